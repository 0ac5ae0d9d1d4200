"""What the documentation says is so: its snippets run, its docstrings' examples hold, its bounds are those tested."""

import pytest

pytest.importorskip("torch")

import contextlib
import doctest
import importlib
import inspect
import io
import json
import re
import runpy
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from torch.optim import AdamW

import acprop_core
import acprop_core.adapt
import acprop_core.rule
import acprop_optax
import acprop_stepper
import acprop_torch
from agreement import BOUNDS, CONSTANT_BOUNDS, NOISE_BOUNDS, RANDOM_BOUNDS, UNCENTRED_BOUNDS
from cases import CASES
from soak import DRIFT, GROWTH, HOSTS
from test_bad_input import ROWS, WORLDS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


# what a fenced block may be, beside a directive: {executed, compared with what was printed, named things exist}
RUN, PROMPTS, PRINTED, SHELL = "python", "pycon", "output", "console"
NOT_CODE = {"bibtex", "text", "toml", "yaml"}
SCRIPT = "{literalinclude}"  # of docs/examples: run as a program, its text is the path


class Block(NamedTuple):
    """A fenced block of code: its language, text, first line, tab ("" outside), and why it does not run."""

    language: str
    text: str
    line: int
    tab: str
    not_run: str


def blocks_of(page: str) -> list[Block]:
    """Return the fenced blocks of a MyST page, those within tabs and other directives too, in order."""
    blocks: list[Block] = []
    tab, not_run = "", ""
    lines = enumerate(textwrap.dedent(page).splitlines(), start=1)
    for number, line in lines:
        if found := re.match(r"\s*(`{3,}|~{3,})\s*(\S*) *(.*)", line):
            fence, language, argument = found.groups()
            inside = []
            for _, inner in lines:
                if inner.strip() == fence:
                    break
                inside.append(inner)
            else:
                raise AssertionError(f"the block in line {number} is not closed")
            text = "\n".join(inside) + "\n"
            if language == SCRIPT and argument.startswith("examples/"):
                blocks.append(Block(SCRIPT, argument, number, tab, not_run))
            elif language.startswith("{"):  # a directive: what it holds
                nested = blocks_of(text)
                blocks += [block._replace(tab=block.tab or tab, line=block.line + number) for block in nested]
            else:
                blocks.append(Block(language, textwrap.dedent(text), number, tab, not_run))
            not_run = ""
        elif found := re.match(r"\s*:{3,}\{tab-item\}\s*(.*)", line):
            tab = f"{number} {found[1]}"
        elif re.match(r"\s*:{4,}\s*$", line):  # the end of a set of tabs, which is longer than that of a tab
            tab = ""
        elif found := re.match(r"\s*(?:%|<!--) not run: (.*?)(?: *-->)?$", line):
            not_run = found[1]
        elif line.strip():
            not_run = ""
    return blocks


def run_blocks(page: Path) -> None:
    """Execute a page from top to bottom; each tab sees what stands above it, and nobody sees into a tab."""
    outside: dict[str, object] = {}
    inside: dict[str, dict[str, object]] = {}
    printed = ""
    known = {RUN, PROMPTS, PRINTED, SCRIPT, SHELL, *NOT_CODE}
    for block in blocks_of(page.read_text()):
        namespace = inside.setdefault(block.tab, dict(outside)) if block.tab else outside
        where = f"{page.name}, line {block.line}"
        assert block.language in known, f"{where}: a block of {block.language!r}"
        if block.language == RUN and not block.not_run:
            with contextlib.redirect_stdout(io.StringIO()) as out:
                # as many lines before it as on the page, so that a traceback names the page's line
                exec(compile("\n" * block.line + block.text, str(page), "exec"), namespace)
            printed = out.getvalue()
        elif block.language == SCRIPT and not block.not_run:
            with contextlib.redirect_stdout(io.StringIO()) as out:
                runpy.run_path(str(ROOT / "docs" / block.text), run_name="__main__")
            printed = out.getvalue()
        elif block.language == PROMPTS and not block.not_run:
            example = doctest.DocTestParser().get_doctest(block.text, namespace, page.name, str(page), block.line)
            assert example.examples, where
            report: list[str] = []
            failed, _ = doctest.DocTestRunner(verbose=False).run(example, out=report.append, clear_globs=False)
            assert not failed, "".join(report)
            namespace.update(example.globs)
        elif block.language == PRINTED and not block.not_run:
            assert block.text == printed, f"{where}: printed is\n{printed}"
        # a shell block is not run here: it installs, or trains for minutes; what it names must exist (below)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_snippets_run(page: Path) -> None:
    run_blocks(page)


