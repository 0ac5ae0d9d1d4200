"""The promises as such: that the page has them all, and that counting counts."""

import contextlib
import re
from pathlib import Path

import pytest

from promises import BEGIN, END, PROMISES, Count, attempt, counting, table, write

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs/reliability.md"


def test_the_page_has_the_promises_and_names_tests_that_hold_them() -> None:
    _, _, rest = PAGE.read_text().partition(BEGIN)
    rows = [line.strip("| ").split(" | ") for line in rest.partition(END)[0].strip().splitlines()[2:]]
    assert [row[0] for row in rows] == [f"**{key}**: {statement}" for key, statement in PROMISES.items()], (
        "run nox -s reliability"
    )
    for _, tests, _, tried, held in rows:
        assert tried == held
        for file, name in re.findall(r"`(\w+\.py)::(\w+)`", tests):
            assert f"def {name}(" in (TESTS / file).read_text(), f"{file}::{name}; run nox -s reliability"


def test_counts() -> None:
    with counting("clip", "test.py::test", "NumPy") as counts:
        pass
    assert counts == [Count("clip", "test.py::test", "NumPy", 1, 1)]
    with counting("clip", "test.py::test", "NumPy") as counts:
        for backend in ("a", "a", ""):
            with attempt(backend):
                pass
    assert counts == [Count("clip", "test.py::test", "a", 2, 2), Count("clip", "test.py::test", "NumPy", 1, 1)]


@pytest.mark.parametrize("tries", [0, 1, 2])
@pytest.mark.parametrize("within", [False, True])
def test_a_failure_is_counted_once(tries: int, within: bool) -> None:
    def fail() -> None:
        for _ in range(tries):
            with attempt():
                pass
        with attempt() if within else contextlib.nullcontext():
            raise AssertionError

    with contextlib.suppress(AssertionError), counting("clip", "test.py::test", "NumPy") as counts:
        fail()
    assert counts == [Count("clip", "test.py::test", "NumPy", tries + 1, tries)]


def test_the_table_is_written_between_the_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"above\n{BEGIN}\nold\n{END}\nbelow\n")
    text = table([Count("clip", "a.py::test", "x", 3, 2), Count("clip", "a.py::test", "y", 1000, 1000)])
    assert f"| **clip**: {PROMISES['clip']} | `a.py::test` | 2 | 1,003 | 1,002 |" in text.splitlines()
    write(page, text)
    write(page, text)
    assert page.read_text() == f"above\n{BEGIN}\n\n{text}\n\n{END}\nbelow\n"
    page.write_text("unmarked\n")
    with pytest.raises(ValueError, match="lacks"):
        write(page, text)
    assert page.read_text() == "unmarked\n"
