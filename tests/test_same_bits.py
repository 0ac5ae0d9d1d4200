"""The same bits: over 1,000 steps, parameters, moments and carries are those of the functional core on NumPy.

`CASES` are runs on leaves of all dtypes and of several shapes, with zeros of both signs, subnormal, huge and infinite
numbers and NaN. The options of any two of their columns meet in some case. A `Way` is a line of the table in
docs/guarantees.md: a backend of the harness, and the cases that it runs. Backends that are not in the table are in
`OTHERS`, with the reason. A NaN equals any NaN, because IEEE 754 does not say which of two operands' it is.
"""

import functools
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import hosts
from acprop_core import ACProp
from acprop_core.adapt import Row, Step, rounded_root
from acprop_core.rule import Hyperparameters, flags_of, numbers_of
from agreement import Record
from cases import CORNERS, DTYPES, Case, growing, inverse
from hosts import BACKENDS, Backend, Host, marks_of

ROOT = Path(__file__).parents[1]
STEPS, EVERY = 1_000, 10  # the bits are compared after every tenth step

REAL = {"w": ("float32", (2, 17)), "scalar": ("float32", ()), "empty": ("float32", (0, 3)), "wide": ("float64", (17,))}
SHORT = {"half": ("float16", (17,)), "brain": ("bfloat16", (17,))}
MASK = {"w": True, "scalar": False, "empty": True, "wide": True, "half": False, "brain": True}


@dataclass(frozen=True, eq=False)
class Bits(Case):
    """A case on leaves of several dtypes. Its parameters go where the steps lead them."""

    steps: int = STEPS
    leaves: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=lambda: REAL | SHORT)

    def decays(self, leaf: str) -> bool:
        mask = self.hyper.get("mask")
        return "weight_decay" in self.hyper and (mask is None or mask[leaf])

    @property
    def free(self) -> bool:
        return True

    def grads(self, leaf: str) -> np.ndarray:
        return _special(self.name, leaf, self.leaves[leaf], STEPS)[: self.steps]

    def params(self, leaf: str) -> np.ndarray:
        return _special(self.name + "-params", leaf, self.leaves[leaf], 1)

    def without(self, lacks: Sequence[str], steps: int) -> "Bits":
        """Return so many steps of the case on the leaves of other dtypes."""
        leaves = {leaf: kind for leaf, kind in self.leaves.items() if kind[0] not in lacks}
        hyper = dict(self.hyper)
        if "mask" in hyper:
            hyper["mask"] = {leaf: hyper["mask"][leaf] for leaf in leaves}
        return Bits(self.name, hyper, leaves, steps=steps)


