"""Files of a run: their content survives, damaged files are refused, and writing is safe."""

import dataclasses
import hashlib
import json
import mmap
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

import acprop_core
from acprop_core import ACProp, State, load, save
from acprop_core.adapt import with_values

GOLDEN = Path(__file__).parent / "golden"
HYPER = {"learning_rate": 0.1, "weight_decay": 0.1, "clip_exponent": 0.25}


def schedule(count: Any) -> Any:
    return 0.1 / (count + 1.0)


def state_of(arrays: dict[str, np.ndarray], count: int = 3) -> State:
    nu = {name: x.real.astype(x.real.dtype) for name, x in arrays.items()}
    return State(count, arrays, nu)


def assert_same_bits(a: State, b: State) -> None:
    assert a.count == b.count
    assert (a.carry is None) == (b.carry is None)
    for x, y in ((a.mu, b.mu), (a.nu, b.nu), (a.carry or {}, b.carry or {})):
        assert set(x) == set(y)
        for name in x:
            if x[name] is None or y[name] is None:
                assert x[name] is y[name]
                continue
            assert (x[name].dtype, x[name].shape) == (y[name].dtype, y[name].shape), name
            assert np.asarray(x[name]).tobytes() == np.asarray(y[name]).tobytes(), name


def checksum_of(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> str:
    """Return the checksum as docs/checkpoint.md describes it."""
    about = {name: [str(x.dtype), *x.shape] for name, x in tensors.items()}
    content = json.dumps([metadata, about], sort_keys=True).encode()
    content += b"".join(x.tobytes() for _, x in sorted(tensors.items()))
    return hashlib.sha256(content).hexdigest()


def without(mapping: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: x for name, x in mapping.items() if name not in names}


def everything() -> tuple[ACProp, State]:
    """Return one of everything that a file can hold: the content of the golden file."""
    x = np.arange(6.0).reshape(2, 3) / 7.0
    arrays = {
        "float32": x.astype(np.float32),
        "float64": x,
        "bfloat16": x.astype(ml_dtypes.bfloat16),
        "float16": x.astype(np.float16),
        "complex64": (x - 1j * x).astype(np.complex64),
        "complex128": x + 2j * x,
        "zero-d": np.asarray(1 / 3),
        "empty": np.zeros((0, 3), np.float32),
        "nan": np.array([np.nan, -np.inf, -0.0, 5e-324]),
        "layers.0.weight": x[:1],
        'é "\x1f\\': x[1:],
        "": np.ones(1),
    }
    state = state_of(arrays, count=2**31 + 12345)
    mask = {name: i % 2 == 0 for i, name in enumerate([*arrays, "frozen"])}
    optimizer = ACProp(
        1 / 3,
        0.95,
        0.9995,
        1e-12,
        1e-13,
        0.01,
        mask,
        clip_exponent=0.25,
        centering="previous",
        moment_dtype="float64",
        compensate=True,
    )
    mu, nu = ({**moments, "frozen": None} for moments in (state.mu, state.nu))
    carry = {name: x if name in ("float16", "bfloat16") else None for name, x in mu.items()}
    return optimizer, State(state.count, mu, nu, carry)


# content


def test_everything_survives_to_the_bit(tmp_path: Path) -> None:
    optimizer, state = everything()
    save(tmp_path / "a", optimizer, state)
    loaded = load(tmp_path / "a")
    assert loaded[0] == optimizer
    assert_same_bits(loaded[1], state)
    save(str(tmp_path / "b"), *loaded)
    again = load(str(tmp_path / "b"))
    assert again[0] == optimizer
    assert_same_bits(again[1], state)


def test_the_golden_file_loads_for_ever() -> None:
    files = sorted(GOLDEN.glob("*.safetensors"))
    assert [file.stem for file in files] == ["v1"]
    optimizer, state = load(files[0])
    expected = everything()
    assert optimizer == expected[0]
    assert_same_bits(state, expected[1])


def test_the_file_is_as_described(tmp_path: Path) -> None:
    optimizer, state = everything()
    save(tmp_path / "a", optimizer, state)
    with safetensors.safe_open(tmp_path / "a", "numpy") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is not a mapping
    present = [name for name in state.mu if name != "frozen"]
    carries = {"carry/float16", "carry/bfloat16"}
    assert set(tensors) == {"count", *carries, *(f"{key}/{name}" for key in ("mu", "nu") for name in present)}
    assert tensors["count"].dtype == np.int64
    assert tensors["count"].shape == ()
    assert tensors["count"] == state.count
    np.testing.assert_array_equal(tensors["mu/float64"], state.mu["float64"])
    np.testing.assert_array_equal(tensors["mu/complex64"][..., 1], state.mu["complex64"].imag)
    assert metadata["format"] == "acprop-core state"
    assert metadata["format_version"] == "1"
    assert metadata["library_version"] == acprop_core.__version__
    assert json.loads(metadata["hyperparameters"]) == dataclasses.asdict(optimizer)
    kinds = {"complex64": "complex", "complex128": "complex", "frozen": "absent"}
    assert json.loads(metadata["parameters"]) == {name: kinds.get(name, "real") for name in state.mu}
    assert metadata["checksum"] == checksum_of(tensors, without(metadata, "checksum"))


def test_names_of_every_character(tmp_path: Path) -> None:
    characters = [*map(chr, range(0x800)), "\u2028", "\ufffe", "\U0010ffff"]
    for name in ("".join(characters), "".join(reversed(characters))):
        save(tmp_path / "a", ACProp(), state_of({name: np.ones(1)}))
        assert list(load(tmp_path / "a")[1].mu) == [name]


def test_the_longest_name_of_a_file(tmp_path: Path) -> None:
    save(tmp_path / ("a" * 255), ACProp(), state_of({"w": np.ones(1)}))
    assert [path.name for path in tmp_path.iterdir()] == ["a" * 255]


@pytest.mark.parametrize("count", [0, 2**31, 2**53 + 1, 2**63 - 1])
def test_counts(count: int, tmp_path: Path) -> None:
    for given in (count, np.asarray(count)):
        save(tmp_path / "a", ACProp(), State(given, {}, {}))
        assert load(tmp_path / "a")[1] == State(count, {}, {})


def test_memory_of_any_layout_and_byte_order(tmp_path: Path) -> None:
    x = np.arange(24.0).reshape(4, 6)
    for y in (x.T, x[::-1, ::2], x.astype(">f8"), np.asfortranarray(x)):
        save(tmp_path / "a", ACProp(), state_of({"w": y}))
        (_, got) = load(tmp_path / "a")
        np.testing.assert_array_equal(got.mu["w"], y)


def test_arrays_are_mapped_and_read_only(tmp_path: Path) -> None:
    save(tmp_path / "a", ACProp(), state_of({"w": np.ones(3), "c": np.ones(3) * 1j}))
    _, state = load(tmp_path / "a", transform=lambda name, x: x[::-1])
    for x in (*state.mu.values(), *state.nu.values()):
        assert not x.flags.writeable
        while isinstance(x, np.ndarray):
            x = x.base
        assert isinstance(x, mmap.mmap)
    save(tmp_path / "a", ACProp(), state_of({"w": np.zeros(3)}))  # the same path
    np.testing.assert_array_equal(state.mu["w"], 1.0)
    assert not load(tmp_path / "a")[1].mu["w"].any()


def test_hyperparameters_are_pythons(tmp_path: Path) -> None:
    given = ACProp(np.float32(0.1), jnp.asarray(0.9), np.asarray(0.99), moment_dtype=np.float64)
    save(tmp_path / "a", given, State(0, {}, {}))
    optimizer, _ = load(tmp_path / "a")
    assert (optimizer.learning_rate, optimizer.b1) == (float(np.float32(0.1)), float(np.float32(0.9)))
    assert {type(getattr(optimizer, name)) for name in ("learning_rate", "b1", "b2")} == {float}
    assert optimizer.moment_dtype == "float64"


def test_callables_must_be_passed_again(tmp_path: Path) -> None:
    def mask(params: Any) -> Any:
        return params

    for name, value in (("learning_rate", schedule), ("weight_decay", schedule), ("mask", mask)):
        save(tmp_path / "a", ACProp(**{name: value}), state_of({"w": np.ones(2)}))
        with pytest.raises(ValueError, match=rf"{name} was a callable.* pass it again: load\(path, {name}="):
            load(tmp_path / "a")
        assert load(tmp_path / "a", **{name: value})[0] == ACProp(**{name: value})
    save(tmp_path / "a", ACProp(), state_of({"w": np.ones(2)}))
    assert load(tmp_path / "a", learning_rate=schedule)[0] == ACProp(schedule)


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay"])
def test_values_of_a_running_schedule_can_be_saved(name: str, tmp_path: Path) -> None:
    record = with_values(ACProp(b1=0.8, mask={"w": True}), **{name: -1.5e-20})
    state = state_of({"w": np.ones(2)})
    save(tmp_path / "a", record, state)
    for params in (None, {"w": np.ones(2)}):
        assert load(tmp_path / "a", params, rename={})[0] == record
    assert getattr(load(tmp_path / "a", **{name: 0.5})[0], name) == 0.5
    with pytest.raises(ValueError, match=f"{name} is -0.5; use a number that is at least 0"):
        load(tmp_path / "a", **{name: -0.5})  # which someone has written now, and no schedule


def test_a_schedule_of_weight_decay_is_saved_as_one(tmp_path: Path) -> None:
    save(tmp_path / "a", ACProp(weight_decay=schedule, mask={"w": False}), state_of({"w": np.ones(2)}))
    with pytest.raises(ValueError, match=r"weight_decay was a callable.* load\(path, weight_decay="):
        load(tmp_path / "a")
    assert load(tmp_path / "a", weight_decay=schedule)[0] == ACProp(weight_decay=schedule, mask={"w": False})
    assert load(tmp_path / "a", weight_decay=0.25)[0].weight_decay == 0.25


@pytest.mark.filterwarnings("error")
def test_loading_does_not_repeat_a_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="b1 is 0"):
        optimizer = ACProp(b1=0.0)
    save(tmp_path / "a", optimizer, state_of({"w": np.ones(2)}))
    assert load(tmp_path / "a", {"w": np.ones(2)}, learning_rate=1e-3)[0] == optimizer


