"""Tables and pictures of convergence.json, and of nothing else.

    python tests/benchmarks/convergence_report.py docs/benchmarks/convergence.json

Beside the file it writes convergence_table.md, convergence.png (the score over the learning rates) and
convergence_curves.png (the loss over the steps at the chosen rates).
"""

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "docs" / "figures"))
import palette

Row = dict[str, Any]

CLOSE = 0.1  # a rate is good if its median score is within this of the best of all optimizers, relatively
SUBS = {  # ticks of a decade, where the upper end of an axis is more than so many times the lower one
    4.0: (1.0, 2.0, 5.0),
    2.0: (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0),
    0.0: (1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 2.75, 3.0, 3.5, 4.0, 5.0, 6.0, 7.0, 8.0),
}
LOOKS: dict[str, dict[str, Any]] = {  # a marker and a dash of its own for each
    "ACProp": {"marker": "o", "linestyle": "-", "linewidth": 2.4, "zorder": 5},
    "AdamW": {"marker": "s", "linestyle": "--"},
    "AdaBelief": {"marker": "^", "linestyle": "-."},
    "SGD with momentum": {"marker": "D", "linestyle": ":"},
    "ACProp without the clip": {"marker": "v", "linestyle": (0, (6, 1.5, 1, 1.5, 1, 1.5))},
}


def write(path: Path) -> str:
    """Write table and pictures beside the results at `path`; return the table."""
    result = json.loads(path.read_text())
    text = table(result)
    path.with_name("convergence_table.md").write_text(text)
    draw_rates(result, path.with_name("convergence.png"))
    draw_curves(result, path.with_name("convergence_curves.png"))
    return text


def summary(values: list[float | None], missing: float) -> tuple[float, float, float]:
    """Return median, lowest and highest, with `missing` for what is not finite."""
    numbers = [missing if x is None else x for x in values]
    return statistics.median(numbers), min(numbers), max(numbers)


def missing(about: Row) -> float:
    return 0.0 if about["more is better"] else math.inf


def of(result: Row, task: str) -> dict[str, list[Row]]:
    """Return the rows of a task by optimizer, the lowest rate first."""
    grouped: dict[str, list[Row]] = {}
    for row in result["rows"]:
        if row["task"] == task:
            grouped.setdefault(row["optimizer"], []).append(row)
    return grouped


def good_rates(rows: list[Row], best: float, about: Row) -> int:
    """Return how many rates have a median test score that is close to `best`."""
    medians = [summary(row["test"], missing(about))[0] for row in rows]
    if about["more is better"]:
        return sum(median >= (1.0 - CLOSE) * best for median in medians)
    return sum(median <= (1.0 + CLOSE) * best for median in medians)


def table(result: Row) -> str:
    """Return one table a task, in Markdown."""
    text = ""
    for task, about in result["tasks"].items():
        grouped = of(result, task)
        chosen = {name: next(row for row in rows if row["chosen"]) for name, rows in grouped.items()}
        medians = [summary(row["test"], missing(about))[0] for row in chosen.values()]
        best = max(medians) if about["more is better"] else min(medians)
        text += f"**{task[0].upper()}{task[1:]}**, {about['steps']:,} steps; {about['score']}, "
        text += f"{'more' if about['more is better'] else 'less'} is better"
        text += (
            ":\n\n" if about["reference"] is None else f" (the training data themselves: {about['reference']:.3f}):\n\n"
        )
        text += "| optimizer | best rate | median | lowest | highest "
        text += "| diverged, best rate | good rates | diverged, all rates |\n"
        text += "|---|---|---|---|---|---|---|---|\n"
        for name, rows in grouped.items():
            row = chosen[name]
            numbers = summary(row["test"], missing(about))
            cells = [f"{x:.3f}" for x in numbers]
            if numbers[0] == best:
                cells[0] = f"**{cells[0]}**"
            runs = len(row["test"])
            text += f"| {name} | {row['rate']:g} | {' | '.join(cells)} | {row['diverged']} of {runs} "
            text += f"| {good_rates(rows, best, about)} of {len(rows)} "
            text += f"| {sum(r['diverged'] for r in rows)} of {runs * len(rows)} |\n"
        text += "\n"
    return text


def digits_table(result: Row) -> str:
    """Return the table of docs/should-i-use.md: the first task, the digits by an MLP."""
    task, about = next(iter(result["tasks"].items()))
    text = "| | median | lowest | highest | at rate 1e-3: median |\n|---|---|---|---|---|\n"
    for name, rows in of(result, task).items():
        at = {row["rate"]: summary(row["test"], missing(about)) for row in rows}
        best = next(summary(row["test"], missing(about)) for row in rows if row["chosen"])
        name = {"ACProp": "ACProp, `clip_exponent=0.25`", "SGD with momentum": "SGD, momentum 0.9"}.get(name, name)
        text += f"| {name} | {' | '.join(f'{x:.3f}' for x in (*best, at[1e-3][0]))} |\n"
    return text


