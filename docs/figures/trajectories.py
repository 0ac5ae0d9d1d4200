"""Draw how x moves on the two problems of counterexamples.py, for each optimizer.

    python docs/figures/trajectories.py [--quick] [--out out]

All have one learning rate, 0.02 / sqrt(t); convergence_area.py shows where all of many rates fail. trajectories.png
shows the mean of x over each period, and the range of x within it. trajectories.json and .md have the mean distance
from the optimum over the last 1,000 of 10,000 steps. `--quick` takes 5,000 steps.
"""

from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from counterexamples import DENSE, LAST, OPTIMIZERS, SPARSE, Grid, Problem, solve
from output import options, table, write
from palette import COLOURS, WIDTH, pyplot


class Setting(NamedTuple):
    """One panel."""

    problem: Problem
    b1: float
    b2: float
    period: int


SETTINGS = {"first": Setting(DENSE, 0.9, 0.5, 15), "sparse": Setting(SPARSE, 0.9, 0.5, 30)}
RATE = 0.02
# "ACProp" is here, as in the paper, without the clip
LOOKS: dict[str, dict[str, Any]] = {
    "RMSProp": {"color": COLOURS["RMSProp"], "linestyle": "-."},
    "Adam": {"color": COLOURS["Adam"], "linestyle": "--"},
    "AdaBelief": {"color": COLOURS["AdaBelief"], "linestyle": ":"},
    "AdaShift": {"color": COLOURS["AdaShift"], "linestyle": "-"},
    "ACProp": {"color": COLOURS["ACProp without the clip"], "linestyle": "-"},
    "ACProp, clip 0.25": {"color": COLOURS["ACProp"], "linestyle": (0, (1, 3))},
}


def trajectory(name: str, setting: Setting, steps: int) -> np.ndarray:
    """Return x after every step."""
    problem, b1, b2, period = setting
    return solve(problem, OPTIMIZERS[name], Grid((RATE,), (b1,), (b2,), (period,)), steps, trace=True).ravel()


def draw(found: dict[str, dict[str, np.ndarray]]) -> Figure:
    """Draw x, a panel per problem."""
    figure, panels = pyplot().subplots(len(found), 1, figsize=(WIDTH, 8.0), sharex=True, layout="constrained")
    for axes, (title, runs) in zip(panels, found.items(), strict=True):
        problem, b1, b2, period = SETTINGS[title]
        for name, x in runs.items():
            periods = x[: len(x) // period * period].reshape(-1, period)
            t = period * np.arange(1, len(periods) + 1)
            axes.fill_between(
                t, periods.min(axis=1), periods.max(axis=1), color=LOOKS[name]["color"], alpha=0.2, linewidth=0
            )
            axes.plot(t, periods.mean(axis=1), linewidth=2.0, label=name, **LOOKS[name])
        low, high = problem.interval
        axes.set(ylim=(low - 0.05 * (high - low), high + 0.05 * (high - low)), ylabel="x")
        axes.set_title(f"{title} problem: {problem.formula}\nP = {period}, $\\beta_1$ = {b1}, $\\beta_2$ = {b2}")
        axes.axhline(problem.optimum, color="black", linewidth=0.8)
        axes.grid(alpha=0.3)
        on_line = {"xycoords": axes.get_yaxis_transform(), "xytext": (-4, 4), "textcoords": "offset points"}
        axes.annotate("optimum", (1.0, problem.optimum), ha="right", **on_line)
    panels[-1].set_xlabel("step t")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, handlelength=2.4)
    return figure


def main() -> None:
    """Solve, draw and write."""
    given = options(__doc__)
    steps = 5_000 if given.quick else 10_000
    found: dict[str, dict[str, np.ndarray]] = {title: {} for title in SETTINGS}
    for title, name in tqdm([(title, name) for title in SETTINGS for name in OPTIMIZERS], unit="run"):
        found[title][name] = trajectory(name, SETTINGS[title], steps)
    numbers = {
        title: {name: float(np.abs(x[-LAST:] - SETTINGS[title].problem.optimum).mean()) for name, x in runs.items()}
        for title, runs in found.items()
    }
    header = ["mean distance from the optimum in the end", *(f"{title} problem" for title in SETTINGS)]
    rows = [[name, *(f"{by_name[name]:.2g}" for by_name in numbers.values())] for name in OPTIMIZERS]
    write(given.out, "trajectories", draw(found), numbers, table(header, rows))


if __name__ == "__main__":
    main()
