"""16-bit memory through Numba: the bits that NumPy and ml_dtypes give, for all there is."""

import pytest

pytest.importorskip("torch")

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch

import acprop_torch
from acprop_core import ACProp
from acprop_core.adapt import Row, step_at
from acprop_core.kernels.element import Access
from acprop_core.kernels.sixteen_bits import access_to, is_readable
from acprop_stepper import Stepper
from cases import DTYPES
from hosts import engines_of, from_torch, no_torch_tiles, to_torch, torch_threads

# on a processor without conversions of its own float16 goes through tiles
SIXTEEN_BITS = [name for name in ("bfloat16", "float16") if is_readable(name, name)]
SPECIAL = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -3e-40, 6e-8, -6e-8, 2.0**-126, 65504, 65520, 3.3e38, -3.4e38]


def all_of(dtype: str) -> np.ndarray:
    """Return every number of a 16-bit dtype."""
    return np.arange(2**16, dtype=np.uint16).view(DTYPES[dtype])


def assert_same(got: np.ndarray, wanted: np.ndarray) -> None:
    """Hold that two arrays have the same bits, except those of NaN."""
    assert got.dtype == wanted.dtype
    nan = np.isnan(wanted.astype(np.float32))
    assert np.array_equal(np.isnan(got.astype(np.float32)), nan)
    kind = np.dtype(f"u{got.itemsize}")
    assert np.array_equal(got.view(kind)[~nan], wanted.view(kind)[~nan])


def around(numbers: np.ndarray) -> np.ndarray:
    """Return float32 numbers: these, what lies half-way between any two that follow each other, and the neighbours."""
    numbers = np.unique(numbers.astype(np.float32))  # sorted, NaN last and once
    between = 0.5 * numbers[1:].astype(np.float64) + 0.5 * numbers[:-1]
    bits = np.concatenate([numbers, between.astype(np.float32)]).view(np.uint32)
    return (bits + np.arange(-2, 3, dtype=np.int64).astype(np.uint32)[:, None]).reshape(-1).view(np.float32)


def loaded(numbers: np.ndarray, memory: Access) -> np.ndarray:
    """Widen numbers."""
    load = memory.load

    @numba.njit
    def run(array: Any) -> Any:
        result = np.empty(array.size, np.float32)
        for i in range(array.size):
            result[i] = load(array[i])
        return result

    return run(numbers.view(memory.dtype))


def stored(values: np.ndarray, memory: Access) -> tuple[np.ndarray, np.ndarray]:
    """Narrow float32 numbers, and return also what they then widen to."""
    dtype, _, store, rounded = memory

    @numba.njit
    def run(values: Any) -> Any:
        result, wide = np.empty(values.size, dtype), np.empty(values.size, np.float32)
        for i in range(values.size):
            result[i] = store(values[i])
            wide[i] = rounded(values[i])
        return result, wide

    return run(values)


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_every_number_is_widened_and_rounded_as_by_its_library(dtype: str) -> None:
    memory, _ = access_to(dtype, dtype)
    numbers = all_of(dtype)
    assert_same(loaded(numbers, memory), numbers.astype(np.float32))
    random = np.random.default_rng(0).integers(0, 2**32, 500_000, dtype=np.uint32).view(np.float32)
    values = np.concatenate([around(numbers), random, np.array(SPECIAL, np.float32)])
    result, wide = stored(values, memory)
    with np.errstate(all="ignore"):
        wanted = values.astype(DTYPES[dtype])
    assert_same(result.view(DTYPES[dtype]), wanted)
    assert_same(wide, wanted.astype(np.float32))
    back, _ = stored(numbers.astype(np.float32), memory)
    assert_same(back.view(DTYPES[dtype]), numbers)


