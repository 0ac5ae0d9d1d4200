"""Measure what the published bounds promise: the largest error of every backend over all cases, beside the bound.

    python tests/benchmarks/bounds.py [--random 4000] [--corner adam]

With `--random N`, search N random cases on NumPy instead for those furthest from the oracle: the seeds to pin in
cases.WORST_SEEDS, or in WORST_CORNERS for a corner of the rule.
"""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from agreement import bounds_of, errors
from cases import CASES, CORNERS, random_case
from hosts import BACKENDS


def main() -> None:
    """Print one line for each (dtype, quantity): largest error in epsilons, bound, and which case it was."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--random", type=int, default=0, metavar="N", help="search N random cases on NumPy")
    parser.add_argument("--corner", choices=CORNERS, help="which corner; ACProp by default")
    options = parser.parse_args()
    if options.random:
        runs = [(BACKENDS["numpy"], random_case(seed, options.corner)) for seed in range(options.random)]
    else:
        runs = [(b, c) for b in BACKENDS.values() if not b.cannot_run() for c in CASES if not b.cannot_take(c)]
    worst: dict[tuple[str, str, str], tuple[float, float, str]] = {}
    for backend, case in tqdm(runs, unit="run"):
        for (quantity, dtype), error in errors(case, backend.run(case), backend.complex_as_real).items():
            kind = "cases" if not case.random else case.hyper.get("centering", "current")
            found = error, bounds_of(case)[dtype][quantity], f"{backend} {case}"
            worst[kind, dtype, quantity] = max(worst.get((kind, dtype, quantity), found), found)
    for (kind, dtype, quantity), (error, bound, name) in sorted(worst.items()):
        print(
            f"{kind:8} {dtype:9} {quantity:7} {error:7.3f} epsilons, bound {bound:5.1f} = {bound / error:.2f} x  {name}"
        )


if __name__ == "__main__":
    main()
