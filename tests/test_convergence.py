"""The benchmark of convergence: its runs, its choice of a rate, its page."""

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

import json
import sys
from pathlib import Path

import jax
import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "benchmarks"), str(ROOT / "docs" / "examples")]
import accuracy
import convergence
import convergence_report
import tasks

RESULTS = ROOT / "docs" / "benchmarks" / "convergence.json"


@pytest.mark.slow
@pytest.mark.parametrize("make", [tasks.mlp, tasks.gan])
def test_the_runs_of_a_sweep_are_those_of_single_runs(make):
    task = make()._replace(steps=convergence.POINTS)
    rates, seeds = (1e-3, 1e-2), (0, 3)
    together = convergence.sweep(task, convergence.OPTIMIZERS["ACProp"], rates, seeds)
    params, batches = convergence.beginnings(task, (3,))
    params, batches = jax.tree.map(lambda x: x[0], (params, batches))
    alone = jax.jit(
        lambda rate, *rest: convergence.train(task, convergence.OPTIMIZERS["ACProp"], rate, *rest), static_argnums=0
    )(1e-2, params, batches)
    for quantity, many in zip(alone, together, strict=True):
        np.testing.assert_allclose(many[1, 1], quantity, rtol=1e-5)
    assert together[0].shape == (2, 2, convergence.POINTS + 1)
    assert together[0][1, 0, -1] != together[0][1, 1, -1]


@pytest.mark.parametrize("more_is_better", [True, False])
def test_the_rate_is_chosen_by_the_validation_data_alone(more_is_better):
    task = tasks.mlp()._replace(more_is_better=more_is_better, steps=convergence.POINTS)
    losses = np.linspace(2.0, 1.0, convergence.POINTS + 1) * np.ones((3, 3, 1))
    losses[0, :, -1] = 2.5, np.nan, 1.9
    validation = np.asarray([[0.1, 0.9, np.nan], [0.5, 0.5, 0.9], [0.5, 0.1, 0.5]])
    validation = validation if more_is_better else 1.0 - validation
    losses[2, :, -1] = 0.9  # which decides between equal scores
    test = np.full((3, 3), 0.5)
    test[1] = 1.0 if more_is_better else 0.0  # which is the best, and chooses nothing
    rows = convergence.rows(task, "ACProp", (1.0, 2.0, 3.0), (losses, validation, test))
    assert [row["chosen"] for row in rows] == [False, False, True]
    assert [row["diverged"] for row in rows] == [2, 0, 0]
    assert rows[0]["validation"][2] is None
    assert rows[1]["test"] == [test[1, 0]] * 3
    json.dumps(rows, allow_nan=False)


def test_frechet_distance_of_moved_and_scaled_data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 4)).astype(np.float32)
    values, vectors = np.linalg.eigh(np.cov(x.T))
    root = (vectors * np.sqrt(values)) @ vectors.T
    assert tasks.frechet(x, x.mean(0), root) == pytest.approx(0.0, abs=1e-5)
    assert tasks.frechet(x, x.mean(0) + 2.0, root) == pytest.approx(16.0, rel=1e-5)
    assert tasks.frechet(3.0 * x, 3.0 * x.mean(0), root) == pytest.approx(4.0 * values.sum(), rel=1e-5)


def test_the_tables_are_those_of_the_results():
    result = json.loads(RESULTS.read_text())
    assert not result["quick"]
    assert RESULTS.with_name("convergence_table.md").read_text() == convergence_report.table(result)
    assert convergence_report.digits_table(result) in (ROOT / "docs" / "should-i-use.md").read_text()
    rows = json.loads(RESULTS.with_name("accuracy.json").read_text())["rows"]
    assert RESULTS.with_name("accuracy_table.md").read_text() == accuracy.table(rows)


def test_what_the_pages_say_holds_in_the_results():
    result = json.loads(RESULTS.read_text())
    rows = {(row["task"], row["optimizer"]): row for row in result["rows"] if row["chosen"]}
    *three, gan = result["tasks"]
    plain = [r for r in result["rows"] if r["optimizer"] == "ACProp without the clip" and r["task"] in three]
    assert sum(row["diverged"] for row in plain) > sum(len(row["test"]) for row in plain) / 2
    for task in three:
        ours = rows[task, "ACProp"]["test"]
        for rival in ("AdamW", "AdaBelief"):
            theirs = rows[task, rival]["test"]
            assert min(ours) <= max(theirs), (task, rival)
            assert min(theirs) <= max(ours), (task, rival)
        sign = 1.0 if result["tasks"][task]["more is better"] else -1.0
        medians = {name: sign * np.median(rows[task, name]["test"]) for name in convergence.OPTIMIZERS}
        assert min(medians, key=medians.__getitem__) == "ACProp without the clip"
    distances = {name: np.median(rows[gan, name]["test"]) for name in convergence.OPTIMIZERS}
    assert distances["ACProp without the clip"] < distances["ACProp"] < distances["AdamW"] < distances["AdaBelief"]
    ours, adamw, adabelief, sgd = (rows[gan, name]["test"] for name in list(convergence.OPTIMIZERS)[:4])
    assert max(ours) >= max(min(adamw), min(adabelief))
    assert max(ours) >= min(sgd)
    assert max(sgd) >= min(ours)
