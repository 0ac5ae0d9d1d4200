"""What the documentation says is so: its snippets run, its docstrings' examples hold, its bounds are those tested."""

import doctest
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import acprop_core._checkpoint
import acprop_core._optimizer
import acprop_optax
import acprop_stepper._stepper
import acprop_torch._optimizer
from agreement import BOUNDS, CONSTANT_BOUNDS, NOISE_BOUNDS, RANDOM_BOUNDS
from cases import CASES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_snippets_run(page: Path) -> None:
    snippets = re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    namespace: dict[str, object] = {}
    for snippet in snippets:
        exec(compile(snippet, str(page), "exec"), namespace)


@pytest.mark.parametrize(
    "module",
    [
        acprop_core._optimizer,
        acprop_core._checkpoint,
        acprop_optax,
        acprop_torch._optimizer,
        acprop_stepper._stepper,
    ],
)
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
    for name, bound in CONSTANT_BOUNDS.items():
        assert f"| {name} | {bound} | {NOISE_BOUNDS[name]} sqrt(n) |" in text
        page = (ROOT / "docs" / "sixteen-bit.md").read_text()
        assert f"| {name} | {bound} | {NOISE_BOUNDS[name]} $\\sqrt n$ |" in page
    assert f"the same {len(CASES)} cases" in text
    demo = (ROOT / "docs" / "examples" / "digits.py").read_text()
    assert f"PARAM_BOUND = {BOUNDS['float64']['param']}\n" in demo


def test_documented_names_are_the_public_ones() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    for package in (acprop_core, acprop_optax, acprop_torch, acprop_stepper):
        documented = re.findall(rf"^\.\. auto\w+:: {package.__name__}\.(\w+)$", text, flags=re.MULTILINE)
        assert sorted(documented) == sorted(package.__all__)


def test_the_explosion_is_as_documented() -> None:
    for clip_exponent, expected in ((None, "-3162"), (0.25, "-0.0012")):
        optimizer = acprop_core.ACProp(learning_rate=1e-3, clip_exponent=clip_exponent)
        _, state = optimizer.update(np.zeros(1), optimizer.init(np.zeros(1)))
        update, _ = optimizer.update(np.ones(1), state)
        assert f"{update[0]:.2g}" == f"{float(expected):.2g}"
        assert expected in (ROOT / "docs" / "algorithm.md").read_text()


def test_readme_keeps_its_length() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 120


def test_the_language_model_trains(tmp_path: Path) -> None:
    script = ROOT / "docs" / "examples" / "language_model.py"
    run = [sys.executable, script, "--steps", "2", "--out", tmp_path]
    printed = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    assert len(re.findall(r"^(?:ACProp, clip_exponent=0.25|AdamW), lr=.* after 2 steps", printed, re.MULTILINE)) == 2
    assert (tmp_path / "language_model.png").stat().st_size > 10_000


def test_the_16_bit_models_train(tmp_path: Path) -> None:
    script = ROOT / "docs" / "examples" / "sixteen_bit.py"
    run = [sys.executable, script, "--steps", "2", "--out", tmp_path]
    printed = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    losses = re.findall(r"^lr=.*, (bfloat16|float32)(, compensate=True)?: .* after 2 steps", printed, re.MULTILINE)
    assert len(losses) == 2 * len({*losses}) == 6
    assert (tmp_path / "sixteen_bit.png").stat().st_size > 10_000
