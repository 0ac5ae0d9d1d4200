"""Draw where each optimizer converges on the two problems of counterexamples.py, over beta2 and the period P.

    python docs/figures/convergence_area.py [--quick] [--out out]

A point of the grid converges if, for the best of the learning rates from 1e-5 to 1, x is nearer than 0.01 to the
optimum on average over the last 1,000 of 10,000 steps. The area is the share of points that converge.
convergence_area.png is for beta1 = 0.9. convergence_area.json and .md have the areas for every beta1, for fewer
learning rates and for more steps, and those of the two asynchronous optimizers with and without their first step.
`--quick` takes a coarse grid of short periods, in which every optimizer has enough steps.
"""

from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from counterexamples import DENSE, LAST, NO_FIRST_MOMENT, OPTIMIZERS, SPARSE, Grid, Optimizer, corner, solve
from output import options, table, write
from palette import WIDTH, pyplot

NEAR = 0.01
STEPS = 10_000
PROBLEMS = {"first": DENSE, "sparse": SPARSE}
DRAWN = 0.9  # beta1 of the figure
CLASSES = (  # of the distance from the optimum; none is an optimizer's colour
    (0.0, "#3B3B3B", f"converges: within {NEAR}"),
    (NEAR, "#BBBBBB", "within 0.1"),
    (0.1, "#F0C808", "further away"),
)
OTHER_FIRST_STEP = {
    "AdaShift, first step taken": corner("AdaShift"),
    "ACProp, first step left out": corner("ACProp", skips_first=True),
}
ONLY_ADASHIFT = "points where AdaShift converges and ACProp does not"

Areas = dict[str, dict[str, np.ndarray]]  # {problem: {optimizer: mean distances}}, axes (rate, b1, b2, P)


def grids(quick: bool) -> dict[str, Grid]:
    """Return the grid of each problem."""
    rates = 10.0 ** (np.arange(-20, 1) / 4.0)
    b1 = (0.0, 0.5, 0.9) if quick else (0.0, 0.1, 0.5, 0.9, 0.95, 0.99)
    b2 = 1.0 - np.geomspace(1e-4, 10.0**-0.05, 9 if quick else 40)
    periods = {"first": range(3, 11), "sparse": range(4, 41, 4)}
    if not quick:
        periods = {"first": range(3, 21), "sparse": range(4, 41)}
    return {name: Grid(rates, b1, b2, periods[name]) for name in PROBLEMS}


def converged(distances: np.ndarray) -> np.ndarray:
    """Return whether the best rate converges; axes (b1, b2, P)."""
    return distances.min(axis=0) < NEAR


def draw(areas: Areas, grid: dict[str, Grid]) -> Figure:
    """Draw the best distance of each point in three classes, a row per optimizer."""
    colours = mpl.colors.ListedColormap([colour for _, colour, _ in CLASSES])
    bins = [edge for edge, _, _ in CLASSES[1:]]
    figure, panels = pyplot().subplots(
        len(OPTIMIZERS), len(PROBLEMS), figsize=(WIDTH, 12.0), sharex="col", layout="constrained"
    )
    for column, (problem, distances) in zip(panels.T, areas.items(), strict=True):
        axis = grid[problem]
        i = axis.b1.index(DRAWN)
        for axes, (name, distance) in zip(column, distances.items(), strict=True):
            best = distance[:, i].min(axis=0)
            axes.pcolormesh(axis.periods, 1.0 - axis.b2, np.digitize(best, bins), cmap=colours, vmin=0, vmax=2)
            axes.set_yscale("log")
            axes.set_yticks(10.0 ** np.arange(-4, 0))
            axes.set_title(f"{name}: {_percent((best < NEAR).mean())} %")
        axes.set_xlabel(f"period P\n{problem} problem:\n{PROBLEMS[problem].formula}")
    for axes in panels[:, 0]:
        axes.set_ylabel("1 - beta2")
    handles = [mpl.patches.Patch(color=colour, label=label) for _, colour, label in CLASSES]
    figure.legend(
        handles=handles,
        loc="outside upper center",
        ncols=len(CLASSES),
        columnspacing=1.0,
        handlelength=1.2,
    )
    return figure


def by_b1(areas: Areas, grid: dict[str, Grid]) -> dict[str, Any]:
    """Return the area of each optimizer for each beta1, and where AdaShift converges and ACProp does not."""
    result: dict[str, Any] = {}
    for problem, distances in areas.items():
        where = {name: converged(distance) for name, distance in distances.items()}
        only = where["AdaShift"] & ~where["ACProp"]
        result[problem] = {
            "points": int(where["ACProp"][0].size),
            "area": {
                name: {f"{b1:g}": float(share) for b1, share in zip(grid[problem].b1, ok.mean((1, 2)), strict=True)}
                for name, ok in where.items()
            },
            ONLY_ADASHIFT: {
                f"{b1:g}": int(points) for b1, points in zip(grid[problem].b1, only.sum((1, 2)), strict=True)
            },
        }
    return result


