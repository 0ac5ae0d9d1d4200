"""The benchmarks of steps: how they measure, and that their page says what their results say."""

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

import itertools
import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "tests" / "benchmarks"
sys.path.insert(0, str(SCRIPTS))

import bench_cuda
import record
import report
import small
import small_report

RESULTS = ROOT / "docs" / "benchmarks"
ENV = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}


def test_the_page_has_the_figures_of_the_results():
    results = report.only_steps(RESULTS)
    assert list(results) == list(report.TITLES)
    assert (RESULTS / "steps_table.md").read_text() == report.page(results)
    assert "{include} /benchmarks/steps_table.md" in (ROOT / "docs" / "benchmarks.md").read_text()


def test_the_tables_of_small_models_have_the_figures_of_the_results():
    results = small_report.results_in(RESULTS)
    assert list(results) == list(small_report.TITLES)
    assert (RESULTS / "small_table.md").read_text() == small_report.page(results)
    assert "{include} /benchmarks/small_table.md" in (ROOT / "docs" / "benchmarks.md").read_text()
    for name, result in results.items():
        least = 200 if name not in ("small_jax_compiling", "small_first") else 3
        assert all(row["rounds"] >= least for row in result["rows"]), name


def test_the_readme_has_the_figures_of_the_results():
    assert report.readme_table(RESULTS) in (ROOT / "README.md").read_text()
    assert report.costs(RESULTS) in (ROOT / "docs" / "should-i-use.md").read_text()


def test_results_name_no_machine_and_are_whole():
    for path in RESULTS.glob("*.json"):
        result = json.loads(path.read_text())
        assert not result["quick"], path.name
        assert not [value for value in result["machine"].values() if platform.node() in str(value) or "/" in str(value)]


def test_every_round_measures_every_run_after_its_preparation(monkeypatch):
    monkeypatch.setattr(record, "REST", 0.0)
    seen = []
    runs = {
        name: record.Run(lambda name=name: seen.append(name), lambda name=name: seen.append(f"before {name}"))
        for name in "ab"
    }
    seconds = record.measure(runs, budget=0.0)
    assert {name: len(s) for name, s in seconds.items()} == {"a": record.LEAST, "b": record.LEAST}
    assert all(s > 0 for both in seconds.values() for s in both)
    assert seen.count("before a") == seen.count("before b") == 2 + record.LEAST
    for before, after in itertools.pairwise(seen):
        if before.startswith("before"):
            assert after == before.removeprefix("before ")


def test_steps_are_measured_in_turns():
    seen = []
    steps = {name: lambda name=name: seen.append(name) for name in "abc"}
    seconds = record.alternate(steps, least=7, most=50, budget=0.0)
    assert {name: len(s) for name, s in seconds.items()} == {"a": 7, "b": 7, "c": 7}
    assert len(seen) == 3 * (3 + 7)
    assert all(sorted(seen[i : i + 3]) == ["a", "b", "c"] for i in range(0, len(seen), 3))
    assert len(record.alternate(steps, least=7, most=50, budget=1.0)["a"]) == 50


def test_the_adam_to_compare_with_is_adam():
    torch = pytest.importorskip("torch")
    grads = small.gradients(2, 5)
    step = small.eager_adam(grads)
    params = [torch.ones(5, dtype=torch.float64, requires_grad=True) for _ in grads]
    peer = torch.optim.Adam(params, lr=0.001)
    for p, g in zip(params, grads, strict=True):
        p.grad = torch.from_numpy(g).double()
    for _ in range(5):
        step()
        peer.step()
    held = step.__closure__[[*step.__code__.co_freevars].index("held")].cell_contents
    for (x, *_), p in zip(held, params, strict=True):
        assert x == pytest.approx(p.detach().numpy(), rel=1e-5)


def test_ratios_are_of_one_round():
    assert record.ratio([2.0, 20.0, 200.0], [1.0, 10.0, 100.0]) == (2.0, 2.0, 2.0)


