"""The CuPy engine: without a device its kernel as CuPy's fusion traces it; with one, the whole suite (nox -s gpu)."""

import pytest

pytest.importorskip("cupy")

import re
from typing import Any

import cupy
import numpy as np

from acprop_core import rule
from acprop_stepper import _cupy
from acprop_stepper._buffers import Buffer, tiles_of
from acprop_stepper._overlap import first_overlap


def device_array(dtype: Any, shape: tuple[int, ...] = (16,), offset: int = 0) -> Any:
    """Return a CuPy array of memory that is not there: enough to trace with."""
    memory = cupy.cuda.UnownedMemory(1 << 20, 1 << 10, None, device_id=0)
    return cupy.ndarray(shape, dtype, memptr=cupy.cuda.MemoryPointer(memory, offset))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("hyper", [{}, {"clip_exponent": 0.25}, {"b1": 0.1, "b2": 0.0, "centering": "previous"}])
@pytest.mark.parametrize("decay", [False, True])
def test_cupy_fuses_the_rule_into_one_kernel(dtype: Any, hyper: dict[str, Any], decay: bool) -> None:
    thread_local = pytest.importorskip("cupy._core._fusion_thread_local").thread_local
    options = rule.Hyperparameters(weight_decay=0.1 if decay else 0.0, **hyper)
    numbers = rule.cast(rule.numbers_of(options, 3, np), dtype, float(np.finfo(dtype).tiny), np)
    traced = []

    class Recording:
        """CuPy with another `fuse`, which keeps the operations of the traced function."""

        def __getattr__(self, name: str) -> Any:
            return getattr(cupy, name)

        def fuse(self, kernel_name: str) -> Any:
            def decorate(function: Any) -> Any:
                def record(*arguments: Any) -> Any:
                    function(*arguments)
                    traced.append(str(thread_local.history))

                return cupy.fuse(kernel_name=kernel_name)(record)

            return decorate

    kernel = _cupy.fused_step(rule.flags_of(options), Recording())
    try:
        kernel(*(device_array(dtype) for _ in range(4)), *map(dtype, numbers))
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
