"""What runs on a CUDA device, tried without one: all parts are there, and each ends as it should."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import on_device
from hosts import BACKENDS
from on_device import Part

TESTS = Path(__file__).parent
LIBRARY = "numba_cuda"  # which is asked for its device anyway

GOOD = """
    import json, os, pytest

    pytestmark = pytest.mark.gpu

    def test_a():
        import acprop_core
        from pathlib import Path
        assert Path(acprop_core.__file__).parents[1] == Path.cwd()  # the packages of the tree

    def test_results_are_written_as_they_come():
        (line,) = open(os.environ["ON_DEVICE_RESULTS"])
        assert json.loads(line)["test"].endswith("test_a")
"""
BAD = """
    import pytest

    @pytest.mark.gpu
    def test_b():
        assert 1 + 1 == 3
"""
UNMARKED = "def test_c(): assert False"
SKIPPED = """
    import pytest

    @pytest.mark.gpu
    @pytest.mark.skip(reason="numba is not installed")
    def test_d(): ...
"""
ENDLESS = """
    import pytest, time

    @pytest.mark.gpu
    def test_e():
        while True: time.sleep(1)
"""


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Return a function that runs tests, given by name and source, and returns the exit status and the summary."""
    monkeypatch.setitem(on_device.PROBES, LIBRARY, "print('a device')")

    def run(seconds, *names, limits=None, **sources):
        parts = []
        for name, source in sources.items():
            path = tmp_path / f"test_{name}.py"
            path.write_text(re.sub("^    ", "", source, flags=re.MULTILINE))
            part = Part(name, LIBRARY, ["-c", str(TESTS.parent / "pyproject.toml"), str(path)])
            parts.append(part._replace(seconds=(limits or {}).get(name, part.seconds)))
        out = tmp_path / "out"
        status = on_device.main([*names, "--seconds", str(seconds), "--out", str(out), "--jobs", "2"], parts)
        return status, json.loads((out / "summary.json").read_text())

    return run


def test_parts_end_as_they_should(run, capsys):
    status, summary = run(300, good=GOOD, bad=BAD, unmarked=UNMARKED, skipped=SKIPPED, broken="import nothing_such")
    ended = {name: (part["ended"], part["why"], part["counts"]) for name, part in summary["parts"].items()}
    assert ended == {
        "good": ("passed", "", {"passed": 2}),
        "bad": ("failed", "exit status 1", {"failed": 1}),
        "unmarked": ("incomplete", "there is no such test", {}),
        "skipped": ("incomplete", "Skipped: numba is not installed", {"skipped": 1}),
        "broken": ("failed", "exit status 2", {"failed": 1}),
    }
    assert summary["found"] == {LIBRARY: "a device"}
    printed = capsys.readouterr().out
    assert "test_b: assert (1 + 1) == 3" in printed
    assert "No module named 'nothing_such'" in printed
    assert status == 1


def test_a_part_that_does_not_end_is_cut_off(run):
    status, summary = run(3, "endless", endless=ENDLESS, good=GOOD)
    assert [(name, part["ended"]) for name, part in summary["parts"].items()] == [("endless", "incomplete")]
    assert summary["parts"]["endless"]["why"].startswith("the time was over")
    assert status == 3


def test_a_part_may_have_a_limit_of_its_own(run):
    _, summary = run(300, limits={"endless": 2.0}, endless=ENDLESS, good=GOOD)
    assert {name: part["ended"] for name, part in summary["parts"].items()} == {
        "endless": "incomplete",
        "good": "passed",
    }


def test_an_outcome_counts_what_had_passed_before_the_time_was_over():
    tests = [{"test": "a", "outcome": "passed", "why": ""}]
    outcome = on_device.judge(on_device.PARTS[0], None, tests)
    assert (outcome.ended, outcome.why, outcome.counts) == ("incomplete", "the time was over", {"passed": 1})
    assert on_device.exit_status([outcome, on_device.Outcome("passed")]) == 3
    assert on_device.exit_status([outcome, on_device.Outcome("failed")]) == 1
    assert on_device.exit_status([on_device.Outcome("passed")]) == 0
    assert on_device.exit_status([]) == 3


def test_without_a_device_it_says_what_did_not_run(tmp_path):
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, TESTS / "on_device.py", "cupy", "bench", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 3, done.stdout + done.stderr
    assert re.search(r"^torch finds no device \(.+\)$", done.stdout, re.MULTILINE)
    assert re.search(r"^bench +incomplete in 0 s; torch finds no device$", done.stdout, re.MULTILINE)
    assert done.stdout.splitlines()[-1] == "something did not run"
    parts = json.loads((tmp_path / "summary.json").read_text())["parts"]
    assert {name: part["why"] for name, part in parts.items()} == {
        "cupy": "cupy finds no device",
        "bench": "torch finds no device",
    }


def test_wheels_stand_in_for_missing_packages_alone(tmp_path):
    for name in ("numpy-2.0-py3-none-any.whl", "nothing_such-1.0-py3-none-any.whl"):
        (tmp_path / name).touch()
    path = on_device.environment(tmp_path)["PYTHONPATH"].split(os.pathsep)
    assert path[:3] == [str(TESTS.parent), str(TESTS.parent / "adapters"), str(TESTS)]
    assert [Path(x).name for x in path if x.endswith(".whl")] == ["nothing_such-1.0-py3-none-any.whl"]


def test_everything_marked_gpu_is_in_a_part():
    selected = [part.arguments[2] for part in on_device.PARTS if part.name.startswith("suite-")]
    assert sorted(selected) == sorted(f"[{backend}" for backend in BACKENDS.values() if backend.needs_gpu)
    marking = {
        f"tests/{file.name}"
        for file in TESTS.glob("test_*.py")
        if re.search(r"mark\.gpu\b|on_every_backend\(\)|marks_of\(backend\)", file.read_text())
        and file != Path(__file__)
    }
    assert marking == {x for part in on_device.PARTS for x in part.arguments if x.endswith(".py")}
