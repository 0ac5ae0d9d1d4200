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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from acprop_core import ACProp

HYPER: dict[str, Any] = {"learning_rate": 1e-3, "clip_exponent": 0.25}
SIZE, CHUNK = 37, 1000

# In machine epsilons of float32, as in agreement.py, but after any number of steps: an average of n = 1/(1 - b2)
# numbers collects the roundings of the last n steps, and more steps do not add to it. Twice what was measured, at most.
DRIFT = {"update": 11.0, "mu": 4.0, "nu": 130.0}
GROWTH = 1.0  # bytes a step, over 100,000 steps and more: no object of Python is as small


class Look(NamedTuple):
    """What a host holds after a step that began from parameters of zero: its update, its moments and its count."""

    update: np.ndarray
    mu: np.ndarray
    nu: np.ndarray
    count: int


Advance = Callable[[np.ndarray], Look]  # steps by gradients, (steps, SIZE), the last one from parameters of zero


def functional(asarray: Any, back: Any = np.array, wrap: Any = lambda f: f, count: Any = None) -> Advance:
    optimizer = ACProp(**HYPER)
    update, apply = wrap(optimizer.update), wrap(optimizer.apply)
    zeros = np.zeros(SIZE, np.float32)
    params = [asarray(zeros)]
    state = [optimizer.init(params[0])]
    if count is not None:
        state[0] = state[0]._replace(count=count)

    def advance(grads: np.ndarray) -> Look:
        for i, g in enumerate(grads):
            if i + 1 == len(grads):
                params[0] = asarray(zeros)
            updates, state[0] = update(asarray(g), state[0], params[0])
            params[0] = apply(params[0], updates)
        return Look(back(params[0]), back(state[0].mu), back(state[0].nu), int(state[0].count))

    return advance


def numpy() -> Advance:
    return functional(np.array)


def strict() -> Advance:
    import array_api_strict as xp

    return functional(xp.asarray, lambda x: np.array(x._array))


def torch() -> Advance:
    import torch

    return functional(torch.tensor, lambda x: x.numpy().copy())


def jax_jit() -> Advance:
    import jax

    return functional(jax.numpy.asarray, wrap=jax.jit, count=jax.numpy.asarray(0))


def jax_scan() -> Advance:
    import jax

    optimizer = ACProp(**HYPER)
    zeros = jax.numpy.zeros(SIZE)
    now = [(zeros, optimizer.init(zeros)._replace(count=jax.numpy.asarray(0)))]

    def step(carry: Any, grad: Any) -> Any:
        params, state = carry
        updates, state = optimizer.update(grad, state, params)
        return (optimizer.apply(params, updates), state), None

    scan = jax.jit(lambda carry, grads: jax.lax.scan(step, carry, grads)[0])

    def advance(grads: np.ndarray) -> Look:
        _, state = scan(now[0], grads[:-1])
        now[0] = params, state = scan((zeros, state), grads[-1:])
        return Look(np.array(params), np.array(state.mu), np.array(state.nu), int(state.count))

    return advance


def optax() -> Advance:
    import jax
    import optax

    import acprop_optax

    transform = acprop_optax.acprop(**HYPER)
    zeros = jax.numpy.zeros(SIZE)
    now = [(zeros, transform.init(zeros))]

    @jax.jit
    def step(grad: Any, params: Any, state: Any) -> Any:
        updates, state = transform.update(grad, state, params)
        return optax.apply_updates(params, updates), state

    def advance(grads: np.ndarray) -> Look:
        for i, g in enumerate(grads):
            params, state = now[0]
            now[0] = step(g, zeros if i + 1 == len(grads) else params, state)
        params, state = now[0]
        return Look(*map(np.array, (params, state[0].mu, state[0].nu)), int(state[0].count))

    return advance


def torch_optimizer(**flags: Any) -> Callable[[], Advance]:
    def make() -> Advance:
        import torch

        import acprop_torch

        x = torch.zeros(SIZE, requires_grad=True)
        optimizer = acprop_torch.ACProp([x], lr=HYPER["learning_rate"], clip_exponent=HYPER["clip_exponent"], **flags)

        def advance(grads: np.ndarray) -> Look:
            for i, g in enumerate(grads):
                x.grad = torch.from_numpy(g)
                if i + 1 == len(grads):
                    with torch.no_grad():
                        x.zero_()
                optimizer.step()
            state = optimizer.state[x]
            return Look(
                *(y.detach().numpy().copy() for y in (x, state["exp_avg"], state["exp_avg_var"])), int(state["step"])
            )

        return advance

    return make


