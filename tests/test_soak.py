"""A short soak of every host; `nox -s soak` does the long one."""

import pytest

from promises import attempt
from soak import DRIFT, HOSTS, soak

STEPS = 5_000  # of each of a dozen hosts


@pytest.mark.slow
@pytest.mark.promise("soak")
@pytest.mark.parametrize("backend", HOSTS)
def test_neither_memory_nor_error_grows(backend: str) -> None:
    if reason := HOSTS[backend].cannot_run():
        pytest.skip(reason)
    report = soak(HOSTS[backend], STEPS)
    for quantity, error in report.drift.items():
        with attempt():
            assert error <= DRIFT[quantity]
    # An object that stayed behind every step would be a block. So few steps say nothing of the process's pages, which
    # come and go by the hundred.
    with attempt():
        assert report.blocks < 0.3
