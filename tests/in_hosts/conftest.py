"""What the hosts run under: no downloads, one thread, and their own warnings are theirs."""

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "KERAS_BACKEND": "jax", "CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}

from collections.abc import Iterable
from typing import Any

import pytest

from runs import REPORT


def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    """Let the hosts warn; a warning that names our code is an error."""
    for item in items:
        # the last mark is applied last, and wins
        item.add_marker(pytest.mark.filterwarnings("error:::acprop_"))
        item.add_marker(pytest.mark.filterwarnings("default"))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Show what was trained, in which version of its host."""
    terminalreporter.section("trained to the same bits after resuming")
    for line in REPORT:
        terminalreporter.write_line(line)
