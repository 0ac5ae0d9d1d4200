"""Everything that runs ACProp, behind one interface.

A `Host` is one run: it begins from a `Case`, sees parameters and gradients as NumPy arrays by leaf, steps, and can be
read, saved and resumed. A `Backend` is a row of the reference suite: how to make a host, what it needs and lacks, and
whether it is slow. `BACKENDS` has them all; a backend that cannot run here says why, and its tests are skipped.

Private names of the packages are changed in this file alone, by the helpers at its end.
"""

import contextlib
import functools
import importlib.util
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import ml_dtypes
import numpy as np

from acprop_core import ACProp, State, load, rule, save
from agreement import Record, Trajectory
from cases import Case

if TYPE_CHECKING:
    import pytest  # the benchmarks use this file without it

Leaves = dict[str, np.ndarray]  # NumPy arrays by the name of the leaf


# One run


class Host(ABC):
    """One run of ACProp on the leaves of a case, begun by the constructor."""

    def __init__(self, case: Case) -> None:
        self.case = case

    @abstractmethod
    def put(self, params: Leaves) -> None:
        """Replace the values of the parameters."""

    @abstractmethod
    def step(self, grads: Leaves) -> None:
        """Take one step with these gradients."""

    @abstractmethod
    def read(self) -> dict[str, Record]:
        """Return copies of everything that the last step left, by leaf."""

    @property
    @abstractmethod
    def count(self) -> Any:
        """How many steps were done: an int, or an integer array of NumPy."""

    @abstractmethod
    def save(self, path: Path) -> None:
        """Save hyperparameters and state to a file."""

    @abstractmethod
    def resume(self, path: Path) -> None:
        """Continue from a saved file."""

    def advance(self, grads: Leaves) -> None:
        """Take a step with each of these gradients, (steps, *shape)."""
        for now in _each(grads):
            self.step(now)

    def run(self) -> Trajectory:
        """Take the steps of the case, and return what each of them left."""
        case, steps = self.case, []
        params, grads = ({leaf: draw(leaf) for leaf in case.leaves} for draw in (case.params, case.grads))
        for t, now in enumerate(_each(grads)):
            if not (case.free and t):
                self.put({leaf: x[t] for leaf, x in params.items()})
            self.step(now)
            steps.append(self.read())
        self.check_count()
        return steps

    def check_count(self) -> None:
        """Assert that the host has counted the steps of the case."""
        done = self.case.steps + (0 if self.case.start is None else self.case.start[0])
        assert int(self.count) == (done if isinstance(self.count, int) else min(done, np.iinfo(self.count.dtype).max))

    def records(self, leave: Callable[[Any], Any], *trees: Any) -> dict[str, Record]:
        """Return a record for each leaf of these containers; a tree may be None, and so may its leaves."""
        leaves = [None if tree is None else self.case.leaves_of(tree) for tree in trees]

        def of(tree: Any, leaf: str) -> Any:
            return None if tree is None or tree[leaf] is None else leave(tree[leaf])

        return {leaf: Record(*(of(tree, leaf) for tree in leaves)) for leaf in self.case.leaves}

    def callables(self) -> dict[str, Any]:
        """Return the hyperparameters that a file cannot hold, so that `load` must be passed them again."""
        names = ("learning_rate", "weight_decay", "mask")
        return {name: self.case.hyper[name] for name in names if callable(self.case.hyper.get(name))}


def _each(grads: Leaves) -> Iterator[Leaves]:
    (steps,) = {len(x) for x in grads.values()}
    for t in range(steps):
        yield {leaf: x[t] for leaf, x in grads.items()}


def _first(case: Case, enter: Callable[[np.ndarray], Any]) -> dict[str, Any]:
    return {leaf: enter(case.params(leaf)[0]) for leaf in case.leaves}


def _start(case: Case) -> tuple[ACProp, State]:
    """Return the start of the case as the adapters' `import_state` takes it."""
    return ACProp(**case.hyper), State(*case.start)


