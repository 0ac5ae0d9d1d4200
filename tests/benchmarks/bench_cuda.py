"""Steps on a CUDA device, 100,000,000 float32 parameters: torch and JAX beside AdamW, CuPy beside a copy of its bytes.

    python tests/benchmarks/bench_cuda.py [quick] [--out docs/benchmarks]

What finds no device is skipped, and its reason printed.
"""

import gc
from collections.abc import Callable
from typing import Any

from record import Run, arguments, measure, quartiles, ratio, save, versions

Runs = dict[str, Run]


def torch_runs(size: int) -> Runs:
    import torch

    from acprop_torch import ACProp

    runs: Runs = {}

    def add(name: str, kind: type[torch.optim.Optimizer], **options: Any) -> None:
        param = torch.ones(size, device="cuda", requires_grad=True)
        param.grad = grad
        optimizer = kind([param], **options)
        runs[name] = Run(lambda: (optimizer.step(), torch.cuda.synchronize()))

    grad = torch.randn(size, device="cuda")
    add("AdamW, fused", torch.optim.AdamW, fused=True)
    for way, flags in {"foreach": {}, "fused": {}, "foreach, capturable": {"capturable": True}}.items():
        add(f"ACProp, {way}", ACProp, clip_exponent=0.25, **{way.partition(",")[0]: True}, **flags)
    return runs


def cupy_runs(size: int) -> Runs:
    import cupy

    from acprop_stepper import Stepper

    params, grads = cupy.ones(size, cupy.float32), cupy.random.default_rng(0).standard_normal(size, cupy.float32)
    stepper = Stepper(params, clip_exponent=0.25)
    source = cupy.ones(size * 28 // 8, cupy.float32)
    target = cupy.empty_like(source)

    def finished(step: Callable[[], object]) -> Run:
        return Run(lambda: (step(), cupy.cuda.get_current_stream().synchronize()))

    return {
        "device copy": finished(lambda: cupy.copyto(target, source)),
        "Stepper, CuPy": finished(lambda: stepper.step(grads)),
    }


def jax_runs(size: int) -> Runs:
    from bench_jax import CONTENDERS
    from steps import gradients

    names = ("optax.adamw", "acprop_optax", "optax.contrib.acprop")
    return {name: Run(CONTENDERS[name].make(gradients(1, size), "float32").step) for name in names}


def on_torch() -> None:
    import torch

    torch.zeros(1, device="cuda")


def on_cupy() -> None:
    import cupy

    cupy.zeros(1)


def on_jax() -> None:
    import jax

    jax.devices("cuda")


# what fails without a device, and what makes the runs, of which the first is the unit
FRAMEWORKS = {
    "torch": (on_torch, torch_runs, "torch"),
    "CuPy": (on_cupy, cupy_runs, "cupy-cuda13x"),
    "JAX": (on_jax, jax_runs, "jax"),
}


def main() -> None:
    """Print the ratios, and save the result steps_cuda where there was a device."""
    given = arguments(__doc__ or "")
    size = 10**6 if given.quick else 10**8
    rows: list[dict[str, Any]] = []
    used: list[str] = []
    for framework, (probe, make, distribution) in FRAMEWORKS.items():
        try:
            probe()
        except Exception as error:  # each library has its own for a device that is not there
            print(f"{framework} on CUDA: skipped ({str(error).strip().splitlines()[0]})")
            continue
        runs = make(size)
        seconds = measure(runs, budget=10.0, label=framework)
        unit = next(iter(runs))
        for name in runs:
            row = {"framework": framework, "contender": name, "size": size, "unit": unit}
            rows.append(row | {"seconds": quartiles(seconds[name]), "to unit": ratio(seconds[name], seconds[unit])})
            print(f"{framework}: {name}: {rows[-1]['to unit'][1]:.2f} times {unit}")
        used.append(distribution)
        del runs
        gc.collect()
    if rows:
        save("steps_cuda", rows, given, versions(*used))


if __name__ == "__main__":
    main()
