"""The table of learning rates, made from convergence.json and ablation.json, and of nothing else.

    python tests/benchmarks/rates.py [--out docs/benchmarks]

Writes rates_table.md, which docs/choose-learning-rate.md has. What a good rate is and when a run has diverged is
said in convergence.py.
"""

import json
from pathlib import Path
from typing import Any

from convergence_report import good_rates, missing, of, summary
from record import arguments
from small_report import markdown

Row = dict[str, Any]
BEST = ["", "ACProp, best", "AdamW, best", "ratio", "ACProp, good", "AdamW, good", "ACProp diverges"]
CLIP = ["", "with the clip, best", "without, best", "with the clip, diverged", "without, diverged"]


def chosen(rows: list[Row]) -> float:
    """Return the best rate of an optimizer."""
    return next(row["rate"] for row in rows if row["chosen"])


def good(rows: list[Row], grouped: dict[str, list[Row]], about: Row) -> str:
    """Say from which to which rate an optimizer is good."""
    medians = [summary(row["test"], missing(about))[0] for found in grouped.values() for row in found if row["chosen"]]
    best = max(medians) if about["more is better"] else min(medians)
    rates = [row["rate"] for row in rows if good_rates([row], best, about)]
    return f"{min(rates):g} to {max(rates):g}" if rates else "none"


def diverges(rows: list[Row]) -> str:
    """Say from which rate on runs diverge."""
    rates = [row["rate"] for row in rows if row["diverged"]]
    return f"from {min(rates):g}" if rates else "never"


def best_table(result: Row) -> str:
    """Return best and good rates beside AdamW's, a row a task."""
    table = [BEST]
    for task, about in result["tasks"].items():
        grouped = of(result, task)
        ours, theirs = grouped["ACProp"], grouped["AdamW"]
        rates = chosen(ours), chosen(theirs)
        ratio = f"{rates[0] / rates[1]:.1g}"
        ranges = good(ours, grouped, about), good(theirs, grouped, about)
        table.append([task, *(f"{x:g}" for x in rates), ratio, *ranges, diverges(ours)])
    return markdown(table)


def clip_table(result: Row) -> str:
    """Return what the clip does to the best rate and to the runs that diverge, a row a task."""
    table = [CLIP]
    for task in result["tasks"]:
        grouped = of(result, task)
        both = grouped["ACProp, clip 0.25"], grouped["ACProp"]
        lost = [f"{sum(x['diverged'] for x in rows)} of {sum(len(x['test']) for x in rows)}" for rows in both]
        table.append([task, *(f"{chosen(rows):g}" for rows in both), *lost])
    return markdown(table)


def page(folder: Path) -> str:
    """Return the table of the page."""
    read = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("convergence", "ablation")}
    text = "The best rate, the range of good ones, and the rate from which on some of five runs diverge:\n\n"
    text += best_table(read["convergence"])
    text += "\nACProp with `clip_exponent=0.25` and without a clip, in a second series of runs:\n\n"
    return text + clip_table(read["ablation"])


if __name__ == "__main__":
    given = arguments(__doc__)
    (given.out / "rates_table.md").write_text(page(given.out))
