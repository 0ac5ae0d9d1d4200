"""Compiled programs on disk: when they are loaded, when compiled anew, and what may go wrong there."""

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import acprop_core

pytest.importorskip("numba")

CORE = Path(acprop_core.__file__).parent
# Print for each program whether it was loaded, and the sum of a step.
STEP = """
import sys
import numpy as np
from acprop_core import rule
from acprop_core.kernels import cpu, element
flags = rule.Flags(asynchronous=sys.argv[1] == "a")
x, g, m, s, count = (np.full(100, value, "f4") for value in (1.0, 0.5, 0.0, 1.0, 1.0))
table = np.zeros((element.ROWS, 1), np.int64)
table[: element.SIZE, 0] = [a.ctypes.data for a in (x, g, m, s, x, count)]
table[element.SIZE] = 100
options = np.array([[1e-3, 0.9, 0.999, 1e-16, 1e-16, 0.0, 0.0, 0.0, 1.0]])
kernel = cpu.kernel_of(flags, "float32", "float32")
kernel(table, options, cpu.shared(100, 100), True)
print(sum(kernel.stats.cache_hits.values()), x.tobytes().hex()[:8], count[0])
"""
CORNERS = """
import sys
import numpy as np
from acprop_core import rule
from acprop_core.kernels import cpu, element
options = np.array([[1e-3, 0.9, 0.999, 1e-16, 1e-16, 0.0, 0.0, 0.0, 1.0]])
for name in sys.argv[1:]:
    kernel = cpu.kernel_of(rule.Flags(centering=rule.Centering[name]), "float32", "float32")
    x, g, m, s, count = (np.full(100, value, "f4") for value in (1.0, 0.5, 0.25, 1.0, 1.0))
    table = np.zeros((element.ROWS, 1), np.int64)
    table[: element.SIZE, 0] = [a.ctypes.data for a in (x, g, m, s, x, count)]
    table[element.SIZE] = 100
    kernel(table, options, cpu.shared(100, 100), True)
    print(name, s[0])
"""
CHECK = """
from acprop_core.kernels import cpu, element
check = cpu.check_kernel()
empty = cpu.np.zeros((element.ROWS, 0), cpu.np.int64)
print(sum(check.stats.cache_hits.values()), check(empty), check.stats.cache_path)
"""


@pytest.fixture
def core(tmp_path: Path) -> Path:
    """Return a folder with a copy of the core, of which nothing is compiled."""
    shutil.copytree(CORE, tmp_path / "acprop_core", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def begin(core: Path, program: str, *arguments: str, **variables: str) -> "subprocess.Popen[str]":
    environment = {name: value for name, value in os.environ.items() if name not in ("NUMBA_CACHE_DIR", "ACPROP_CACHE")}
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        env={**environment, "PYTHONPATH": str(core), **variables},
        cwd=core,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: "subprocess.Popen[str]") -> list[str]:
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    return out.split()


def run(core: Path, program: str, *arguments: str, **variables: str) -> list[str]:
    return ended(begin(core, program, *arguments, **variables))


def files(core: Path) -> list[Path]:
    return sorted((core / "acprop_core" / "kernels").rglob("*.nb?"))


@pytest.mark.slow
def test_processes_at_once_and_the_next_ones(core: Path) -> None:
    at_once = [begin(core, STEP, which) for which in "aabb"]
    a, again, b, _ = map(ended, at_once)
    assert a[1:] == again[1:] != b[1:]
    # Each has the program for its own options, also if both have written at the same moment.
    assert run(core, STEP, "a") == ["1", *a[1:]]
    assert run(core, STEP, "b") == ["1", *b[1:]]


@pytest.mark.slow
def test_one_character_of_a_source_compiles_anew(core: Path) -> None:
    run(core, CHECK)
    for file in ("rule.py", "kernels/cpu.py", "kernels/element.py", "kernels/scalars.py", "kernels/sixteen_bits.py"):
        source = core / "acprop_core" / file
        text = source.read_text()
        before = source.stat()
        source.write_text(text.replace("r", "R", 1))
        os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))  # Numba itself would see only the date of cpu.py
        assert run(core, CHECK, PYTHONDONTWRITEBYTECODE="1")[0] == "0", file
        source.write_text(text)
        os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert run(core, CHECK)[0] == "1"


@pytest.mark.slow
def test_a_change_of_the_arithmetic_is_compiled(core: Path) -> None:
    old = run(core, STEP, "a")
    source = core / "acprop_core" / "rule.py"
    text = source.read_text()
    assert text.count("update = numbers.rate * d") == 1
    source.write_text(text.replace("update = numbers.rate * d", "update = numbers.rate + d"))
    new = run(core, STEP, "a")
    assert new[0] == "0"
    assert new[1] != old[1]


def test_it_can_be_switched_off(core: Path) -> None:
    assert run(core, CHECK, ACPROP_CACHE="0")[:2] == ["0", "True"]
    assert files(core) == []


def test_a_folder_that_cannot_be_written(core: Path) -> None:
    beside = core / "acprop_core" / "kernels" / "__pycache__"
    beside.touch()  # no folder can be made here, nor in a file: so it is with root's rights too
    folder = str(beside / "folder")
    variables = {"NUMBA_CACHE_DIR": folder, "XDG_CACHE_HOME": folder, "HOME": folder, "PYTHONDONTWRITEBYTECODE": "1"}
    for _ in range(2):
        assert run(core, CHECK, **variables)[:2] == ["0", "True"]
    assert files(core) == []


def test_a_damaged_file(core: Path) -> None:
    run(core, CHECK)
    for kind, content in itertools.product(("*.nbi", "*.nbc"), (b"", b"damaged")):
        (file,) = (core / "acprop_core" / "kernels").rglob(kind)
        file.write_bytes(content)
        assert run(core, CHECK)[:2] == ["0", "True"], (kind, content)
        assert run(core, CHECK)[:2] == ["0", "True"], (kind, content)
        assert file.read_bytes() != content  # written anew
    assert run(core, CHECK)[:2] == ["1", "True"]


def test_a_disk_that_is_full(core: Path) -> None:
    full = "import pickle, os\nfrom numba.core import caching\n\ndef full(*a): raise OSError(28, 'No space left')\n"
    full += "caching.IndexDataCacheFile.save = full\n"
    assert run(core, full + CHECK)[:2] == ["0", "True"]
    assert files(core) == []


@pytest.mark.slow
def test_programs_of_several_processes_do_not_mix(core: Path) -> None:
    """Numba names functions by a number that is unique within a process only."""
    names = ["CURRENT", "PREVIOUS", "NONE"]
    alone = [ended(begin(core, CORNERS, name)) for name in names]
    assert len({moment for _, moment in alone}) == 3
    for order in (names, names[::-1]):
        together = ended(begin(core, CORNERS, *order))
        assert sorted(together) == sorted(word for words in alone for word in words)