def by_setting(
    first: dict[str, np.ndarray], longer: dict[str, np.ndarray], steps: int, grid: Grid
) -> dict[str, dict[str, float]]:
    """Return the areas of the first problem at the beta1 of the figure: fewer rates, all, and more steps."""
    i = grid.b1.index(DRAWN)
    decades = slice(None, None, 4)
    settings = {
        f"{len(grid.rates[decades])} rates, {STEPS:,} steps": {name: d[decades, i] for name, d in first.items()},
        f"{len(grid.rates)} rates, {STEPS:,} steps": {name: d[:, i] for name, d in first.items()},
        f"{len(grid.rates)} rates, {steps:,} steps": {name: d[:, 0] for name, d in longer.items()},
    }
    return {
        setting: {name: float(converged(d).mean()) for name, d in by_name.items()}
        for setting, by_name in settings.items()
    }


def by_first_step(areas: Areas, grid: dict[str, Grid], others: Areas) -> dict[str, dict[str, float]]:
    """Return the areas at the beta1 of the figure of AdaShift and ACProp, as in their papers and the other way."""
    result: dict[str, dict[str, float]] = {}
    for problem, distances in areas.items():
        i = grid[problem].b1.index(DRAWN)
        published = {f"{name}, as in its paper": distances[name][:, i] for name in ("AdaShift", "ACProp")}
        others_here = {name: distance[:, 0] for name, distance in others[problem].items()}
        result[problem] = {
            name: float(converged(distance).mean()) for name, distance in (published | others_here).items()
        }
    return result


def text(numbers: dict[str, Any]) -> str:
    """Return the tables of the page."""
    parts = []
    for problem in PROBLEMS:
        area = numbers[problem]["area"]
        rows = [[name, *map(_percent, shares.values())] for name, shares in area.items()]
        rows.append(
            [f"{ONLY_ADASHIFT}, of {numbers[problem]['points']}", *map(str, numbers[problem][ONLY_ADASHIFT].values())]
        )
        parts.append(f"**{problem.capitalize()} problem: area in %**")
        parts.append(table([r"$\beta_1$", *next(iter(area.values()))], rows))
    settings = numbers["first problem by setting"]
    rows = [[name, *(_percent(shares[name]) for shares in settings.values())] for name in OPTIMIZERS]
    parts += [rf"**First problem: area in %,** $\beta_1 = {DRAWN}$", table(["", *settings], rows)]
    by_problem = numbers["first step"]
    rows = [[name, *(_percent(shares[name]) for shares in by_problem.values())] for name in by_problem["first"]]
    parts.append(rf"**Both problems: area in %,** $\beta_1 = {DRAWN}$")
    parts.append(table(["", *(f"{problem} problem" for problem in by_problem)], rows))
    return "\n\n".join(parts)


def _percent(share: float) -> str:
    # 99.9 % must not read as all
    return "100" if share == 1.0 else f"{min(100.0 * share, 99.9):.1f}"


def main() -> None:
    """Solve, draw and write."""
    given = options(__doc__)
    grid = grids(given.quick)
    at_drawn = {problem: axes._replace(b1=(DRAWN,)) for problem, axes in grid.items()}
    bar = tqdm(total=3 * len(OPTIMIZERS) + 2 * len(OTHER_FIRST_STEP), unit="solved")

    def areas(problem: str, axes: Grid, steps: int, optimizers: dict[str, Optimizer]) -> dict[str, np.ndarray]:
        distances = {}
        for name, optimizer in optimizers.items():
            bar.set_description(f"{problem}, {steps:,} steps, {name}")
            one = axes._replace(b1=axes.b1[:1]) if name in NO_FIRST_MOMENT else axes
            found = solve(PROBLEMS[problem], optimizer, one, steps)
            distances[name] = np.broadcast_to(found, (len(axes.rates), len(axes.b1), *found.shape[2:]))
            bar.update()
        return distances

    solved = {problem: areas(problem, axes, STEPS, OPTIMIZERS) for problem, axes in grid.items()}
    steps = 2 * STEPS if given.quick else 10 * STEPS
    more = areas("first", at_drawn["first"], steps, OPTIMIZERS)
    others = {problem: areas(problem, axes, STEPS, OTHER_FIRST_STEP) for problem, axes in at_drawn.items()}
    bar.close()
    numbers = {
        **by_b1(solved, grid),
        "first problem by setting": by_setting(solved["first"], more, steps, grid["first"]),
        "first step": by_first_step(solved, grid, others),
        "criterion": {"distance below": NEAR, "on average over the last steps": LAST, "of": STEPS},
    }
    write(given.out, "convergence_area", draw(solved, grid), numbers, text(numbers))


if __name__ == "__main__":
    main()
