"""The table, the pictures and the page of the results that the benchmarks of steps have left in a folder.

    python tests/benchmarks/report.py [--out docs/benchmarks]

Writes `steps_table.md` and `small_table.md`, which docs/benchmarks.md includes, and pictures; prints the times as one
table. With `--out docs/benchmarks` it also writes the tables and pictures of convergence, ablation and accuracy. It
measures nothing.
"""

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import small_report
from record import arguments, load
from small_report import digits, machine_of, markdown, spread
from steps import SIZES, Shape

sys.path.insert(0, str(Path(__file__).parents[2] / "docs" / "figures"))
import palette

Result = dict[str, Any]
Row = dict[str, Any]
TITLES = {"steps_numpy": "NumPy", "steps_torch": "PyTorch", "steps_jax": "JAX"}
FASTEST = [
    ("steps_numpy", "Stepper, Numba", "to limit"),
    ("steps_torch", "ACProp, fused", "to unit"),
    ("steps_jax", "acprop_optax", "to unit"),
]


def named(shape: Shape) -> str:
    """Write 1 x 16M."""
    arrays, size = shape
    return f"{arrays:,} x " + (f"{size // 10**6}M" if size >= 10**6 else f"{size:,}")


def shape_of(row: Row) -> str:
    return named((row["arrays"], row["size"]))


def sized(rows: Sequence[Row], shapes: Sequence[Shape], cell: Callable[[Row], str]) -> Iterator[list[str]]:
    """Yield a table of contenders by sizes."""
    yield ["", *map(named, shapes)]
    for name in dict.fromkeys(row["contender"] for row in rows):
        own = {(row["arrays"], row["size"]): cell(row) for row in rows if row["contender"] == name}
        yield [name, *(own.get(shape, "") for shape in shapes)]


def times(result: Result, dtype: str) -> dict[str, str]:
    """Return the tables of a framework in one dtype; what was measured for the pictures of growth alone is left out."""
    rows = [row for row in result["rows"] if row["dtype"] == dtype]
    measured = {(row["arrays"], row["size"]) for row in rows}
    shapes = [shape for shape in SIZES if shape in measured] if not result["quick"] else sorted(measured)
    cells = {
        "milliseconds": lambda row: digits(1e3 * row["seconds"][1]),
        "times the limit": lambda row: spread(row["to limit"]),
        f"times {result['unit']}": lambda row: spread(row["to unit"]),
    }
    return {heading: markdown(sized(rows, shapes, cell)) for heading, cell in cells.items()}


def fastest(results: dict[str, Result]) -> Iterator[list[str]]:
    """Yield the time of our fastest float32 step in each framework."""
    yield ["", "time, in units of", *map(named, SIZES)]
    for name, contender, key in FASTEST:
        if name in results:
            unit = results[name]["unit"] if key == "to unit" else "the limit"
            rows = [row for row in results[name]["rows"] if (row["contender"], row["dtype"]) == (contender, "float32")]
            own = {(row["arrays"], row["size"]): spread(row[key]) for row in rows}
            yield [f"{TITLES[name]}: {contender}", unit, *(own.get(shape, "") for shape in SIZES)]


def one_table(results: dict[str, Result]) -> Iterator[list[str]]:
    """Yield a row for each contender and dtype: milliseconds and, after a slash, times the limit, of each size."""
    shapes = [*dict.fromkeys((row["arrays"], row["size"]) for result in results.values() for row in result["rows"])]
    chosen = [shape for shape in SIZES if shape in shapes] or shapes
    yield ["ms / times the limit", "", *map(named, chosen)]
    for name, result in results.items():
        for dtype in dict.fromkeys(row["dtype"] for row in result["rows"]):
            rows = [row for row in result["rows"] if row["dtype"] == dtype]
            cells = sized(rows, chosen, lambda row: f"{digits(1e3 * row['seconds'][1])} / {digits(row['to limit'][1])}")
            next(cells)  # its head
            yield from ([f"{TITLES[name]}, {dtype}", *line] for line in cells)