def panels(result: Row, title: str) -> Any:
    """Return a figure and its axes, one a task; all are logarithmic, and less is better in each."""
    plt = palette.pyplot()
    figure, axes = plt.subplots(2, 2, figsize=(palette.WIDTH, 6.8), layout="constrained")
    figure.suptitle(title, fontsize=12)
    for ax, task in zip(axes.flat, result["tasks"], strict=True):
        ax.set_title(f"{task[0].upper()}{task[1:]}", fontsize=11)
        ax.set(yscale="log")
        ax.grid(alpha=0.25, which="both", axis="y")
        ax.grid(alpha=0.25, which="major", axis="x")
    return figure, list(axes.flat)


def finish(figure: Any, axes: Any, file: Path) -> None:
    """Set the ticks, write the legend and save."""
    from matplotlib import ticker

    for ax in axes:
        low, high = ax.get_ylim()
        subs = next(subs for ratio, subs in SUBS.items() if high / low > ratio)
        ax.yaxis.set_major_locator(ticker.LogLocator(subs=subs, numticks=20))
        ax.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        ax.yaxis.set_minor_formatter(ticker.NullFormatter())
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, handlelength=3.2)
    palette.save(figure, file)


def line(ax: Any, name: str, look: Row, x: list[float], bands: Any, top: float, **options: Any) -> None:
    """Draw medians, and from the lowest to the highest a band; what is beyond the `top`, or infinite, just above it."""
    middle, low, high = np.minimum(np.asarray(list(bands)), 2.0 * top).T
    within = low < top
    within[1:-1] &= within[:-2] | within[2:]  # a band of one rate would be a scrap
    look = {"linewidth": 1.7, "markersize": 5, "color": palette.COLOURS[name], **look, **options}
    ax.fill_between(
        x, low, high, color=look["color"], alpha=0.06 if "without" in name else 0.14, linewidth=0, where=within
    )
    ax.plot(x, middle, label=name, **look)


def draw_rates(result: Row, file: Path) -> None:
    """Draw the score on the test data over the learning rates; of an accuracy what it lacks to 1."""
    seeds = len(result["rows"][0]["test"])
    figure, axes = panels(
        result, f"Over the learning rate: median, lowest and highest\nof {seeds} seeds; lower is better"
    )
    for ax, (task, about) in zip(axes, result["tasks"].items(), strict=True):
        grouped = of(result, task)
        bands, least, top = over_rates(grouped, about)
        for name, rows in grouped.items():
            line(ax, name, LOOKS[name], [row["rate"] for row in rows], bands[name], top)
        ax.set(xscale="log", xlabel="learning rate", ylabel=drawn_score(about), ylim=(least / 1.05, top))
    finish(figure, axes, file)


def over_rates(grouped: dict[str, list[Row]], about: Row) -> tuple[dict[str, np.ndarray], float, float]:
    """Return the bands of each optimizer, (rates, 3), the least of them, and the upper end of the frame."""
    more = about["more is better"]
    bands = {
        name: np.asarray([summary([_lacking(x, more) for x in row["test"]], math.inf) for row in rows])
        for name, rows in grouped.items()
    }
    least = min(x.min() for x in bands.values())
    # an untrained network is above the frame, or at its upper end
    top = 1.0 if more else (least + max(rows[0]["start"] for rows in grouped.values())) / 2.0
    return bands, least, top


def drawn_score(about: Row) -> str:
    return "test error (1 - accuracy)" if about["more is better"] else about["score"]


def _lacking(score: float | None, more_is_better: bool) -> float | None:
    return 1.0 - score if more_is_better and score is not None else score


def draw_curves(result: Row, file: Path) -> None:
    """Draw the loss on the validation data over the steps, each optimizer at its best rate."""
    figure, axes = panels(result, "Over the steps, each optimizer at its best rate:\nmedian, lowest and highest")
    for ax, (task, about) in zip(axes, result["tasks"].items(), strict=True):
        grouped = of(result, task)
        top = 1.5 * max(rows[0]["start"] for rows in grouped.values())
        least = math.inf
        for i, (name, rows) in enumerate(grouped.items()):
            row = next(row for row in rows if row["chosen"])
            bands = [summary(list(losses), math.inf) for losses in zip(*row["losses"], strict=True)]
            least = min(least, *(low for _, low, _ in bands))
            line(ax, name, LOOKS[name], row["steps"], bands, top, markevery=(i % 4, 4))
        ax.set(xlabel="step", ylabel=about["loss"].replace(" Fréchet", "\nFréchet"), ylim=(least / 1.05, top))
    finish(figure, axes, file)


if __name__ == "__main__":
    print(write(Path(sys.argv[1])))