def inductor() -> Advance:
    from acprop_torch import _fused

    has_numba = _fused._has_numba
    advance = torch_optimizer(fused=True)()

    def without_numba(grads: np.ndarray) -> Look:
        _fused._has_numba = lambda: False
        try:
            return advance(grads)
        finally:
            _fused._has_numba = has_numba

    return without_numba


def stepper(engine: str, dtype: Any = np.float32, **options: Any) -> Callable[[], Advance]:
    def make() -> Advance:
        import acprop_stepper

        x = np.zeros(SIZE, dtype)
        host = acprop_stepper.Stepper(x, **HYPER, engine=engine, **options)

        def advance(grads: np.ndarray) -> Look:
            for i, g in enumerate(grads):
                if i + 1 == len(grads):
                    x[...] = 0.0
                host.step(g.astype(dtype))
            state = host.state
            return Look(x.copy(), np.array(state.mu), np.array(state.nu), state.count)

        return advance

    return make


# Each with the part of the steps that it does: array-api-strict checks for longer than it computes. Dask is not here:
# it schedules a step for tens of milliseconds, and keeps memory of every operation, also where nothing of ours runs.
HOSTS: dict[str, tuple[Callable[[], Advance], float]] = {
    "NumPy": (numpy, 1.0),
    "PyTorch": (torch, 1.0),
    "JAX, jit": (jax_jit, 1.0),
    "JAX, scan": (jax_scan, 1.0),
    "acprop_optax": (optax, 1.0),
    "acprop_torch, for-loop": (torch_optimizer(foreach=False), 1.0),
    "acprop_torch, foreach": (torch_optimizer(foreach=True), 1.0),
    "acprop_torch, fused": (torch_optimizer(fused=True), 1.0),
    "acprop_torch, compiled": (inductor, 1.0),
    "acprop_stepper, tiles": (stepper("tiles"), 1.0),
    "acprop_stepper, Numba": (stepper("numba"), 1.0),
    "acprop_stepper, guarded": (stepper("numba", nonfinite="raise", clip_norm=1e30), 1.0),
    "array-api-strict": (strict, 0.1),
}


def gradients() -> Iterator[np.ndarray]:
    """Yield float32 noise for CHUNK steps at a time, without end, always the same."""
    rng = np.random.default_rng(0)
    for chunk in range(sys.maxsize):
        scale = 10.0 ** (1.5 * np.sin(chunk / 3.0))
        yield (scale * rng.normal(size=(CHUNK, SIZE))).astype(np.float32)


_looks: list[Look] = []


def reference(chunks: int) -> list[Look]:
    """Return what the functional core holds in float64 after each chunk: the stepper has its bits, and is faster."""
    advance = _exact()
    for grads in itertools.islice(gradients(), len(_looks), chunks):
        _looks.append(advance(grads))
    return _looks[:chunks]


@functools.cache
def _exact() -> Advance:
    return stepper("tiles", np.float64)()


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


def soak(make: Callable[[], Advance], steps: int) -> Report:
    """Step a host so many times."""
    advance = make()
    chunks = max(5, steps // CHUNK)
    largest = {"update": 0.0, "mu": 0.0}
    drift = dict.fromkeys(DRIFT, 0.0)
    sizes = np.zeros((chunks, 2))
    seconds = 0.0
    looks = reference(chunks)  # before memory is looked at
    for chunk, (grads, exact) in enumerate(zip(gradients(), looks, strict=False)):
        start = time.perf_counter()
        got = advance(grads)
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
        make, part = HOSTS[name]
        report = soak(make, round(arguments.steps * part))
        drift = " | ".join(f"{x:.1f}" for x in report.drift.values())
        print(f"| {name} | {report.steps:,} | {report.slope:+.3f} | {drift} |", flush=True)
        print(f"{name}: {report.seconds:.0f} s, {report.blocks:+.5f} blocks a step", file=sys.stderr, flush=True)
        failed |= any(x > DRIFT[q] for q, x in report.drift.items()) or (report.slope > 1.0 and report.steps >= 10**5)
    sys.exit(failed)


if __name__ == "__main__":
    main()
