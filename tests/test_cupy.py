"""CuPy's arrays in the stepper: without a device its logic, by fakes and in Numba's simulator; with one, on it."""

import os
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("cupy")

import cupy

from acprop_stepper import Stepper, _engines
from acprop_stepper._buffers import Buffer, tiles_of
from acprop_stepper._overlap import first_overlap
from hosts import BACKENDS, engines_of, marks_of

HYPER: dict[str, Any] = {"learning_rate": 0.01, "weight_decay": 0.1, "clip_exponent": 0.25}
ENGINES = {"cuda": BACKENDS["stepper_cuda"], "tiles": BACKENDS["stepper_cupy_tiles"]}
on_device = [pytest.param(name, marks=marks_of(backend)) for name, backend in ENGINES.items()]
with_numba_cuda = pytest.mark.parametrize("engine", on_device[:1])
on_each_engine = pytest.mark.parametrize("engine", on_device)


def device_array(dtype: Any, shape: tuple[int, ...] = (16,), offset: int = 0) -> Any:
    """Return a CuPy array of memory that is not there: enough for all but its values."""
    memory = cupy.cuda.UnownedMemory(1 << 20, 1 << 10, None, device_id=0)
    return cupy.ndarray(shape, dtype, memptr=cupy.cuda.MemoryPointer(memory, offset))


# without a device