@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_the_slope_is_the_exponent_at_the_upper_end(exponent):
    x = [10, 100, 1_000, 10_000, 100_000, 1_000_000]
    seconds = [7.0, 7.0, 7.0, *(3.0 * n**exponent for n in x[3:])]
    assert report.slope(x, seconds) == pytest.approx(exponent)


def test_without_a_cuda_device_the_reason_is_printed(tmp_path):
    command = [sys.executable, SCRIPTS / "bench_cuda.py", "quick", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV)
    assert done.returncode == 3, done.stderr
    assert done.stdout.count("skipped (") == 3
    assert done.stdout.splitlines()[-1].count(";") == len(bench_cuda.PLAN) - 1  # all of it is left
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("framework", ["torch", "cupy", "jax"])
def test_what_is_measured_on_a_device_runs_on_a_cpu(monkeypatch, tmp_path, framework):
    pytest.importorskip({"cupy": "numpy"}.get(framework, framework))
    monkeypatch.setattr(record, "REST", 0.0)
    monkeypatch.setattr(record, "TURN", 0.0)
    task, late = bench_cuda.Task(framework, bench_cuda.TEN), bench_cuda.Task("later", bench_cuda.ONE)
    monkeypatch.setattr(bench_cuda, "FRAMEWORKS", {framework: bench_cuda.FRAMEWORKS[framework]})
    monkeypatch.setattr(bench_cuda, "PLAN", [task, late])
    monkeypatch.setattr(sys, "argv", ["bench_cuda.py", "quick", "--device", "cpu", "--out", str(tmp_path)])
    assert bench_cuda.main() == 3
    result = json.loads((tmp_path / "steps_cuda.json").read_text())
    assert result["left"] == [str(late)]
    unit = bench_cuda.FRAMEWORKS[framework].unit
    rows = {row["contender"]: row for row in result["rows"]}
    assert rows[unit]["wall to unit"] == [1.0, 1.0, 1.0]
    moved = {row["bytes"] for name, row in rows.items()}
    assert moved == {28 * 10_000}  # float32: parameter, gradient and two moments


def test_a_contender_that_fails_leaves_the_others(monkeypatch):
    monkeypatch.setattr(record, "REST", 0.0)
    cupy = bench_cuda.Cupy("cpu")
    makers = cupy.makers([(10,)], "float32")

    def broken():
        raise RuntimeError("no such kernel")

    cupy.makers = lambda shapes, dtype: {**makers, "Stepper": broken}
    good, bad = bench_cuda.rows_of(bench_cuda.PLAN[2], cupy, [(10,)], None)
    assert "wall" in good
    assert bad["error"] == "RuntimeError: no such kernel"
    assert bench_cuda.said(bad).endswith("RuntimeError: no such kernel")


def test_kernels_are_measured_behind_other_work_and_in_turns():
    """A device that is a list: every operation takes a second of its clock."""
    done, clock = [], iter(range(10**6))

    class Device(bench_cuda.Framework):
        copy = staticmethod(lambda: (done.append("copy"), next(clock)))
        finish = staticmethod(lambda: done.append("finish"))
        record = staticmethod(lambda: next(clock))
        seconds = staticmethod(lambda begin, end: end - begin)

    steps = {name: lambda name=name: (done.append(name), next(clock)) for name in "ab"}
    seconds = bench_cuda.kernel_seconds(Device("none"), steps)
    assert seconds == {name: [2] * record.MOST for name in "ab"}
    turns = [x for x in done if x in steps][2:]
    assert turns == ["a", "b"] * record.MOST
    assert all(done[i - 1] == "copy" for i, x in enumerate(done) if x in steps and i > done.index("b"))


def test_gpt2_has_its_shapes():
    small = bench_cuda.gpt2(12, 768, 50_257, 1_024)
    assert (len(small), sum(map(math.prod, small))) == (148, 124_439_808)
    shapes = bench_cuda.SIZES[bench_cuda.GPT2]
    assert (len(shapes), round(sum(map(math.prod, shapes)) / 1e6)) == (496, 122)
