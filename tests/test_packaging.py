"""The wheel, the imports, and who may import whom."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

import acprop_core
from acprop_core.adapt import check_version

ROOT = Path(__file__).parents[1]
PACKAGES = ("acprop_core", "acprop_optax", "acprop_torch", "acprop_stepper")


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize(
    ("package", "names"),
    [
        ("acprop_core", ["ACProp", "State", "load", "save"]),
        ("acprop_optax", ["CarryState", "acprop", "export_state", "import_state", "scale_by_acprop"]),
        ("acprop_torch", ["ACProp", "export_state", "import_state"]),
        ("acprop_stepper", ["StepRecord", "Stepper", "export_state", "import_state"]),
    ],
)
def test_public_names(package: str, names: list[str]) -> None:
    assert pytest.importorskip(package).__all__ == names


def test_import_of_the_core_imports_no_framework() -> None:
    loaded = python("import sys, acprop_core; print(*sys.modules)").split()
    frameworks = {"numpy", "jax", "torch", "cupy", "dask", "optax", "numba", "safetensors", "scipy"}
    assert not frameworks & set(loaded)
    # and of the rest of the world, only the standard library and array_api_compat
    outside = {m.partition(".")[0] for m in loaded} - set(sys.stdlib_module_names) - {"acprop_core", "array_api_compat"}
    baseline = {m.partition(".")[0] for m in python("import sys; print(*sys.modules)").split()}
    assert not outside - baseline


@pytest.mark.parametrize(
    ("package", "framework", "others"),
    [
        ("acprop_optax", "optax", {"torch", "cupy", "dask"}),
        ("acprop_torch", "torch", {"jax", "optax", "cupy", "dask"}),
        ("acprop_stepper", "numpy", {"jax", "torch", "optax", "dask"}),
    ],
)
def test_import_of_an_adapter_imports_its_own_framework(package: str, framework: str, others: set[str]) -> None:
    pytest.importorskip(framework)
    loaded = set(python(f"import sys, {package}; print(*sys.modules)").split())
    assert framework in loaded
    assert not others & loaded


@pytest.mark.parametrize(
    ("package", "name", "version", "needed"),
    [
        ("acprop_torch", "torch", "2.5.0+cpu", "2.5.1"),
        ("acprop_stepper", "numpy", "1.26.4", "2.0"),
        ("acprop_optax", "jax", "0.5.3", "0.6.0"),
        ("acprop_optax", "optax", "0.2.4.dev1", "0.2.5"),
    ],
)
def test_a_framework_that_is_too_old_is_refused_at_import(package: str, name: str, version: str, needed: str) -> None:
    pytest.importorskip(name)
    lines = f"import {name}; {name}.__version__ = {version!r}\ntry: import {package}\nexcept ImportError as e: print(e)"
    assert python(lines).strip() == (
        f"{package} needs {name} {needed} or newer, and {name} {version} is installed: "
        f"python -m pip install '{name}>={needed}'"
    )


@pytest.mark.parametrize("version", ["2.5.1", "2.5.1+cpu", "2.5.2", "2.10.0a0+git1", "3.0.0"])
def test_the_oldest_framework_and_newer_ones_are_taken(version: str) -> None:
    framework = SimpleNamespace(__name__="torch", __version__=version)
    assert check_version("acprop_torch", framework, (2, 5, 1)) == tuple(map(int, re.findall(r"\d+", version)))[:3]


def test_the_oldest_frameworks_are_those_of_the_extras() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for package, extra in (("acprop_torch", "torch"), ("acprop_stepper", "numpy"), ("acprop_optax", "optax")):
        text = (ROOT / "adapters" / package / "_version.py").read_text()
        checked = re.findall(r"check_version\(\"\w+\", (\w+), \(([\d, ]+)\)\)", text)
        names = {"np": "numpy"}
        assert {f"{names.get(x, x)}>={oldest.replace(', ', '.')}" for x, oldest in checked} == {*extras[extra]}


def test_arrows_point_to_the_core() -> None:
    result = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout


def test_the_wheel_holds_the_four_packages(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path], cwd=ROOT, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names} == {*PACKAGES, f"acprop_core-{acprop_core.__version__}.dist-info"}
    for package in PACKAGES:
        assert f"{package}/__init__.py" in names
        assert f"{package}/py.typed" in names
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "acprop_core").rglob("*.py")}
    assert sources <= set(names)
