"""The reference suite: every backend through every case, against the oracle."""

from collections.abc import Iterator
from typing import Any

import pytest

from agreement import violations
from cases import CASES, Case
from hosts import BACKENDS, Backend, marks_of


def _runs() -> Iterator[Any]:
    for backend in BACKENDS.values():
        if backend.cannot_run():
            yield pytest.param(backend, None, id=str(backend), marks=marks_of(backend))
            continue
        for case in CASES:
            skip = [pytest.mark.skip(reason=reason)] if (reason := backend.cannot_take(case)) else []
            yield pytest.param(backend, case, id=f"{backend}-{case}", marks=[*marks_of(backend, case), *skip])


@pytest.mark.parametrize(("backend", "case"), list(_runs()))
def test_agrees_with_the_oracle(backend: Backend, case: Case) -> None:
    assert not violations(case, backend.run(case), backend.complex_as_real)


def test_case_names_are_unique() -> None:
    assert len({str(case) for case in CASES}) == len(CASES)