def drawn(dtype: str, seed: int) -> np.ndarray:
    """Return every number of a dtype in random order, and again numbers around 1."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.permutation(all_of(dtype)), rng.normal(size=2**16).astype(DTYPES[dtype])])


@pytest.mark.parametrize("compensate", [False, True])
@pytest.mark.parametrize("moment_dtype", [None, "float16"])
@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_steps_have_the_bits_of_tiles(dtype: str, moment_dtype: str | None, compensate: bool) -> None:
    """Of all numbers there are: infinite, NaN, denormal, zeros of both signs; large enough to overflow in rounding."""
    hyper = {"learning_rate": 0.3, "clip_exponent": 0.25, "weight_decay": 0.01, "centering": "previous"}
    runs = []
    for engine in ("tiles", "numba"):
        params = {"w": drawn(dtype, 0), "small": drawn(dtype, 1)[::3].copy()}
        stepper = Stepper(params, **hyper, moment_dtype=moment_dtype, compensate=compensate, engine=engine)
        if {dtype, moment_dtype or dtype} <= {*SIXTEEN_BITS}:
            assert engines_of(stepper) == [engine]
        for t in range(4):
            stepper.step({"w": drawn(dtype, 2 + t), "small": drawn(dtype, 9 + t)[::3].copy()})
        runs.append((params, stepper.state))
    (expected, before), (got, after) = runs
    for name in expected:
        assert_same(got[name], expected[name])
        for column in ("mu", "nu", "carry"):
            if getattr(before, column) is not None:
                assert_same(getattr(after, column)[name], getattr(before, column)[name])


@pytest.mark.parametrize(("threads", "scale"), [(1, None), (2, 4.0)])
@pytest.mark.parametrize("compensate", [False, True])
@pytest.mark.parametrize("moment_dtype", ["float32", *SIXTEEN_BITS])
@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_torch_steps_have_the_bits_of_the_rule_in_numpy(
    dtype: str,
    moment_dtype: str,
    compensate: bool,
    threads: int,
    scale: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    no_torch_tiles(monkeypatch)
    torch_threads(monkeypatch, threads, least=1000)
    arrays = [drawn(dtype, 0)[:70_001], drawn(dtype, 1)[-5000:], drawn(dtype, 2)[:0]]
    tensors = [to_torch(x).requires_grad_() for x in arrays]
    kinds = DTYPES[moment_dtype], DTYPES[moment_dtype], DTYPES[dtype]
    kept = [[np.zeros(x.shape, kind) for kind in kinds] for x in arrays]
    reference = ACProp(0.3, clip_exponent=0.25, compensate=compensate)
    optimizer = acprop_torch.ACProp(
        tensors,
        lr=0.3,
        clip_exponent=0.25,
        moment_dtype=getattr(torch, moment_dtype),
        compensate=compensate,
        fused=True,
    )
    if scale is not None:
        optimizer.grad_scale = torch.tensor(scale)
    for t in range(3):
        step = step_at(reference, t, np)
        for i, (p, x) in enumerate(zip(tensors, arrays, strict=True)):
            grad = drawn(dtype, 3 + t)[: x.size]
            p.grad = to_torch(grad)
            mu, nu, carry = kept[i]
            with np.errstate(all="ignore"):
                grad = grad.astype(np.float32) / (scale or 1.0)
                update, *new = step(Row(x, grad, mu, nu, carry if compensate else None))
                arrays[i], kept[i] = x + update, [*new[:2], new[2] if compensate else carry]
        optimizer.step()
    for p, x, (mu, nu, carry) in zip(tensors, arrays, kept, strict=True):
        state = optimizer.state[p]
        assert_same(from_torch(p), x)
        assert_same(from_torch(state["exp_avg"]), mu)
        assert_same(from_torch(state["exp_avg_var"]), nu)
        assert not compensate or not state["carry"].numel() or state["carry"].any()
        assert_same(from_torch(state.get("carry", torch.zeros_like(p))), carry)


def test_processors_without_conversions_leave_float16_to_tiles() -> None:
    """LLVM would call a function that need not be there. Numba is told of such a processor before it is imported."""
    program = """
import numpy as np, ml_dtypes
from acprop_stepper import Stepper
from hosts import engines_of
for dtype, engine in ((np.float16, "tiles"), (ml_dtypes.bfloat16, "numba")):
    stepper = Stepper([np.ones(100, dtype)], compensate=True)
    stepper.step([np.ones(100, dtype)])
    assert engines_of(stepper) == [engine]
"""
    env = os.environ | {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    subprocess.run([sys.executable, "-c", program], check=True, env=env, cwd=Path(__file__).parent)
