"""The CuPy engine: without a device its kernel as CuPy's fusion traces it; with one, the whole suite (nox -s gpu)."""

import pytest

pytest.importorskip("cupy")

import re
from typing import Any

import cupy
import numpy as np

import acprop_stepper._engines as engines
from acprop_core import ACProp
from acprop_stepper._memory import first_overlap


def device_array(dtype: Any, shape: tuple[int, ...] = (16,), offset: int = 0) -> Any:
    """Return a CuPy array of memory that is not there: enough to trace with."""
    memory = cupy.cuda.UnownedMemory(1 << 20, 1 << 10, None, device_id=0)
    return cupy.ndarray(shape, dtype, memptr=cupy.cuda.MemoryPointer(memory, offset))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("hyper", [{}, {"clip_exponent": 0.25}, {"b1": 0.1, "b2": 0.0, "centering": "previous"}])
@pytest.mark.parametrize("decay", [False, True])
def test_cupy_fuses_the_rule_into_one_kernel(dtype: Any, hyper: dict[str, Any], decay: bool) -> None:
    thread_local = pytest.importorskip("cupy._core._fusion_thread_local").thread_local
    k, _, _ = ACProp(**hyper).at(3, np).numbers_for(dtype)
    traced = []

    class Recording:
        """CuPy, but for `fuse`, which keeps the operations of the traced function."""

        def __getattr__(self, name: str) -> Any:
            return getattr(cupy, name)

        def fuse(self, kernel_name: str) -> Any:
            def decorate(function: Any) -> Any:
                def record(*arguments: Any) -> Any:
                    function(*arguments)
                    traced.append(str(thread_local.history))

                return cupy.fuse(kernel_name=kernel_name)(record)

            return decorate

    kernel = engines.fused_step(k, decay, Recording())
    try:
        kernel(*(device_array(dtype) for _ in range(4)), *engines.scalars_of(k, 1.0, dtype))
    except cupy.cuda.runtime.CUDARuntimeError:
        assert not cupy.is_available()  # the launch, which only a device can do
    (operations,) = traced
    assert operations.count("cupy_copy") == 3  # parameter and two moments, in the one kernel
    # scalars that meet scalars would do so in half precision
    assert set(re.findall(r"(?:float|int|bool)\d*", operations)) == {np.dtype(dtype).name}


def test_what_of_the_engine_needs_no_device() -> None:
    small = [device_array(np.float32, shape, 128 * i) for i, shape in enumerate([(3,), (), (2, 4)])]
    large, strided = device_array(np.float32, (100,), 512), device_array(np.float32, (4, 4), 448).T
    params = [*small, large, strided]
    moments = [device_array(np.float32, (128,)) for _ in range(2)]
    buffer = engines.Buffer(range(5), params, *moments, None, False, cupy)
    assert engines.Cupy.fits(buffer)
    assert not engines.Cupy.fits(engines.Buffer([0], [device_array(np.float16)], *moments, None, False, cupy))
    tiles = engines.tiles_of(buffer, 100, 50)
    assert [(tile.first, tile.last, tile.start, tile.stop) for tile in tiles] == [
        (0, 3, 0, 12),
        (3, 4, 12, 112),
        (4, 5, 112, 128),
    ]
    assert engines.gather(params, tiles[1], cupy).data.ptr == large.data.ptr
    assert engines.gather(params, tiles[2], cupy).strides == strided.strides
    assert buffer.kept(2)[0].shape == (2, 4)
    assert first_overlap([(str(i), x, True) for i, x in enumerate(params)], cupy) is None
