"""The ablation of the paper's two ideas: its script, its tables, and what the page says of them."""

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "benchmarks"), str(ROOT / "docs" / "examples")]
import ablation
import convergence

RESULTS = ROOT / "docs" / "benchmarks" / "ablation.json"
PAGE = ROOT / "docs" / "four-corners.md"
CORNERS = ("Adam", "AdaBelief", "AdaShift", "ACProp")


@pytest.mark.slow
def test_quick(tmp_path: Path) -> None:
    script = ROOT / "tests" / "benchmarks" / "ablation.py"
    subprocess.run([sys.executable, script, "quick", "--out", tmp_path], check=True)
    result = json.loads((tmp_path / "ablation.json").read_text())
    assert {row["optimizer"] for row in result["rows"]} == {*ablation.OPTIMIZERS}
    assert len(ablation.OPTIMIZERS) == 8
    assert (tmp_path / "ablation.md").read_text() == ablation.text(result)
    assert (tmp_path / "ablation.png").stat().st_size > 10_000


def test_the_optimizers_are_those_of_their_names() -> None:
    slopes = [jnp.asarray(np.float32(x)) for x in (0.5, -2.0, 3.0, 0.1)]

    def steps(transform: optax.GradientTransformation) -> list[float]:
        state = transform.init(slopes[0])
        found = []
        for slope in slopes:
            update, state = transform.update(slope, state, slopes[0])
            found.append(float(update))
        return found

    unclipped = {name: steps(ablation.OPTIMIZERS[name](0.1, 0.5)) for name in CORNERS}
    assert unclipped["Adam"] == pytest.approx(steps(optax.adam(0.1, 0.5)), rel=1e-5)
    assert unclipped["AdaBelief"] == pytest.approx(steps(optax.adabelief(0.1, 0.5)), rel=1e-5)
    mean, second = 0.0, {"AdaShift": 0.0, "ACProp": 0.0}
    for t, g in enumerate(map(float, slopes), start=1):
        mean = 0.5 * mean + 0.5 * g
        for name, centre in (("AdaShift", 0.0), ("ACProp", mean)):
            root = np.sqrt(second[name] / (1.0 - 0.999 ** (t - 1))) if t > 1 else 1.0  # of the step before
            assert unclipped[name][t - 1] == pytest.approx(-0.1 * g / root, rel=1e-4), (name, t)
            second[name] = 0.999 * second[name] + 0.001 * (g - centre) ** 2
    for name in CORNERS:
        clipped = steps(ablation.OPTIMIZERS[ablation.named(name, True)](0.1, 0.5))
        limits = [0.1 * t**0.25 for t in range(1, 5)]
        assert clipped == pytest.approx(np.clip(unclipped[name], -np.asarray(limits), limits), rel=1e-5)


def test_gains_are_of_one_seed_and_count_upwards() -> None:
    rows = [
        {"task": task, "optimizer": name, "chosen": chosen, "test": test}
        for task, name, chosen, test in [
            ("a", "old", False, [0.0, 0.0, 0.0]),
            ("a", "old", True, [0.5, 0.75, None]),
            ("a", "new", True, [0.75, 0.5, 0.25]),
            ("b", "old", True, [2.0, 1.0, None]),
            ("b", "new", True, [1.0, None, None]),
        ]
    ]
    result = {"rows": rows, "tasks": {"a": {"more is better": True}, "b": {"more is better": False}}}
    assert ablation.gains(result, "a", "old", "new") == [0.25, -0.25, 0.25]
    assert ablation.gains(result, "b", "old", "new") == [1.0, -np.inf, 0.0]


def test_the_tables_are_those_of_the_results() -> None:
    result = json.loads(RESULTS.read_text())
    assert not result["quick"]
    assert RESULTS.with_name("ablation.md").read_text() == ablation.text(result)
    assert {row["rate"] for row in result["rows"]} == {*convergence.RATES}
    assert {row["optimizer"] for row in result["rows"]} == {*ablation.OPTIMIZERS}
    assert {len(row["test"]) for row in result["rows"]} == {result["seeds"]} == {len(ablation.FULL[2])}
    page = PAGE.read_text()
    assert "{include} /benchmarks/ablation.md" in page
    assert "(/benchmarks/ablation.png)" in page
    assert "python tests/benchmarks/ablation.py" in page


def test_the_page_has_the_areas_of_the_counterexamples() -> None:
    found = json.loads((ROOT / "docs" / "figures" / "convergence_area.json").read_text())
    page = PAGE.read_text()
    areas = {problem: [found[problem]["area"][name]["0.9"] for name in CORNERS] for problem in ("first", "sparse")}
    taken = [*areas["first"][:2], found["first step"]["first"]["AdaShift, first step taken"], areas["first"][3]]
    for label, shares in (
        ("first problem", areas["first"]),
        ("first problem, all with a first step", taken),
        ("sparse problem", areas["sparse"]),
    ):
        assert f"| {label} | {' | '.join(f'{100.0 * share:.3g}' for share in shares)} |" in page, label
    lost = areas["sparse"][0] - areas["sparse"][2]
    assert f"loses {100.0 * lost:.1f} points" in page
    first, sparse = (100.0 * found[problem]["area"]["ACProp, clip 0.25"]["0.9"] for problem in ("first", "sparse"))
    assert f"it does not: {first:.1f} % and {sparse:.1f} %" in page


def test_what_the_page_says_holds_in_the_results() -> None:
    result = json.loads(RESULTS.read_text())
    *three, gan = result["tasks"]

    def median(task: str, name: str) -> float:
        return next(
            float(np.median(row["test"]))
            for row in result["rows"]
            if (row["task"], row["optimizer"], row["chosen"]) == (task, name, True)
        )

    def diverged(task: str, name: str) -> int:
        return sum(row["diverged"] for row in result["rows"] if (row["task"], row["optimizer"]) == (task, name))

    def gains(task: str, clipped: bool) -> dict[tuple[str, str], list[float]]:
        steps = [(before, after) for _, before, after in ablation.IDEAS]
        return {(a, b): ablation.gains(result, task, *(ablation.named(x, clipped) for x in (a, b))) for a, b in steps}

    def agree(found: list[float]) -> bool:
        return min(found) > 0.0 or max(found) < 0.0

    for task, apart in zip(three, (0.006, 0.006, 0.02), strict=True):
        medians = [median(task, ablation.named(name, True)) for name in CORNERS]
        assert max(medians) - min(medians) < apart
    medians = {name: median(gan, ablation.named(name, True)) for name in CORNERS}
    level = [x for name, x in medians.items() if name != "AdaBelief"]
    assert max(level) - min(level) < 0.01 < medians["AdaBelief"] - max(level)
    assert not any(agree(x) for task in result["tasks"] for x in gains(task, True).values())
    assert [diverged(three[0], name) for name in CORNERS] == [0, 0, 42, 42]
    lost = gains(three[2], False)
    assert [round(-float(np.median(lost[x])), 2) for x in (("Adam", "AdaShift"), ("AdaBelief", "ACProp"))] == [0.17] * 2
    unclipped = gains(gan, False)
    assert min(*unclipped["Adam", "AdaShift"], *unclipped["AdaBelief", "ACProp"]) > 0.0
    assert min(ablation.OPTIMIZERS, key=lambda name: median(gan, name)) == "ACProp"
    assert diverged(gan, "ACProp") == 21
    centred = [("Adam", "AdaBelief"), ("AdaShift", "ACProp")]
    assert not any(agree(gains(task, False)[x]) for task in result["tasks"] for x in centred)
