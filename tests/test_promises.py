"""The promises as such: that the page names the tests that hold them, and that counting counts."""

import re
from pathlib import Path

import pytest

from promises import PAGE, ROW

pytest_plugins = ["pytester"]
TESTS = Path(__file__).parent


def test_the_page_names_tests_that_hold_its_promises() -> None:
    rows = list(ROW.finditer(PAGE.read_text()))
    assert len(rows) >= 25
    for promise, backends, tried, held, tests in (row.group(2, 3, 4, 5, 6) for row in rows):
        assert tried == held
        assert int(backends) > 0, "run nox -s reliability"
        for file, name in re.findall(r"`(\w+\.py)::(\w+)`", tests):
            source = (TESTS / file).read_text()
            assert f"def {name}(" in source, f"{file}::{name}; run nox -s reliability"
            assert f'promise("{promise}"' in source


HELD = """
import pytest
from promises import attempt

def test_without_a_promise():
    with attempt():
        pass

@pytest.mark.promise("clip")
def test_one_try():
    pass

@pytest.mark.promise("clip", backend="torch")
@pytest.mark.parametrize("tries", [1, 2])
def test_tries(tries):
    for _ in range(tries):
        with attempt():
            pass

@pytest.mark.promise("sign")
@pytest.mark.parametrize("backend", ["jax"])
def test_backends(backend):
    for name in ("dask", "dask", "", "torch"):
        with attempt(name):
            pass

@pytest.mark.promise("sign")
def test_skipped():
    pytest.skip("no device")
"""
FAILED = """
import pytest
from promises import attempt

@pytest.mark.promise("clip")
@pytest.mark.parametrize("before", [0, 1, 2])
def test_fails_within(before):
    for _ in range(before):
        with attempt():
            pass
    with attempt():
        raise AssertionError

@pytest.mark.promise("clip")
@pytest.mark.parametrize("before", [0, 1, 2])
def test_fails_outside(before):
    for _ in range(before):
        with attempt():
            pass
    raise AssertionError
"""
TABLE = "above\n| **clip**: never | 7 | 1,234 | 5 | old |\n| **sign**: a | 7 | 8 | 9 | old |\n| no row |\nbelow\n"


def page_after(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, source: str, *options: str) -> list[str]:
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    pytester.makeini("[pytest]\nmarkers = promise: it holds a promise\n")
    pytester.makepyfile(test_it=source)
    page = pytester.makefile(".md", page=TABLE)
    pytester.runpytest_subprocess("-p", "promises", "-p", "no:cacheprovider", "--promises", page, *options)
    return page.read_text().splitlines()


@pytest.mark.parametrize("options", [(), ("-n", "1")], ids=["one process", "xdist"])
def test_tries_are_counted(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    assert page_after(pytester, monkeypatch, HELD, *options) == [
        "above",
        "| **clip**: never | 2 | 4 | 4 | `test_it.py::test_one_try`<br>`test_it.py::test_tries` |",
        "| **sign**: a | 3 | 4 | 4 | `test_it.py::test_backends` |",
        "| no row |",
        "below",
    ]


def test_a_failure_is_counted_once(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    page = page_after(pytester, monkeypatch, FAILED)
    tests = "`test_it.py::test_fails_outside`<br>`test_it.py::test_fails_within`"
    assert page[1:3] == [f"| **clip**: never | 1 | 12 | 6 | {tests} |", "| **sign**: a | 0 | 0 | 0 | none |"]


def test_a_promise_that_the_page_lacks_is_refused(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    source = HELD.replace('promise("sign")', 'promise("sine")')
    assert page_after(pytester, monkeypatch, source) == TABLE.splitlines()
