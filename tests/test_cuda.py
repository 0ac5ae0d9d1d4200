"""The step for CUDA devices without a device: in Numba's simulator, and the logic of the host."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba_cuda")

from acprop_core import kernels
from acprop_core.kernels import cuda
from acprop_core.kernels import cuda_device as device

HERE = Path(__file__).parent


@pytest.mark.slow
def test_the_simulated_kernels_pass_the_suite_with_the_bits_of_a_cpu() -> None:
    pytest.importorskip("torch")
    pytest.importorskip("ml_dtypes")
    done = subprocess.run(
        [sys.executable, "cuda_simulated.py"],
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1"},
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert re.search(r"^\d{3} cases, \d{4,} launches$", done.stderr, re.MULTILINE)
    row = "| the CUDA kernel in Numba's simulator (60 steps) | yes | yes | yes |"
    assert row in (HERE.parent / "docs" / "guarantees.md").read_text()


@pytest.mark.parametrize("sizes", [[0], [1], [cuda.CHUNK], [cuda.CHUNK + 1, 0, 3 * cuda.CHUNK, 5]])
def test_chunks_are_every_element_once(sizes: list[int]) -> None:
    chunks = cuda.chunks_of(np.array(sizes, np.int64))
    assert chunks.dtype == np.int64
    assert chunks.flags.c_contiguous
    for i, size in enumerate(sizes):
        firsts = [first for owner, first in chunks.tolist() if owner == i]
        assert firsts == list(range(0, max(size, 1), cuda.CHUNK))
    assert chunks[:, 0].tolist() == sorted(chunks[:, 0].tolist())


def test_a_launcher_launches_its_two_kernels_in_order() -> None:
    launcher = object.__new__(cuda.Launcher)
    launches: list[Any] = []
    launcher._make_numbers, launcher._step, launcher._launch = 1, 2, lambda *args: launches.append(args)
    launcher.run(3, 4, 100, 257, 200, 1000, 300, 400, grad_scale=500, found_inf=600)
    assert launches == [
        (3, 4, 1, 2, 256, (100, 257, 300, 400, 500)),
        (3, 4, 2, 1000, 256, (100, 257, 200, 400, 600)),
    ]


class Driver:
    """The part of NVIDIA's driver that is called, imitated."""

    def __init__(self, context: int, result: str = "CUDA_SUCCESS") -> None:
        self.calls: list[Any] = []
        self.context, self.result = context, result
        self.CUresult, self.CUfunction = device.driver.CUresult, device.driver.CUfunction

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> Any:
            self.calls.append((name, *args))
            values = {"cuCtxGetCurrent": [self.context], "cuDeviceGet": args, "cuDevicePrimaryCtxRetain": [77]}
            result = self.result if name == "cuLaunchKernel" else "CUDA_SUCCESS"
            return (getattr(self.CUresult, result), *values.get(name, []))

        return call


def test_a_launch_is_on_the_stream_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(context=5)
    monkeypatch.setattr(device, "driver", driver)
    device.launch(1, 9, 12, 3, 256, (1, 2))
    (_, launch) = driver.calls
    name, function, *grid, (values, kinds), extra = launch
    assert (name, int(function), grid, values, extra) == ("cuLaunchKernel", 12, [3, 1, 1, 256, 1, 1, 0, 9], (1, 2), 0)
    assert [kind(2**40).value for kind in kinds] == [2**40] * 2


def test_a_thread_without_a_context_gets_that_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(context=0)
    monkeypatch.setattr(device, "driver", driver)
    device._context_of.cache_clear()
    device.launch(1, 9, 12, 3, 256, (1, 2))
    device._context_of.cache_clear()
    assert driver.calls[1:-1] == [("cuDeviceGet", 1), ("cuDevicePrimaryCtxRetain", 1), ("cuCtxSetCurrent", 77)]


def test_a_refused_launch_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "driver", Driver(context=5, result="CUDA_ERROR_INVALID_VALUE"))
    with pytest.raises(RuntimeError, match="refuses the compiled step: CUDA_ERROR_INVALID_VALUE;"):
        device.launch(1, 9, 12, 3, 256, (1, 2))


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels.why_no_numba_cuda.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
        assert kernels.why_no_numba_cuda((9, 0)) == kernels.NO_CUDA
    kernels.why_no_numba_cuda.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(device, "load", lambda code: 1)
        assert kernels.why_no_numba_cuda((9, 0)) is None
    kernels.why_no_numba_cuda.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(device, "assemble", lambda *args: 1 / 0)
        assert (
            kernels.why_no_numba_cuda((9, 0)) == "numba-cuda does not work here (ZeroDivisionError: division by zero)"
        )
    kernels.why_no_numba_cuda.cache_clear()
