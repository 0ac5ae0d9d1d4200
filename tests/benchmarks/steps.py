"""Steps of optimizers beside each other: the sizes, the limit, and the rows of one framework.

bench_numpy.py, bench_torch.py and bench_jax.py each have a table of contenders and hand it to `bench`. The limit is the
time that np.add(a, b, out=a) takes to move the bytes of an ACProp step: parameter, gradient and two float32 moments
are read, parameter and moments written; 28 bytes a float32 parameter, 22 a bfloat16 one.
"""

import argparse
import gc
import json
import random
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from record import Run, measure, pin, quartiles, ratio, save, versions

Grads = list[np.ndarray]  # float32
Shape = tuple[int, int]  # so many arrays of so many elements

SIZES: list[Shape] = [(1, 10**6), (1, 16 * 10**6), (1, 64 * 10**6), (100, 10**4), (1_000, 1_000)]
GROWTH: list[Shape] = [(1, 1_000), (1, 10**4), (1, 10**5), (1, 4 * 10**6), (10, 1_000), (100, 1_000), (10_000, 1_000)]
QUICK: list[Shape] = [(1, 1_000), (1, 10**6), (100, 1_000)]
MEMORY: list[Shape] = [(1, 16 * 10**6), (1_000, 1_000)]
LIMIT = "limit"
MOVED = {"float32": 28, "bfloat16": 22}


class Optimizer(NamedTuple):
    """A step, what is not timed before it, and the numbers of bytes that parameters and state occupy."""

    step: Callable[[], object]
    nbytes: Callable[[], int]
    prepare: Callable[[], object] = lambda: None


class Contender(NamedTuple):
    """What makes an optimizer, and the largest number of arrays for which it is ready in reasonable time."""

    package: str
    make: Callable[[Grads, str], Optimizer]
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    most_arrays: int = 10_000


def limit(nbytes: int) -> Run:
    """Return the run that moves `nbytes`."""
    a, b = np.ones(nbytes // 12, np.float32), np.ones(nbytes // 12, np.float32)
    return Run(lambda: np.add(a, b, out=a))


def gradients(arrays: int, size: int) -> Grads:
    """Return float32 noise."""
    rng = np.random.default_rng(0)
    return [rng.standard_normal(size, np.float32) for _ in range(arrays)]


def rows_of(
    contenders: Mapping[str, Contender],
    shape: Shape,
    dtype: str,
    unit: str,
    extra: Callable[[Optimizer], int] | None,
    budget: float,
) -> list[dict[str, Any]]:
    """Measure one size in one dtype; `extra` says how many bytes a step takes beside its arrays."""
    arrays, size = shape
    grads = gradients(*shape)
    chosen = {name: c for name, c in contenders.items() if dtype in c.dtypes and arrays <= c.most_arrays}
    optimizers = {name: c.make(grads, dtype) for name, c in tqdm(chosen.items(), "ready", leave=False)}
    runs = {LIMIT: limit(arrays * size * MOVED[dtype])} | {n: Run(o.step, o.prepare) for n, o in optimizers.items()}
    seconds = measure(runs, budget, f"{arrays:,} x {size:,} {dtype}")
    rows = []
    for name, optimizer in optimizers.items():
        row: dict[str, Any] = {"contender": name, "dtype": dtype, "arrays": arrays, "size": size}
        row["seconds"] = quartiles(seconds[name])
        row["to unit"] = ratio(seconds[name], seconds[unit])
        row["to limit"] = ratio(seconds[name], seconds[LIMIT])
        row["rounds"] = len(seconds[name])
        row["bytes"] = optimizer.nbytes() / (arrays * size)
        if extra:
            optimizer.prepare()
            gc.collect()
            row["extra bytes"] = extra(optimizer) / (arrays * size)
        rows.append(row)
    return rows


def starts(script: str, framework: str, contenders: Mapping[str, Contender], rounds: int) -> list[dict[str, Any]]:
    """Return what importing and the first step take in a fresh process, in turns."""
    asked = [name for name, c in contenders.items() if "float32" in c.dtypes]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in asked}
    turns = [name for _ in range(rounds) for name in random.sample(asked, len(asked))]
    for name in tqdm(turns, "fresh processes", leave=False):
        command = [sys.executable, Path(__file__).with_name("start.py"), script, name, framework]
        done = subprocess.run([*command, contenders[name].package], check=True, capture_output=True, text=True)
        found[name].append(json.loads(done.stdout.splitlines()[-1]))
    keys = ("framework", "package", "first step")
    return [{"contender": name} | {key: median(t[key] for t in times) for key in keys} for name, times in found.items()]


def bench(
    framework: str,
    contenders: Mapping[str, Contender],
    given: argparse.Namespace,
    *,
    unit: str,
    extra: Callable[[Optimizer], int],
    libraries: tuple[str, ...],
    **about: Any,
) -> None:
    """Measure all contenders of a framework and save the result `steps_<framework>`."""
    pin()
    plan = [(s, "float32") for s in (QUICK if given.quick else GROWTH + SIZES)]
    plan += [(s, "bfloat16") for s in (QUICK[1:] if given.quick else SIZES)]
    memory, budget = (QUICK, 1.0) if given.quick else (MEMORY, 3.0)
    rows = []
    for shape, dtype in tqdm(plan, framework):
        rows += rows_of(contenders, shape, dtype, unit, extra if shape in memory else None, budget)
        gc.collect()
    # a fresh process takes seconds: in a short run each package has one
    started = {c.package: {name: c} for name, c in reversed(contenders.items())} if given.quick else {"": contenders}
    chosen = {name: c for some in started.values() for name, c in some.items()}
    first = starts(f"bench_{framework}", framework, chosen, rounds=1 if given.quick else 2)
    save(f"steps_{framework}", rows, given, versions(*libraries), unit=unit, starts=first, **about)
