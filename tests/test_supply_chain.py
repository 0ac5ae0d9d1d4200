"""What the shipped packages may import and call, by their syntax trees; what the wheel holds; what it asks for."""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from email import message_from_bytes
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "acprop_core": ROOT / "acprop_core",
    **{p.name: p for p in (ROOT / "adapters").iterdir() if (p / "__init__.py").exists()},
}
SOURCES = sorted((name, path) for name, folder in PACKAGES.items() for path in folder.rglob("*.py"))
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())

# Every module that may be imported. Everything else (pickle, marshal, shelve, ctypes, subprocess, socket, ssl,
# urllib, http, asyncio, multiprocessing, tempfile ...) is not on the list.
STANDARD = {
    "collections", "concurrent", "contextlib", "copy", "dataclasses", "enum", "functools", "hashlib", "importlib",
    "itertools", "json", "math", "mmap", "numbers", "operator", "os", "pathlib", "queue", "re", "stat", "sys",
    "threading", "types", "typing", "warnings",
}  # fmt: skip
FRAMEWORKS = {
    "acprop_core": {
        *("array_api_compat", "llvmlite", "ml_dtypes", "numba", "numpy", "safetensors"),  # llvmlite: Numba's
        *("ctypes", "cuda"),  # OpenMP's threads; the arguments of a CUDA kernel, and NVIDIA's linker and driver
    },
    "acprop_optax": {"jax", "numpy", "optax"},
    "acprop_stepper": {"array_api_compat", "ctypes", "numba", "numpy"},  # ctypes: the addresses of arrays
    "acprop_torch": {"array_api_compat", "numpy", "torch"},
}
# Imports by a name that is computed: each a choice among names in the code next to it.
COMPUTED_IMPORTS = {
    ("adapters/acprop_stepper/_matching.py", "importlib.import_module(name)"),  # numpy or cupy
}
NAMES = {"eval", "exec", "compile", "__import__", "breakpoint", "input", "print"}
# Of modules that can do more than they should, what may be used.
OF_MODULES = {
    "ctypes": {"CDLL", "c_int64", "c_void_p", "cast"},
    "os": {"PathLike", "environ", "fsdecode", "getpid", "name", "path", "register_at_fork", "urandom"}
    | {"cpu_count", "sched_getaffinity"}
    | {"O_RDONLY", "chmod", "chown", "close", "fstat", "fsync", "open", "replace", "stat", "stat_result", "unlink"},
    "sys": {"_getframe", "float_info", "maxsize"},
    "importlib": {"import_module", "util"},
    "concurrent": {"futures"},
}
OF_FRAMEWORKS = {"load", "save", "loads", "dumps", "hub", "fromfile", "tofile", "memmap", "genfromtxt", "load_library"}


def findings(package: str, path: Path) -> Iterator[str]:
    """Yield a line for everything in a source file that no shipped package should do."""
    tree = ast.parse(path.read_text())
    relative = path.relative_to(ROOT).as_posix()
    allowed = STANDARD | FRAMEWORKS[package] | PACKAGES.keys()
    modules: dict[str, str] = {}
    for node in ast.walk(tree):
        names: list[tuple[str, str]] = []
        if isinstance(node, ast.Import):
            names = [(x.name, x.asname or x.name.partition(".")[0]) for x in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "the packages import by full names"
            names = [(f"{node.module}.{x.name}", "") for x in node.names]
        for name, bound in names:
            top, _, rest = name.partition(".")
            if top not in allowed:
                yield f"{relative}:{node.lineno} imports {name}"
            if bound:
                modules[bound] = top
            elif rest and top in OF_MODULES and rest.split(".")[0] not in OF_MODULES[top]:
                yield f"{relative}:{node.lineno} imports {name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in NAMES:
            yield f"{relative}:{node.lineno} uses {node.id}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            top = modules[node.value.id]
            if top in OF_MODULES and node.attr not in OF_MODULES[top]:
                yield f"{relative}:{node.lineno} uses {top}.{node.attr}"
            if top in FRAMEWORKS[package] and node.attr in OF_FRAMEWORKS:
                yield f"{relative}:{node.lineno} uses {top}.{node.attr}"
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            literal = isinstance(node.args[0], ast.Constant) and node.args[0].value.partition(".")[0] in allowed
            if not literal and (relative, ast.unparse(node)) not in COMPUTED_IMPORTS:
                yield f"{relative}:{node.lineno} calls {ast.unparse(node)}"


@pytest.mark.promise("supply chain", backend="wheel")
@pytest.mark.parametrize(("package", "path"), SOURCES, ids=lambda x: x if isinstance(x, str) else x.name)
def test_no_pickle_eval_network_or_subprocess(package: str, path: Path) -> None:
    assert list(findings(package, path)) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "import subprocess as s",
        "from urllib import request",
        "from os import system",
        "import os\nos.system('x')",
        "import os.path\nos.popen('x')",
        "eval('1')",
        "f = exec",
        "__import__('socket')",
        "import importlib\nimportlib.import_module('socket')",
        "import importlib\nimportlib.import_module(name)",
        "from importlib import import_module as load\nimport importlib\nimportlib.reload(x)",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import sys\nsys.modules['x']",
    ],
)
def test_the_scan_finds_what_it_should(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "bad.py").write_text(line)
    assert list(findings("acprop_core", tmp_path / "bad.py"))


@pytest.mark.promise("supply chain", backend="wheel")
def test_the_wheel_holds_the_packages_and_asks_for_one_dependency(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path], cwd=ROOT, check=True)
    (path,) = tmp_path.glob("*.whl")
    wheel = zipfile.ZipFile(path)
    (metadata,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    info = metadata.removesuffix("/METADATA")
    expected = {f"{name}/{x.relative_to(PACKAGES[name]).as_posix()}" for name, x in SOURCES}
    expected |= {f"{name}/py.typed" for name in PACKAGES}
    expected |= {f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "licenses/LICENSE")}
    assert set(wheel.namelist()) == expected
    requires = [Requirement(x) for x in message_from_bytes(wheel.read(metadata)).get_all("Requires-Dist")]
    assert [str(x) for x in requires if x.marker is None] == PROJECT["project"]["dependencies"]
    assert [x.name for x in requires if x.marker is None] == ["array-api-compat"]


@pytest.mark.promise("supply chain", backend="wheel")
def test_the_minimums_are_what_the_project_promises() -> None:
    # `minimums` of the noxfile writes == for >=, so nothing else may bound a version
    project = PROJECT["project"]
    promises = sum(project["optional-dependencies"].values(), project["dependencies"])
    assert {x for x in promises if not re.fullmatch(r"[\w-]+(\[\w+\])?>=[\d.]+", x)} == {"ml_dtypes"}
    tried = re.search(r'\[name\] for name in \((".*")\)\]', (ROOT / "noxfile.py").read_text())
    assert tried is not None
    assert {*re.findall(r"\w+", tried[1])} == {*project["optional-dependencies"]} - {"torch", "cupy", "cuda"}