def memory(results: dict[str, Result]) -> str:
    """Return the bytes of a parameter, a table a framework and dtype: with its state, and at the peak of a step."""
    found = "Bytes a parameter: what it takes with its state, and what a step needs more at its peak.\n"
    for name, result in results.items():
        rows = [row for row in result["rows"] if "extra bytes" in row]
        for dtype in dict.fromkeys(row["dtype"] for row in rows):
            here = [row for row in rows if row["dtype"] == dtype]
            kept = {row["contender"]: f"{row['bytes']:.2f}" for row in here}
            shapes = list(dict.fromkeys((row["arrays"], row["size"]) for row in here))
            (_, *head), *lines = sized(here, shapes, lambda row: f"{row['extra bytes']:.2f}")
            table = [["", "with state", *(f"more, {shape}" for shape in head)]]
            table += [[contender, kept[contender], *cells] for contender, *cells in lines]
            found += f"\n**{TITLES[name]}, {dtype}**\n\n{markdown(iter(table))}"
    return found


def starts(results: dict[str, Result]) -> Iterator[list[str]]:
    """Yield the seconds of imports and of first steps."""
    yield ["", "optimizer", "framework", "package", "first step"]
    for name, result in results.items():
        for row in result["starts"]:
            seconds = (f"{row[key]:.3f}" for key in ("framework", "package", "first step"))
            yield [TITLES[name], row["contender"], *seconds]


def grown(result: Result, by: str) -> dict[str, tuple[list[int], list[float]]]:
    """Return numbers of parameters or of arrays, and seconds, of each contender in float32."""
    other, value = ("arrays", 1) if by == "size" else ("size", 1_000)
    lines: dict[str, dict[int, float]] = {}
    for row in result["rows"]:
        if row["dtype"] == "float32" and row[other] == value:
            lines.setdefault(row["contender"], {})[row[by]] = row["seconds"][1]
    return {name: (sorted(line), [line[x] for x in sorted(line)]) for name, line in lines.items()}


