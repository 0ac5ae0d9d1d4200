"""Steps on a CUDA device: torch beside AdamW, CuPy beside a copy of the same bytes, JAX beside optax.adamw.

    python tests/benchmarks/bench_cuda.py [quick] [--seconds 300] [--device cuda] [--out docs/benchmarks]

The tasks come in the order of their importance, and begin as long as there is time. After each, `steps_cuda.json` is
written anew. Each contender has two times, both in turns with the others. "wall" is the time of a few steps and of the
wait for the device after them. "kernel" is what the device took between two CUDA events: it is given work before the
first one, so that it need not wait for the host (unless a step launches more than the queue holds, about a thousand).
torch's profiler counts the launches of one step. The share of the peak is of a large copy's bandwidth: parameter,
gradient and state are read, parameter and state written.

The exit status is 1 if a contender failed, 3 if something was left or a library found no device, and otherwise 0.
--device cpu goes through the same lines without a device, for a test; its figures mean nothing.
"""

import gc
import importlib
import math
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from record import LEAST, MOST, Run, arguments, measure, quartiles, ratio, save, versions

Shapes = list[tuple[int, ...]]


def gpt2(layers: int, width: int, vocabulary: int, context: int) -> Shapes:
    """Return the shapes of a GPT-2: embeddings, twelve tensors a layer, and the last normalization."""
    layer = [(width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,)]
    layer += [(width,), (width,), (width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [(vocabulary, width), (context, width), *layer * layers, (width,), (width,)]


ONE, GPT2, THOUSAND, TEN = "1 x 100M", "GPT-2 in 496 tensors", "1,000 x 1,000", "10 x 1,000"
SIZES: dict[str, Shapes] = {
    ONE: [(10**8,)],
    GPT2: gpt2(41, 448, 50_257, 1_024),  # 122M parameters
    THOUSAND: [(1_000,)] * 1_000,
    TEN: [(1_000,)] * 10,
}
QUICK: dict[str, Shapes] = {
    ONE: [(10**5,)],
    GPT2: gpt2(2, 16, 100, 32),
    THOUSAND: [(10,)] * 20,
    TEN: [(1_000,)] * 10,
}


class Task(NamedTuple):
    """What is measured together: the contenders of a framework on parameters of these shapes and this dtype."""

    framework: str
    sizes: str
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"{self.framework}, {self.sizes}, {self.dtype}"


PLAN = [
    Task("torch", GPT2),
    Task("torch", ONE),
    Task("cupy", ONE),
    Task("torch", THOUSAND),
    Task("torch", TEN),
    Task("cupy", GPT2),
    Task("jax", ONE),
    Task("torch", GPT2, "bfloat16"),
    Task("torch", ONE, "bfloat16"),
    Task("cupy", THOUSAND),
    Task("cupy", TEN),
    Task("torch", THOUSAND, "bfloat16"),
    Task("torch", TEN, "bfloat16"),
    Task("jax", TEN),
    Task("jax", GPT2),
]


class Contender(NamedTuple):
    """A step, which need not wait for the device, and the bytes that it reads and writes."""

    step: Callable[[], object]
    nbytes: Callable[[], int]


class Framework:
    """The device as a library has it: what to measure there, and its clock."""

    unit = ""  # the contender that the others are compared with

    def __init__(self, device: str) -> None:
        """Raise an exception of the library if there is no device."""
        self.device = device

    def makers(self, shapes: Shapes, dtype: str) -> dict[str, Callable[[], Contender]]:
        """Return what makes each contender."""
        raise NotImplementedError

    def finish(self) -> None:
        """Wait for the device."""

    def record(self) -> Any:
        """Return an event at this place in the queue of the device."""

    def seconds(self, begin: Any, end: Any) -> float:
        """Return the seconds between two events, of which the second has come."""
        raise NotImplementedError

    copy: Callable[[], object] | None = None  # of 2**28 bytes, so that it moves twice as many; None without a clock


class Torch(Framework):
    unit = "AdamW, fused"

    def __init__(self, device: str) -> None:
        import torch

        super().__init__(device)
        source = torch.ones(2**26 if device == "cuda" else 1, device=device)
        if device == "cuda":
            target = torch.empty_like(source)
            self.copy = lambda: target.copy_(source)

    def makers(self, shapes: Shapes, dtype: str) -> dict[str, Callable[[], Contender]]:
        import torch

        from acprop_torch import ACProp
        from eager import EagerACProp

        grads = [torch.randn(shape, device=self.device).to(getattr(torch, dtype)) for shape in shapes]

        def make(kind: Callable[..., torch.optim.Optimizer], **flags: Any) -> Contender:
            params = [torch.ones_like(g, requires_grad=True) for g in grads]
            for x, g in zip(params, grads, strict=True):
                x.grad = g
            optimizer = kind(params, **flags)

            def nbytes() -> int:
                state = [x for p in params for x in optimizer.state[p].values() if getattr(x, "shape", None) == p.shape]
                return 2 * sum(x.nbytes for x in [*params, *state]) + sum(g.nbytes for g in grads)

            return Contender(optimizer.step, nbytes)

        acprop = partial(make, ACProp, clip_exponent=0.25)
        makers = {
            self.unit: partial(make, torch.optim.AdamW, fused=True),
            "AdamW, foreach": partial(make, torch.optim.AdamW, foreach=True),
            "ACProp, fused": partial(acprop, fused=True),
            "ACProp, foreach": partial(acprop, foreach=True),
            "eager ACProp": partial(make, EagerACProp),
        }
        if self.device == "cuda":
            makers["ACProp, fused, capturable"] = partial(acprop, fused=True, capturable=True)
            makers["ACProp, foreach, capturable"] = partial(acprop, foreach=True, capturable=True)
        return makers

    def finish(self) -> None:
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()

    def record(self) -> Any:
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: Any, end: Any) -> float:
        return 1e-3 * begin.elapsed_time(end)


class Cupy(Framework):
    unit = "device copy"

    def __init__(self, device: str) -> None:
        super().__init__(device)
        self.xp: Any = np if device == "cpu" else importlib.import_module("cupy")
        source = self.xp.ones(2**26 if device == "cuda" else 1, np.float32)
        if device == "cuda":
            target = self.xp.empty_like(source)
            self.copy = lambda: self.xp.copyto(target, source)

    def makers(self, shapes: Shapes, dtype: str) -> dict[str, Callable[[], Contender]]:
        xp, count = self.xp, sum(map(math.prod, shapes))

        def copy() -> Contender:
            source = xp.ones(count * 14 // 4, np.float32)
            target = xp.empty_like(source)
            return Contender(lambda: xp.copyto(target, source), lambda: 2 * source.nbytes)

        def stepper() -> Contender:
            from acprop_stepper import Stepper

            params = [xp.ones(shape, dtype) for shape in shapes]
            grads = [xp.random.default_rng(0).standard_normal(shape, xp.float32) for shape in shapes]
            own = Stepper(params, clip_exponent=0.25)
            return Contender(lambda: own.step(grads), lambda: 28 * count)

        return {self.unit: copy, "Stepper": stepper}

    def finish(self) -> None:
        if self.device == "cuda":
            self.xp.cuda.get_current_stream().synchronize()

    def record(self) -> Any:
        event = self.xp.cuda.Event()
        event.record()
        return event

    def seconds(self, begin: Any, end: Any) -> float:
        return 1e-3 * self.xp.cuda.get_elapsed_time(begin, end)


class Jax(Framework):
    """Its steps wait for the device, and it has no events; the profiler alone sees its kernels."""

    unit = "optax.adamw"

    def __init__(self, device: str) -> None:
        import jax

        super().__init__(device)
        self.default = jax.devices(device)[0]

    def makers(self, shapes: Shapes, dtype: str) -> dict[str, Callable[[], Contender]]:
        import jax

        from bench_jax import CONTENDERS

        rng = np.random.default_rng(0)
        grads = [rng.standard_normal(shape, np.float32) for shape in shapes]
        nbytes = sum(g.size for g in grads) * 7 * np.dtype(dtype).itemsize

        def make(name: str) -> Contender:
            with jax.default_device(self.default):
                return Contender(CONTENDERS[name].make(grads, dtype).step, lambda: nbytes)

        names = (self.unit, "acprop_optax", "optax.contrib.acprop")
        return {name: partial(make, name) for name in names}


FRAMEWORKS: dict[str, type[Framework]] = {"torch": Torch, "cupy": Cupy, "jax": Jax}


def kernel_seconds(framework: Framework, steps: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Return the seconds that the device takes for a step of each contender, one a round, in turns."""
    copy = framework.copy
    assert copy is not None
    one = median(_busy_seconds(framework, copy, 0) for _ in range(LEAST))
    host = {}
    for name, step in steps.items():
        framework.finish()
        begin = time.perf_counter()
        step()
        host[name] = time.perf_counter() - begin
    rounds = min(MOST, max(LEAST, round(2.0 / (3.0 * sum(host.values()) + 1e-3))))
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            seconds[name].append(_busy_seconds(framework, step, math.ceil(2.0 * host[name] / one) + 1))
    return seconds


def _busy_seconds(framework: Framework, step: Callable[[], object], copies: int) -> float:
    """Return the seconds of a step on a device that has so many copies to do first."""
    framework.finish()
    for _ in range(copies):
        framework.copy()
    begin = framework.record()
    step()
    end = framework.record()
    framework.finish()
    return framework.seconds(begin, end)


def launches(step: Callable[[], object], finish: Callable[[], None]) -> dict[str, Any]:
    """Return how many kernels and copies one step launches, of any library, and their seconds; nothing without CUDA."""
    try:
        import torch
        from torch.profiler import ProfilerActivity, profile
    except ImportError:
        return {}
    if not torch.cuda.is_available():
        return {}
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        finish()
        torch.cuda.synchronize()
    own = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return {"launches": len(own), "profiled": 1e-6 * sum(event.time_range.elapsed_us() for event in own)}


def rows_of(task: Task, framework: Framework, shapes: Shapes, peak: float | None) -> list[dict[str, Any]]:
    """Measure a task; a contender that fails has a row with the error, and the others are measured."""
    size = {"tensors": len(shapes), "parameters": sum(map(math.prod, shapes))}
    common = {**task._asdict(), **size, "unit": framework.unit}
    contenders: dict[str, Contender] = {}
    failed = []
    for name, make in framework.makers(shapes, task.dtype).items():
        try:
            contenders[name] = make()
            contenders[name].step()
            framework.finish()
        except Exception as error:  # the first steps on a device: the other figures count in any case
            contenders.pop(name, None)
            failed.append({**common, "contender": name, "error": f"{type(error).__name__}: {error}"[:500]})
    steps = {name: contender.step for name, contender in contenders.items()}
    wall = measure({name: Run(step, finish=framework.finish) for name, step in steps.items()}, 2.0, str(task))
    kernel = kernel_seconds(framework, steps) if framework.copy else {}
    rows = []
    for name, contender in contenders.items():
        row = {**common, "contender": name, "wall": quartiles(wall[name]), "bytes": contender.nbytes()}
        try:
            row |= launches(contender.step, framework.finish)
        except Exception as error:  # the times count without it
            row["profiler"] = f"{type(error).__name__}: {error}"[:500]
        if name in kernel:
            row["kernel"] = quartiles(kernel[name])
            row["share of peak"] = row["bytes"] / row["kernel"][1] / peak if peak else None
        if framework.unit in contenders:
            row["wall to unit"] = ratio(wall[name], wall[framework.unit])
            if name in kernel:
                row["kernel to unit"] = ratio(kernel[name], kernel[framework.unit])
        rows.append(row)
    return rows + failed


def said(row: dict[str, Any]) -> str:
    """Return a row as a line."""
    name = f"{row['contender']:28}"
    if "error" in row:
        return f"{name} {row['error'].splitlines()[0]}"
    parts = [f"wall {1e3 * row['wall'][1]:9.4f} ms"]
    parts += [f"kernel {1e3 * row['kernel'][1]:9.4f} ms"] if "kernel" in row else []
    parts += [f"{key} {row[key][1]:.2f}" for key in ("wall to unit", "kernel to unit") if key in row]
    parts += [f"{row['launches']} launches"] if "launches" in row else []
    parts += [f"{row['share of peak']:.0%} of the peak"] if row.get("share of peak") else []
    return f"{name} {', '.join(parts)}"


def main() -> int:
    """Print and save the rows, and return the exit status."""
    seconds = {"type": float, "default": 300.0, "help": "no task begins later"}
    given = arguments(__doc__ or "", seconds=seconds, device={"choices": ["cuda", "cpu"], "default": "cuda"})
    until = time.monotonic() + given.seconds
    sizes = QUICK if given.quick else SIZES
    frameworks: dict[str, Framework] = {}
    about: dict[str, Any] = {"device": given.device, "skipped": {}, "peak, GB/s": {}, "left": list(map(str, PLAN))}
    rows: list[dict[str, Any]] = []
    for name, kind in FRAMEWORKS.items():
        try:
            frameworks[name] = kind(given.device)
        except Exception as error:  # each library has its own for a device that is not there
            about["skipped"][name] = (str(error).strip() or type(error).__name__).splitlines()[0]
            print(f"{name} on {given.device}: skipped ({about['skipped'][name]})", flush=True)
            continue
        if (copy := frameworks[name].copy) is not None:
            copied = median(_busy_seconds(frameworks[name], copy, 2) for _ in range(MOST))
            about["peak, GB/s"][name] = 2e-9 * 2**28 / copied
    for task in PLAN:
        framework = frameworks.get(task.framework)
        if framework is None or time.monotonic() > until:
            continue
        print(task, flush=True)
        peak = about["peak, GB/s"].get(task.framework)
        try:
            own = rows_of(task, framework, sizes[task.sizes], peak and 1e9 * peak)
        except Exception as error:
            own = [{**task._asdict(), "contender": "all", "error": f"{type(error).__name__}: {error}"[:500]}]
        print(*map(said, own), sep="\n", flush=True)
        rows += own
        about["left"].remove(str(task))
        if given.device == "cuda" and task.framework == "torch":
            import torch

            about["device"] = torch.cuda.get_device_name()
        libraries = {name: sys.modules[name].__version__ for name in frameworks if name in sys.modules}
        save("steps_cuda", rows, given, versions() | libraries, **about)
        gc.collect()
    print(f"left: {'; '.join(about['left']) or 'nothing'}")
    return 1 if any("error" in row for row in rows) else 3 if about["left"] else 0


if __name__ == "__main__":
    sys.exit(main())
