"""Parameters of 16 bits, with and without compensation, beside those of 32 bits and beside others' optimizers.

    OMP_NUM_THREADS=1 taskset -c 0 python tests/benchmarks/sixteen_bit.py [quick]

One process; in each round every contender makes one step, in random order. A ratio is of two steps of one round, to our
float32 parameters in the same framework; printed are the median time, and of the ratios median and quartiles. Bytes are
those of parameters and state, a parameter; gradients and temporaries come on top. The last columns are what a parameter
of 1.0 becomes in 1,000 steps that should each take 1e-4 from it, and what it and its carry add up to: 0.9 is right.
"""

import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import optimi
import torch
from tqdm import tqdm

import acprop_optax
import acprop_torch
from acprop_core import ACProp
from acprop_stepper import Stepper

RATE = 1e-4
OURS = {"clip_exponent": 0.0}  # no step is longer than the rate; a constant gradient's is never shorter
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
Grads = list[np.ndarray]


class Run(NamedTuple):
    """An optimizer with its parameters."""

    step: Callable[[], object]
    look: Callable[[], tuple[list[Any], list[Any], list[Any]]]  # parameters, all of the state, the carries in it
    prepare: Callable[[], object] = lambda: None  # before each step, not timed


def functional(grads: Grads, dtype: str, **options: Any) -> Run:
    optimizer = ACProp(RATE, **OURS, **options)
    params = [np.ones(g.shape, DTYPES[dtype]) for g in grads]
    grads = [g.astype(DTYPES[dtype]) for g in grads]
    held = [params, optimizer.init(params)]

    def step() -> None:
        updates, held[1] = optimizer.update(grads, held[1], held[0])
        held[0] = optimizer.apply(held[0], updates)

    return Run(step, lambda: (held[0], jax.tree.leaves(held[1][1:]), held[1].carry or []))


def stepper(grads: Grads, dtype: str, **options: Any) -> Run:
    params = [np.ones(g.shape, DTYPES[dtype]) for g in grads]
    grads = [g.astype(DTYPES[dtype]) for g in grads]
    own = Stepper(params, RATE, **OURS, **options)
    return Run(lambda: own.step(grads), lambda: (params, jax.tree.leaves(own.state[1:]), own.state.carry or []))


def in_jax(grads: Grads, dtype: str, transform: optax.GradientTransformation) -> Run:
    def compute(params: Any, state: Any, grads: Any) -> Any:
        updates, state = transform.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = [jnp.ones(g.shape, dtype) for g in grads]
    grads = [jnp.asarray(g, dtype) for g in grads]
    state = transform.init(params)
    program = jax.jit(compute, donate_argnums=(0, 1)).lower(params, state, grads).compile()
    held = [params, state]

    def step() -> None:
        held[:] = jax.block_until_ready(program(*held, grads))

    def look() -> tuple[list[Any], list[Any], list[Any]]:
        carries = [part.carry for part in held[1] if isinstance(part, acprop_optax.CarryState)]
        return held[0], jax.tree.leaves(held[1]), jax.tree.leaves(carries)

    return Run(step, look)


def in_torch(grads: Grads, dtype: str, make: Callable[..., torch.optim.Optimizer], **options: Any) -> Run:
    params = [torch.ones(g.shape, dtype=getattr(torch, dtype), requires_grad=True) for g in grads]
    fresh = [torch.as_tensor(g).to(params[0].dtype) for g in grads]
    optimizer = make(params, lr=RATE, **options)

    def prepare() -> None:
        for p, g in zip(params, fresh, strict=True):
            p.grad = g.clone()  # optimi writes into gradients

    def look() -> tuple[list[Any], list[Any], list[Any]]:
        states = [x for state in optimizer.state.values() for x in state.items() if isinstance(x[1], torch.Tensor)]
        return params, [x for _, x in states], [x for key, x in states if key in ("carry", "kahan_comp")]

    return Run(optimizer.step, look, prepare)


