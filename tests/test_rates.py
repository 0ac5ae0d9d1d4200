"""docs/choose-learning-rate.md says what the results of the benchmarks say."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))

import rates
from convergence_report import of

RESULTS = ROOT / "docs" / "benchmarks"
PAGE = (ROOT / "docs" / "choose-learning-rate.md").read_text()


def cells(table: str) -> dict[str, list[str]]:
    """Return the cells of each row of a table, by its first."""
    lines = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    return {task: rest for task, *rest in lines}


def table_of(name: str) -> dict[str, list[str]]:
    result = json.loads((RESULTS / f"{name}.json").read_text())
    return cells((rates.best_table if name == "convergence" else rates.clip_table)(result))


def test_the_tables_are_those_of_the_results() -> None:
    assert (RESULTS / "rates_table.md").read_text() == rates.page(RESULTS)
    assert (RESULTS / "rates_table.md").read_text() in PAGE


def test_the_best_rate_is_between_a_tenth_and_three_times_that_of_adamw() -> None:
    ratios = [float(row[2]) for row in table_of("convergence").values()]
    assert (min(ratios), max(ratios)) == (0.1, 3.0)


def test_good_rates_are_in_one_range_which_is_that_of_adamw_or_a_step_wider() -> None:
    result = json.loads((RESULTS / "convergence.json").read_text())
    grid = sorted({row["rate"] for row in result["rows"]})
    for task, row in table_of("convergence").items():
        if task == "digits, GAN":
            assert row[3:5] == ["none", "none"]
            continue
        ours, theirs = ([grid.index(float(x)) for x in text.split(" to ")] for text in row[3:5])
        assert ours[0] in (theirs[0] - 1, theirs[0])
        assert ours[1] in (theirs[1], theirs[1] + 1)
        grouped, about = of(result, task), result["tasks"][task]
        for i in range(ours[0], ours[1] + 1):  # none within is not good
            assert rates.good([grouped["ACProp"][i]], grouped, about) != "none"


def test_which_runs_diverge() -> None:
    result = json.loads((RESULTS / "convergence.json").read_text())
    adamw = {row["task"] for row in result["rows"] if row["optimizer"] == "AdamW" and row["diverged"]}
    assert adamw == {"digits, GAN"}
    ours = table_of("convergence")
    assert ours["digits, convolutional"][5] == f"from {ours['digits, convolutional'][3].split(' to ')[1]}"
    for clipped, without, few, many in table_of("ablation").values():
        assert 1.0 <= float(clipped) / float(without) < 10.1
        assert int(few.split()[0]) < int(many.split()[0])
    diverged, runs = (sum(int(row[3].split()[i]) for row in table_of("ablation").values()) for i in (0, 2))
    assert f"{diverged / runs:.0%}" == "55%"  # "more than half of the runs"


def test_the_best_rate_of_the_network_of_the_small_search() -> None:
    assert f"the best rate of such a network is\n{table_of('convergence')['digits, MLP'][0]}." in PAGE
