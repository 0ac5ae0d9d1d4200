"""Run everything that needs a CUDA device, most important first, within a time limit; nothing need be installed.

    python tests/on_device.py [--seconds 330] [--out out/on_device] [--wheels .wheels] [--jobs 6] [NAME ...]

First the tests marked `gpu` (torch, CuPy, JAX), several processes at a time, then `tests/benchmarks/bench_cuda.py` by
itself. The packages are those of the tree. Pure Python wheels in the folder of `--wheels` replace packages that
are missing; CONTRIBUTING.md says which. Results are written as they come: `NAME.jsonl` has a line for each test,
`NAME.log` what the part printed, `summary.json` what became of each part. NAME chooses parts.

The exit status is 0 if every part ran and passed, 1 if something failed, and 3 if nothing failed but something did not
run: a library found no device, a part ran no test, or the time was over.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
RESULTS = "ON_DEVICE_RESULTS"  # the variable with the file into which the tests of a process write
FAILED, INCOMPLETE = 1, 3
BENCH_SHARE = 0.4  # of the time is kept for the benchmark

# What asks a library for its device, and says which it found.
PROBES = {
    "torch": "import torch as t; t.ones(1, device='cuda'); print(t.__version__, 'on', t.cuda.get_device_name())",
    "cupy": "import cupy as c; c.ones(1); print(c.__version__, 'with CUDA', c.cuda.runtime.runtimeGetVersion())",
    "jax": "import jax as j; d = j.devices('cuda')[0]; print(j.__version__, 'on', d.device_kind)",
    "numba_cuda": "import numba_cuda as n; from numba import cuda as c; c.to_device([1.0]); print(n.__version__)",
}
WANTED = ("array_api_compat", "array_api_strict", "hypothesis", "ml_dtypes", "mpmath", "numpy", "pytest", "tqdm")


class Part(NamedTuple):
    """What one process runs: arguments of pytest or of Python, the library that must find a device, and a limit."""

    name: str
    library: str
    arguments: Sequence[str]
    is_script: bool = False
    seconds: float = float("inf")


def suite(name: str, library: str, backend: str) -> Part:
    """Return the reference suite on one backend."""
    return Part(f"suite-{name}", library, ["tests/test_suite.py", "-k", f"[{backend}"])


EVERYWHERE = ["tests/test_extremes.py", "tests/test_properties.py"]
PARTS = [
    Part("torch", "torch", ["tests/test_torch_cuda.py"]),
    suite("torch-fused", "torch", "torch_fused_cuda"),
    Part("cupy", "cupy", ["tests/test_cupy.py"]),
    suite("stepper", "cupy", "stepper_cuda"),
    suite("torch-fused-capturable", "torch", "torch_capturable_fused_cuda"),
    suite("torch-foreach", "torch", "torch_foreach_cuda"),
    suite("torch-optimizer", "torch", "torch_optimizer_cuda"),
    suite("torch-foreach-capturable", "torch", "torch_capturable_foreach_cuda"),
    Part("torch-compile", "torch", ["tests/test_torch_cuda_compiled.py"], seconds=120.0),  # compiling may take long
    suite("optax", "jax", "optax_cuda"),
    suite("torch-capturable", "torch", "torch_capturable_cuda"),
    suite("torch", "torch", "torch_cuda"),
    suite("stepper-tiles", "cupy", "stepper_cupy_tiles"),
    suite("cupy", "cupy", "cupy"),
    suite("jax", "jax", "jax_jit_cuda"),
    Part("everywhere-torch", "torch", [*EVERYWHERE, "-k", "torch"]),
    Part("everywhere-cupy", "cupy", [*EVERYWHERE, "-k", "cupy"]),
    Part("everywhere-jax", "jax", [*EVERYWHERE, "-k", "jax or optax"]),
]
BENCH = Part("bench", "torch", ["tests/benchmarks/bench_cuda.py"], is_script=True)


@dataclass
class Outcome:
    """What became of a part: how it ended ("passed", "failed" or "incomplete"), why, its counts, and the seconds."""

    ended: str
    why: str = ""
    counts: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def __str__(self) -> str:
        counted = ", ".join(f"{n} {kind}" for kind, n in sorted(self.counts.items()))
        return f"{self.ended} in {self.seconds:.0f} s" + "".join(f"; {x}" for x in (counted, self.why) if x)


def pytest_runtest_logreport(report: Any) -> None:
    """Write a line for each test, because a process that is killed at the time limit writes no report."""
    if report.when == "call" or report.outcome != "passed":
        _write(report)


def pytest_collectreport(report: Any) -> None:
    """Write a line for a file that cannot be imported."""
    if report.failed:
        _write(report)


def _write(report: Any) -> None:
    # of a skipped test it is (file, line, reason)
    why = report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longreprtext
    line = {"test": report.nodeid, "outcome": report.outcome, "seconds": getattr(report, "duration", 0.0), "why": why}
    with open(os.environ[RESULTS], "a") as file:
        file.write(json.dumps(line) + "\n")


def environment(wheels: Path) -> dict[str, str]:
    """Return the environment of every process: the packages of the tree, then wheels for those that are missing."""
    wheels = wheels.resolve()
    missing = [str(path) for path in sorted(wheels.glob("*.whl")) if not _is_found(path.name.partition("-")[0])]
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    path = [str(ROOT), str(ROOT / "adapters"), str(TESTS), *missing, *given]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # the suite needs none, and which there are is not known
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # of the device's memory, which several processes share
    }


def _is_found(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def python(*arguments: str, env: dict[str, str], until: float, log: Any = subprocess.PIPE) -> tuple[int | None, str]:
    """Run Python from the root of the tree; return its exit status, None if the time was over, and its output."""
    # a session of its own, so that what it started can be killed with it
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=env,
        stdout=log,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=max(until - time.monotonic(), 0.1))
        return process.returncode, output or ""
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        return None, output or ""


def probe(library: str, env: dict[str, str], until: float) -> tuple[bool, str]:
    """Return whether a library finds a device, and its version, or why not."""
    status, output = python("-c", PROBES[library], env=env, until=until)
    if status is None:
        return False, "the time was over"
    lines = output.strip().splitlines() or [f"exit status {status}"]
    return status == 0, next((line for line in reversed(lines) if status and "Error" in line), lines[-1])


def run(part: Part, out: Path, env: dict[str, str], until: float) -> Outcome:
    """Run a part, and print what became of it."""
    begun = time.monotonic()
    if begun >= until:
        return Outcome("incomplete", "the time was over before it began")
    until = min(until, begun + part.seconds)
    results = out / f"{part.name}.jsonl"
    results.write_text("")
    with open(out / f"{part.name}.log", "w") as log:
        if part.is_script:
            options = ["--seconds", str(max(round(until - begun - 20.0), 1)), "--out", str(out)]
            status, _ = python(*part.arguments, *options, env=env, until=until, log=log)
        else:
            # warnings are shown and do not fail: the versions here are not those that the suite pins
            options = ["-q", "-m", "gpu", "-p", "on_device", "-p", "no:cacheprovider", "-W", "default", "--tb=short"]
            own = env | {RESULTS: str(results)}
            status, _ = python("-m", "pytest", *part.arguments, *options, env=own, until=until, log=log)
    outcome = judge(part, status, [json.loads(line) for line in results.read_text().splitlines()])
    outcome.seconds = round(time.monotonic() - begun, 1)
    print(f"{part.name}: {outcome}", flush=True)
    for failure in outcome.failures[:3]:
        print(f"    {failure}", flush=True)
    return outcome


def judge(part: Part, status: int | None, tests: Sequence[dict[str, Any]]) -> Outcome:
    """Return what became of a part, by its exit status and its tests so far."""
    counts = dict(Counter(test["outcome"] for test in tests))
    failures = [f"{test['test']}: {_last_line(test['why'])}" for test in tests if test["outcome"] == "failed"]
    if part.is_script and status == INCOMPLETE:
        return Outcome("incomplete", "its log says what is left")
    if failures or status not in (0, 5, None):  # 5: no test was collected
        return Outcome("failed", f"exit status {status}", counts, failures)
    if status is None:
        return Outcome("incomplete", "the time was over", counts)
    if not (part.is_script or counts.get("passed")):
        reasons = {_last_line(test["why"]) for test in tests}
        return Outcome("incomplete", "; ".join(sorted(reasons)) or "there is no such test", counts)
    return Outcome("passed", "", counts)


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.startswith("E ")] or text.splitlines()[-1:] or [""]
    return lines[0].removeprefix("E").strip()[:200]


def exit_status(outcomes: Sequence[Outcome]) -> int:
    """Return 1 if a part failed, 3 if one did not run to its end, and otherwise 0."""
    ended = {outcome.ended for outcome in outcomes}
    return FAILED if "failed" in ended else INCOMPLETE if "incomplete" in ended or not ended else 0


def main(arguments: Sequence[str] | None = None, parts: Sequence[Part] = (*PARTS, BENCH)) -> int:
    """Run parts as the command line says, and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(part.name for part in parts)}")
    parser.add_argument("--seconds", type=float, default=330.0, help="the time limit of all")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ROOT / "out" / "on_device")))
    parser.add_argument("--wheels", type=Path, default=ROOT / ".wheels")
    parser.add_argument("--jobs", type=int, default=min(6, os.cpu_count() or 1), help="processes at a time")
    given = parser.parse_args(arguments)
    if unknown := set(given.names) - {part.name for part in parts}:
        parser.error(f"there is no part {', '.join(sorted(unknown))}")
    begun = time.monotonic()
    until = begun + given.seconds
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    env = environment(given.wheels)
    chosen = [part for part in parts if not given.names or part.name in given.names]
    outcomes: dict[str, Outcome] = {}
    versions: dict[str, str] = {}

    def record(part: Part, outcome: Outcome) -> None:
        outcomes[part.name] = outcome
        about = {"seconds": round(time.monotonic() - begun, 1), "found": versions}
        summary = about | {"parts": {name: asdict(outcome) for name, outcome in outcomes.items()}}
        (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")

    lacking = f"import importlib.util as u; print(*[name for name in {WANTED} if not u.find_spec(name)])"
    if missing := python("-c", lacking, env=env, until=until)[1].strip():
        print(f"missing, and not in {given.wheels}: {missing}", flush=True)
    with ThreadPoolExecutor(given.jobs) as pool:
        libraries = sorted({part.library for part in chosen} | {"numba_cuda"})
        found = dict(zip(libraries, pool.map(lambda name: probe(name, env, until), libraries), strict=True))
        for name, (works, said) in found.items():
            versions[name] = said if works else f"finds no device ({said})"
            print(f"{name} {versions[name]}", flush=True)
        able = [part for part in chosen if found[part.library][0]]
        for part in chosen:
            if part not in able:
                record(part, Outcome("incomplete", f"{part.library} finds no device"))
        scripts, tests = ([part for part in able if part.is_script is kind] for kind in (True, False))
        until_tests = until - BENCH_SHARE * given.seconds if scripts else until
        running = {pool.submit(run, part, out, env, until_tests): part for part in tests}
        for future in as_completed(running):
            record(running[future], future.result())
    for part in scripts:
        record(part, run(part, out, env, until))
    for name, outcome in outcomes.items():
        print(f"{name:32}{outcome}")
    status = exit_status(list(outcomes.values()))
    print({0: "everything ran and passed", FAILED: "something failed", INCOMPLETE: "something did not run"}[status])
    return status


if __name__ == "__main__":
    sys.exit(main())
