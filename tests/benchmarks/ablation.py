"""Train the tasks of convergence.py with the four optimizers of ACProp's paper, each with the clip and without.

    python tests/benchmarks/ablation.py [quick] [--out FOLDER]

The four are one rule, `acprop_optax.acprop`, and differ in its two switches alone: all have the same eps and eps_root,
the library's defaults. Everything else is as in convergence.py. Written are ablation.json, and of it alone ablation.md
(the tables) and ablation.png (the score over the learning rates).
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from acprop_optax import acprop

sys.path.insert(0, str(Path(__file__).parents[2] / "docs" / "figures"))
import convergence
import convergence_report
import palette
import record
from counterexamples import CORNERS
from tasks import TASKS
from trajectories import LOOKS

Row = dict[str, Any]

FULL = (TASKS, convergence.RATES, convergence.SEEDS, 1)
CLIP = 0.25
MARKERS = {"Adam": "s", "AdaBelief": "^", "AdaShift": "v", "ACProp": "o"}
IDEAS = (  # what is switched on: from which corner to which
    ("centering", "Adam", "AdaBelief"),
    ("centering", "AdaShift", "ACProp"),
    ("asynchronous", "Adam", "AdaShift"),
    ("asynchronous", "AdaBelief", "ACProp"),
)


def named(corner: str, clipped: bool) -> str:
    return f"{corner}, clip {CLIP}" if clipped else corner


OPTIMIZERS = {
    named(corner, clipped): partial(acprop, clip_exponent=CLIP if clipped else None, **switches)
    for clipped in (True, False)
    for corner, switches in CORNERS.items()
}


def gains(result: Row, task: str, before: str, after: str) -> list[float]:
    """Return how much better the score on the test data becomes, for each seed, both at their own best rates."""
    about = result["tasks"][task]
    grouped = convergence_report.of(result, task)
    worst = convergence_report.missing(about)
    scores = (
        [worst if x is None else x for x in row["test"]]
        for name in (before, after)
        for row in grouped[name]
        if row["chosen"]
    )
    sign = 1.0 if about["more is better"] else -1.0
    return [0.0 if old == new else sign * (new - old) for old, new in zip(*scores, strict=True)]


def gains_table(result: Row) -> str:
    """Return what each idea contributes, in Markdown; bold where all seeds agree."""
    text = f"| switched on | clip | {' | '.join(result['tasks'])} |\n"
    text += "|---|---|" + "---|" * len(result["tasks"]) + "\n"
    for clipped in (True, False):
        for idea, before, after in IDEAS:
            cells = []
            for task in result["tasks"]:
                found = gains(result, task, named(before, clipped), named(after, clipped))
                median, low, high = convergence_report.summary(list(found), 0.0)
                cell = f"{median:+.3f} ({low:+.3f}, {high:+.3f})"
                cells.append(f"**{cell}**" if low > 0.0 or high < 0.0 else cell)
            text += f"| {idea}: {before} to {after} | {CLIP if clipped else 'none'} | {' | '.join(cells)} |\n"
    return text


def text(result: Row) -> str:
    """Return all tables."""
    return f"{gains_table(result)}\n{convergence_report.table(result)}".rstrip() + "\n"


def draw(result: Row, file: Path) -> None:
    """Draw the score over the learning rates: a row a task, with the clip on the left and without on the right."""
    plt = palette.pyplot()
    rows = len(result["tasks"])
    size = (palette.WIDTH, 0.8 + 2.55 * rows)
    figure, panels = plt.subplots(rows, 2, figsize=size, sharex=True, sharey="row", squeeze=False, layout="constrained")
    figure.get_layout_engine().set(wspace=0.08)  # or the last number of a panel touches the first of the next
    for row, (task, about) in zip(panels, result["tasks"].items(), strict=True):
        grouped = convergence_report.of(result, task)
        bands, least, top = convergence_report.over_rates(grouped, about)
        for ax, clipped in zip(row, (True, False), strict=True):
            for corner, marker in MARKERS.items():
                name = named(corner, clipped)
                look = {**LOOKS[corner], "color": palette.COLOURS[corner], "marker": marker}
                x = [of_rate["rate"] for of_rate in grouped[name]]
                convergence_report.line(ax, corner, look, x, bands[name], top)
            ax.set(xscale="log", yscale="log", ylim=(least / 1.05, top))
            ax.set_title(f"{task[0].upper()}{task[1:]}\n{f'clip {CLIP}' if clipped else 'no clip'}", fontsize=11)
            ax.grid(alpha=0.25)
        row[0].set_ylabel(convergence_report.drawn_score(about))
    for ax in panels[-1]:
        ax.set_xlabel("learning rate")
    convergence_report.finish(figure, list(panels.flat), file)


def write(path: Path) -> str:
    """Write tables and picture beside the results at `path`; return the tables."""
    result = json.loads(path.read_text())
    path.with_name("ablation.md").write_text(text(result))
    draw(result, path.with_name("ablation.png"))
    return text(result)


def main() -> None:
    """Run everything, write the results, print the tables."""
    given = record.arguments(__doc__)
    # quick: one task, because compiling a sweep takes most of its time
    makers, rates, seeds, shorter = (TASKS[:1], (1e-3, 1e-1), (0, 1), 10) if given.quick else FULL
    found, about = convergence.measure(makers, OPTIMIZERS, rates, seeds, shorter)
    used = record.versions(*convergence.LIBRARIES)
    print(write(record.save("ablation", found, given, used, tasks=about, seeds=len(seeds))))


if __name__ == "__main__":
    main()
