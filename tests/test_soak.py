"""A short soak of every host; `nox -s soak` does the long one."""

import importlib.util

import pytest
from soak import DRIFT, HOSTS, soak

from promises import attempt

STEPS = 5_000  # of each of a dozen hosts
NEEDS = {
    "JAX": "jax",
    "acprop_optax": "optax",
    "PyTorch": "torch",
    "acprop_torch": "torch",
    "array-api-strict": "array_api_strict",
}


@pytest.mark.promise("soak")
@pytest.mark.parametrize("backend", HOSTS)
def test_neither_memory_nor_error_grows(backend: str) -> None:
    needs = NEEDS.get(backend.partition(",")[0], "numba" if "Numba" in backend or "guarded" in backend else "numpy")
    if importlib.util.find_spec(needs) is None:
        pytest.skip(f"{needs} is not installed")
    report = soak(HOSTS[backend][0], STEPS)
    for quantity, error in report.drift.items():
        with attempt():
            assert error <= DRIFT[quantity]
    # An object that stayed behind every step would be a block. So few steps say nothing of the process's pages, which
    # come and go by the hundred.
    with attempt():
        assert report.blocks < 0.3