def test_an_invalid_state_writes_nothing(tmp_path: Path) -> None:
    good = state_of({"w": np.ones(2)})
    twice = {"a": {"b": np.ones(1)}, "a.b": np.ones(1)}
    cases: list[tuple[Any, Any, type[Exception], str]] = [
        ("optimizer", good, TypeError, "the optimizer is a str"),
        (ACProp(), (3, {}, {}), TypeError, "the state is a tuple"),
        (ACProp(), good._replace(count=-1), ValueError, "-1"),
        (ACProp(), good._replace(count=2**63), ValueError, "2\\*\\*63"),
        (ACProp(), good._replace(count=0.5), TypeError, "0.5"),
        (ACProp(), State(0, twice, twice), ValueError, "two arrays are called 'a.b'"),
        (ACProp(), good._replace(nu={"w": np.ones(3)}), ValueError, "second moment of 'w' has shape"),
        (ACProp(), good._replace(nu={}), ValueError, "second moments lacks 'w'"),
        (ACProp(), good._replace(mu={"w": np.ones(2, int)}), TypeError, "first moment of 'w' has dtype int64"),
        (ACProp(mask={"v": True}), good, ValueError, "the mask lacks 'w'"),
        (ACProp(compensate=True), good, ValueError, "the state was made without it"),
        (ACProp(), good._replace(carry={"w": None}), ValueError, "the state has a carry"),
        (ACProp(compensate=True), good._replace(carry={"w": np.ones(2)}), TypeError, "only 16-bit parameters"),
        (ACProp(compensate=True), good._replace(carry={"w": np.ones(3, np.float16)}), ValueError, "carry of 'w' has"),
    ]
    for optimizer, state, error, message in cases:
        with pytest.raises(error, match=message):
            save(tmp_path / "a", optimizer, state)
    with pytest.raises(TypeError, match="cannot be made a NumPy array"):
        jax.jit(lambda x: save(tmp_path / "a", ACProp(), State(0, x, x)))(jnp.ones(2))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", ["numpy", "safetensors"])
