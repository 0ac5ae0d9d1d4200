"""What every test runs under, and how the promises of docs/reliability.md are counted."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import promises

# One BLAS/OpenMP thread a process: pytest-xdist already runs one process a core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

_counts: list[promises.Count] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--promises", type=Path, help="write the counts of the promises into this page")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if (promise := _promise(item)) is not None and promise not in promises.PROMISES:
            raise pytest.UsageError(f"{item.nodeid} is marked with {promise!r}, which tests/promises.py does not have")


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    promise = _promise(pyfuncitem)
    if promise is None:
        return (yield)
    marker = pyfuncitem.get_closest_marker("promise")
    callspec = getattr(pyfuncitem, "callspec", None)
    backend = marker.kwargs.get("backend") or (callspec.params.get("backend") if callspec else None) or "NumPy"
    test = f"{pyfuncitem.path.name}::{pyfuncitem.originalname}"
    counts: list[promises.Count] = []
    try:
        with promises.counting(promise, test, str(backend)) as counts:
            return (yield)
    finally:
        pyfuncitem.user_properties.append(("promises", [list(count) for count in counts]))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and not report.skipped:
        _counts.extend(
            promises.Count(*row) for name, rows in report.user_properties if name == "promises" for row in rows
        )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    page = config.getoption("--promises")
    if page is None:
        return
    text = promises.table(_counts)
    terminalreporter.section("promises")
    terminalreporter.write_line(text)
    promises.write(page, text)


def _promise(item: pytest.Item) -> str | None:
    marker = item.get_closest_marker("promise")
    return None if marker is None else marker.args[0]
