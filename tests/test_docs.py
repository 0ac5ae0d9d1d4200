"""What the documentation says is so: its snippets run, its docstrings' examples hold, its bounds are those tested."""

import doctest
import re
from pathlib import Path

import pytest

import acprop_core._optimizer
import acprop_optax
import acprop_stepper._stepper
import acprop_torch
from agreement import BOUNDS, RANDOM_BOUNDS
from cases import CASES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_snippets_run(page: Path) -> None:
    snippets = re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    namespace: dict[str, object] = {}
    for snippet in snippets:
        exec(compile(snippet, str(page), "exec"), namespace)


@pytest.mark.parametrize("module", [acprop_core._optimizer, acprop_optax, acprop_torch, acprop_stepper._stepper])
def test_examples_of_docstrings_hold(module: object) -> None:
    failed, tried = doctest.testmod(module)
    assert tried
    assert not failed


def test_published_bounds_are_those_tested() -> None:
    text = (ROOT / "docs" / "guarantees.md").read_text()
    rows = {**BOUNDS, **{f"{dtype}, random hyperparameters": bounds for dtype, bounds in RANDOM_BOUNDS.items()}}
    for name, bounds in rows.items():
        cells = [str(bounds.get(quantity, "as float32")) for quantity in ("update", "param", "mu", "nu")]
        assert f"| {name} | {' | '.join(cells)} |" in text
    assert f"the same {len(CASES)} cases" in text


def test_readme_keeps_its_length() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 120
