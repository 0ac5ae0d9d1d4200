"""What a reader sees: lines of code that fit a page, and figures with one colour for each optimizer."""

import pytest

pytest.importorskip("matplotlib")

import json
import re
import textwrap
from pathlib import Path

import palette

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
WIDEST = 84  # columns of code that a page shows without scrolling, on a screen of 1280 pixels
PRINTED = {"output", "text"}  # as programs print it


def too_wide(page: str) -> list[str]:
    """Return the lines of code that are wider than a page: of fences, of directives with code, and indented ones."""
    found, fence, language, empty = [], "", "", True
    for line in page.splitlines():
        opened = re.match(r"\s*(`{3,})\s*(\S*)", line)
        # an indented block begins after an empty line, and continues with indented lines
        indented = empty and not fence and line.startswith("    ")
        if opened and not fence:
            fence, language = opened.groups()
        elif fence and line.strip() == fence:
            fence = ""
        elif (fence and language not in PRINTED) or indented:
            found += [line] if len(line) > WIDEST + 4 * indented else []
        empty = not line.strip() or indented
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_fits_the_page(page: Path) -> None:
    assert too_wide(page.read_text()) == []


@pytest.mark.parametrize(
    "page", ["```python\n{}\n```", "text\n\n    a\n    {}\n", "::::{{tab}} A\n\n```console\n{}\n```\n::::"]
)
def test_a_wide_line_is_found(page: str) -> None:
    assert too_wide(page.format("x" * WIDEST)) == []
    assert too_wide(page.format("x" * (WIDEST + 1))) != []


def test_what_programs_print_and_prose_may_be_wider() -> None:
    wide = "x " * WIDEST
    assert too_wide(f"{wide}\n\n```output\n{wide}\n```\n\n- {wide}\n") == []


def included(page: Path) -> list[tuple[Path, str]]:
    """Return the files whose code a page shows, and the part of each."""
    found = []
    text = page.read_text()
    for name, options in re.findall(r"^```\{literalinclude\} *(\S+)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        path = (page.parent / name).resolve()
        part = path.read_text()
        for mark, keep in (("start-after", -1), ("end-before", 0)):
            if given := re.search(rf"^:{mark}: *\"?(.*?)\"?$", options, flags=re.MULTILINE):
                part = part.split(given[1], maxsplit=1)[keep]
        found.append((path, textwrap.dedent(part)))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_included_code_fits_the_page(page: Path) -> None:
    # lines of the rule and of the oracle are as long as those of all other sources: some of them scroll
    parts = [(path, part) for path, part in included(page) if path.name not in ("rule.py", "reference.py")]
    assert [(path.name, line) for path, part in parts for line in part.splitlines() if len(line) > WIDEST] == []


def test_every_contender_has_a_colour_and_no_two_of_a_panel_look_alike() -> None:
    for path in (ROOT / "docs" / "benchmarks").glob("steps_*.json"):
        contenders = {row["contender"] for row in json.loads(path.read_text())["rows"]}
        looks = [tuple(palette.look(name).items()) for name in contenders]
        assert len({*looks}) == len(looks), path.name


def test_each_optimizer_has_one_hue_in_all_figures() -> None:
    assert len({*palette.COLOURS.values()}) == len(palette.COLOURS) - 1  # Adam and AdamW share theirs
    for name, contender in {"ACProp": "ACProp, fused", "AdamW": "AdamW, fused", "AdaBelief": "optax.adabelief"}.items():
        assert palette.look(contender)["color"] == palette.COLOURS[name]
    ours = (*(ROOT / "docs" / "figures").glob("*.py"), *(ROOT / "tests" / "benchmarks").glob("*.py"))
    named = [path.name for path in ours if re.search(r"\"(#[0-9A-Fa-f]{6}|C\d)\"", path.read_text())]
    assert sorted(named) == ["convergence_area.py", "palette.py"]  # the former's grey is of no optimizer


SOURCES = [path for folder in ("acprop_core", "adapters") for path in sorted((ROOT / folder).rglob("*.py"))]


def test_examples_of_docstrings_fit_the_page() -> None:
    # a page shows a docstring in a narrower column than its other code
    lines = [(path.name, line.strip()) for path in SOURCES for line in path.read_text().splitlines()]
    examples = [(name, line) for name, line in lines if line.startswith((">>> ", "... "))]
    assert len(examples) > 100
    assert [(name, line) for name, line in examples if len(line) > WIDEST] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_power_is_not_drawn_as_bold(page: Path) -> None:
    # two powers in one paragraph, such as 2 ** 63 without spaces, are the borders of what Markdown draws bold
    prose = re.sub(r"^( *)(`{3,}).*?^\1\2|`[^`]*`", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert re.findall(r"[\w.]+\*\*-?\d+", prose) == []