def contenders() -> Iterator[tuple[str, str, Callable[[Grads], Run]]]:
    """Yield framework, name and what makes the run; the first of each framework is the unit of its ratios."""
    kinds: dict[str, dict[str, Any]] = {
        "float32": {"dtype": "float32"},
        "bfloat16": {"dtype": "bfloat16"},
        "bfloat16, compensate": {"dtype": "bfloat16", "compensate": True},
    }
    moments_too = "bfloat16, compensate, bfloat16 moments"  # which NumPy's bfloat16 is not made for
    for name, options in kinds.items():
        yield "NumPy, functional", name, partial(functional, **options)
    for name, options in kinds.items():
        yield "NumPy, stepper", name, partial(stepper, **options)
    for name, options in (kinds | {moments_too: kinds["bfloat16, compensate"] | {"moment_dtype": "bfloat16"}}).items():
        own = {key: value for key, value in options.items() if key != "dtype"}
        yield "optax", name, partial(in_jax, dtype=options["dtype"], transform=acprop_optax.acprop(RATE, **OURS, **own))
    for dtype in DTYPES:
        yield "optax", f"adamw, {dtype}", partial(in_jax, dtype=dtype, transform=optax.adamw(RATE, weight_decay=0.0))
    for way, flags in {"for-loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}.items():
        more = {moments_too: kinds["bfloat16, compensate"] | {"moment_dtype": torch.bfloat16}}
        for name, options in (kinds | more).items():
            yield f"torch, {way}", name, partial(in_torch, make=acprop_torch.ACProp, **OURS, **flags, **options)
        for dtype in DTYPES:
            theirs = partial(in_torch, dtype=dtype, make=torch.optim.AdamW, weight_decay=0.0, **flags)
            yield f"torch, {way}", f"AdamW, {dtype}", theirs
        if way != "fused":  # on a CPU optimi has the other two
            kahan = partial(in_torch, dtype="bfloat16", make=optimi.AdamW, weight_decay=0.0, kahan_sum=True, **flags)
            yield f"torch, {way}", "optimi AdamW, bfloat16, Kahan", kahan


def seconds_of(run: Run) -> float:
    run.prepare()
    time.sleep(0.005)  # what frees memory in the background is done
    start = time.perf_counter()
    run.step()
    return time.perf_counter() - start


def ends_at(make: Callable[[Grads], Run]) -> tuple[float, float | None]:
    """Return what a parameter of 1.0 becomes, and what it and its carry are together."""
    run = make([np.ones(1, np.float32)])
    for _ in range(1_000):
        run.prepare()
        run.step()
    (param,), _, carry = run.look()
    return float(param[0]), float(param[0]) + float(carry[0][0]) if carry else None


def main() -> None:
    """Print one table."""
    quick = sys.argv[1:] == ["quick"]
    if sys.argv[1:] and not quick:
        sys.exit(f"{sys.argv[1:]}: not understood; the one argument that there is is `quick`")
    rounds = 3 if quick else 25
    shapes = [(1, 100_000), (10, 1_000)] if quick else [(1, 4_000_000), (100, 10_000)]
    rng = np.random.default_rng(0)
    named = {(framework, name): make for framework, name, make in contenders()}
    units = {framework: (framework, name) for framework, name in reversed(named)}
    taken: dict[tuple[int, int], dict[Any, list[float]]] = {}
    per_parameter: dict[Any, float] = {}
    for shape in shapes:
        grads = [rng.normal(size=shape[1]).astype(np.float32) for _ in range(shape[0])]
        runs = {key: make(grads) for key, make in named.items()}
        taken[shape] = {key: [] for key in runs}
        for number in tqdm(range(rounds + 1), f"{shape[0]:,} x {shape[1]:,}", leave=False):
            for key in random.sample(list(runs), len(runs)):
                seconds = seconds_of(runs[key])
                if number:  # the first round warms up
                    taken[shape][key].append(seconds)
        for key, run in runs.items():
            params, state, _ = run.look()
            per_parameter.setdefault(key, sum(x.nbytes for x in params + state) / (shape[0] * shape[1]))
        del runs
    heads = "".join(f" | {f'{arrays:,} x {size:,}':>32}" for arrays, size in shapes)
    print(f"{'':58} | bytes{heads} | from 1.0 | with carry")
    for key, make in tqdm(named.items(), leave=False):
        cells = ""
        for times in taken.values():
            ratios = [a / b for a, b in zip(times[key], times[units[key[0]]], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            cells += f" | {1e3 * statistics.median(times[key]):8.2f} ms {middle:6.2f} ({low:5.2f}, {high:5.2f})"
        param, whole = ends_at(make)
        line = f"{key[0]:18}{key[1]:40} | {per_parameter[key]:5.1f}{cells} | {param:8.4f}"
        tqdm.write(line + (" |" if whole is None else f" | {whole:10.6f}"))


if __name__ == "__main__":
    main()
