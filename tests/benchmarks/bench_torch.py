"""PyTorch on a CPU: ways to step, in one process and on one core.

OMP_NUM_THREADS=1 python tests/benchmarks/bench_torch.py [quick] [--out docs/benchmarks]
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[1]))

import hosts
from record import arguments
from steps import Contender, Grads, Optimizer, bench

CLIPPED = {"clip_exponent": 0.25}


def optimizer(
    grads: Grads, dtype: str, name: str, wrap: Callable[[Any], Callable[[], object]] | None = None, **options: Any
) -> Optimizer:
    """Return the optimizer called `name`; `wrap` makes a step of it, which is its own by default."""
    kind = getattr(torch, dtype)
    params = [torch.ones(g.shape, dtype=kind, requires_grad=True) for g in grads]
    constant = [torch.from_numpy(g).to(kind) for g in grads]
    own = resolve_name(name)(params, **options)
    writes = name.startswith("optimi:")  # into gradients
    for p, g in zip(params, constant, strict=True):
        p.grad = g.clone() if writes else g

    def prepare() -> None:
        for p, g in zip(params, constant, strict=True):
            p.grad.copy_(g)

    def nbytes() -> int:
        states = [x for state in own.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
        return sum(x.nbytes for x in params + states)

    return Optimizer(wrap(own) if wrap else own.step, nbytes, *([prepare] if writes else []))


def without_numba(own: Any) -> Callable[[], object]:
    """Return a step that is compiled by torch, as where Numba is not installed."""

    def step() -> None:
        with hosts.without_numba():
            own.step()

    return step


def compiled(own: Any) -> Callable[[], object]:
    torch._dynamo.config.recompile_limit = 64  # each optimizer and number of tensors is a graph of its own
    return torch.compile(own.step)


def extra(optimizer: Optimizer) -> int:
    """Return the bytes that a step holds at most beyond those that were there before, as torch's allocator saw it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        optimizer.step()
    held = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def contender(name: str, **options: Any) -> Contender:
    limits = {key: options.pop(key) for key in ("dtypes", "most_arrays") if key in options}
    return Contender(name.partition(":")[0], partial(optimizer, name=name, **options), **limits)


acprop = partial(contender, "acprop_torch:ACProp", **CLIPPED)
CONTENDERS = {
    "ACProp, for-loop": acprop(foreach=False),
    "ACProp, foreach": acprop(foreach=True),
    "ACProp, fused": acprop(fused=True),
    "ACProp, fused, compensate": acprop(fused=True, compensate=True, dtypes=("bfloat16",)),
    "ACProp, fused without Numba": acprop(fused=True, wrap=without_numba, dtypes=("float32",)),
    "ACProp, compiled step": acprop(wrap=compiled, most_arrays=10),
    "eager ACProp": contender("eager:EagerACProp"),
    "AdamW, foreach": contender("torch.optim:AdamW", foreach=True),
    "AdamW, fused": contender("torch.optim:AdamW", fused=True),
    "optimi AdamW": contender("optimi:AdamW", lr=1e-3),
    "optimi AdamW, Kahan": contender("optimi:AdamW", lr=1e-3, kahan_sum=True, dtypes=("bfloat16",)),
    "pytorch_optimizer AdaBelief": contender("pytorch_optimizer:AdaBelief"),
}


def main() -> None:
    """Save the result steps_torch."""
    given = arguments(__doc__ or "")
    torch.set_num_threads(1)
    libraries = ("torch", "numba", "torch-optimi", "pytorch_optimizer")
    bench("torch", CONTENDERS, given, unit="AdamW, fused", extra=extra, libraries=libraries)


if __name__ == "__main__":
    main()
