"""Every way to run ACProp, each as a function from a case to a trajectory.

A backend that lacks a library, a device or a dtype says so with a reason, and its cases are skipped.
"""

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np

from acprop_core import ACProp, State
from agreement import Record, Trajectory
from cases import Case

Convert = Callable[[np.ndarray], Any]


def _functional(
    case: Case, to: Convert, back: Convert, wrap: Callable[[Any], Any] = lambda f: f, count: Any = None
) -> Trajectory:
    """Run the functional core step by step; `count` makes an array of the int with which it would count."""
    optimizer = ACProp(**case.hyper)
    update, apply = wrap(optimizer.update), wrap(optimizer.apply)
    grads = {leaf: case.grads(leaf) for leaf in case.leaves}
    params = {leaf: case.params(leaf) for leaf in case.leaves}
    state = _begin(case, optimizer.init(_container(case, lambda leaf: to(params[leaf][0]))), to)
    if count is not None:
        state = state._replace(count=count(state.count))
    steps = []
    new: Any = None
    for t in range(case.steps):
        x = new if case.free and t else _container(case, lambda leaf, t=t: to(params[leaf][t]))
        updates, state = update(_container(case, lambda leaf, t=t: to(grads[leaf][t])), state, x)
        new = apply(x, updates)
        steps.append(_records(case, back, updates, new, state.mu, state.nu, state.carry))
    _check_count(case, state.count if isinstance(state.count, int) else back(state.count))
    return steps


def _container(case: Case, make: Callable[[str], Any]) -> Any:
    return case.container({leaf: make(leaf) for leaf in case.leaves})


def _begin(case: Case, state: State, to: Convert) -> State:
    """Return the state that the case starts from, instead of that of `init` if it says so."""
    if case.start is None:
        return state
    count, *moments = case.start
    return State(count, *(_container(case, lambda leaf, m=m: to(m[leaf])) for m in moments))


def _saved(case: Case) -> tuple[ACProp, State]:
    """Return what the `import_state` of the adapters takes."""
    return ACProp(**case.hyper), State(*case.start)


def _check_count(case: Case, count: Any) -> None:
    done = case.steps + (0 if case.start is None else case.start[0])
    assert int(count) == (done if isinstance(count, int) else min(done, np.iinfo(count.dtype).max))


def _records(
    case: Case, back: Convert, updates: Any, params: Any, mu: Any, nu: Any, carry: Any = None
) -> dict[str, Record]:
    trees = [None if tree is None else case.leaves_of(tree) for tree in (updates, params, mu, nu, carry)]

    def of(tree: Any, leaf: str) -> Any:
        return None if tree is None or tree[leaf] is None else back(tree[leaf])

    return {leaf: Record(*(of(tree, leaf) for tree in trees)) for leaf in case.leaves}


def numpy(case: Case) -> Trajectory:
    return _functional(case, np.array, np.array)


def numpy_readonly(case: Case) -> Trajectory:
    def frozen(x: np.ndarray) -> np.ndarray:
        x = np.array(x)
        x.flags.writeable = False
        return x

    def freeze(f: Any) -> Any:
        def call(grads: Any, *rest: Any) -> Any:
            moments = [d for tree in rest if isinstance(tree, State) for d in (tree.mu, tree.nu)]
            for leaf in [x for d in moments for x in case.leaves_of(d).values()]:
                leaf.flags.writeable = False
            return f(grads, *rest)

        return call

    return _functional(case, frozen, np.array, wrap=freeze)


def numpy_array_count(case: Case) -> Trajectory:
    return _functional(case, np.array, np.array, count=lambda n: np.asarray(n, dtype=np.int32))


def _strict(version: str) -> Callable[[Case], Trajectory]:
    def run(case: Case) -> Trajectory:
        import array_api_strict as xp

        flags = xp.ArrayAPIStrictFlags(
            api_version=version, boolean_indexing=False, data_dependent_shapes=False, enabled_extensions=()
        )
        with flags:
            # its arrays hand their memory to np.asarray only from 2024.12 on, hence the buffer beneath
            return _functional(case, xp.asarray, lambda x: np.array(getattr(x, "_array", x)))

    return run


def strict_array_count(case: Case) -> Trajectory:
    import array_api_strict as xp

    return _functional(
        case,
        xp.asarray,
        lambda x: np.array(getattr(x, "_array", x)),
        count=lambda n: xp.asarray(n, dtype=xp.int64),
    )


def _to_torch(x: np.ndarray) -> Any:
    import torch

    if x.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(x.astype(np.float32)).to(torch.bfloat16)
    return torch.from_numpy(np.array(x))


