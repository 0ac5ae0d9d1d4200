"""Tables and a picture of the results of small.py. report.py writes them, and docs/benchmarks.md includes them."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from record import load

sys.path.insert(0, str(Path(__file__).parents[2] / "docs" / "figures"))
import palette

Result = dict[str, Any]
PREFIX = "small_"
TITLES = {
    "small_torch": "PyTorch on one core",
    "small_torch_large": "PyTorch on one core, 16 million parameters",
    "small_torch_threads": "PyTorch with two threads on two cores",
    "small_numpy": "NumPy on one core",
    "small_numpy_threads": "A stepper with two threads, compared with one",
    "small_jax": "optax: a call of the jitted step",
    "small_jax_compiling": "optax: tracing and compiling",
    "small_first": "The first step of a process",
}


def results_in(folder: Path) -> dict[str, Result]:
    """Return the results in the order of their titles."""
    found = load(folder)
    return {name: found[name] for name in TITLES if name in found}


def digits(x: float) -> str:
    """Write three digits, plainly."""
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"


def spread(quartiles: Sequence[float]) -> str:
    """Write a median, and the quartiles around it."""
    low, middle, high = map(digits, quartiles)
    return f"{middle} ({low}, {high})"


def shape_of(row: dict[str, Any]) -> str:
    size = f"{row['size'] // 10**6}M" if row["size"] >= 10**6 else f"{row['size']:,}"
    return f"{row['arrays']:,} x {size}" + (f", {row['where']}" if row["where"].endswith("groups") else "")


def steps(result: Result) -> str:
    """Return a table for each pair."""
    tables = []
    for contender, peer in sorted({(row["contender"], row["peer"]) for row in result["rows"]}):
        lines = [["arrays", "ratio (quartiles)", "ours, µs", "the other, µs"]]
        for row in result["rows"]:
            if (row["contender"], row["peer"]) == (contender, peer):
                own, other = (digits(1e6 * row[key][1]) for key in ("seconds", "peer seconds"))
                lines.append([shape_of(row), spread(row["to peer"]), own, other])
        tables.append(f"**{contender}**, compared with {peer}\n\n{markdown(iter(lines))}")
    return "\n".join(tables)


def first_steps(result: Result) -> Iterator[list[str]]:
    """Yield the seconds of first steps."""
    yield ["", "import of Numba, s", "then our imports and a step, s"]
    for row in result["rows"]:
        yield [row["contender"], spread(row["numba"]), spread(row["seconds"])]


def machine_of(about: dict[str, Any]) -> str:
    """Say on what machine."""
    cores = f"{about['cores']} cores" + (f" ({about['cores used']} used)" if about["cores used"] else "")
    return f"{about['cpu']}, {cores}, {about['memory, GiB']} GiB of memory, {about['system']}"


def markdown(rows: Iterator[list[str]]) -> str:
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def page(results: dict[str, Result]) -> str:
    """Return the tables by their headings, and on what they were measured."""
    sections = []
    for name, result in results.items():
        table = markdown(first_steps(result)) if name == "small_first" else steps(result)
        sections.append(f"### {TITLES[name]}\n\n{table}")
    machines = {machine_of({**result["machine"], "cores used": None}): 0 for result in results.values()}
    used = {k: v for result in results.values() for k, v in result["versions"].items()}
    versions = ", ".join(f"{k} {v}" for k, v in used.items())
    return "\n".join([*sections, f"Machine: {'; '.join(machines)}. Versions: {versions}.\n"])


def draw(results: dict[str, Result], file: Path) -> None:
    """Draw the ratios with their quartiles, a panel a result."""
    plt = palette.pyplot()
    chosen = {name: result for name, result in results.items() if name != "small_first"}
    shapes_of = {name: list({shape_of(row): None for row in result["rows"]}) for name, result in chosen.items()}
    pairs_of = {
        name: list(dict.fromkeys((row["contender"], row["peer"]) for row in result["rows"]))
        for name, result in chosen.items()
    }
    heights = [0.34 * len(shapes_of[name]) + 0.24 * len(pairs_of[name]) + 1.0 for name in chosen]
    figure = plt.figure(figsize=(palette.WIDTH, sum(heights) + 0.6), layout="constrained")
    figure.suptitle("Time of our step over the other's;\nleft of the line ours is faster", fontsize=12)
    parts = figure.subfigures(len(chosen), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, name in zip(parts, chosen, strict=True):
        shapes, pairs = shapes_of[name], pairs_of[name]
        ax = part.subplots()
        for i, (contender, peer) in enumerate(pairs):
            own = [row for row in chosen[name]["rows"] if (row["contender"], row["peer"]) == (contender, peer)]
            low, middle, high = np.array([row["to peer"] for row in own]).T
            y = [shapes.index(shape_of(row)) + 0.6 * (i + 0.5) / len(pairs) - 0.3 for row in own]
            bars = {"xerr": [middle - low, high - middle], "ls": "", "ms": 5, **palette.look(contender)}
            ax.errorbar(middle, y, **bars, label=f"{contender} / {peer}")
        ax.axvline(1.0, color="0.5", lw=1, ls="--")
        ticks = [0.1, 0.2, 0.5, 1.0, 2.0, 4.0]
        ax.set(xscale="log", xlim=(0.1, 5.0), xticks=ticks, xticklabels=[f"{x:g}" for x in ticks])
        ax.minorticks_off()
        ax.set_title(TITLES[name], fontweight="bold")
        ax.set_yticks(range(len(shapes)), shapes)
        ax.set_ylim(len(shapes) - 0.5, -0.5)
        ax.grid(axis="x", alpha=0.25)
        part.legend(*ax.get_legend_handles_labels(), loc="outside lower left")
    palette.save(figure, file)


def write(folder: Path) -> None:
    """Write the tables and the picture, if there are results."""
    if results := results_in(folder):
        (folder / "small_table.md").write_text(page(results))
        draw(results, folder / "small_ratios.png")
