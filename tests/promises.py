"""A pytest plugin that counts how often each promise of docs/reliability.md was tried, and how often it held.

The page has a row for each promise. A test that holds one is marked ``@pytest.mark.promise("its key")``. It counts as
one try on one backend, unless it puts each try into ``with attempt():``. The tries travel as user properties of the
test, also from the processes of pytest-xdist, and ``pytest --promises=docs/reliability.md`` counts them in the page.
"""

import contextlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "reliability.md"
ROW = re.compile(r"^(\| \*\*(.+?)\*\*: .+?) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \| (.*) \|$", re.MULTILINE)


class Try(NamedTuple):
    """Whether a promise held, on one backend, in one test."""

    promise: str
    test: str
    backend: str
    held: bool


_within: list[tuple[str, bool]] = []  # the test that runs: the backend of each try, and whether the promise held
_tries: list[Try] = []  # the whole session


@contextlib.contextmanager
def attempt(backend: object = "") -> Iterator[None]:
    """Count the block as one try of the test's promise, held unless it raises.

    `backend` is needed only where the test has no parameter of that name.
    """
    held = False
    try:
        yield
        held = True
    finally:
        _within.append((str(backend), held))


def counted(page: str, tries: Iterable[Try]) -> str:
    """Return the page with these counts in its rows."""
    tries = list(tries)

    def row(match: re.Match[str]) -> str:
        mine = [x for x in tries if x.promise == match[2]]
        tests = "<br>".join(f"`{test}`" for test in sorted({x.test for x in mine})) or "none"
        backends, held = len({x.backend for x in mine}), sum(x.held for x in mine)
        return f"{match[1]} | {backends} | {len(mine):,} | {held:,} | {tests} |"

    return ROW.sub(row, page)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--promises", type=Path, help="write the counts of the promises into this page")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    page = config.getoption("--promises") or PAGE
    promises = {match[2] for match in ROW.finditer(page.read_text())}
    for item in items:
        if (marker := item.get_closest_marker("promise")) and marker.args[0] not in promises:
            raise pytest.UsageError(f"{item.nodeid} is marked with {marker.args[0]!r}, which {page} does not have")


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    marker = pyfuncitem.get_closest_marker("promise")
    if marker is None:
        return (yield)
    _within.clear()
    passed = False
    try:
        result = yield
        passed = True
        return result
    finally:
        if not _within or (not passed and all(held for _, held in _within)):
            _within.append(("", passed))  # the test is the try; or it failed after the last one
        parameters: dict[str, Any] = pyfuncitem.callspec.params if hasattr(pyfuncitem, "callspec") else {}
        own = str(marker.kwargs.get("backend") or parameters.get("backend", "numpy"))
        test = f"{pyfuncitem.path.name}::{pyfuncitem.originalname}"
        rows = [[marker.args[0], test, backend or own, held] for backend, held in _within]
        pyfuncitem.user_properties.append(("promise", rows))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and not report.skipped:
        _tries.extend(Try(*row) for name, rows in report.user_properties if name == "promise" for row in rows)


def pytest_terminal_summary(config: pytest.Config) -> None:
    page = config.getoption("--promises")
    if page and _tries:
        page.write_text(counted(page.read_text(), _tries))
