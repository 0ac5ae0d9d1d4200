"""The stepper's figures, beside what is asked of them: ratios in one process, medians of turns.

    OMP_NUM_THREADS=1 taskset -c 0 python tests/benchmarks/stepper.py [quick]

The limit is the time that np.add(a, b, out=a) takes to move the bytes of one step, 28 a parameter in float32. On a CUDA
device it is that of a copy. What threads bring shows only with more than one core.
"""

import gc
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable

import numpy as np
from speed import Step, measure, numpy_steps
from tqdm import tqdm

from acprop_stepper import Stepper

ENGINES = ("Numba", "tiles")


def stepper_step(arrays: int, size: int, **options: object) -> Step:
    rng = np.random.default_rng(0)
    grads = [rng.normal(size=size).astype(np.float32) for _ in range(arrays)]
    stepper = Stepper([np.ones(size, np.float32) for _ in range(arrays)], clip_exponent=0.25, **options)
    return lambda: stepper.step(grads)


def ratio(a: Step, b: Step, rounds: int, between: Step) -> float:
    """Return the median of the ratios of pairs; before each step, `between` empties the cache."""
    ratios = []
    for _ in tqdm(range(rounds), leave=False):
        seconds = []
        for step in (a, b):
            between()
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)


def peak_bytes(make: Callable[[], Step]) -> int:
    """Return how much memory a first step takes beside its arrays."""
    make()()  # what is imported and compiled once
    step = make()
    gc.collect()
    tracemalloc.start()
    step()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def on_cuda(size: int, rounds: int) -> None:
    try:
        import cupy

        cupy.zeros(1)
    except Exception as error:
        print(f"CuPy against a copy on the device: not measured ({error})")
        return
    params, grads = cupy.ones(size, cupy.float32), cupy.random.default_rng(0).normal(size=size, dtype=cupy.float32)
    stepper = Stepper(params, clip_exponent=0.25)
    source = cupy.ones(size * 28 // 8, cupy.float32)
    target = cupy.empty_like(source)

    def finished(step: Step) -> Step:
        return lambda: (step(), cupy.cuda.get_current_stream().synchronize())

    copy, step = finished(lambda: cupy.copyto(target, source)), finished(lambda: stepper.step(grads))
    print(f"{size:,} on CUDA: {ratio(step, copy, rounds, copy):.2f} times a copy of the same bytes (wanted: 1.15)")


def main() -> None:
    """Print one line for each figure."""
    quick = "quick" in sys.argv[1:]
    size, rounds = (2_000_000, 5) if quick else (16_000_000, 15)
    steps = numpy_steps(1, size)
    del steps["functional core"]
    seconds = measure(steps, rounds)
    for engine, limit, faster in (("Numba", 1.15, 10), ("tiles", 4.5, 3)):
        own = seconds[f"Stepper, {engine}"]
        print(
            f"1 x {size:,}, {engine}: {own / seconds['limit']:.2f} times the limit (wanted: {limit}); "
            f"{seconds['scikit-learn Adam'] / own:.1f} times as fast as scikit-learn's Adam (wanted: {faster})"
        )
    for engine in ENGINES:
        many, one = (stepper_step(*shape, engine=engine.lower()) for shape in ((1_000, 1_000), (1, 1_000_000)))
        figure = ratio(many, one, 5 * rounds, steps["limit"])
        print(f"1,000 x 1,000, {engine}: {figure:.2f} times the time for 1 x 1,000,000 (wanted: 1.5)")
    for engine in ENGINES:
        one, two = (stepper_step(1, size, engine=engine.lower(), threads=threads) for threads in (1, 2))
        print(f"1 x {size:,}, {engine}, 2 threads: {1 / ratio(two, one, rounds, lambda: None):.2f} times as fast as 1")
    for engine in ENGINES:
        peak = peak_bytes(lambda engine=engine: stepper_step(1, size, engine=engine.lower()))
        print(f"1 x {size:,}, {engine}: {peak / 2**20:.2f} MiB beside its arrays (wanted: 4)")
    on_cuda(1_000_000 if quick else 100_000_000, rounds)


if __name__ == "__main__":
    main()