@functools.lru_cache(maxsize=64)
def _special(name: str, leaf: str, kind: tuple[str, tuple[int, ...]], steps: int) -> np.ndarray:
    """Return noise in which each of the first elements is, at every other step, a number with a trap."""
    dtype, shape = kind
    rng = np.random.default_rng([*name.encode(), *leaf.encode()])
    real = DTYPES[dtype]
    limits = ml_dtypes.finfo(real)
    tiny, huge = float(limits.smallest_normal), float(limits.max)
    x = rng.normal(size=(steps, int(np.prod(shape)))).astype(real)
    traps = (0.0, -0.0, float(limits.smallest_subnormal), tiny, -tiny / 2, 1e-15, 1e4, huge, -huge / 2)
    with np.errstate(all="ignore"):
        for column, trap in zip(x.T, traps, strict=False):
            column[...] = np.where(rng.random(steps) < 0.5, column * real.type(trap), real.type(trap))
    if x.shape[1] > len(traps) + 3 and steps > 1:
        x[::7, len(traps)] = 0.0
        x[steps // 2 :, len(traps) + 1] = np.inf
        x[steps // 2 :, len(traps) + 2] = np.nan
    return x.reshape(steps, *shape)


CORNER_HYPERS: dict[str, Any] = {"acprop": {}, "acprop-previous": {"centering": "previous"}, **CORNERS}
DECAYS: dict[str, Any] = {
    "plain": {},
    "mask": {"weight_decay": 0.1, "mask": MASK},
    "schedules": {"weight_decay": growing, "learning_rate": inverse},
}
MORE: list[Any] = [
    {},
    {"b1": 0.3, "b2": 0.2},
    {"eps": 0.0, "eps_root": 1e-8},
    {"b1": 0.0},
    {"eps": 1e-3},
    {"b2": 0.99999},
]


def _cases() -> Iterator[Bits]:
    """Yield each corner with each decay, clipped or not, compensated or not."""
    # The rate is high, so that a parameter shows the last bit of an update.
    for i, (corner, hyper) in enumerate(CORNER_HYPERS.items()):
        for j, (decay, options) in enumerate(DECAYS.items()):
            clip = {"clip_exponent": 0.25} if (i + j) % 2 == 0 else {}
            compensate = {"compensate": True} if (i // 2 + j) % 2 else {}
            name = "_".join([corner, decay, *(["clip"] if clip else []), *(["compensated"] if compensate else [])])
            more = MORE[(i + 2 * j) % len(MORE)]
            yield Bits(name, {"learning_rate": 0.5, **hyper, **options, **clip, **compensate, **more})


CASES = {case.name: case for case in _cases()}


def _third(k: int) -> list[str]:
    """Return the names of a third of the cases, one of each corner; 0, 1 and 2 give all of them."""
    return [name for i, name in enumerate(CASES) if (i + i // 3) % 3 == k]


def _sixth(k: int) -> list[str]:
    """Return the names of a sixth of the cases, for what is slow; 0 to 5 give all of them."""
    return _third(k // 2)[k % 2 :: 2]


# The table

DTYPES_OF_COLUMNS = ("float32", "float64", "float16, bfloat16")


@dataclass(frozen=True)
class Way:
    """A line of the table: a backend with the bits of NumPy in these cases, except in the dtypes of these columns."""

    label: str
    backend: Backend
    cases: Sequence[str]
    steps: int = STEPS
    unequal: tuple[str, ...] = ()


class _CompiledStep(hosts.TorchOptimizer):
    """The optimizer with its whole step compiled by torch."""

    def __init__(self, case: Case) -> None:
        import torch

        super().__init__(case)
        self.optimizer.step = torch.compile(self.optimizer.step)  # type: ignore[method-assign]


def _ways() -> Iterator[Way]:
    part = functools.partial
    # Torch computes the numbers of a step in float64, on tensors. Its `expm1` and `pow` round otherwise than the C
    # library's now and then, which float64 parameters show.
    traced = part(Way, unequal=("float64",))
    of_torch = part(Backend, needs=("torch",), complex_as_real=True)
    yield Way("functional core on NumPy, `count` an array", BACKENDS["numpy_array_count"], _third(0))
    yield Way("functional core on array-api-strict", BACKENDS["strict_2025"], _third(1)[:1])
    yield Way("functional core on Dask (30 steps)", BACKENDS["dask"], _third(2)[:1], 30)
    yield Way("functional core on PyTorch", BACKENDS["torch"], _third(0))
    unscheduled = [name for name in _sixth(2) if "schedules" not in name]  # torch computes 1.0 + an integer in float32
    yield traced("functional core on PyTorch, `count` a tensor", BACKENDS["torch_array_count"], unscheduled)
    yield Way("`acprop_torch`", of_torch(name="torch_default", begin=hosts.TorchOptimizer), _sixth(5))
    yield Way("`acprop_torch`, `foreach=False`", BACKENDS["torch_optimizer"], _third(1))
    yield Way("`acprop_torch`, `foreach=True`", BACKENDS["torch_foreach"], _sixth(4))
    yield Way("`acprop_torch`, `fused=True`, by Numba", BACKENDS["torch_fused"], _third(2))
    yield Way("`acprop_torch`, `fused=True`, by Inductor", BACKENDS["torch_fused_by_inductor"], ["acprop_plain_clip"])
    yield traced("`acprop_torch`, `differentiable=True`", BACKENDS["torch_differentiable"], _sixth(1))
    yield traced("`acprop_torch`, `capturable=True`", BACKENDS["torch_capturable"], _sixth(3))
    yield traced("`acprop_torch`, `capturable=True`, lists", BACKENDS["torch_capturable_foreach"], _sixth(4))
    compiled = of_torch(name="torch_compiled_step", begin=_CompiledStep)
    # and the compiler does not round the update to 16 bits before it adds it
    unequal = ("float64", "float16, bfloat16")
    yield Way("`acprop_torch`, `torch.compile(optimizer.step)`", compiled, ["acprop_plain_clip"], unequal=unequal)
    yield Way("`Stepper`, tiles", BACKENDS["stepper_tiles"], _third(0) + _third(1))
    yield Way("`Stepper`, Numba", BACKENDS["stepper_numba"], _third(2))
    threads = Backend(name="stepper_two_threads", begin=part(hosts.Stepper, threads=2))
    yield Way("`Stepper`, `threads=2`", threads, _third(2))


WAYS = {way.label: way for way in _ways()}

# Backends of the harness that are not in the table, with the reason.
OTHERS = {
    "numpy": "the reference",
    "numpy_readonly": "the reference, with a check that nothing is written",
    **dict.fromkeys(
        ("strict_2022", "strict_2023", "strict_2024", "strict_array_count"), "arrays of NumPy, as strict_2025"
    ),
    **dict.fromkeys(
        ("jax_eager", "jax_jit", "jax_scan", "optax"), "XLA flushes subnormal numbers, and has its own libm"
    ),
    "mlx": "not compared yet: it was not installed where the table was made",
    "stepper_threads": "refuses infinities; here it is stepper_two_threads",
}


# Bits


def _bits(records: dict[str, Record]) -> dict[str, bytes]:
    """Return a digest of what a step left of each leaf: parameter, moments and carry."""
    digests = {}
    for leaf, (_, *arrays) in records.items():
        digest = hashlib.blake2b(digest_size=8)
        for x in arrays:
            if x is not None:
                digest.update(np.where(np.isnan(x), np.zeros((), x.dtype), x).tobytes() + np.isnan(x).tobytes())
        digests[leaf] = digest.digest()
    return digests


def _run(host: Host, case: Bits) -> Iterator[dict[str, bytes]]:
    """Take the steps of a case, from its parameters on, and yield the bits of every tenth."""
    grads = {leaf: case.grads(leaf) for leaf in case.leaves}
    host.put({leaf: case.params(leaf)[0, ...] for leaf in case.leaves})
    for t in range(case.steps):
        with np.errstate(all="ignore"):  # the core on NumPy warns of overflow, and infinity minus infinity
            host.step({leaf: x[t, ...] for leaf, x in grads.items()})
            if (t + 1) % EVERY == 0:
                yield _bits(host.read())


@functools.cache
def _of_numpy(name: str) -> list[dict[str, bytes]]:
    case = CASES[name]
    with BACKENDS["numpy"].host(case) as host:
        return list(_run(host, case))


def _check(way: Way, name: str) -> None:
    case = CASES[name].without((*way.backend.lacks, *", ".join(way.unequal).split(", ")), way.steps)
    with way.backend.host(case) as host:
        found = list(_run(host, case))
    assert len(found) * EVERY == way.steps
    for t, (bits, expected) in enumerate(zip(found, _of_numpy(name), strict=False)):
        apart = [leaf for leaf in case.leaves if bits[leaf] != expected[leaf]]
        assert not apart, f"after step {EVERY * (t + 1)} there are other bits in {', '.join(apart)}"


def _parameters() -> Iterator[Any]:
    for way in WAYS.values():
        for i, name in enumerate(way.cases):
            slow = [pytest.mark.slow] if i else []
            yield pytest.param(way, name, id=f"{way.backend}-{name}", marks=[*marks_of(way.backend), *slow])


@pytest.mark.parametrize(("way", "name"), list(_parameters()))
def test_same_bits(way: Way, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way.backend.name.startswith("stepper"):
        hosts.stepper_tiles(monkeypatch, tile=64, chunk=5)  # several tiles and chunks, so that threads share the work
    _check(way, name)


def test_any_two_options_meet() -> None:
    parts = [name.split("_") for name in CASES]
    rows = [(corner, decay, "clip" in others, "compensated" in others) for corner, decay, *others in parts]
    for i, j in itertools.combinations(range(4), 2):
        pairs = {(row[i], row[j]) for row in rows}
        assert pairs == {*itertools.product({row[i] for row in rows}, {row[j] for row in rows})}


def test_every_backend_is_accounted_for() -> None:
    in_table = {way.backend.name for way in WAYS.values()}
    devices = {name for name, backend in BACKENDS.items() if backend.needs_gpu}
    assert not in_table & OTHERS.keys()
    assert BACKENDS.keys() - in_table - devices == OTHERS.keys()


def test_the_page_has_the_table() -> None:
    def cell(way: Way, dtypes: str) -> str:
        lacks = {*dtypes.split(", ")} <= {*way.backend.lacks}
        return "no" if dtypes in way.unequal else ("has none" if lacks else "yes")

    rows = ["| " + " | ".join([way.label, *(cell(way, x) for x in DTYPES_OF_COLUMNS)]) + " |" for way in WAYS.values()]
    assert "\n".join(rows) in (ROOT / "docs" / "guarantees.md").read_text()


# What the cases leave out


@pytest.mark.parametrize("foreach", [False, True, None])
@pytest.mark.parametrize("options", [{"l2": True, "weight_decay": 0.1}, {"maximize": True}])
@pytest.mark.parametrize("asynchronous", [True, False])
def test_options_of_torch_alone(options: dict[str, Any], asynchronous: bool, foreach: bool | None) -> None:
    """The core does not have them, so the reference is the rule itself on NumPy."""
    torch = pytest.importorskip("torch")
    acprop_torch = pytest.importorskip("acprop_torch")
    grads = _special("torch-alone", "w", REAL["w"], STEPS)
    param, mu, nu = np.ones_like(grads[0]), np.zeros_like(grads[0]), np.zeros_like(grads[0])
    w = torch.ones(param.shape, requires_grad=True)
    hyper = Hyperparameters(clip_exponent=0.25, asynchronous=asynchronous, **options)
    own = {"decoupled_weight_decay": False, "weight_decay": 0.1} if "l2" in options else options
    optimizer = acprop_torch.ACProp([w], clip_exponent=0.25, asynchronous=asynchronous, foreach=foreach, **own)
    for t, grad in enumerate(grads):
        with np.errstate(all="ignore"):
            update, mu, nu, _ = Step(numbers_of(hyper, t, np), flags_of(hyper), np)(Row(param, grad, mu, nu))
            param = param + update
        w.grad = torch.from_numpy(grad.copy())
        optimizer.step()
    state = optimizer.state[w]
    for ours, theirs in ((w, param), (state["exp_avg"], mu), (state["exp_avg_var"], nu)):
        np.testing.assert_array_equal(ours.detach().numpy(), theirs)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("flags", [{}, {"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
def test_any_layout(flags: dict[str, Any], dtype: str) -> None:
    torch = pytest.importorskip("torch")
    acprop_torch = pytest.importorskip("acprop_torch")
    rng = np.random.default_rng(0)
    grads = rng.normal(size=(100, 3, 4, 5)).astype(dtype)
    core = ACProp(clip_exponent=0.25)
    params: Any = np.ones((3, 4, 5), dtype)
    state = core.init(params)
    some = torch.ones((5, 3, 8), dtype=getattr(torch, dtype))
    tensors = [some.clone().permute(1, 2, 0)[:, ::2], some.clone().permute(1, 2, 0)[:, :4].contiguous()]
    optimizer = acprop_torch.ACProp(
        [x.requires_grad_() for x in map(torch.Tensor.detach, tensors)], clip_exponent=0.25, **flags
    )
    leaves = optimizer.param_groups[0]["params"]
    for grad in grads:
        updates, state = core.update(grad, state, params)
        params = core.apply(params, updates)
        for x in leaves:
            x.grad = torch.from_numpy(grad.copy())
        optimizer.step()
    for x in leaves:
        assert x.detach().numpy().tobytes() == params.tobytes()


# The square root of torch


def _radicands(dtype: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    limits = np.finfo(dtype)
    x = (rng.uniform(1.0, 4.0, 50_000) * 2.0 ** rng.integers(limits.minexp, limits.maxexp - 2, 50_000)).astype(dtype)
    return np.concatenate([x, np.array([0.0, -0.0, np.inf, limits.smallest_subnormal, limits.max, limits.tiny], dtype)])


ROOTS = {
    "plain": lambda x, torch: rounded_root(x, x.sqrt()),
    "every second": lambda x, torch: rounded_root(x.repeat_interleave(2)[::2], x.repeat_interleave(2)[::2].sqrt()),
    "over something": lambda x, torch: rounded_root(x, torch.ones_like(x)),
    "followed by autograd": lambda x, torch: rounded_root(x.requires_grad_(), x.sqrt()).detach(),
    "a parameter": lambda x, torch: rounded_root(torch.nn.Parameter(x), torch.nn.Parameter(x).sqrt()).detach(),
    "a subclass": lambda x, torch: rounded_root(*[x.as_subclass(type("Own", (torch.Tensor,), {}))] * 2).as_subclass(
        torch.Tensor
    ),
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", ROOTS)
def test_the_root_of_torch_is_correctly_rounded(kind: str, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    x = _radicands(dtype)
    assert ROOTS[kind](torch.from_numpy(x.copy()), torch).numpy().tobytes() == np.sqrt(x).tobytes()


def test_the_root_within_a_transformation_or_without_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    x = _radicands("float32")
    tensor = torch.from_numpy(x)

    def root(x: Any) -> Any:
        return rounded_root(x, x.sqrt())

    assert torch.func.vmap(root)(tensor).numpy().tobytes() == np.sqrt(x).tobytes()
    assert torch.func.grad_and_value(lambda x: root(x).sum())(tensor[:9])[1].shape == ()

    def numpy(*_: Any) -> Any:
        raise RuntimeError("Numpy is not available")

    monkeypatch.setattr(torch.Tensor, "numpy", numpy)
    found = root(tensor)
    monkeypatch.undo()
    assert found.numpy().tobytes() == np.sqrt(x).tobytes()


def test_derivatives_of_the_root() -> None:
    torch = pytest.importorskip("torch")
    x = torch.rand(8, dtype=torch.float64) + 0.5

    def root(x: Any) -> Any:
        return rounded_root(x, x.sqrt())

    assert torch.autograd.gradcheck(root, x.clone().requires_grad_(), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(root, x.clone().requires_grad_())