def slope(x: list[int], seconds: list[float]) -> float:
    """Return the exponent of growth: least squares in logarithms over the upper half of the sizes."""
    if len(x) < 2:
        return float("nan")
    upper = slice(len(x) // 2, None) if len(x) > 3 else slice(None)
    return float(np.polyfit(np.log(x[upper]), np.log(seconds[upper]), 1)[0])


def growth(results: dict[str, Result]) -> Iterator[list[str]]:
    """Yield the slopes."""
    yield ["", "optimizer", "size of one array", "number of arrays"]
    for name, result in results.items():
        by_size, by_number = grown(result, "size"), grown(result, "arrays")
        for contender, line in by_size.items():
            yield [
                TITLES[name],
                contender,
                *(f"{slope(*x):.2f}".replace("nan", "") for x in (line, by_number[contender])),
            ]


def measured(result: Result) -> str:
    """Say on what machine, and with which versions."""
    machine = machine_of(result["machine"])
    used = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    kind = "A short run (`quick`): the ratios are rough. " if result["quick"] else ""
    return f"{kind}Machine: {machine}. Versions: {used}.\n"


def sections(results: dict[str, Result]) -> dict[str, str]:
    """Return the tables by their headings."""
    found = {"Our fastest step in each framework, float32": markdown(fastest(results))}
    for name, result in results.items():
        for dtype in dict.fromkeys(row["dtype"] for row in result["rows"]):
            for heading, table in times(result, dtype).items():
                found[f"{TITLES[name]}, {dtype}, {heading}"] = table
        if threads := result.get("threads"):
            found[f"{TITLES[name]}, threads"] = (
                f"Stepper with Numba, 1 x {threads['size']:,}: two threads on {threads['cores']} cores are"
                f" {digits(threads['ratio'][1])} times as fast as one.\n"
            )
    found["Memory"] = memory(results)
    found["Growth"] = f"Slopes of the time of a step:\n\n{markdown(growth(results))}"
    found["Import and first step"] = (
        "Seconds to import the framework, then the package, and of the first step:\n\n" + markdown(starts(results))
    )
    return found | {f"{TITLES[name]}, machine and versions": measured(result) for name, result in results.items()}


def page(results: dict[str, Result]) -> str:
    """Return the generated part of docs/benchmarks.md."""
    return "\n".join(f"### {heading}\n\n{text}" for heading, text in sections(results).items())


# Rows of the README's table: how it is said, the result file and names of the pair at 12 x 10,000, and at 1 x 16M.
README = [
    ("PyTorch with Numba, default options", "torch.optim.AdamW", "small_torch", "default flags", "small_torch_large"),
    ("PyTorch with Numba, `fused=True`", "the same, `fused=True`", "small_torch", "fused", "small_torch_large"),
    ("optax, jitted", "optax.adamw", "small_jax", "acprop_optax", "steps_jax"),
    ("`Stepper`, compiled", "scikit-learn's Adam", "small_numpy", "Stepper, Numba", "steps_numpy"),
    ("core on NumPy", "Adam in NumPy, a line an equation", "small_numpy", "functional core", ""),
]


def readme_table(folder: Path) -> str:
    """Return the table of README.md: our step in units of another optimizer's, a small model and a large array."""
    found = load(folder)

    def ratio(name: str, contender: str, arrays: int, size: int) -> float:
        rows = [row for row in found[name]["rows"] if (row["arrays"], row["size"]) == (arrays, size)]
        own = next(row for row in rows if contender in row["contender"] and row.get("dtype", "float32") == "float32")
        if "to peer" in own:
            return float(own["to peer"][1])
        if found[name]["unit"] != "functional core":
            return float(own["to unit"][1])
        other = next(row for row in rows if row["contender"] == "scikit-learn Adam" and row["dtype"] == "float32")
        return float(own["seconds"][1] / other["seconds"][1])

    def lines() -> Iterator[list[str]]:
        yield ["a step of ours", "the other", "12 arrays of 10,000", "one array of 16 million"]
        for ours, other, small, contender, large in README:
            at_large = digits(ratio(large, contender, 1, 16 * 10**6)) if large else ""
            yield [ours, other, digits(ratio(small, contender, 12, 10_000)), at_large]

    return markdown(lines())


def costs(folder: Path) -> str:
    """Return the list of docs/should-i-use.md: from the least to the most time of a step in units of the other's."""
    found = load(folder)

    def extent(contender: str, *keys: tuple[str, str]) -> str:
        ratios = [
            row[key][1]
            for name, key in keys
            for row in found[name]["rows"]
            if row["contender"] == contender and row.get("dtype", "float32") == "float32"
        ]
        return f"{digits(min(ratios))} to {digits(max(ratios))}"

    torch = ("small_torch", "to peer"), ("small_torch_large", "to peer"), ("steps_torch", "to unit")
    optax = ("small_jax", "to peer"), ("steps_jax", "to unit")
    numpy = [("small_numpy", "to peer")]
    return (
        f"- **PyTorch with Numba**, default options: {extent('ACProp, default flags', *torch)} of AdamW.\n"
        f"- **PyTorch with Numba**, `fused=True`: {extent('ACProp, fused', *torch)} of fused AdamW.\n"
        f"- **optax, jitted**: {extent('acprop_optax', *optax)} of `optax.adamw`.\n"
        f"- **`Stepper` with Numba**, small models: {extent('Stepper, Numba', *numpy)} of scikit-learn's Adam.\n"
        f"- **The core on NumPy**, small models: {extent('functional core', *numpy)} of an Adam written for NumPy.\n"
    )


def only_steps(folder: Path) -> dict[str, Result]:
    found = load(folder)
    return {name: found[name] for name in TITLES if name in found}


def draw_growth(results: dict[str, Result], file: Path) -> None:
    """Draw seconds over sizes, and over numbers of arrays, of each framework."""
    plt = palette.pyplot()
    axes_of = {"size": "parameters in one array", "arrays": "arrays of 1,000"}
    figure = plt.figure(figsize=(palette.WIDTH, 5.2 * len(results)), layout="constrained")
    figure.get_layout_engine().set(wspace=0.1)  # or the last number of a panel touches the first of the next
    parts = figure.subfigures(len(results), 1, squeeze=False)[:, 0]
    for part, (name, result) in zip(parts, results.items(), strict=True):
        part.suptitle(TITLES[name], fontweight="bold")
        axes = part.subplots(1, 2, sharey=True)
        for ax, (by, label) in zip(axes, axes_of.items(), strict=True):
            for contender, line in grown(result, by).items():
                ax.loglog(*line, ms=5, lw=1.5, label=contender, **palette.look(contender))
            ax.set(xlabel=label)
            ax.grid(alpha=0.25)
        axes[0].set_ylabel("seconds of a step")
        part.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=2)
    palette.save(figure, file)


