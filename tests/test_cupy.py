"""The CuPy engine: without a device its kernel as CuPy's fusion traces it; with one, the whole suite (nox -s gpu)."""

import re
from typing import Any

import cupy
import numpy as np
import pytest

import acprop_stepper._engines as engines
from acprop_core import ACProp


def device_array(dtype: Any) -> Any:
    """Return a CuPy array of memory that is not there: enough to trace with."""
    memory = cupy.cuda.UnownedMemory(1 << 20, 1 << 10, None, device_id=0)
    return cupy.ndarray((16,), dtype, memptr=cupy.cuda.MemoryPointer(memory, 0))


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
