"""The step for CUDA devices without a device: in Numba's simulator, as machine code, and the logic of the host."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba_cuda")

from acprop_core import kernels, rule
from acprop_core.kernels import cuda
from acprop_core.kernels import cuda_device as device

HERE = Path(__file__).parent
FLAGS = rule.Flags(scaled=True)


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


@pytest.fixture(scope="module")
def compiler() -> Iterator[None]:
    """Answer for the device that Numba asks about when it compiles."""
    from numba.cuda import dispatcher

    class Device:
        compute_capability = (9, 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatcher, "get_current_device", Device)
        yield


def ptx(kernel: Any, capability: tuple[int, int] = (9, 0)) -> str:
    return device.assemble(device.compile_kernel(kernel, capability), capability, as_text=True).decode()


def instructions(text: str) -> set[str]:
    return set(re.findall(r"^\s*(?:@!?%p\d+ )?([a-z]\w*(?:\.\w+)+)\s", text, re.MULTILINE))


def step_of(flags: rule.Flags, param_dtype: str, moment_dtype: str) -> Any:
    return cuda.step_kernel_of(flags, param_dtype, moment_dtype, device.MEMORY, cuda.THREADS)


def with_format(name: str) -> rule.Flags:
    return FLAGS._replace(format=rule.FORMATS[name])


COMBINATIONS = {
    **{
        f"{centering.name.lower()} {asynchronous}": (
            *(
                FLAGS._replace(centering=centering, asynchronous=asynchronous, clipped=asynchronous),
                "float32",
                "float32",
            ),
        )
        for centering in rule.Centering
        for asynchronous in (True, False)
    },
    "b1, b2 on the device": (FLAGS._replace(old_is_lighter1=None, old_is_lighter2=None), "float32", "float32"),
    "float64": (FLAGS._replace(old_is_lighter1=True), "float64", "float64"),
    "bfloat16": (FLAGS, "bfloat16", "bfloat16"),
    "bfloat16 compensated": (with_format("bfloat16"), "bfloat16", "float32"),
    "float16": (FLAGS, "float16", "float32"),
    "float16 compensated": (with_format("float16")._replace(asynchronous=False, clipped=True), "float16", "float32"),
}
# what one load or store of four numbers is called
VECTORS = {"float32": r"v4\.f32", "float64": r"v2\.f64"}
VECTORS.update(dict.fromkeys(("bfloat16", "float16"), r"(v4\.[ub]16|v2\.[ub]32|[ub]64)"))


@pytest.mark.parametrize(("flags", "param_dtype", "moment_dtype"), COMBINATIONS.values(), ids=COMBINATIONS)
def test_the_code_of_a_step(flags: rule.Flags, param_dtype: str, moment_dtype: str, compiler: None) -> None:
    """One rounding an operation, correct roots and quotients, nothing wider than it must be, whole vectors."""
    text = ptx(step_of(flags, param_dtype, moment_dtype))
    used = instructions(text)
    real = "f64" if moment_dtype == "float64" else "f32"
    assert {f"{name}.rn.{real}" for name in ("sqrt", "div", "add", "mul")} <= used
    assert [x for x in used if x.startswith(("fma", "mad.f", "rsqrt")) or ".approx" in x or ".ftz" in x] == []
    if real == "f32":  # a step count alone may be a float64, read and written once
        assert sorted(x for x in re.findall(r"^\s*(\S+)\s", text, re.MULTILINE) if x.endswith(".f64")) == [
            *("add.rn.f64", "ld.global.f64", "st.global.f64")
        ]
    assert re.findall(r"\.local|\bcall\b|\.shared", text) == []
    for dtype in (param_dtype, moment_dtype):
        for instruction in ("ld", "st"):
            assert [x for x in used if re.fullmatch(rf"{instruction}\.global\.{VECTORS[dtype]}", x)]


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("flags", [FLAGS, with_format("bfloat16")], ids=["plain", "compensated"])
def test_the_code_of_the_numbers(flags: rule.Flags, asynchronous: bool, compiler: None) -> None:
    """In float64, and written as float32."""
    flags = flags._replace(asynchronous=asynchronous)
    text = ptx(cuda.numbers_kernel_of(flags, "float32", "float32", device.MEMORY, cuda.THREADS))
    used = instructions(text)
    assert {"div.rn.f64", "cvt.rn.f32.f64", "st.global.f32"} <= used
    assert not [x for x in used if x.endswith(".f32") and x.startswith(("add", "mul", "sub", "div", "fma", "sqrt"))]
    assert ".local" not in text


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
def test_machine_code_can_be_made(capability: tuple[int, int], compiler: None) -> None:
    code = device.assemble(device.compile_kernel(step_of(FLAGS, "bfloat16", "float32"), capability), capability)
    assert code[:4] == b"\x7fELF"


def test_contraction_would_be_seen(compiler: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The linker contracts unless it is told not to."""
    code = device.compile_kernel(step_of(FLAGS, "float32", "float32"), (9, 0))
    create = device.nvjitlink.create
    monkeypatch.setattr(
        device.nvjitlink, "create", lambda n, options: create(n - 1, [x for x in options if x != "-fma=0"])
    )
    assert "fma.rn.f32" in instructions(device.assemble(code, (9, 0), as_text=True).decode())


@pytest.mark.parametrize("sizes", [[0], [1], [cuda.CHUNK], [cuda.CHUNK + 1, 0, 3 * cuda.CHUNK, 5]])
def test_chunks_are_every_element_once(sizes: list[int]) -> None:
    chunks = cuda.chunks_of(np.array(sizes, np.int64))
    assert chunks.dtype == np.int64
    assert chunks.flags.c_contiguous
    for i, size in enumerate(sizes):
        firsts = [first for owner, first in chunks.tolist() if owner == i]
        assert firsts == list(range(0, max(size, 1), cuda.CHUNK))
    assert chunks[:, 0].tolist() == sorted(chunks[:, 0].tolist())


def test_a_program_launches_its_two_kernels_in_order() -> None:
    program = object.__new__(cuda.Program)
    launches: list[Any] = []
    program._make_numbers, program._step, program._launch = 1, 2, lambda *args: launches.append(args)
    program.run(3, 4, 100, 257, 200, 1000, 300, 400, grad_scale=500, found_inf=600)
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
