"""optax's own tests, with acprop_optax in the place of optax.contrib.acprop and of optax.adam."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import optax
import pytest

FILES = (
    "contrib/_common_test.py",
    "contrib/_sam_test.py",
    "transforms/_accumulation_test.py",
    "transforms/_combining_test.py",
    "tree_utils/_state_utils_test.py",
    "_src/float64_test.py",
    "_src/sharding_test.py",
)


@pytest.mark.skipif(
    jax.__version_info__ < (0, 10), reason="the tests of older versions of optax are arranged otherwise"
)
def test_the_tests_of_optax_pass() -> None:
    pytest.importorskip("flax")  # which some of them import
    tests = [Path(optax.__file__).parent / name for name in FILES]
    if missing := [test.name for test in tests if not test.exists()]:
        pytest.skip(f"this optax comes without {', '.join(missing)}")
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "optax_in_place",
            "-p",
            "no:cacheprovider",
            "-c",
            os.devnull,
            *tests,
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) > 80, result.stdout
