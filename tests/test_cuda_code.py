"""The kernels for CUDA devices as PTX and as machine code, made without a device and looked at."""

import functools
import importlib.util
import itertools
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("numba_cuda")

from acprop_core import rule
from acprop_core.kernels import cuda
from acprop_core.kernels import cuda_device as device
from acprop_core.kernels.sixteen_bits import is_compiled

FLAGS = rule.Flags(scaled=True)
CAPABILITIES = [(8, 0), (9, 0), (10, 0)]


@pytest.fixture(scope="module", autouse=True)
def compiler() -> Iterator[None]:
    """Answer for the device that Numba asks about when it compiles."""
    from numba.cuda import dispatcher

    class Device:
        compute_capability = (9, 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatcher, "get_current_device", Device)
        yield


DTYPES = ("float32", "float64", "bfloat16", "float16")
# Of parameters and moments, and the format of a carry. With all flags there are 1,728 kernels, and each takes about a
# second. So each combination of dtypes has one set of flags, chosen so that any two flags meet in each of their values.
DTYPE_SETS = [
    (own, moments, form)
    for own, moments in itertools.product(DTYPES, DTYPES)
    if is_compiled(own, moments)
    for form in {None: None, rule.FORMATS.get(own): None}
]
LIGHTER = (False, True, None)  # the last: where decay rates are on the device
KERNELS = {
    f"{own} {moments}{' compensated' * (form is not None)}": (
        rule.Flags(
            centering=rule.Centering(i % 3),
            asynchronous=i % 2 == 0,
            clipped=i // 2 % 2 == 0,
            old_is_lighter1=LIGHTER[i // 3 % 3],
            old_is_lighter2=LIGHTER[(i + i // 3) % 3],
            scaled=True,
            format=form,
        ),
        own,
        moments,
    )
    for i, (own, moments, form) in enumerate(DTYPE_SETS)
}


def test_any_two_flags_meet_in_each_of_their_values() -> None:
    names = ("centering", "asynchronous", "clipped", "old_is_lighter1", "old_is_lighter2")
    chosen = [[getattr(flags, name) for name in names] for flags, *_ in KERNELS.values()]
    for a, b in itertools.combinations(range(len(names)), 2):
        values = [{row[i] for row in chosen} for i in (a, b)]
        assert {(row[a], row[b]) for row in chosen} == set(itertools.product(*values))
        assert [len(x) for x in values] == [len({*map(str, x)}) for x in values]
    assert len(DTYPE_SETS) == 16


@functools.cache
def compiled(make: Any, flags: rule.Flags, own: str, moments: str, capability: tuple[int, int]) -> bytes:
    return device.compile_kernel(make(flags, own, moments, device.MEMORY, cuda.THREADS), capability)


def ptx(make: Any, *kernel: Any) -> str:
    return device.assemble(compiled(make, *kernel, (9, 0)), (9, 0), as_text=True).decode()


def instructions(text: str) -> set[str]:
    return set(re.findall(r"^\s*(?:@!?%p\d+ )?([a-z]\w*(?:\.\w+)+)\s", text, re.MULTILINE))


# what one load or store of four numbers is called
VECTORS = {"float32": r"v4\.f32", "float64": r"v2\.f64"}
VECTORS.update(dict.fromkeys(("bfloat16", "float16"), r"(v4\.[ub]16|v2\.[ub]32|[ub]64)"))


@pytest.mark.parametrize(
    "kernel",
    [pytest.param(kernel, marks=[pytest.mark.slow] if i % 4 else []) for i, kernel in enumerate(KERNELS.values())],
    ids=KERNELS,
)
def test_the_code_of_a_step(kernel: Any) -> None:
    """One rounding an operation, correct roots and quotients, nothing wider than it must be, whole vectors."""
    text = ptx(cuda.step_kernel_of, *kernel)
    _, own, moments = kernel
    used = instructions(text)
    real = "f64" if moments == "float64" else "f32"
    assert {f"{name}.rn.{real}" for name in ("sqrt", "div", "add", "mul")} <= used
    assert [x for x in used if x.startswith(("fma", "mad.f", "rsqrt")) or ".approx" in x or ".ftz" in x] == []
    if real == "f32":  # a step count alone may be a float64, read and written once
        assert sorted(x for x in re.findall(r"^\s*(\S+)\s", text, re.MULTILINE) if x.endswith(".f64")) == [
            *("add.rn.f64", "ld.global.f64", "st.global.f64")
        ]
    assert re.findall(r"\.local|\bcall\b|\.shared", text) == []
    for dtype in (own, moments):
        for instruction in ("ld", "st"):
            assert [x for x in used if re.fullmatch(rf"{instruction}\.global\.{VECTORS[dtype]}", x)]


NUMBERS = [
    FLAGS._replace(asynchronous=asynchronous, format=form)
    for asynchronous in (True, False)
    for form in (None, rule.FORMATS["bfloat16"])
]


@pytest.mark.parametrize("flags", NUMBERS)
def test_the_code_of_the_numbers(flags: rule.Flags) -> None:
    """In float64, and written as float32."""
    text = ptx(cuda.numbers_kernel_of, flags, "float32", "float32")
    used = instructions(text)
    assert {"div.rn.f64", "cvt.rn.f32.f64", "st.global.f32"} <= used
    assert not [x for x in used if x.endswith(".f32") and x.startswith(("add", "mul", "sub", "div", "fma", "sqrt"))]
    assert ".local" not in text


def nvdisasm() -> Path | None:
    """Return NVIDIA's disassembler, from the package nvidia-cuda-nvdisasm."""
    spec = importlib.util.find_spec("nvidia")
    places = [Path(x) for x in (spec.submodule_search_locations if spec else None) or ()]
    return next((x for place in places for x in place.glob("cu*/bin/nvdisasm")), None)


def machine_code(tmp_path: Path, make: Any, kernel: Any, capability: tuple[int, int]) -> Counter[str]:
    """Return how often the machine code has each instruction."""
    tool = nvdisasm()
    if tool is None:
        pytest.skip("there is no nvdisasm (python -m pip install nvidia-cuda-nvdisasm)")
    file = tmp_path / "code"
    file.write_bytes(device.assemble(compiled(make, *kernel, capability), capability))
    text = subprocess.run([tool, "-c", file], capture_output=True, text=True, check=True).stdout
    return Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", text, re.MULTILINE))


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", ["float32 float32", "float64 float64", "bfloat16 float32 compensated"])
def test_the_machine_code_of_a_step(name: str, capability: tuple[int, int], tmp_path: Path) -> None:
    """As in PTX; and everything is in registers, roots and quotients are corrected, and vectors have 128 bits."""
    used = machine_code(tmp_path, cuda.step_kernel_of, KERNELS[name], capability)
    assert not {x for x in used if x.startswith(("LDL", "STL", "LDS", "STS"))}
    wide = {x: n for x, n in used.items() if re.match("D(ADD|MUL|FMA|SETP)|.*64H", x)}
    if name == "float64 float64":
        assert {"MUFU.RSQ64H", "MUFU.RCP64H", "DFMA"} <= {*used}
        assert wide["DFMA"] >= 4 * (wide["MUFU.RSQ64H"] + wide["MUFU.RCP64H"])
    else:
        assert wide == {"DADD": 1}  # of a step count
        roots, quotients = used["MUFU.RSQ"], used["MUFU.RCP"]
        assert min(roots, quotients) > 0
        assert used["FCHK"] == quotients - 1  # each quotient is checked, but the one that is computed then
        assert used["FFMA"] <= 5 * quotients + 2 * roots + 3  # they correct roots and quotients: nothing is contracted
    assert used["LDG.E.128"] >= 2
    assert used["STG.E.128"] >= 2


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_machine_code_of_the_numbers(capability: tuple[int, int], tmp_path: Path) -> None:
    used = machine_code(tmp_path, cuda.numbers_kernel_of, (NUMBERS[-1], "float32", "float32"), capability)
    assert not {x for x in used if x.startswith(("LDL", "STL", "LDS", "STS"))}
    assert used["DFMA"] > 0


def test_contraction_would_be_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The linker contracts unless it is told not to."""
    create = device.nvjitlink.create
    monkeypatch.setattr(
        device.nvjitlink, "create", lambda n, options: create(n - 1, [x for x in options if x != "-fma=0"])
    )
    kernel = KERNELS["float32 float32"]
    assert "fma.rn.f32" in instructions(ptx(cuda.step_kernel_of, *kernel))
    used = machine_code(tmp_path, cuda.step_kernel_of, kernel, (9, 0))
    assert used["FFMA"] > 5 * used["MUFU.RCP"] + 2 * used["MUFU.RSQ"] + 3