class Functional(Host):
    """The functional core on any array library.

    `enter` makes an array of the library, `leave` one of NumPy. `wrap` is applied to the methods, such as by
    compiling them. `count` makes an array of the int with which the state would count.
    """

    def __init__(
        self,
        case: Case,
        enter: Callable[[np.ndarray], Any] = np.array,
        leave: Callable[[Any], np.ndarray] = np.array,
        wrap: Callable[[Any], Any] | None = None,
        count: Callable[[int], Any] | None = None,
        optimizer: ACProp | None = None,
    ) -> None:
        super().__init__(case)
        self.enter, self.leave = enter, leave
        self.optimizer = ACProp(**case.hyper) if optimizer is None else optimizer
        self.update, self.apply = self.optimizer.update, self.optimizer.apply
        if wrap is not None:
            self.update, self.apply = wrap(self.update), wrap(self.apply)
        self.params = case.container(_first(case, enter))
        self.updates: Any = None
        self.state = self.optimizer.init(self.params)
        if case.start is not None:
            self.state = State(case.start[0], *map(self.tree, case.start[1:]))
        if count is not None:
            self.state = self.state._replace(count=count(self.state.count))

    def tree(self, leaves: Leaves) -> Any:
        return self.case.container({leaf: self.enter(x) for leaf, x in leaves.items()})

    def put(self, params: Leaves) -> None:
        self.params = self.tree(params)

    def step(self, grads: Leaves) -> None:
        self.updates, self.state = self.update(self.tree(grads), self.state, self.params)
        self.params = self.apply(self.params, self.updates)

    def read(self) -> dict[str, Record]:
        _, mu, nu, carry = self.state
        return self.records(self.leave, self.updates, self.params, mu, nu, carry)

    @property
    def count(self) -> Any:
        return self.state.count if isinstance(self.state.count, int) else self.leave(self.state.count)

    def save(self, path: Path) -> None:
        save(path, self.optimizer, self.state)

    def resume(self, path: Path) -> None:
        _, self.state = load(path, self.params, **self.callables())


class ReadOnly(Functional):
    """The functional core on NumPy arrays that nobody can write to."""

    def __init__(self, case: Case) -> None:
        super().__init__(case, enter=readonly)

    def step(self, grads: Leaves) -> None:
        for tree in (self.state.mu, self.state.nu):
            for x in self.case.leaves_of(tree).values():
                x.flags.writeable = False
        super().step(grads)


class Scan(Functional):
    """The functional core within `jax.lax.scan`."""

    def __init__(self, case: Case) -> None:
        super().__init__(case, enter=to_jax)

    def run(self) -> Trajectory:
        import jax

        case = self.case

        def step(carried: Any, now: Any) -> Any:
            state, params = carried
            grads, prescribed = now
            updates, state = self.update(grads, state, params if case.free else prescribed)
            params = self.apply(params if case.free else prescribed, updates)
            return (state, params), (updates, params, state.mu, state.nu, state.carry)

        stream = [self.tree({leaf: draw(leaf) for leaf in case.leaves}) for draw in (case.grads, case.params)]
        (self.state, self.params), columns = jax.lax.scan(step, (self.state, self.params), stream)
        self.check_count()
        columns = jax.tree.map(np.asarray, columns)
        rows = [jax.tree.map(lambda x, t=t: x[t], columns) for t in range(case.steps)]
        return [self.records(np.array, *row) for row in rows]

    def advance(self, grads: Leaves) -> None:
        self.state, self.params = self._scan((self.state, self.params), self.tree(grads))

    @functools.cached_property
    def _scan(self) -> Any:
        import jax

        def step(carried: Any, grads: Any) -> Any:
            state, params = carried
            updates, state = self.update(grads, state, params)
            return (state, self.apply(params, updates)), None

        return jax.jit(lambda carried, grads: jax.lax.scan(step, carried, grads)[0])


