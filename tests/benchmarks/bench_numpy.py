"""NumPy: what may be chosen for a step, in one process and on one core.

OMP_NUM_THREADS=1 python tests/benchmarks/bench_numpy.py [quick] [--out docs/benchmarks]
"""

import os
import tracemalloc
from collections.abc import Callable
from functools import partial
from pkgutil import resolve_name
from typing import Any

import ml_dtypes
import numpy as np

from record import Run, arguments, measure, ratio
from steps import Contender, Grads, Optimizer, bench, gradients

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def fresh(grads: Grads, dtype: str) -> tuple[list[np.ndarray], Grads]:
    """Return parameters, and the gradients in their dtype."""
    return [np.ones(g.shape, DTYPES[dtype]) for g in grads], [g.astype(DTYPES[dtype], copy=False) for g in grads]


def size_of(*lists: Any) -> int:
    """Return the bytes of the arrays in `lists`."""
    return sum(x.nbytes for arrays in lists for x in arrays or [] if x is not None)


def stepper(grads: Grads, dtype: str, **options: Any) -> Optimizer:
    params, grads = fresh(grads, dtype)
    own = resolve_name("acprop_stepper:Stepper")(params, clip_exponent=0.25, **options)
    return Optimizer(lambda: own.step(grads), lambda: size_of(params, *own.state[1:]))


def functional(grads: Grads, dtype: str) -> Optimizer:
    params, grads = fresh(grads, dtype)
    optimizer = resolve_name("acprop_core:ACProp")(clip_exponent=0.25)
    held = [params, optimizer.init(params)]

    def step() -> None:
        updates, held[1] = optimizer.update(grads, held[1], held[0])
        held[0] = optimizer.apply(held[0], updates)

    return Optimizer(step, lambda: size_of(held[0], *held[1][1:]))


def sklearn(grads: Grads, dtype: str) -> Optimizer:
    params, grads = fresh(grads, dtype)
    adam = resolve_name("sklearn.neural_network._stochastic_optimizers:AdamOptimizer")(params)
    return Optimizer(lambda: adam.update_params(params, grads), lambda: size_of(params, adam.ms, adam.vs))


def thinc(grads: Grads, dtype: str) -> Optimizer:
    params, constant = fresh(grads, dtype)
    grads = [g.copy() for g in constant]  # which it sets to zero
    adam = resolve_name("thinc.api:Adam")(0.001, grad_clip=0.0, use_averages=False)
    held = list(params)

    def step() -> None:
        for i, g in enumerate(grads):
            held[i], _ = adam((i, "w"), held[i], g)

    def prepare() -> None:
        for g, value in zip(grads, constant, strict=True):
            g[...] = value

    return Optimizer(step, lambda: size_of(held, adam.mom1.values(), adam.mom2.values()), prepare)


def extra(optimizer: Optimizer) -> int:
    tracemalloc.start()
    optimizer.step()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


CONTENDERS = {
    "Stepper, Numba": Contender("acprop_stepper", partial(stepper, engine="numba")),
    "Stepper, Numba, compensate": Contender(
        "acprop_stepper", partial(stepper, engine="numba", compensate=True), ("bfloat16",)
    ),
    "Stepper, tiles": Contender("acprop_stepper", partial(stepper, engine="tiles")),
    "functional core": Contender("acprop_core", functional),
    "scikit-learn Adam": Contender("sklearn.neural_network", sklearn, ("float32",)),
    "thinc Adam": Contender("thinc.api", thinc, ("float32",)),
}


def in_threads(cores: set[int], size: int) -> dict[str, Any]:
    """Return how much longer one thread takes than two, on `cores`."""
    os.sched_setaffinity(0, cores)
    grads = gradients(1, size)
    makes: dict[str, Callable[..., Optimizer]] = {str(n): partial(stepper, engine="numba", threads=n) for n in (1, 2)}
    seconds = measure({n: Run(make(grads, "float32").step) for n, make in makes.items()}, budget=2.0, label="threads")
    return {"size": size, "cores": len(cores), "ratio": ratio(seconds["1"], seconds["2"])}


def main() -> None:
    """Save the result steps_numpy."""
    given = arguments(__doc__ or "")
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    threads = in_threads(cores, 10**6 if given.quick else 16 * 10**6) if len(cores) > 1 else None
    libraries = ("numpy", "numba", "scikit-learn", "thinc", "ml_dtypes")
    bench("numpy", CONTENDERS, given, unit="functional core", extra=extra, libraries=libraries, threads=threads)


if __name__ == "__main__":
    main()