@pytest.mark.parametrize(
    ("page", "error"),
    [
        ("```python\n1 / 0\n```\n", ZeroDivisionError),
        (":::{tab-item} A\n```python\n1 / 0\n```\n:::\n", ZeroDivisionError),
        ("````{note}\n```python\n1 / 0\n```\n````\n", ZeroDivisionError),
        ("```pycon\n>>> 1 + 1\n3\n```\n", AssertionError),
        ("```python\nprint(1)\n```\n```output\n2\n```\n", AssertionError),
        ("```ruby\n1\n```\n", AssertionError),
        ("```python\n1\n", AssertionError),
        ("::::{tab-set}\n:::{tab-item} A\n```python\na = 1\n```\n:::\n::::\n```python\na\n```\n", NameError),
    ],
)
def test_a_wrong_block_fails(page: str, error: type[Exception], tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(page)
    with pytest.raises(error):
        run_blocks(tmp_path / "page.md")


def test_good_blocks_pass_and_a_reason_keeps_one_from_running(tmp_path: Path) -> None:
    page = "```python\nprint(a := 1)\n```\n```output\n1\n```\n```pycon\n>>> a + 1\n2\n```\n"
    page += "<!-- not run: divides by zero -->\n```python\n1 / 0\n```\n"
    (tmp_path / "page.md").write_text(page)
    run_blocks(tmp_path / "page.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_command_names_exists(page: Path) -> None:
    text = page.read_text()
    sessions = set(re.findall(r"^def (\w+)\(session", (ROOT / "noxfile.py").read_text(), flags=re.MULTILINE))
    for line in re.findall(r"nox -s ((?:[a-z_]+(?:-[0-9.]+)? ?)+)", text):
        assert {*line.split()} <= sessions | {"and", "or"}, line
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for names in re.findall(r"install \"?(?:\.|acprop-core)\[([\w,]+)\]", text):
        assert {*names.split(",")} <= {*extras}, names
    for path in re.findall(r"\b((?:docs|tests|adapters|acprop_core)/[\w/.-]+\.(?:py|md|png|svg|json))\b", text):
        assert (ROOT / path).is_file(), path


def documented_modules() -> list[str]:
    """Return the names of all modules of ours that have an example in a docstring."""
    files = [path.relative_to(ROOT) for folder in ("acprop_core", "adapters") for path in (ROOT / folder).rglob("*.py")]
    with_examples = [path for path in files if ">>> " in (ROOT / path).read_text()]
    return sorted(".".join(path.with_suffix("").parts).removeprefix("adapters.") for path in with_examples)


@pytest.mark.parametrize("name", documented_modules())
def test_examples_of_docstrings_hold(name: str) -> None:
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert tried
    assert not failed


def test_published_bounds_are_those_tested() -> None:
    text = (ROOT / "docs" / "guarantees.md").read_text()
    rows = {**BOUNDS, **{f"{dtype}, random hyperparameters": bounds for dtype, bounds in RANDOM_BOUNDS.items()}}
    rows["float64, random hyperparameters, not centred"] = UNCENTRED_BOUNDS["float64"]
    for name, bounds in rows.items():
        cells = [str(bounds.get(quantity, "as float32")) for quantity in ("update", "param", "mu", "nu")]
        assert f"| {name} | {' | '.join(cells)} |" in text
    for name, bound in CONSTANT_BOUNDS.items():
        assert f"| {name} | {bound} | {NOISE_BOUNDS[name]} $\\sqrt n$ |" in text
        page = (ROOT / "docs" / "sixteen-bit.md").read_text()
        assert f"| {name} | {bound} | {NOISE_BOUNDS[name]} $\\sqrt n$ |" in page
    assert f"the same {len(CASES)} cases" in text
    demo = (ROOT / "docs" / "examples" / "digits.py").read_text()
    assert f"PARAM_BOUND = {BOUNDS['float64']['param']}\n" in demo


def test_documented_names_are_the_public_ones() -> None:
    text = "".join(path.read_text() for path in sorted((ROOT / "docs").glob("api-*.md")))
    overview = (ROOT / "docs" / "api.md").read_text()
    documented = re.findall(r"^\.\. auto(?:class|function|data):: (\S+)$", text, flags=re.MULTILINE)
    for package in (acprop_core, acprop_optax, acprop_torch, acprop_stepper):
        names = [f"{package.__name__}.{name}" for name in package.__all__]
        assert sorted(name for name in documented if name.rpartition(".")[0] == package.__name__) == sorted(names)
        (row,) = re.findall(rf"^\| \[`{package.__name__}`\].*\| (.*) \|$", overview, flags=re.MULTILINE)
        assert sorted(re.findall(r"`(\w+)`", row)) == sorted(package.__all__)
    rule = {
        f"acprop_core.rule.{name}"
        for name, x in vars(acprop_core.rule).items()
        if getattr(x, "__module__", "") == "acprop_core.rule" and not name.startswith("_")
    }
    assert rule <= {*documented}
    assert not [name for name in documented if "._" in name]


def test_the_explosion_is_as_documented() -> None:
    for clip_exponent, expected in ((None, "-3162"), (0.25, "-0.0012")):
        optimizer = acprop_core.ACProp(learning_rate=1e-3, clip_exponent=clip_exponent)
        _, state = optimizer.update(np.zeros(1), optimizer.init(np.zeros(1)))
        update, _ = optimizer.update(np.ones(1), state)
        assert f"{update[0]:.2g}" == f"{float(expected):.2g}"
        assert expected in (ROOT / "docs" / "algorithm.md").read_text()


def test_whether_to_use_it_is_as_measured() -> None:
    measured = json.loads((ROOT / "docs" / "benchmarks" / "convergence.json").read_text())
    page = " ".join((ROOT / "docs" / "should-i-use.md").read_text().split())
    of = {name: [row for row in measured["rows"] if row["optimizer"] == name] for name in ("ACProp", "AdamW")}
    ours, theirs = (sum(row["diverged"] for row in rows) for rows in of.values())
    runs = sum(len(row["test"]) for row in of["ACProp"])
    assert f"it diverges more often: in {ours} of {runs} runs, AdamW in {theirs}." in page
    assert ours > theirs
    # "In each of the four tasks below the ranges of five seeds overlap"
    best = [{row["task"]: row for row in rows if row["chosen"]} for rows in of.values()]
    assert len(best[0]) == len(best[1]) == 4
    for task, row in best[0].items():
        other = best[1][task]["test"]
        assert len(other) == len(row["test"]) == 5
        assert min(row["test"]) <= max(other), task
        assert min(other) <= max(row["test"]), task


def test_readme_keeps_its_length() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 130


README = [block for block in blocks_of((ROOT / "README.md").read_text()) if block.language == RUN]


@pytest.mark.parametrize("block", README, ids=lambda block: f"line {block.line}")
def test_a_snippet_of_the_readme_runs_alone_and_prints(block: Block, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(README) == 4
    exec(block.text, {})
    assert capsys.readouterr().out


@pytest.mark.parametrize(("page", "count"), [("README.md", 5), ("docs/algorithm.md", 7)])
def test_symbols_have_their_options_and_defaults(page: str, count: int) -> None:
    symbol = r"(?:\$.*?\$|`[\u0370-\u03ff].*`|`p`)"  # in README Greek letters, because PyPI renders no formulas
    rows = re.findall(rf"^\| {symbol} \| (.*?) \| (.*?) \| (.*?) \|$", (ROOT / page).read_text(), re.MULTILINE)
    assert len(rows) == count
    ours, theirs = (inspect.signature(x).parameters for x in (acprop_core.ACProp, acprop_torch.ACProp))
    for core, torch, default in rows:
        names = [name for name in re.findall("`(.*?)`", core) if name != "mask"]
        assert re.split(" ?[;(]", default)[0] == ", ".join(str(ours[name].default) for name in names), core
        for adapter in (acprop_stepper.Stepper, acprop_optax.acprop):
            parameters = inspect.signature(adapter).parameters
            defaults = [parameters[name].default for name in names]
            assert all(
                x == ours[name].default or x is inspect.Parameter.empty for x, name in zip(defaults, names, strict=True)
            )
        assert [theirs[name].default for name in re.findall("`(.*?)`", torch)] in (
            [ours[name].default for name in names],
            [tuple(ours[name].default for name in names)],
        )
    assert "`torch.optim.AdamW` has 0.01" in rows[3][2]
    assert inspect.signature(AdamW).parameters["weight_decay"].default == 0.01


def test_examples_of_checkpoints_save_the_parameters_too() -> None:
    blocks = [block.text for block in blocks_of((ROOT / "docs" / "checkpoint.md").read_text()) if block.language == RUN]
    saving = [text for text in blocks if re.search(r"^save\(", text, flags=re.MULTILINE)]
    assert len(saving) == 5
    assert all("np.savez(" in text or "torch.save(" in text for text in saving)


@pytest.mark.parametrize(
    ("page", "function"),
    [("torch.md", acprop_torch.ACProp), ("stepper.md", acprop_stepper.Stepper), ("optax.md", acprop_optax.acprop)],
)
def test_the_table_of_options_is_complete_and_has_the_defaults(page: str, function: type) -> None:
    table = (ROOT / "docs" / page).read_text().partition("\n## Options\n")[2].partition("\n## ")[0]
    told = {}
    for names, cell, _ in re.findall(r"^\| (`.*?) \| (.*?) \| (.*) \|$", table, flags=re.MULTILINE):
        names = re.findall("`(.*?)`", names)
        cell = re.sub(r" \(AdamW: .*\)|`", "", cell)
        defaults = eval(cell, {"required": inspect.Parameter.empty})
        told |= {names[0]: defaults} if len(names) == 1 else dict(zip(names, defaults, strict=True))
    options = inspect.signature(function).parameters.values()
    assert told == {option.name: option.default for option in options if option.name != "params"}


def test_the_start_page_names_the_oldest_versions() -> None:
    page = " ".join((ROOT / "docs" / "index.md").read_text().split())
    versions = page.partition("**Versions.**")[2].partition(" pip keeps")[0].lower()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for needed in {x for extra in extras.values() for x in extra if ">=" in x}:
        name, _, oldest = needed.partition(">=")
        assert f"{name.split('[')[0].removesuffix('-cuda13x')} {oldest}" in versions, needed


def test_the_readme_links_to_pages_that_github_renders() -> None:
    pages = {ROOT / path for path in re.findall(r"\]\((docs/[\w/.-]+\.md)", (ROOT / "README.md").read_text())}
    assert len(pages) > 10
    directive, role = r"^\s*(?:`{3,}|:{3,})\s*\{", r"\{[a-z:]+\}`"  # of MyST: GitHub shows their source
    space = r"\$[^$\n]*\\[,;:!][^$\n]*\$"  # GitHub takes `\,` in a formula for Markdown's escaped comma
    shown_as_source = re.compile(f"{directive}|{role}|{space}", re.MULTILINE)
    assert not [page.name for page in pages if shown_as_source.search(page.read_text())]


def test_the_language_model_trains(tmp_path: Path) -> None:
    script = ROOT / "docs" / "examples" / "language_model.py"
    run = [sys.executable, script, "--steps", "2", "--out", tmp_path]
    printed = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    assert len(re.findall(r"^(?:ACProp, clip_exponent=0.25|AdamW), lr=.* after 2 steps", printed, re.MULTILINE)) == 2
    assert (tmp_path / "language_model.png").stat().st_size > 10_000


def test_the_adamw_run_moves(tmp_path: Path) -> None:
    script = ROOT / "docs" / "examples" / "move_adamw.py"
    run = [sys.executable, script, "--steps", "12", "--out", tmp_path]
    printed = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    assert re.search(r"^largest difference of the two runs' losses: \S+e-1[3-9]$", printed, re.MULTILINE)
    assert (tmp_path / "move_adamw.png").stat().st_size > 10_000


def test_the_demo_has_the_bits_of_numpy_in_jax_and_pytorch(tmp_path: Path) -> None:
    script = ROOT / "docs" / "examples" / "digits.py"
    run = [sys.executable, script, "--steps", "40", "--out", tmp_path]
    printed = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    for framework in (r"JAX \+ optax", "PyTorch"):
        assert re.search(rf"^{framework} +0\.0e\+00 \(none after 40 of 40 steps\)$", printed, re.MULTILINE)
    assert (tmp_path / "digits.png").stat().st_size > 10_000


def test_the_recorded_run_is_replayed(tmp_path: Path) -> None:
    script = ROOT / "docs" / "examples" / "same_bits.py"
    run = [sys.executable, script, "--steps", "30", "--out", tmp_path]
    printed = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    assert printed == "NumPy has the bits of PyTorch after 30 of 30 steps.\n"


def test_the_16_bit_models_train(tmp_path: Path) -> None:
    script = ROOT / "docs" / "examples" / "sixteen_bit.py"
    run = [sys.executable, script, "--steps", "2", "--out", tmp_path]
    printed = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    losses = re.findall(r"^lr=.*, (bfloat16|float32)(, compensate=True)?: .* after 2 steps", printed, re.MULTILINE)
    assert len(losses) == 2 * len({*losses}) == 6
    assert (tmp_path / "sixteen_bit.png").stat().st_size > 10_000


def test_figures_in_prose_are_those_of_the_results() -> None:
    stepper, algorithm = (
        " ".join((ROOT / "docs" / page).read_text().split()) for page in ("stepper.md", "algorithm.md")
    )
    threads = json.loads((ROOT / "docs" / "benchmarks" / "small_numpy_threads.json").read_text())["rows"]
    ratios = {row["arrays"] * row["size"]: row["to peer"][1] for row in threads}
    large = [ratio for size, ratio in ratios.items() if size >= 10**6]
    said = f"Two threads on two cores take {min(large):.2f} to {max(large):.2f} of one thread's time from one million"
    assert f"{said} parameters on, and {ratios[300_000]:.2f} of it at 300,000" in stepper

    alone = json.loads((ROOT / "docs" / "benchmarks" / "steps_numpy.json").read_text())["threads"]
    assert f"two were [{alone['ratio'][1]:.2f} times as fast](benchmarks.md#numpy-threads) as one at 16" in stepper
    assert (alone["size"], "as one at 16 million parameters" in stepper) == (16_000_000, True)

    # the bias correction in float32, as 1 - b2**t, at the first step
    wrong = [abs((1 - np.float32(b2)) / (1 - b2) - 1) for b2 in (0.999, 0.99999)]
    small, large = (f"{x:.1e}".replace("e-0", "e-") for x in wrong)
    assert f"in float32 is wrong by {large} at $\\beta_2 = 0.99999$" in algorithm
    assert f"wrong by {small} at $\\beta_2 = 0.999$, by {large} at 0.99999" in (ROOT / "docs" / "optax.md").read_text()

    explosion = json.loads((ROOT / "docs" / "figures" / "explosion.json").read_text())
    rosenbrock, digits = (of["ACProp, no clip"] for of in explosion.values())
    said = "loss of Rosenbrock jumps from 1 to ten thousand at the third step, and the loss of the digits to a million"
    assert said in algorithm
    assert (round(rosenbrock["largest loss"], -4), rosenbrock["at step"]) == (10_000, 3)
    assert round(digits["largest loss"], -6) == 1_000_000


def test_figures_of_the_page_on_reliability() -> None:
    page = " ".join((ROOT / "docs" / "reliability.md").read_text().split())
    rows = {(WORLDS[backend][0].__name__, row.name) for backend, row in ROWS}
    said = re.search(
        r"about ([\d,]+) in all \(functional core (\d+), PyTorch (\d+), stepper and files (\d+), optax (\d+)\)", page
    )
    assert said
    counts = [sum(host == world for host, _ in rows) for world in ("Core", "Torch", "Files", "Optax")]
    assert [int(x.replace(",", "")) for x in said.groups()] == pytest.approx([len(rows), *counts], rel=0.05)

    soaked = re.findall(
        r"\| ([^|]+) \| (1,?0+,000) \| ([+-][\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", page.replace("| |", "|\n|")
    )
    assert [name for name, *_ in soaked] == list(HOSTS)
    for name, _, growth, *errors in soaked:
        assert float(growth) < GROWTH, name
        assert all(float(x) <= bound for x, bound in zip(errors, DRIFT.values(), strict=True)), name


@pytest.mark.parametrize(
    ("transform", "largest", "last"),
    [(optax.contrib.acprop(1e-4), 7967, None), (acprop_optax.acprop(1e-4, clip_exponent=0.25), 1, 0.30)],
)
def test_rosenbrock_is_as_on_the_page_of_optax(transform: Any, largest: float, last: float | None) -> None:
    def loss(p: jax.Array) -> jax.Array:
        return (1 - p[0]) ** 2 + 100 * (p[1] - p[0] ** 2) ** 2

    def step(run: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], jax.Array]:
        updates, state = transform.update(jax.grad(loss)(run[0]), run[1], run[0])
        params = optax.apply_updates(run[0], updates)
        return (params, state), loss(params)

    page = (ROOT / "docs" / "optax.md").read_text()
    start = jax.numpy.zeros(2)
    _, losses = jax.lax.scan(step, (start, transform.init(start)), length=1000)
    assert round(max(float(losses.max()), float(loss(start)))) == largest
    if last is None:
        assert f"Rosenbrock from zeros, rate 1e-4: climbs from 1 to {largest:,}" in page
    else:
        assert round(float(losses[-1]), 2) == last
        assert f"with `clip_exponent=0.25` never above {largest}, {last:.2f} after 1,000 steps" in page


def test_the_whole_loop_in_torch_resumes_with_float16_too(tmp_path: Path) -> None:
    before, after = "torch.bfloat16, False  # or torch.float16, True", "torch.float16, True"
    source = (ROOT / "docs" / "examples" / "loop_torch.py").read_text()
    assert before in source
    (tmp_path / "loop.py").write_text(source.replace(before, after))
    with contextlib.redirect_stdout(io.StringIO()) as out:
        runpy.run_path(str(tmp_path / "loop.py"), run_name="__main__")
    assert "without a stop: True" in out.getvalue()


@pytest.mark.parametrize("clip", [None, 0.25])
def test_how_far_a_gradient_100_times_the_usual_moves_an_element(clip: float | None) -> None:
    """The pages of whole loops say: ACProp 100 rates, with the clip t**0.25; Adam 3."""
    rng = np.random.default_rng(0)
    grads = rng.standard_normal((5000, 200))
    grads[-1] = 100.0
    moved = {}
    for name, switches in {"Adam": {"asynchronous": False, "centering": "none"}, "ACProp": {}}.items():
        optimizer = acprop_core.ACProp(1.0, clip_exponent=clip, **switches)
        state = optimizer.init(grads[0])
        for grad in grads:
            update, state = optimizer.update(grad, state)
        moved[name] = np.median(-update)
    assert moved["Adam"] == pytest.approx(3.0, rel=0.05)
    assert moved["ACProp"] == pytest.approx(100 / 0.9 if clip is None else 5000**clip, rel=0.03)