class Optax(Host):
    """`acprop` of acprop_optax; several hosts may share one transformation, and one compiled `update`."""

    def __init__(self, case: Case, transform: Any = None, update: Any = None) -> None:
        import acprop_optax

        super().__init__(case)
        self.optimizer = ACProp(**case.hyper)
        self._share(transform, update)
        self.params = self.tree({leaf: case.params(leaf)[0] for leaf in case.leaves})
        self.updates: Any = None
        self.state = self.transform.init(self.params)
        if case.start is not None:
            self.state = acprop_optax.import_state(self.state, self.optimizer, *_start(case))

    def _share(self, transform: Any = None, update: Any = None) -> None:
        import jax

        import acprop_optax

        self.transform = acprop_optax.acprop(**self.case.hyper) if transform is None else transform
        self.update = jax.jit(self.transform.update) if update is None else update

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the transformation, which cannot be pickled, because its two functions are closures."""
        return {name: x for name, x in vars(self).items() if name not in ("transform", "update")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._share()

    def tree(self, leaves: Leaves) -> Any:
        return self.case.container({leaf: to_jax(x) for leaf, x in leaves.items()})

    def put(self, params: Leaves) -> None:
        self.params = self.tree(params)

    def step(self, grads: Leaves) -> None:
        import optax

        self.updates, self.state = self.update(self.tree(grads), self.state, self.params)
        self.params = optax.apply_updates(self.params, self.updates)

    def read(self) -> dict[str, Record]:
        moments, carry = self.state[0], self.state[3].carry if self.case.free else None
        return self.records(np.array, self.updates, self.params, moments.mu, moments.nu, carry)

    @property
    def count(self) -> Any:
        return np.array(self.state[0].count)

    def save(self, path: Path) -> None:
        import acprop_optax

        save(path, *acprop_optax.export_state(self.state, self.optimizer))

    def resume(self, path: Path) -> None:
        import acprop_optax

        loaded = load(path, **self.callables())
        self.state = acprop_optax.import_state(self.state, self.optimizer, *loaded)


class TorchOptimizer(Host):
    """`acprop_torch.ACProp`, with the flags of a way to step. Each leaf has a group, for its own weight decay."""

    def __init__(self, case: Case, device: str = "cpu", **flags: Any) -> None:
        import torch

        import acprop_torch

        super().__init__(case)
        of_groups = ("learning_rate", "b1", "b2", "weight_decay", "mask")
        options = {name: x for name, x in case.hyper.items() if name not in of_groups}
        if "moment_dtype" in options:
            options["moment_dtype"] = getattr(torch, options["moment_dtype"])
        self.device = device
        self.params = _first(case, lambda x: to_torch(x).to(device).requires_grad_(not flags.get("differentiable")))
        groups = [{"params": [x], "decays": case.decays(leaf)} for leaf, x in self.params.items()]
        if case.container(self.params) is not self.params:  # torch's containers are its groups
            groups = [{"params": list(self.params.values()), "decays": False}]
        betas = (case.hyper.get("b1", 0.9), case.hyper.get("b2", 0.999))
        self.optimizer = acprop_torch.ACProp(groups, betas=betas, **options, **flags)
        self.done = 0 if case.start is None else case.start[0]
        self._set_values()
        if case.start is not None:
            # where the case has a schedule, a group has a number
            acprop_torch.import_state(self.optimizer, self.params, *_start(case), prefer="own")

    def _set_values(self) -> None:
        options = (self.case.hyper["learning_rate"], self.case.hyper.get("weight_decay", 0.0))
        rate, decay = (x(self.done) if callable(x) else x for x in options)
        for group in self.optimizer.param_groups:
            group["lr"], group["weight_decay"] = rate, decay if group["decays"] else 0.0

    def put(self, params: Leaves) -> None:
        import torch

        with torch.no_grad():
            for leaf, x in params.items():
                self.params[leaf].copy_(to_torch(x))

    def step(self, grads: Leaves) -> None:
        for leaf, g in grads.items():
            self.params[leaf].grad = to_torch(g).to(self.device)
        self._set_values()
        self.optimizer.step()
        self.done += 1

    def read(self) -> dict[str, Record]:
        state = {leaf: self.optimizer.state[x] for leaf, x in self.params.items()}
        return {
            leaf: Record(
                None,
                from_torch(x),
                from_torch(state[leaf]["exp_avg"]),
                from_torch(_as_real(state[leaf]["exp_avg_var"])),
                from_torch(state[leaf]["carry"]) if "carry" in state[leaf] else None,
            )
            for leaf, x in self.params.items()
        }

    @property
    def count(self) -> int:
        (count,) = {int(state["step"]) for state in self.optimizer.state.values()}
        return count

    def check_count(self) -> None:
        if self.done <= 2**24:  # torch counts in float32, which holds no odd number above
            super().check_count()

    def save(self, path: Path) -> None:
        import acprop_torch

        save(path, *acprop_torch.export_state(self.optimizer, self.params))

    def resume(self, path: Path) -> None:
        import acprop_torch

        callables = self.callables()
        saved, state = load(path, **callables)
        self.done = state.count
        self._set_values()
        prefer = "own" if {"learning_rate", "weight_decay"} & callables.keys() else None
        acprop_torch.import_state(self.optimizer, self.params, saved, state, prefer=prefer)


class Stepper(Host):
    """`acprop_stepper.Stepper`, with an engine, or the best that is installed."""

    def __init__(
        self,
        case: Case,
        enter: Callable[[np.ndarray], Any] = np.array,
        leave: Callable[[Any], np.ndarray] = np.array,
        **options: Any,
    ) -> None:
        import acprop_stepper

        super().__init__(case)
        self.enter, self.leave = enter, leave
        self.params = _first(case, enter)
        self.stepper = acprop_stepper.Stepper(case.container(self.params), **case.hyper, **options)
        if case.start is not None:
            acprop_stepper.import_state(self.stepper, *_start(case))

    def put(self, params: Leaves) -> None:
        for leaf, x in params.items():
            self.params[leaf][...] = self.enter(x)

    def step(self, grads: Leaves) -> None:
        self.stepper.step(self.case.container({leaf: self.enter(g) for leaf, g in grads.items()}))

    def read(self) -> dict[str, Record]:
        _, mu, nu, carry = self.stepper.state
        return self.records(self.leave, None, self.stepper.params, mu, nu, carry)

    @property
    def count(self) -> int:
        return self.stepper.state.count

    def save(self, path: Path) -> None:
        import acprop_stepper

        save(path, *acprop_stepper.export_state(self.stepper))

    def resume(self, path: Path) -> None:
        import acprop_stepper

        acprop_stepper.import_state(self.stepper, *load(path, **self.callables()))


# Arrays of each library, from NumPy and to NumPy


def readonly(x: np.ndarray) -> np.ndarray:
    x = np.array(x)
    x.flags.writeable = False
    return x


def to_strict(x: np.ndarray) -> Any:
    import array_api_strict

    return array_api_strict.asarray(x)


def from_strict(x: Any) -> np.ndarray:
    # its arrays pass their memory to np.asarray only from 2024.12 on, hence the buffer within
    return np.array(getattr(x, "_array", x))


def to_torch(x: np.ndarray) -> Any:
    import torch

    if x.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(np.array(x, np.float32)).to(torch.bfloat16)
    return torch.from_numpy(np.array(x))


def to_mlx(x: np.ndarray) -> Any:
    import mlx.core

    return mlx.core.array(x, getattr(mlx.core, x.dtype.name))  # without a dtype it makes float32 of float64


def from_mlx(x: Any) -> np.ndarray:
    import mlx.core

    if x.dtype == mlx.core.bfloat16:
        return np.array(x.astype(mlx.core.float32)).astype(ml_dtypes.bfloat16)
    return np.array(x)


def to_cuda(x: np.ndarray) -> Any:
    return to_torch(x).cuda()


def from_torch(x: Any) -> np.ndarray:
    import torch

    if isinstance(x, int):
        return np.asarray(x)
    x = x.detach().cpu()
    if x.dtype == torch.bfloat16:
        return x.to(torch.float32).numpy().astype(ml_dtypes.bfloat16)
    return x.numpy().copy()


def _as_real(x: Any) -> Any:
    import torch

    return torch.view_as_real(x) if x.is_complex() else x


def to_jax(x: np.ndarray) -> Any:
    import jax

    return jax.numpy.asarray(x)


def to_dask(x: np.ndarray) -> Any:
    import dask.array

    return dask.array.from_array(x, chunks=tuple(max(2, -(-n // 4)) for n in x.shape))  # a few chunks along every axis


def from_dask(x: Any) -> np.ndarray:
    return np.array(x.compute(scheduler="synchronous") if hasattr(x, "compute") else x)


def to_cupy(x: np.ndarray) -> Any:
    import cupy

    return cupy.asarray(x)


def from_cupy(x: Any) -> np.ndarray:
    import cupy

    return cupy.asnumpy(x)


# Counts that are arrays


def numpy_count(n: int) -> Any:
    return np.asarray(n, dtype=np.int32)


def strict_count(n: int) -> Any:
    import array_api_strict

    return array_api_strict.asarray(n, dtype=array_api_strict.int64)


def torch_count(n: int) -> Any:
    import torch

    return torch.tensor(n)


# What the methods of the core are wrapped in


def jit(method: Any) -> Any:
    import jax

    return jax.jit(method)


def lazy(method: Any) -> Any:
    """Assert that the method of Dask arrays computes nothing, and compute what it returns."""
    import dask.base

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("the update computed something; it must stay lazy")

    def call(*args: Any) -> Any:
        with dask.base.config.set(scheduler=never):
            result = method(*args)
        return dask.base.persist(result, scheduler="synchronous")[0]  # or the graph grows from step to step

    return call


# What must be set while a backend runs


def _nothing(case: Case) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext()


@contextlib.contextmanager
def _jax_on(platform: str, case: Case) -> Iterator[None]:
    """Make arrays on a platform's first device; switch the 64-bit dtypes of JAX on if the case has any."""
    import jax

    wide = {"float64", "complex128"}
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", bool(wide & case.dtypes) or case.hyper.get("moment_dtype") in wide)
    try:
        with jax.default_device(jax.devices(platform)[0]):
            yield
    finally:
        jax.config.update("jax_enable_x64", before)