def test_the_simulated_kernel_passes_the_suite_with_the_bits_of_a_cpu() -> None:
    for module in ("numba_cuda", "torch", "ml_dtypes"):
        pytest.importorskip(module)
    done = subprocess.run(
        [sys.executable, "cuda_simulated_stepper.py"],
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1"},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert re.search(r"^9 cases, \d{3,} launches$", done.stderr, re.MULTILINE)


def test_what_of_the_buffers_needs_no_device() -> None:
    small = [device_array(np.float32, shape, 128 * i) for i, shape in enumerate([(3,), (), (2, 4)])]
    large, strided = device_array(np.float32, (100,), 512), device_array(np.float32, (4, 4), 448).T
    params = [*small, large, strided]
    moments = [device_array(np.float32, (128,)) for _ in range(2)]
    buffer = Buffer(range(5), params, *moments, None, False, cupy)
    assert buffer.is_alike()
    assert not Buffer([0], [device_array(np.float16)], *moments, None, False, cupy).is_alike()
    tiles = tiles_of(buffer, 100, 50)
    assert [(tile.first, tile.last, tile.start, tile.stop) for tile in tiles] == [
        (0, 3, 0, 12),
        (3, 4, 12, 112),
        (4, 5, 112, 128),
    ]
    assert tiles[1].gather(params, cupy).data.ptr == large.data.ptr
    assert tiles[2].gather(params, cupy).strides == strided.strides
    assert buffer.kept(2)[0].shape == (2, 4)
    assert first_overlap([(str(i), x, True) for i, x in enumerate(params)], cupy) is None


def test_the_engine_is_for_contiguous_arrays_of_its_dtypes() -> None:
    pytest.importorskip("numba_cuda")
    from acprop_stepper._cuda import Cuda

    def buffer(param: Any, moments: Any) -> Buffer:
        return Buffer([0], [param], moments, moments, None, False, cupy)

    wide, narrow, double = (device_array(dtype) for dtype in (np.float32, np.float16, np.float64))
    assert Cuda.fits(buffer(wide, wide))
    assert Cuda.fits(buffer(narrow, wide))
    assert Cuda.fits(buffer(double, double))
    assert not Cuda.fits(buffer(wide, double))
    assert not Cuda.fits(buffer(device_array(np.complex64), wide))
    assert not Cuda.fits(buffer(device_array(np.float32, (4, 4)).T, wide))
    assert not Cuda.fits(buffer(device_array(np.float32, (4,), offset=2), wide))


class Params(types.SimpleNamespace):
    """What the choice of an engine asks of a buffer, and not more."""

    device = types.SimpleNamespace(compute_capability="100")


def choose(engine: str | None, monkeypatch: pytest.MonkeyPatch, why: str | None) -> list[str]:
    asked = []

    def why_no_numba_cuda(capability: tuple[int, int]) -> str | None:
        asked.append(capability)
        return why

    monkeypatch.setattr(_engines, "why_no_numba_cuda", why_no_numba_cuda)
    monkeypatch.setattr(_engines, "Tiles", lambda buffer: "tiles")
    _engines.check_engine(engine, cupy)
    chosen = _engines.engines_of([types.SimpleNamespace(mu=Params())], engine, cupy, 1)
    assert asked == ([] if engine == "tiles" else [(10, 0)])
    return chosen


def test_without_numba_cuda_arrays_go_by_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose("tiles", monkeypatch, None) == ["tiles"]
    assert choose(None, monkeypatch, _engines.NO_CUDA) == ["tiles"]
    with pytest.raises(ModuleNotFoundError, match="engine is 'cuda', which needs numba-cuda: python -m pip"):
        choose("cuda", monkeypatch, _engines.NO_CUDA)
    with pytest.raises(RuntimeError, match="engine is 'cuda', but it is too old; repair it, or use engine='tiles'"):
        choose("cuda", monkeypatch, "it is too old")
    with pytest.warns(RuntimeWarning, match="it is too old; continuing without it, which is slower"):
        assert choose(None, monkeypatch, "it is too old") == ["tiles"]


def test_an_engine_for_numpy_is_refused() -> None:
    with pytest.raises(ValueError, match="engine is 'numba'; for CuPy arrays use 'tiles' or 'cuda', or None"):
        _engines.check_engine("numba", cupy)


# with a device


@pytest.fixture
def other_stream() -> Iterator[Any]:
    with cupy.cuda.Stream(non_blocking=True) as stream:
        yield stream


def run(engine: str, steps: int = 3) -> tuple[Any, list[Any]]:
    rng = np.random.default_rng(0)
    params = [cupy.asarray(rng.standard_normal(n).astype(np.float32)) for n in (1000, 3, 20_000)]
    stepper = Stepper(params, **HYPER, engine=engine)
    for _ in range(steps):
        stepper.step([cupy.asarray(rng.standard_normal(x.shape).astype(np.float32)) for x in params])
    return stepper, params


@on_each_engine
def test_an_engine_on_a_device_leaves_what_numpy_does(engine: str) -> None:
    stepper, params = run(engine)
    assert engines_of(stepper) == [engine]
    rng = np.random.default_rng(0)
    expected = [rng.standard_normal(n).astype(np.float32) for n in (1000, 3, 20_000)]
    other = Stepper(expected, **HYPER, engine="tiles")
    for _ in range(3):
        other.step([rng.standard_normal(x.shape).astype(np.float32) for x in expected])
    for x, y in zip(params, expected, strict=True):
        if engine == "cuda":  # the bits of a CPU: no product and sum are contracted
            np.testing.assert_array_equal(cupy.asnumpy(x), y)
        else:
            np.testing.assert_allclose(cupy.asnumpy(x), y, rtol=1e-6)


@on_each_engine
def test_a_step_is_on_the_current_stream(engine: str, other_stream: Any) -> None:
    _, expected = run(engine)
    slow = cupy.ones((4096, 4096), np.float32)
    for _ in range(4):
        slow = slow @ slow * 1e-4  # the device is busy when gradients and steps are queued
    _, params = run(engine)
    other_stream.synchronize()
    for x, y in zip(params, expected, strict=True):
        np.testing.assert_array_equal(cupy.asnumpy(x), cupy.asnumpy(y))


@with_numba_cuda
def test_gradients_elsewhere_strided_or_absent(engine: str) -> None:
    def stepped(engine: str) -> list[np.ndarray]:
        rng = np.random.default_rng(1)
        params = [cupy.zeros((50, 4), np.float32), cupy.zeros(7, np.float32)]
        stepper = Stepper(params, **HYPER, engine=engine)
        for t in range(4):
            g = cupy.asarray(rng.standard_normal((4, 50)).astype(np.float32)).T
            stepper.step([g if t % 2 else g.copy(order="C"), None if t == 2 else cupy.ones(7, np.float32)])
        return [cupy.asnumpy(x) for x in params]

    for x, y in zip(stepped("cuda"), stepped("tiles"), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)


@with_numba_cuda
def test_a_step_is_one_launch(engine: str) -> None:
    torch = pytest.importorskip("torch")  # its profiler sees the kernels of every library
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    stepper, params = run(engine)
    grads = [cupy.ones_like(x) for x in params]
    stepper.step(grads)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        stepper.step(grads)
        cupy.cuda.get_current_stream().synchronize()
        torch.cuda.synchronize()
    kernels = [x for x in profiler.events() if x.device_type == torch.autograd.DeviceType.CUDA]
    assert len([x for x in kernels if not x.name.startswith(("Memcpy", "Memset"))]) == 1