def test_a_missing_module_is_named_with_its_remedy(module: str, tmp_path: Path) -> None:
    save(tmp_path / "a", ACProp(), State(0, {}, {}))
    code = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
import acprop_core, acprop_core.checkpoint
for call in (
    lambda: acprop_core.save("b", acprop_core.ACProp(), acprop_core.State(0, {{}}, {{}})),
    lambda: acprop_core.load("a"),
):
    try:
        call()
    except ModuleNotFoundError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    message = f"{module} is not installed, which checkpoints need: python -m pip install {module}"
    assert done.stdout.splitlines() == [message, message]


def test_bfloat16_needs_ml_dtypes_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "a", ACProp(), state_of({"w": np.ones(2, np.float16)}))
    save(tmp_path / "b", ACProp(), state_of({"w": np.ones(2, ml_dtypes.bfloat16)}))
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    assert load(tmp_path / "a")[1].count == 3
    with pytest.raises(ModuleNotFoundError, match="python -m pip install ml_dtypes"):
        load(tmp_path / "b")


# refusals


def small(path: Path) -> bytes:
    save(path, ACProp(mask={"é\x1f": True}), State(3, {"é\x1f": np.array([0.5, 32.0])}, {"é\x1f": np.ones(2)}))
    return path.read_bytes()