def _strict_flags(version: str, case: Case) -> contextlib.AbstractContextManager[Any]:
    """Have array-api-strict refuse all that a version of the standard does not promise."""
    import array_api_strict

    return array_api_strict.ArrayAPIStrictFlags(
        api_version=version, boolean_indexing=False, data_dependent_shapes=False, enabled_extensions=()
    )


# The rows of the reference suite


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One way to run ACProp.

    `begin` makes a host, `needs` are modules, `lacks` dtypes; `around` is in force while a host is used.
    `slow_steps`: 10,000 steps take minutes. `slow_start`: every run is compiled or scheduled anew, for 200 ms and more.
    `flushes`: numbers below the smallest normal one count as 0. `complex_as_real`: a complex parameter counts as two
    real ones, the convention of torch.optim.
    """

    name: str
    begin: Callable[[Case], Host]
    needs: tuple[str, ...] = ("numpy",)
    needs_gpu: bool = False
    lacks: tuple[str, ...] = ()
    around: Callable[[Case], contextlib.AbstractContextManager[Any]] = _nothing
    slow_steps: bool = False
    slow_start: bool = False
    flushes: bool = False
    complex_as_real: bool = False

    def __str__(self) -> str:
        return self.name

    @contextlib.contextmanager
    def host(self, case: Case) -> Iterator[Any]:
        """Give a host that has begun the case."""
        with self.around(case):
            with warnings.catch_warnings():
                # b1=0 without a clip explodes, and the suite wants to see by how much
                warnings.filterwarnings("ignore", ".*residual", UserWarning)
                host = self.begin(case)
            yield host

    def run(self, case: Case) -> Trajectory:
        """Return what each step of the case left."""
        with self.host(case) as host:
            return host.run()

    def cannot_run(self) -> str | None:
        """Return why this backend cannot run here, or None."""
        for module in self.needs:
            if importlib.util.find_spec(module) is None:
                return f"{module} is not installed"
        return _no_gpu(self.needs[0]) if self.needs_gpu else None

    def cannot_take(self, case: Case) -> str | None:
        """Return why this backend cannot take this case, or None."""
        if self.name == "strict_array_count" and _is_scheduled(case):
            return "array-api-strict refuses integer arrays together with floats, so a schedule must be written for it"
        if self.name == "torch_array_count" and _is_scheduled(case) and "float64" in case.dtypes:
            return "torch computes 0.1 / (integer tensor + 1.0), the schedule, in float32"
        if case.steps >= 10_000 and self.slow_steps:
            return "10,000 steps take minutes here; the shorter case is run"
        lacking = case.dtypes & set(self.lacks)
        return f"{self} has no {', '.join(sorted(lacking))}" if lacking else None

    def is_slow(self, case: Case) -> bool:
        """Return whether this case takes long here, and is like others or like those of faster backends."""
        compiles = self.slow_start or self.name.startswith("torch_fused")  # these for each new set of flags
        return (compiles and (case.random or case.steps > 15)) or (case.steps >= 10_000 and self.name != "numpy")


def _is_scheduled(case: Case) -> bool:
    return any(callable(case.hyper.get(name)) for name in ("learning_rate", "weight_decay"))


def _rows() -> Iterator[Backend]:
    part = functools.partial

    yield Backend(name="numpy", begin=Functional)
    yield Backend(name="numpy_readonly", begin=ReadOnly)
    yield Backend(name="numpy_array_count", begin=part(Functional, count=numpy_count))

    strict = part(Functional, enter=to_strict, leave=from_strict)
    of_strict = part(Backend, needs=("array_api_strict",), lacks=("float16", "bfloat16"))
    for year in ("2022", "2023", "2024", "2025"):
        yield of_strict(name=f"strict_{year}", begin=strict, around=part(_strict_flags, f"{year}.12"))
    yield of_strict(name="strict_array_count", begin=part(strict, count=strict_count))

    torch = part(Functional, leave=from_torch)
    yield Backend(name="torch", begin=part(torch, enter=to_torch), needs=("torch",))
    yield Backend(name="torch_array_count", begin=part(torch, enter=to_torch, count=torch_count), needs=("torch",))
    yield Backend(name="torch_cuda", begin=part(torch, enter=to_cuda), needs=("torch",), needs_gpu=True)

    mlx = part(Functional, enter=to_mlx, leave=from_mlx)
    yield Backend(name="mlx", begin=mlx, needs=("mlx",), lacks=("complex128",))

    # XLA on a CPU computes with flush-to-zero, coming in and going out
    of_jax = part(Backend, needs=("jax",), around=part(_jax_on, "cpu"), flushes=True)
    yield of_jax(name="jax_eager", begin=part(Functional, enter=to_jax), slow_steps=True)
    yield of_jax(name="jax_jit", begin=part(Functional, enter=to_jax, wrap=jit), slow_start=True)
    yield of_jax(name="jax_scan", begin=Scan, slow_start=True)
    jax_cuda = part(Backend, needs=("jax",), needs_gpu=True, around=part(_jax_on, "cuda"), slow_start=True)
    yield jax_cuda(name="jax_jit_cuda", begin=part(Functional, enter=to_jax, wrap=jit), slow_steps=True)

    dask = part(Functional, enter=to_dask, leave=from_dask, wrap=lazy)
    yield Backend(name="dask", begin=dask, needs=("dask",), slow_steps=True, slow_start=True)
    cupy = {"enter": to_cupy, "leave": from_cupy}
    of_cupy = part(Backend, needs=("cupy",), needs_gpu=True, lacks=("bfloat16",))
    yield of_cupy(name="cupy", begin=part(Functional, **cupy), slow_steps=True)
    yield of_jax(name="optax", begin=Optax, needs=("optax",), slow_start=True)
    yield jax_cuda(name="optax_cuda", begin=Optax, needs=("jax", "optax"), slow_steps=True)

    of_torch = part(Backend, needs=("torch",), complex_as_real=True)
    fused = part(TorchOptimizer, fused=True)
    complexes = ("complex64", "complex128")  # AdamW does not fuse these either
    yield of_torch(name="torch_optimizer", begin=part(TorchOptimizer, foreach=False))
    yield of_torch(name="torch_foreach", begin=part(TorchOptimizer, foreach=True))
    yield of_torch(name="torch_fused", begin=fused, needs=("torch", "numba"), lacks=complexes)
    yield of_torch(name="torch_fused_by_inductor", begin=fused, around=lambda _: without_numba(), lacks=complexes)
    yield of_torch(name="torch_differentiable", begin=part(TorchOptimizer, differentiable=True), slow_steps=True)
    for name, foreach in (("torch_capturable", False), ("torch_capturable_foreach", True)):
        begin = part(TorchOptimizer, capturable=True, foreach=foreach)
        yield of_torch(name=name, begin=begin, around=lambda _: capturable_on_cpu(), slow_steps=not foreach)
    on_cuda = part(of_torch, needs_gpu=True)
    of_cuda = part(TorchOptimizer, device="cuda")
    of_capturable = part(of_cuda, capturable=True)
    yield on_cuda(name="torch_optimizer_cuda", begin=part(of_cuda, foreach=False), slow_steps=True)
    yield on_cuda(name="torch_foreach_cuda", begin=part(of_cuda, foreach=True), slow_steps=True)
    yield on_cuda(name="torch_fused_cuda", begin=part(of_cuda, fused=True), lacks=complexes)
    yield on_cuda(name="torch_capturable_cuda", begin=part(of_capturable, foreach=False), slow_steps=True)
    yield on_cuda(name="torch_capturable_foreach_cuda", begin=part(of_capturable, foreach=True), slow_steps=True)
    yield on_cuda(name="torch_capturable_fused_cuda", begin=part(of_capturable, fused=True), lacks=complexes)

    guarded = part(Stepper, threads=2, nonfinite="raise", clip_norm=1e300)
    yield Backend(name="stepper_tiles", begin=part(Stepper, engine="tiles"))
    yield Backend(name="stepper_numba", begin=part(Stepper, engine="numba"), needs=("numba",))
    yield Backend(name="stepper_threads", begin=guarded)
    of_numba_cuda = part(of_cupy, needs=("cupy", "numba_cuda"))
    yield of_numba_cuda(name="stepper_cuda", begin=part(Stepper, engine="cuda", **cupy))
    yield of_cupy(name="stepper_cupy_tiles", begin=part(Stepper, engine="tiles", **cupy), slow_steps=True)


BACKENDS = {backend.name: backend for backend in _rows()}


def marks_of(backend: Backend, case: Case | None = None) -> list[Any]:
    """Return the marks of a test of this backend; if it cannot run here, one skips the test with the reason."""
    import pytest

    marks = [pytest.mark.gpu] if backend.needs_gpu else []
    if case is not None and backend.is_slow(case):
        marks.append(pytest.mark.slow)
    reason = backend.cannot_run()
    return marks if reason is None else [*marks, pytest.mark.skip(reason=reason)]


def on_every_backend() -> Any:
    """Return a decorator that parametrizes a test by `backend`."""
    import pytest

    parameters = [pytest.param(b, id=str(b), marks=marks_of(b)) for b in BACKENDS.values()]
    return pytest.mark.parametrize("backend", parameters)


@functools.cache
def _no_gpu(module: str) -> str | None:
    if module == "torch":
        import torch

        return None if torch.cuda.is_available() else "torch finds no CUDA device"
    if module == "jax":
        if importlib.util.find_spec("jax_plugins") is None:  # to ask JAX itself would start it, in each test session
            return "jax has no plugin for a CUDA device"
        import jax

        try:
            return None if jax.devices("cuda") else "jax finds no CUDA device"
        except RuntimeError as error:
            return f"jax finds no CUDA device: {error}"
    import cupy

    try:
        found = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"CuPy finds no CUDA device: {error}"
    return None if found else "CuPy finds no CUDA device"


# Private names of the packages


def without_numba() -> contextlib.AbstractContextManager[Any]:
    """Have the fused step of torch believe that Numba is not installed, so that torch.compile makes it."""
    from acprop_torch import _numba

    def has_numba() -> bool:  # a Mock would remember every call
        return False

    return mock.patch.object(_numba, "has_numba", has_numba)


def capturable_on_cpu() -> contextlib.AbstractContextManager[Any]:
    """Run on a CPU what a CUDA graph would capture. Torch refuses it there, because there is nothing to gain."""
    from acprop_torch import _private

    def supported() -> list[str]:
        return ["cpu"]

    return mock.patch.object(_private, "capturable_devices", supported)


def torch_tile() -> int:
    """Return the bytes that one list of tensors may have on a CPU, as `torch_tiles` sets them."""
    from acprop_torch import _rows

    return _rows._CPU_TILE


def torch_tiles(
    patch: "pytest.MonkeyPatch", lists: int, *, single: int | None = None, small: int | None = None
) -> None:
    """Set the bytes of one list of tensors on a CPU, of a tile of one tensor, and of a small tensor."""
    from acprop_torch import _rows

    for name, value in (("_CPU_TILE", lists), ("_TILE", single), ("_SMALL", small)):
        if value is not None:
            patch.setattr(_rows, name, value)


def torch_threads(patch: "pytest.MonkeyPatch", threads: int, least: int) -> None:
    """Have the fused step of torch use so many threads, each for at least so many elements."""
    import torch

    from acprop_torch import _numba

    patch.setattr(_numba, "_MIN_PER_THREAD", least)
    patch.setattr(_numba, "_CHUNK", least)
    patch.setattr(torch, "get_num_threads", lambda: threads)


def no_torch_tiles(patch: "pytest.MonkeyPatch") -> None:
    """Have the fused step of torch fail where it would step tiles without a compiler."""
    from acprop_torch import _fused

    patch.setattr(_fused, "prepare_tiles", None)


def engines_of(stepper: Any) -> list[str]:
    """Return the engines that a stepper runs, as its option calls them."""
    return [type(engine).__name__.lower() for engine in stepper._engines]


@contextlib.contextmanager
def numba_not_found() -> Iterator[None]:
    """Have Python find no Numba; what would use it fails."""
    from acprop_core import kernels
    from acprop_torch import _numba

    _numba.warn_of_torch_compile.cache_clear()

    def found(name: str, *args: Any) -> Any:
        return None if name == "numba" else find_spec(name, *args)

    find_spec = importlib.util.find_spec
    try:
        with (
            mock.patch.object(importlib.util, "find_spec", found),
            mock.patch.object(kernels, "why_no_numba", return_value="it is not installed"),
            mock.patch.object(_numba, "Compiled", None),
        ):
            yield
    finally:
        _numba.warn_of_torch_compile.cache_clear()


@contextlib.contextmanager
def numba_unusable() -> Iterator[None]:
    """Have Numba be installed, and fail."""
    from acprop_core import kernels
    from acprop_torch import _numba

    _numba.warn_of_torch_compile.cache_clear()
    why = "ImportError: Numba needs NumPy 1.26 or less"
    try:
        with mock.patch.object(kernels, "why_no_numba", return_value=why), mock.patch.object(_numba, "Compiled", None):
            yield
    finally:
        _numba.warn_of_torch_compile.cache_clear()


def fused_as_on_an_accelerator() -> contextlib.AbstractContextManager[Any]:
    """Run the fused step on a CPU as on an accelerator, where no value may be read."""
    from acprop_torch import _fused

    def prepare(batch: Any) -> Any:
        return None, _fused.prepare_on_accelerator(batch)

    return mock.patch.object(_fused, "prepare", prepare)


@contextlib.contextmanager
def lists_on_a_cpu() -> Iterator[None]:
    """Have foreach=True with numbers of the host, the default on accelerators, run on lists on a CPU too."""
    from acprop_core.adapt import Step
    from acprop_torch import _lists

    def in_lists(batch: Any, step: Any) -> None:
        _lists._in_lists(batch, Step(step.numbers, step.flags, _lists._namespace))

    with mock.patch.object(_lists, "in_tiles", in_lists):
        yield


def interrupted_kernel() -> contextlib.AbstractContextManager[Any]:
    """Have Ctrl-C come while Numba compiles the fused step of torch."""
    from acprop_core.kernels import cpu

    return mock.patch.object(cpu, "kernel_of", side_effect=KeyboardInterrupt)


def interrupted_after_kernel() -> contextlib.AbstractContextManager[Any]:
    """Have Ctrl-C come while the fused step of torch runs in Numba, so that Python handles it when that returns."""
    from acprop_core.kernels import cpu

    kernel_of = cpu.kernel_of

    def interrupted(*args: Any) -> Any:
        kernel = kernel_of(*args)

        def run(*arguments: Any) -> None:
            kernel(*arguments)
            raise KeyboardInterrupt

        return run

    return mock.patch.object(cpu, "kernel_of", interrupted)


def failing_torch_compile(error: type[BaseException], at: Any) -> contextlib.AbstractContextManager[Any]:
    """Have torch.compile raise where it would compile the fused step for this dtype."""
    import torch

    def compile(function: Any, **options: Any) -> Any:
        def run(rows: Any, *rest: Any) -> None:
            if rows[0].mu.dtype is at:
                raise error("no working compiler\nand more")
            function(rows, *rest)

        return run

    return mock.patch.object(torch, "compile", compile)


def torch_version() -> tuple[int, int]:
    """Return the version of torch that is installed, as far as its features depend on it."""
    import torch

    major, minor, *_ = torch.__version__.split(".")
    return int(major), int(minor)


def named(pairs: Iterable[tuple[str, Any]]) -> list[Any]:
    """Return named parameters as this torch takes them, which before 2.6 is without their names."""
    return [pair if torch_version() >= (2, 6) else pair[1] for pair in pairs]


def called(name: str, place: int) -> str:
    """Return what an error calls a parameter that was `named`, the one in this place of its group."""
    return f"parameter {name!r}" if torch_version() >= (2, 6) else f"parameter {place} of its group"


def torch_operation(patch: "pytest.MonkeyPatch", name: str, function: Any) -> None:
    """Replace an operation of the program that steps tiles."""
    from acprop_torch import _tiles

    patch.setattr(_tiles, "_OPERATIONS", _tiles._OPERATIONS._replace(**{name: function}))


def forget_compiled_torch_step() -> None:
    """Have torch compile the fused step anew."""
    from acprop_torch import _inductor

    _inductor._programs.clear()


def stepper_tiles(patch: "pytest.MonkeyPatch", tile: int, chunk: int | None = None) -> None:
    """Set the bytes of a tile of the stepper, and the elements of a chunk of its Numba engine."""
    from acprop_stepper import _tiles

    patch.setattr(_tiles, "TILE", tile)
    if chunk is not None and importlib.util.find_spec("numba") is not None:
        from acprop_stepper import _numba

        patch.setattr(_numba, "CHUNK", chunk)
        patch.setattr(_numba, "SHARE", 1)


def compensated(
    update: np.ndarray, param: np.ndarray, carry: np.ndarray, numbers: rule.Numbers
) -> tuple[np.ndarray, np.ndarray]:
    """Return what the rule adds to a 16-bit parameter for a float32 update, and the next carry."""

    class Rounding:
        abs, maximum, round = np.abs, np.maximum, np.round

        @staticmethod
        def rounded(x: np.ndarray) -> np.ndarray:
            return x.astype(param.dtype).astype(np.float32)

    wide, low = (x.astype(np.float32) for x in (param, carry)), rule.FORMATS[param.dtype.name]
    added, new = rule._compensated(update, *wide, numbers, low, Rounding)
    return added.astype(param.dtype), new.astype(param.dtype)