def draw_ratios(results: dict[str, Result], file: Path) -> None:
    """Draw the ratios to the limit at each size, with their quartiles."""
    plt = palette.pyplot()
    drawn = {
        name: sorted(
            (row for row in result["rows"] if row["dtype"] == "float32" and row["arrays"] * row["size"] >= 10**5),
            key=lambda row: (row["arrays"], row["size"]),
        )
        for name, result in results.items()
    }
    # as many lines as there are contenders at all sizes, and their legend
    heights = [
        0.11 * len({(row["contender"], shape_of(row)) for row in rows})
        + 0.12 * len({row["contender"] for row in rows})
        + 1.2
        for rows in drawn.values()
    ]
    figure = plt.figure(figsize=(palette.WIDTH, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(results), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, (name, rows) in zip(parts, drawn.items(), strict=True):
        shapes = list(dict.fromkeys(map(shape_of, rows)))
        names = list(dict.fromkeys(row["contender"] for row in rows))
        ax = part.subplots()
        for i, contender in enumerate(names):
            own = [row for row in rows if row["contender"] == contender]
            low, middle, high = np.array([row["to limit"] for row in own]).T
            y = [shapes.index(shape_of(row)) + 0.8 * (i + 0.5) / len(names) - 0.4 for row in own]
            bars = {"xerr": [middle - low, high - middle], "ls": "", "ms": 5, **palette.look(contender)}
            ax.errorbar(middle, y, **bars, label=contender)
        for edge in range(1, len(shapes)):
            ax.axhline(edge - 0.5, color="0.9", lw=1)
        ax.axvline(1.0, color="0.5", lw=1, ls="--")
        ax.set(xscale="log", xlabel="time of a step, times the limit")
        ax.set_title(f"{TITLES[name]}, float32", fontweight="bold")
        ax.set_yticks(range(len(shapes)), shapes)
        ax.invert_yaxis()
        ax.grid(axis="x", alpha=0.25)
        part.legend(*ax.get_legend_handles_labels(), loc="outside lower left", ncols=2)
    palette.save(figure, file)


def redraw(folder: Path) -> None:
    """Write tables and pictures of the other results that are in the folder, without measuring anything."""
    for name in ("convergence_report", "ablation", "accuracy"):
        path = folder / f"{name.removesuffix('_report')}.json"
        if path.exists():
            importlib.import_module(name).write(path)


def main() -> None:
    """Write and print."""
    folder = arguments(__doc__ or "").out
    small_report.write(folder)
    redraw(folder)
    results = only_steps(folder)
    if not results:
        print((folder / "small_table.md").read_text())
        return
    (folder / "steps_table.md").write_text(page(results))
    draw_growth(results, folder / "steps_growth.png")
    draw_ratios(results, folder / "steps_ratios.png")
    rows = list(one_table(results))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(f"\nIn README.md:\n\n{readme_table(folder)}\nIn docs/should-i-use.md:\n\n{costs(folder)}")
    print(f"All of it, with memory, growth and first steps: {folder / 'steps_table.md'}, and the pictures beside it")


if __name__ == "__main__":
    main()
