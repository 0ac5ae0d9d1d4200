"""A long run of small arrays on each CPU backend: does memory grow, do backends drift from each other?

``python tests/soak.py`` does a million steps on each and prints the table of docs/reliability.md; ``--steps`` does
fewer, and names of hosts choose some. `test_soak.py` does a few thousand.

Every host steps float32 parameters by the same gradients, noise whose scale changes by a factor of 1,000 on the way.
Moments and updates are compared with those of the functional core in float64.
"""

import argparse
import functools
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cases import Case
from hosts import BACKENDS, Backend, Host, Stepper

HYPER: dict[str, Any] = {"learning_rate": 1e-3, "clip_exponent": 0.25}
SIZE, CHUNK = 37, 1000

# In machine epsilons of float32, as in agreement.py, but after any number of steps: an average of n = 1/(1 - b2)
# numbers collects the roundings of the last n steps, and more steps do not add to it. Twice what was measured, at most.
DRIFT = {"update": 11.0, "mu": 4.0, "nu": 130.0}
GROWTH = 1.0  # bytes a step, over 100,000 steps and more: no object of Python is as small

GUARDED = Backend(
    name="stepper_guarded",
    begin=functools.partial(Stepper, engine="numba", nonfinite="raise", clip_norm=1e30),
    needs=("numba",),
)
# Dask is left out: it schedules a step for tens of milliseconds, and keeps memory for every operation, even without
# any code of ours.
HOSTS: dict[str, Backend] = {
    "NumPy": BACKENDS["numpy"],
    "PyTorch": BACKENDS["torch"],
    "JAX, jit": BACKENDS["jax_jit"],
    "JAX, scan": BACKENDS["jax_scan"],
    "acprop_optax": BACKENDS["optax"],
    "acprop_torch, for-loop": BACKENDS["torch_optimizer"],
    "acprop_torch, foreach": BACKENDS["torch_foreach"],
    "acprop_torch, fused": BACKENDS["torch_fused"],
    "acprop_torch, compiled": BACKENDS["torch_fused_by_inductor"],
    "acprop_stepper, tiles": BACKENDS["stepper_tiles"],
    "acprop_stepper, Numba": BACKENDS["stepper_numba"],
    "acprop_stepper, guarded": GUARDED,
    "array-api-strict": BACKENDS["strict_2025"],
}
PARTS = {"array-api-strict": 0.1}  # of the steps: it checks for longer than it computes


class Look(NamedTuple):
    """What a host holds after a step that began from parameters of zero: its update, its moments and its count."""

    update: np.ndarray
    mu: np.ndarray
    nu: np.ndarray
    count: int


def case(dtype: str) -> Case:
    return Case("soak", HYPER, {"w": (dtype, (SIZE,))}, steps=1)


def advance(host: Host, grads: np.ndarray) -> Look:
    """Step by gradients, (steps, SIZE), the last one from parameters of zero."""
    dtype = host.case.leaves["w"][0]
    grads = grads.astype(dtype)
    host.advance({"w": grads[:-1]})
    host.put({"w": np.zeros(SIZE, dtype)})
    host.advance({"w": grads[-1:]})
    record = host.read()["w"]
    return Look(record.param, record.mu, record.nu, int(host.count))


def gradients() -> Iterator[np.ndarray]:
    """Yield float32 noise for CHUNK steps at a time, without end, always the same."""
    rng = np.random.default_rng(0)
    for chunk in range(sys.maxsize):
        scale = 10.0 ** (1.5 * np.sin(chunk / 3.0))
        yield (scale * rng.normal(size=(CHUNK, SIZE))).astype(np.float32)


_looks: list[Look] = []


def reference(chunks: int) -> list[Look]:
    """Return what the functional core holds in float64 after each chunk: the stepper has its bits, and is faster."""
    for grads in itertools.islice(gradients(), len(_looks), chunks):
        _looks.append(advance(_exact(), grads))
    return _looks[:chunks]


@functools.cache
def _exact() -> Host:
    return BACKENDS["stepper_tiles"].begin(case("float64"))


def memory() -> int:
    """Return the bytes that the process has in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


class Report(NamedTuple):
    """What became of one host."""

    steps: int
    seconds: float
    slope: float  # bytes of growth per step, after the first fifth
    blocks: float  # Python's memory blocks of growth per step, after the first fifth
    drift: dict[str, float]  # in epsilons of float32, the largest at the end of any chunk


def soak(backend: Backend, steps: int) -> Report:
    """Step a host so many times."""
    chunks = max(5, steps // CHUNK)
    largest = {"update": 0.0, "mu": 0.0}
    drift = dict.fromkeys(DRIFT, 0.0)
    sizes = np.zeros((chunks, 2))
    seconds = 0.0
    looks = reference(chunks)  # before memory is looked at
    with backend.host(case("float32")) as host:
        for chunk, (grads, exact) in enumerate(zip(gradients(), looks, strict=False)):
            start = time.perf_counter()
            got = advance(host, grads)
            seconds += time.perf_counter() - start
            assert got.count == exact.count == (chunk + 1) * CHUNK
            for name, error in drift.items():
                x, y = getattr(got, name).astype(np.float64), getattr(exact, name)
                if name in largest:
                    largest[name] = max(largest[name], float(np.abs(y).max()))
                scale = largest.get(name, y)
                drift[name] = max(error, float(np.max(np.abs(x - y) / scale)) * 2.0**23)
            sizes[chunk] = memory(), sys.getallocatedblocks()
    first = chunks // 5
    slope, blocks = np.polyfit(np.arange(first, chunks) * CHUNK, sizes[first:], 1)[0]
    return Report(chunks * CHUNK, seconds, float(slope), float(blocks), drift)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("hosts", nargs="*", help=f"of {', '.join(HOSTS)}; all by default")
    parser.add_argument("--steps", type=int, default=10**6)
    arguments = parser.parse_args()
    print("| host | steps | memory, bytes a step | update | mu | nu |\n|---|---|---|---|---|---|")
    failed = False
    for name in arguments.hosts or HOSTS:
        report = soak(HOSTS[name], round(arguments.steps * PARTS.get(name, 1.0)))
        drift = " | ".join(f"{x:.1f}" for x in report.drift.values())
        print(f"| {name} | {report.steps:,} | {report.slope:+z.3f} | {drift} |", flush=True)
        print(f"{name}: {report.seconds:.0f} s, {report.blocks:+.5f} blocks a step", file=sys.stderr, flush=True)
        failed |= any(x > DRIFT[q] for q, x in report.drift.items()) or (
            report.slope > GROWTH and report.steps >= 10**5
        )
    sys.exit(failed)


if __name__ == "__main__":
    main()
