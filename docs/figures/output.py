"""The common parts of the scripts that draw the figures of docs/paper.md: their options and their output."""

import argparse
import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import palette


class Options(NamedTuple):
    """The options of every script."""

    quick: bool
    out: pathlib.Path


def options(doc: str | None) -> Options:
    """Read ``--quick`` and ``--out`` from the command line."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small version, in seconds")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"), help="folder for the output")
    given = parser.parse_args()
    return Options(given.quick, given.out)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, all columns but the first to the right."""
    lines = [header, ["---"] + ["--:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(out: pathlib.Path, name: str, figure: Any, numbers: Any = None, text: str = "") -> None:
    """Write the picture, and numbers, if there are any, as JSON and as the Markdown that the page includes."""
    out.mkdir(parents=True, exist_ok=True)
    palette.save(figure, out / f"{name}.png")
    if numbers is not None:
        (out / f"{name}.json").write_text(json.dumps(numbers, indent=1) + "\n")
        (out / f"{name}.md").write_text(text.rstrip() + "\n")
    print(f"wrote {out / name}.png" + ("" if numbers is None else ", .json and .md"))