def refusals(path: Path, variants: Any) -> tuple[int, int, set[str]]:
    """Return how many variants of a file were tried and refused, and what was said."""
    tried, refused, reasons = 0, 0, set()
    for content in variants:
        path.write_bytes(content)
        tried += 1
        try:
            load(path)
        except ValueError as error:
            refused += str(error).startswith(repr(str(path)))
            reasons.add(str(error).removeprefix(repr(str(path)))[:30])
    return tried, refused, reasons


def test_every_flipped_bit_is_refused(tmp_path: Path) -> None:
    content = small(tmp_path / "a")

    def flipped() -> Any:
        for i in range(8 * len(content)):
            damaged = bytearray(content)
            damaged[i // 8] ^= 1 << i % 8
            yield damaged

    tried, refused, _ = refusals(tmp_path / "b", flipped())
    assert (tried, refused) == (8 * len(content), 8 * len(content))
    assert load(tmp_path / "a")[1].count == 3


def test_every_header_that_means_the_same_is_refused(tmp_path: Path) -> None:
    content = small(tmp_path / "a")
    end = 8 + int.from_bytes(content[:8], "little")
    header = content[8:end].rstrip(b" ")
    entry = header[header.index(b'"count":') : header.index(b"}", header.index(b'"count":')) + 1]
    others = [
        header.replace(b":", b": ", 1),
        header.replace(b'"count"', b'"co\\u0075nt"'),
        header.replace("é".encode(), b"\\u00e9"),
        header.replace(entry, entry + b"," + entry),
        header + b" " * 8,
    ]
    for other in others:
        other += b" " * (-len(other) % 8)
        (tmp_path / "b").write_bytes(len(other).to_bytes(8, "little") + other + content[end:])
        assert_same_bits(load(tmp_path / "b", verify=False)[1], load(tmp_path / "a")[1])
        with pytest.raises(ValueError, match="its checksum does not match its content"):
            load(tmp_path / "b")


def test_every_truncation_and_every_surplus_is_refused(tmp_path: Path) -> None:
    content = small(tmp_path / "a")
    shorter = [content[:i] for i in range(len(content))]
    assert refusals(tmp_path / "b", shorter)[:2] == (len(content), len(content))
    longer = [content + bytes(i) for i in range(1, 17)] + [bytes(i) + content for i in range(1, 17)]
    assert refusals(tmp_path / "b", longer)[:2] == (32, 32)


def test_every_exchange_of_bytes_is_refused(tmp_path: Path) -> None:
    content = small(tmp_path / "a")
    rng = np.random.default_rng(0)
    variants = []
    while len(variants) < 500:
        i, j = sorted(rng.integers(len(content), size=2))
        if content[i] != content[j]:
            variants.append(
                content[:i] + content[j : j + 1] + content[i + 1 : j] + content[i : i + 1] + content[j + 1 :]
            )
    assert refusals(tmp_path / "b", variants)[:2] == (500, 500)


def sealed(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Write a file with a checksum that matches its content."""
    metadata = without(metadata, "checksum")
    safetensors.numpy.save_file(tensors, path, metadata | {"checksum": checksum_of(tensors, metadata)})


def parts(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    with safetensors.safe_open(path, "numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def test_content_that_save_does_not_write_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    save(path, ACProp(), state_of({"w": np.ones((2, 3)), "b": np.ones(3), "c": np.ones(2) * 1j}))
    tensors, metadata = parts(path)
    hyper = json.loads(metadata["hyperparameters"])
    sealed(path, tensors, metadata)
    assert load(path)[1].count == 3
    hypers = [
        hyper | {"b1": 2.0},
        hyper | {"b1": "0.9"},
        hyper | {"b1": "callable"},
        hyper | {"beta": 1.0},
        hyper | {"centering": None},
        hyper | {"mask": {"w": True}},
        hyper | {"mask": True},
        [],
    ]
    compensated = {"hyperparameters": json.dumps(hyper | {"compensate": True})}
    carries = [
        ({"carry/w": np.ones((2, 3))}, "carry of 'w' has dtype float64; only 16-bit parameters have a carry"),
        ({"carry/w": np.ones(3, np.float16)}, "carry of 'w' has shape (3,), its first moment (2, 3)"),
        ({"carry/x": np.ones(3, np.float16)}, "names"),
    ]
    wrong: list[tuple[dict[str, np.ndarray], dict[str, str], str]] = [
        (tensors | {"nu/w": np.ones((3, 2))}, metadata, "second moment of 'w' has shape (3, 2)"),
        (tensors | {"nu/w": np.ones((2, 3), np.int64)}, metadata, "dtype int64"),
        (tensors | {"mu/c": np.ones((2, 3))}, metadata, "complex"),
        (tensors | {"count": np.ones(1, np.int64)}, metadata, "count"),
        (tensors | {"count": np.asarray(-1)}, metadata, "-1"),
        (tensors | {"count": np.asarray(1.0)}, metadata, "count"),
        (without(tensors, "nu/w"), metadata, "second moment of 'w' is None"),
        (without(tensors, "mu/w"), metadata, "names"),
        (without(tensors, "mu/w", "nu/w"), metadata, "names"),
        (without(tensors, "count"), metadata, "count"),
        (tensors | {"mu/x": np.ones(1), "nu/x": np.ones(1)}, metadata, "names"),
        (tensors | {"other": np.ones(1)}, metadata, "names"),
        (tensors | {"carry/w": np.ones((2, 3), np.float16)}, metadata, "names"),
        (tensors | {"nu/w": np.ones((2, 3), bool)}, metadata, "BOOL"),
        *((tensors, metadata | {"hyperparameters": json.dumps(h)}, "") for h in hypers),
        *((tensors | carry, metadata | compensated, message) for carry, message in carries),
        (tensors, metadata | {"hyperparameters": "{"}, ""),
        (tensors, metadata | {"parameters": "[]"}, ""),
        (tensors, without(metadata, "parameters"), "parameters"),
    ]
    refused = 0
    for new_tensors, new_metadata, message in wrong:
        sealed(path, new_tensors, new_metadata)
        with pytest.raises(ValueError, match="cannot be loaded: ") as caught:
            load(path)
        assert message in str(caught.value)
        refused += 1
    assert refused == len(wrong)


def test_other_files_and_versions_are_refused_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "a"
    content = small(path)
    tensors, metadata = parts(path)
    for new, message in (
        (metadata | {"format_version": "2"}, "it has format version 2, not 1; install a newer acprop-core"),
        (without(metadata, "format_version"), "unknown or missing 'format_version'"),
        (metadata | {"format": "pt"}, "acprop_core.save did not write it"),
        ({}, "acprop_core.save did not write it"),
    ):
        sealed(path, tensors, new)
        with pytest.raises(ValueError, match=message):
            load(path)
    safetensors.numpy.save_file({"w": np.ones(2)}, path)
    with pytest.raises(ValueError, match="acprop_core.save did not write it"):
        load(path)
    for junk in (b"", b"junk", b"PK\x03\x04" * 50, b"\x80\x04" * 50):
        path.write_bytes(junk)
        with pytest.raises(ValueError, match="is damaged, or not a safetensors file"):
            load(path)
    path.write_bytes(content[:-1] + b"\x01")
    with pytest.raises(
        ValueError, match="its checksum does not match its content, so it is damaged; use an older copy"
    ):
        load(path)
    load(path, verify=False)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none")
    with pytest.raises(IsADirectoryError):
        load(tmp_path)


# writing is safe


CRASH = """
import os, sys
import numpy as np
import acprop_core
from acprop_core.checkpoint import _contents, _file
path, way = sys.argv[1:]
state = lambda c: acprop_core.State(c, {"w": np.full(3, float(c))}, {"w": np.full(3, float(c))})
acprop_core.save(path, acprop_core.ACProp(), state(1))
lines = 0
def crash_at(k):
    def trace(frame, event, arg):
        global lines
        if frame.f_code.co_filename not in (_contents.__file__, _file.__file__, os.__file__):
            return None if frame.f_code.co_filename.startswith("<") else trace
        if event == "line":
            lines += 1
            if lines == k:
                if way == "exit":
                    os._exit(17)
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace
    return trace
def attempt(k):
    global lines
    lines = 0
    sys.settrace(crash_at(k))
    try:
        acprop_core.save(path, acprop_core.ACProp(), state(2))
    except KeyboardInterrupt:
        return 17
    finally:
        sys.settrace(None)
    return 0
tried, old, new, k = 0, 0, 0, 0
while True:
    k += 1
    acprop_core.save(path, acprop_core.ACProp(), state(1))
    if way == "exit":
        child = os.fork()
        if not child:
            os._exit(attempt(k))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    else:
        code = attempt(k)
    _, got = acprop_core.load(path)
    assert (got.mu["w"] == got.count).all()
    if way == "raise":
        assert os.listdir(os.path.dirname(path)) == [os.path.basename(path)]
    if code == 0:
        assert got.count == 2
        break
    assert code == 17
    tried += 1
    old += got.count == 1
    new += got.count == 2
print(tried, old, new)
"""


@pytest.mark.parametrize("way", ["raise", "exit"])
def test_a_crash_at_any_line_leaves_the_old_file_or_the_new_one(way: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CRASH, tmp_path / "a", way], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    tried, old, new = map(int, done.stdout.split())
    assert tried == old + new
    assert old > 20
    assert new > 1


def test_the_new_file_is_on_disk_before_it_takes_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        stat = os.fstat(descriptor)
        events.append(("fsync", stat.st_ino))
        fsync(descriptor)

    def replaced(a: Any, b: Any) -> None:
        assert Path(a).parent == Path(b).parent
        load(a)  # whole, checksum and all
        events.append(("replace", os.stat(a).st_ino))
        replace(a, b)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    save(tmp_path / "a", ACProp(), state_of({"w": np.ones(2)}))
    inode = (tmp_path / "a").stat().st_ino
    assert events == [("fsync", inode), ("replace", inode), ("fsync", tmp_path.stat().st_ino)]


def test_a_failure_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = small(tmp_path / "a")

    def fail(*args: Any) -> None:
        raise OSError("no space left on device")

    for owner, name in ((os, "fsync"), (os, "replace"), (os, "chmod"), (safetensors.numpy, "save_file")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            with pytest.raises(OSError, match="no space"):
                save(tmp_path / "a", ACProp(), State(0, {}, {}))
        assert [p.name for p in tmp_path.iterdir()] == ["a"]
        assert (tmp_path / "a").read_bytes() == content


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o444])
def test_a_file_that_is_replaced_keeps_its_mode_and_owner(mode: int, tmp_path: Path) -> None:
    small(tmp_path / "a")
    (tmp_path / "a").chmod(mode)
    groups = [group for group in os.getgroups() if group != (tmp_path / "a").stat().st_gid]
    if os.geteuid() == 0:
        os.chown(tmp_path / "a", 1234, 4321)
    elif groups:
        os.chown(tmp_path / "a", -1, groups[0])
    before = (tmp_path / "a").stat()
    (tmp_path / "link").symlink_to("a")
    save(tmp_path / "link", ACProp(), State(1, {}, {}))
    after = (tmp_path / "a").stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    assert load(tmp_path / "a")[1].count == 1


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_a_new_file_follows_the_umask(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        save(tmp_path / "a", ACProp(), State(0, {}, {}))
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~mask


def test_the_new_file_is_private_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []
    save_file = safetensors.numpy.save_file

    def seen(tensors: Any, path: str, metadata: Any) -> None:
        modes.append(os.stat(path).st_mode & 0o777)
        save_file(tensors, path, metadata)
        modes.append(os.stat(path).st_mode & 0o777)

    monkeypatch.setattr(safetensors.numpy, "save_file", seen)
    save(tmp_path / "a", ACProp(), State(0, {}, {}))
    assert modes == [0o600, 0o600]


def _make_special(kind: str, path: Path) -> None:
    if kind == "directory":
        path.mkdir()
    elif kind == "named pipe":
        os.mkfifo(path)
    elif kind == "device":  # one of our own: what root replaces by mistake should not be the system's
        try:
            os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        except PermissionError:
            pytest.skip("only root can make devices")
    else:
        socket.socket(socket.AF_UNIX).bind(os.path.relpath(path))


@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
@pytest.mark.parametrize("kind", ["directory", "named pipe", "device", "socket"])
def test_what_is_not_a_regular_file_is_not_replaced(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    _make_special(kind, tmp_path / "a")
    before = os.stat("a")
    with pytest.raises(OSError, match=f"'a' is a {kind}, which save does not replace; pass the path of a regular file"):
        save("a", ACProp(), State(0, {}, {}))
    after = os.stat("a")
    assert (after.st_mode, after.st_ino) == (before.st_mode, before.st_ino)
    assert os.listdir(tmp_path) == ["a"]


def test_modes_and_links_are_those_of_any_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    save(tmp_path / "link", ACProp(), State(0, {}, {}))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode


# names


NESTED = {"layers": [{"weight": np.ones((2, 3)), "bias": np.zeros(2)}, (np.ones(()),)], "none": None}
NAMES = ["layers.0.weight", "layers.0.bias", "layers.1.0", "none"]


def test_moments_come_in_the_structure_of_the_parameters(tmp_path: Path) -> None:
    mask = {"layers": [{"weight": True, "bias": False}, False], "none": None}
    optimizer = ACProp(**HYPER, mask=mask)
    grads = jax.tree.map(lambda x: x + 0.5, NESTED)
    _, state = optimizer.update(grads, optimizer.init(NESTED), NESTED)
    save(tmp_path / "a", optimizer, state)
    named, flat = load(tmp_path / "a")
    assert list(flat.mu) == NAMES
    assert named.mask == dict(zip(NAMES, (True, False, False, False), strict=True))
    again, got = load(tmp_path / "a", NESTED)
    assert jax.tree.structure(got) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, got, state)
    for a, b in zip(optimizer.update(grads, state, NESTED), again.update(grads, got, NESTED), strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_states_that_do_not_match_the_parameters_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "a", ACProp(), state_of({"w": np.ones((2, 3)), "b": np.ones(3)}))
    w, b = np.ones((2, 3)), np.ones(3)
    wrong: list[tuple[Any, type[Exception], str]] = [
        ({"w": w, "v": b}, ValueError, "the saved state lacks 'v'; it has 'w', 'b'"),
        ({"w": w}, ValueError, "the saved state has 'b', but there is no such parameter here"),
        ({"w": w.T, "b": b}, ValueError, "first moment of 'w' has shape (2, 3), here it is (3, 2); use load("),
        ({"w": w.astype(np.float32), "b": b}, TypeError, "first moment of 'w' has dtype float64, here it is float32"),
        ({"w": w, "b": None}, ValueError, "first moment of 'b' is an array, but there is no parameter here"),
    ]
    for params, error, message in wrong:
        with pytest.raises(error) as caught:
            load(tmp_path / "a", params)
        assert message in str(caught.value)


def test_rename_and_transform(tmp_path: Path) -> None:
    x = np.arange(6.0).reshape(2, 3)
    mask = {"dense.weight": False, "dense.bias": True, "old.bias": False}
    state = state_of({"dense.weight": x, "dense.bias": np.ones(2), "old.bias": np.ones(1)})
    save(tmp_path / "a", ACProp(weight_decay=0.1, mask=mask), state)
    mapping = {"dense.weight": "dense.kernel", "old.bias": None}
    params = {"dense": {"kernel": np.ones((3, 2)), "bias": np.ones(2)}}
    for rename, transform in (
        (mapping, {"dense.kernel": np.transpose}),
        (lambda name: mapping.get(name, name), lambda name, x: x.T if name == "dense.kernel" else x),
    ):
        optimizer, got = load(tmp_path / "a", params, rename=rename, transform=transform)
        for moments in (got.mu, got.nu):
            np.testing.assert_array_equal(moments["dense"]["kernel"], x.T)
        assert optimizer.mask == {"dense": {"kernel": False, "bias": True}}
    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"rename": {"w": "v"}}, ValueError, "rename names 'w', which the saved state lacks"),
        ({"rename": ["w"]}, TypeError, "rename is ['w']; pass a mapping by name, or a callable"),
        ({"rename": lambda name: "w"}, ValueError, "two arrays are called 'w'"),
        ({"rename": {"dense.bias": 3}}, TypeError, "rename makes 3 of 'dense.bias'"),
        ({"transform": {"dense.kernel": np.transpose}}, ValueError, "transform names 'dense.kernel'"),
        ({"transform": lambda name, x: x.astype(int)}, TypeError, "dtype int64"),
    ]
    for options, error, message in wrong:
        with pytest.raises(error) as caught:
            load(tmp_path / "a", **options)
        assert message in str(caught.value)