def _from_torch(x: Any) -> np.ndarray:
    import torch

    if isinstance(x, int):
        return np.asarray(x)
    x = x.detach().cpu()
    if x.dtype == torch.bfloat16:
        return x.to(torch.float32).numpy().astype(ml_dtypes.bfloat16)
    return x.numpy().copy()


def torch(case: Case) -> Trajectory:
    return _functional(case, _to_torch, _from_torch)


def torch_array_count(case: Case) -> Trajectory:
    import torch

    return _functional(case, _to_torch, _from_torch, count=torch.tensor)


def torch_cuda(case: Case) -> Trajectory:
    return _functional(case, lambda x: _to_torch(x).cuda(), _from_torch)


@contextlib.contextmanager
def _jax(case: Case) -> Iterator[Any]:
    import jax

    wide = {"float64", "complex128"}
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", bool(wide & case.dtypes) or case.hyper.get("moment_dtype") in wide)
    try:
        yield jax
    finally:
        jax.config.update("jax_enable_x64", before)


def jax_eager(case: Case) -> Trajectory:
    with _jax(case) as jax:
        return _functional(case, jax.numpy.asarray, np.array)


def jax_jit(case: Case) -> Trajectory:
    with _jax(case) as jax:
        return _functional(case, jax.numpy.asarray, np.array, wrap=jax.jit)


def jax_scan(case: Case) -> Trajectory:
    optimizer = ACProp(**case.hyper)
    with _jax(case) as jax:
        stream = [_container(case, lambda leaf, f=f: jax.numpy.asarray(f(leaf))) for f in (case.grads, case.params)]

        def step(carried: Any, now: Any) -> Any:
            state, params = carried
            grads, prescribed = now
            params = params if case.free else prescribed
            updates, state = optimizer.update(grads, state, params)
            params = optimizer.apply(params, updates)
            return (state, params), (updates, params, state.mu, state.nu, state.carry)

        first = _container(case, lambda leaf: jax.numpy.asarray(case.params(leaf)[0]))
        state = _begin(case, optimizer.init(first), jax.numpy.asarray)
        (state, _), columns = jax.lax.scan(step, (state, first), stream)
        _check_count(case, np.array(state.count))
        columns = jax.tree.map(np.asarray, columns)
        rows = [jax.tree.map(lambda x, t=t: x[t], columns) for t in range(case.steps)]
        return [_records(case, np.array, *row) for row in rows]


