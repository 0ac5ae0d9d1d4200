"""Time of one step, as ratios in one process, interleaved: medians.

    OMP_NUM_THREADS=1 taskset -c 0 python tests/benchmarks/speed.py [quick]

What a NumPy user may choose from, against the time that np.add(a, b, out=a) takes to move the bytes of one step (28 a
parameter in float32: read parameter, gradient and two moments, write parameter and moments). stepper.py, torch_speed.py
and optax_speed.py have the figures of the adapters.
"""

import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
from tqdm import tqdm

Step = Callable[[], object]


def measure(steps: dict[str, Step], rounds: int) -> dict[str, float]:
    """Return the median seconds of each, run in turns."""
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in tqdm(range(rounds), desc=" | ".join(steps), leave=False):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(s) for name, s in seconds.items()}


def numpy_steps(arrays: int, size: int) -> dict[str, Step]:
    from sklearn.neural_network._stochastic_optimizers import AdamOptimizer

    from acprop_core import ACProp
    from acprop_stepper import Stepper

    rng = np.random.default_rng(0)
    grads = [rng.normal(size=size).astype(np.float32) for _ in range(arrays)]

    def fresh() -> list[np.ndarray]:
        return [np.ones(size, np.float32) for _ in range(arrays)]

    a, b = np.ones(arrays * size * 28 // 12, np.float32), np.ones(arrays * size * 28 // 12, np.float32)
    numba = Stepper(fresh(), clip_exponent=0.25, engine="numba")
    tiles = Stepper(fresh(), clip_exponent=0.25, engine="tiles")
    sklearn_params = fresh()
    sklearn = AdamOptimizer(sklearn_params)
    optimizer, params = ACProp(clip_exponent=0.25), fresh()
    held = [optimizer.init(params)]

    def functional() -> None:
        updates, held[0] = optimizer.update(grads, held[0])
        optimizer.apply(params, updates)

    return {
        "limit": lambda: np.add(a, b, out=a),
        "Stepper, Numba": lambda: numba.step(grads),
        "Stepper, tiles": lambda: tiles.step(grads),
        "functional core": functional,
        "scikit-learn Adam": lambda: sklearn.update_params(sklearn_params, grads),
    }


def main() -> None:
    """Print one line a size and contender; the first of each is the unit."""
    quick = "quick" in sys.argv[1:]
    shapes = [(1, 1_000_000)] if quick else [(1, 1_000_000), (1, 16_000_000), (1_000, 1_000)]
    for arrays, size in shapes:
        medians = measure(numpy_steps(arrays, size), rounds=5 if quick else 15)
        unit, seconds = next(iter(medians.items()))
        print(f"{arrays:,} x {size:,} float32; {unit} = {1e3 * seconds:.2f} ms")
        for name, s in list(medians.items())[1:]:
            print(f"    {name:24}{s / seconds:8.2f}")


if __name__ == "__main__":
    main()
