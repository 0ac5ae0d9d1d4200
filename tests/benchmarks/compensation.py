"""How far compensated 16-bit parameters drift from exact sums of their updates, and what the dither is good for.

The updates are prescribed, so that only the summation is seen: constant ones and noise, 10,000 of each, on a thousand
parameters between 0.5 and 2. Printed is the largest error on the way of the median and of the worst parameter, in units
in the last place of a number of 16 significant bits, beside a float32 parameter to which the same updates are added.

    python tests/benchmarks/compensation.py
"""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from acprop_core import rule
from hosts import compensated

STEPS, SIZE = 10_000, 1000
HYPER = rule.Hyperparameters(compensate=True)


def updates(kind: str, size: float) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        yield np.asarray(size * (rng.standard_normal(SIZE) if kind == "noise" else np.ones(SIZE)), np.float32)


def start() -> np.ndarray:
    return np.linspace(0.5, 2.0, SIZE).astype(ml_dtypes.bfloat16)


def units(sums: np.ndarray, exact: np.ndarray) -> np.ndarray:
    return np.abs(sums - exact) / 2.0 ** (np.floor(np.log2(np.abs(exact))) - 15)


def with_carry(dtype: object, stream: Iterable[np.ndarray], dithered: bool) -> np.ndarray:
    param = start().astype(dtype)
    carry, exact, worst = np.zeros_like(param), param.astype(np.float64), np.zeros(SIZE)
    for count, update in enumerate(stream):
        numbers = rule.numbers_of(HYPER, count, np)
        added, carry = compensated(update, param, carry, numbers if dithered else numbers._replace(dither=0.0))
        param = param + added
        exact = exact + update
        worst = np.maximum(worst, units(param.astype(np.float64) + carry.astype(np.float64), exact))
    return worst


def in_float32(stream: Iterable[np.ndarray]) -> np.ndarray:
    param = start().astype(np.float32)
    exact, worst = param.astype(np.float64), np.zeros(SIZE)
    for update in stream:
        param = param + update
        exact = exact + update
        worst = np.maximum(worst, units(param, exact))
    return worst


def main() -> None:
    titles = ("updates", "bfloat16", "without dither", "float16", "float32 alone")
    print(*(f"{title:>16}" for title in titles), "  (median/worst)")
    for kind, size in (("constant", 1e-4), ("constant", 1e-5), ("constant", 1e-6), ("noise", 1e-3), ("noise", 1e-4)):
        runs = (
            with_carry(ml_dtypes.bfloat16, updates(kind, size), dithered=True),
            with_carry(ml_dtypes.bfloat16, updates(kind, size), dithered=False),
            with_carry(np.float16, updates(kind, size), dithered=True),
            in_float32(updates(kind, size)),
        )
        cells = (f"{np.median(worst):.3g}/{worst.max():.3g}" for worst in runs)
        print(f"{f'{kind} {size:.0e}':>16}", *(f"{cell:>16}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