def dask(case: Case) -> Trajectory:
    import dask.array as da
    import dask.base

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("the update computed something; it must stay lazy")

    def lazy(f: Any) -> Any:
        def call(*args: Any) -> Any:
            with dask.base.config.set(scheduler=never):
                result = f(*args)
            return dask.base.persist(result, scheduler="synchronous")[0]  # or the graph grows from step to step

        return call

    return _functional(
        case,
        # a few chunks along every axis
        lambda x: da.from_array(x, chunks=tuple(max(2, -(-n // 4)) for n in x.shape)),
        lambda x: np.array(x.compute(scheduler="synchronous") if hasattr(x, "compute") else x),
        wrap=lazy,
    )


def cupy(case: Case) -> Trajectory:
    import cupy as cp

    return _functional(case, cp.asarray, cp.asnumpy)


def optax(case: Case) -> Trajectory:
    import optax

    import acprop_optax

    with _jax(case) as jax:
        transform = acprop_optax.acprop(**case.hyper)
        update = jax.jit(transform.update)
        grads = {leaf: case.grads(leaf) for leaf in case.leaves}
        params = {leaf: case.params(leaf) for leaf in case.leaves}
        state = transform.init(_container(case, lambda leaf: jax.numpy.asarray(params[leaf][0])))
        if case.start is not None:
            saved = _saved(case)
            state = acprop_optax.import_state(state, saved[0], *saved)
        steps = []
        new: Any = None
        for t in range(case.steps):
            g, x = (
                _container(case, lambda leaf, tree=tree, t=t: jax.numpy.asarray(tree[leaf][t]))
                for tree in (grads, params)
            )
            x = new if case.free and t else x
            updates, state = update(g, state, x)
            new = optax.apply_updates(x, updates)
            carry = state[3].carry if case.free else None
            steps.append(_records(case, np.array, updates, new, state[0].mu, state[0].nu, carry))
        _check_count(case, np.array(state[0].count))
        return steps


def _torch_optimizer(case: Case, device: str, **flags: Any) -> Trajectory:
    import torch

    import acprop_torch

    options = {k: v for k, v in case.hyper.items() if k not in ("learning_rate", "b1", "b2", "weight_decay", "mask")}
    if "moment_dtype" in options:
        options["moment_dtype"] = getattr(torch, options["moment_dtype"])
    lr = case.hyper["learning_rate"]
    tensors = {
        leaf: _to_torch(case.params(leaf)[0]).to(device).requires_grad_(not flags.get("differentiable"))
        for leaf in case.leaves
    }
    groups = [
        {"params": [x], "weight_decay": case.hyper["weight_decay"] if case.decays(leaf) else 0.0}
        for leaf, x in tensors.items()
    ]
    if case.container(tensors) is not tensors:  # torch's containers are its groups
        groups = [{"params": list(tensors.values())}]
    optimizer = acprop_torch.ACProp(
        groups,
        lr=lr(0) if callable(lr) else lr,
        betas=(case.hyper.get("b1", 0.9), case.hyper.get("b2", 0.999)),
        **options,
        **flags,
    )
    grads = {leaf: case.grads(leaf) for leaf in case.leaves}
    if case.start is not None:
        acprop_torch.import_state(optimizer, tensors, *_saved(case), prefer="own")  # numbers that are tensors differ
    steps = []
    for t in range(case.steps):
        for group in optimizer.param_groups:
            group["lr"] = lr(t) if callable(lr) else lr
        for leaf, x in tensors.items():
            if not case.free:
                with torch.no_grad():
                    x.copy_(_to_torch(case.params(leaf)[t]))
            x.grad = _to_torch(grads[leaf][t]).to(device)
        optimizer.step()
        mu = {leaf: optimizer.state[x]["exp_avg"] for leaf, x in tensors.items()}
        nu = {leaf: _real_view(optimizer.state[x]["exp_avg_var"]) for leaf, x in tensors.items()}
        carry = {leaf: optimizer.state[x].get("carry") for leaf, x in tensors.items()}
        steps.append(_records(case, _from_torch, None, *map(case.container, (tensors, mu, nu, carry))))
    return steps


def _real_view(x: Any) -> Any:
    import torch

    return torch.view_as_real(x) if x.is_complex() else x


def _torch(device: str = "cpu", **flags: Any) -> Callable[[Case], Trajectory]:
    return lambda case: _torch_optimizer(case, device, **flags)


def _torch_capturable(**flags: Any) -> Callable[[Case], Trajectory]:
    """Run what a CUDA graph would capture, on the CPU: torch refuses it there, since there is nothing to gain."""

    def run(case: Case) -> Trajectory:
        from acprop_torch import _optimizer

        with mock.patch.object(_optimizer, "capturable_devices", return_value=["cpu"]):
            return _torch_optimizer(case, "cpu", capturable=True, **flags)

    return run


def torch_fused_by_inductor(case: Case) -> Trajectory:
    from acprop_torch import _numba

    with mock.patch.object(_numba, "has_numba", return_value=False):
        return _torch_optimizer(case, "cpu", fused=True)


def _stepper(engine: str | None, **options: Any) -> Callable[[Case], Trajectory]:
    def run(case: Case) -> Trajectory:
        import acprop_stepper

        to, back = (np.array, np.array)
        if engine == "cupy":
            import cupy as cp

            to, back = cp.asarray, cp.asnumpy
        params = {leaf: to(case.params(leaf)[0]) for leaf in case.leaves}
        stepper = acprop_stepper.Stepper(case.container(params), **case.hyper, engine=engine, **options)
        if case.start is not None:
            acprop_stepper.import_state(stepper, *_saved(case))
        grads = {leaf: case.grads(leaf) for leaf in case.leaves}
        steps = []
        for t in range(case.steps):
            for leaf, x in params.items():
                if not case.free:
                    x[...] = to(case.params(leaf)[t])
            stepper.step(_container(case, lambda leaf, t=t: to(grads[leaf][t])))
            state = stepper.state
            steps.append(_records(case, back, None, stepper.params, state.mu, state.nu, state.carry))
        _check_count(case, state.count)
        return steps

    return run


class Backend(Enum):
    """(how to run a case, what it needs, dtypes that it lacks)."""

    NUMPY = numpy, "numpy", ()
    NUMPY_READONLY = numpy_readonly, "numpy", ()
    NUMPY_ARRAY_COUNT = numpy_array_count, "numpy", ()
    STRICT_2022 = _strict("2022.12"), "array_api_strict", ("float16", "bfloat16")
    STRICT_2023 = _strict("2023.12"), "array_api_strict", ("float16", "bfloat16")
    STRICT_2024 = _strict("2024.12"), "array_api_strict", ("float16", "bfloat16")
    STRICT_2025 = _strict("2025.12"), "array_api_strict", ("float16", "bfloat16")
    STRICT_ARRAY_COUNT = strict_array_count, "array_api_strict", ("float16", "bfloat16")
    TORCH = torch, "torch", ()
    TORCH_ARRAY_COUNT = torch_array_count, "torch", ()
    TORCH_CUDA = torch_cuda, "torch:cuda", ()
    JAX_EAGER = jax_eager, "jax", ()
    JAX_JIT = jax_jit, "jax", ()
    JAX_SCAN = jax_scan, "jax", ()
    DASK = dask, "dask", ()
    CUPY = cupy, "cupy:cuda", ("bfloat16",)
    OPTAX = optax, "optax", ()
    TORCH_OPTIMIZER = _torch(foreach=False), "torch", ()
    TORCH_FOREACH = _torch(foreach=True), "torch", ()
    TORCH_FUSED = _torch(fused=True), "torch+numba", ("complex64", "complex128")
    TORCH_FUSED_BY_INDUCTOR = torch_fused_by_inductor, "torch", ("complex64", "complex128")
    TORCH_DIFFERENTIABLE = _torch(differentiable=True), "torch", ()
    TORCH_CAPTURABLE = _torch_capturable(foreach=False), "torch", ()
    TORCH_CAPTURABLE_FOREACH = _torch_capturable(foreach=True), "torch", ()
    TORCH_OPTIMIZER_CUDA = _torch("cuda", foreach=False), "torch:cuda", ()
    TORCH_FOREACH_CUDA = _torch("cuda", foreach=True), "torch:cuda", ()
    TORCH_FUSED_CUDA = _torch("cuda", fused=True), "torch:cuda", ("complex64", "complex128")
    TORCH_CAPTURABLE_CUDA = _torch("cuda", capturable=True), "torch:cuda", ()
    STEPPER_TILES = _stepper("tiles"), "numpy", ()
    STEPPER_NUMBA = _stepper("numba"), "numba", ()
    STEPPER_THREADS = _stepper(None, threads=2, nonfinite="raise", clip_norm=1e300), "numpy", ()
    STEPPER_CUPY = _stepper("cupy"), "cupy:cuda", ("bfloat16",)

    def __str__(self) -> str:
        return self.name.lower()

    def run(self, case: Case) -> Trajectory:
        return self.value[0](case)

    @property
    def complex_as_real(self) -> bool:
        """Whether a complex parameter counts as two real ones, the convention of torch.optim."""
        return self.name.startswith("TORCH_") and self not in (Backend.TORCH_ARRAY_COUNT, Backend.TORCH_CUDA)

    @property
    def needs_gpu(self) -> bool:
        return self.value[1].endswith(":cuda")

    def cannot_run(self) -> str | None:
        """Return why this backend cannot run here, or None."""
        modules = self.value[1].partition(":")[0].split("+")
        for module in modules:
            if importlib.util.find_spec(module) is None:
                return f"{module} is not installed"
        if self.needs_gpu:
            return _no_gpu(modules[0])
        return None

    def cannot_take(self, case: Case) -> str | None:
        """Return why this backend cannot take this case, or None."""
        if self is Backend.STRICT_ARRAY_COUNT and callable(case.hyper["learning_rate"]):
            return "array-api-strict refuses integer arrays beside floats, so a schedule must be written for it"
        if self is Backend.TORCH_ARRAY_COUNT and callable(case.hyper["learning_rate"]) and "float64" in case.dtypes:
            return "torch computes 0.1 / (integer tensor + 1.0), the schedule, in float32"
        if case.steps >= 10_000 and self.name in _SLOW:
            return "10,000 steps take minutes here; the shorter case is run"
        lacking = case.dtypes & set(self.value[2])
        return f"{self} has no {', '.join(sorted(lacking))}" if lacking else None


def on_every_backend() -> Any:
    """Return what parametrizes a test by `backend`; one that cannot run here is skipped with its reason."""
    import pytest

    def parameter(backend: Backend) -> Any:
        marks = [pytest.mark.gpu] if backend.needs_gpu else []
        if reason := backend.cannot_run():
            marks.append(pytest.mark.skip(reason=reason))
        return pytest.param(backend, id=str(backend), marks=marks)

    return pytest.mark.parametrize("backend", list(map(parameter, Backend)))


_SLOW = ("DASK", "JAX_EAGER", "TORCH_CAPTURABLE", "TORCH_DIFFERENTIABLE")


def _no_gpu(module: str) -> str | None:
    if module == "torch":
        import torch

        return None if torch.cuda.is_available() else "torch finds no CUDA device"
    import cupy

    try:
        found = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"CuPy finds no CUDA device: {error}"
    return None if found else "CuPy finds no CUDA device"
