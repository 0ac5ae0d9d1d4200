"""What the benchmarks share: arguments, the machine, measuring in turns, and results as JSON.

A result is a file `<name>.json` of flat rows, beside the machine and the versions that they were measured with:

    {"name": ..., "quick": false, "machine": {...}, "versions": {...}, "rows": [{...}, ...]}

report.py makes the table, the pictures and the page of these files, and of nothing else.
"""

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

import acprop_core

TURN = 1e-3  # seconds: a shorter step is repeated within its turn until this is filled
REST = 5e-3  # seconds before each turn, in which what the step before frees in the background is freed
LEAST, MOST = 5, 30  # rounds


class Run(NamedTuple):
    """What is timed, what is done before each turn without being timed, and what ends a turn and is timed."""

    step: Callable[[], object]
    prepare: Callable[[], object] = lambda: None
    finish: Callable[[], object] = lambda: None


def arguments(doc: str, **more: Mapping[str, Any]) -> argparse.Namespace:
    """Return `quick` (bool), `out` (a folder, made), and `more` options from the command line."""
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    parser.add_argument("quick", nargs="?", choices=["quick"], help="fewer sizes and rounds")
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks"), help="the folder of the results")
    for name, settings in more.items():
        parser.add_argument(f"--{name}", **settings)
    given = parser.parse_args()
    given.quick = given.quick is not None
    given.out.mkdir(parents=True, exist_ok=True)
    return given


def pin() -> None:
    """Keep this process, and the threads that it will start, on one core where the system allows it."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def machine() -> dict[str, Any]:
    """Return what a figure depends on, and nothing that names this one machine."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "cores used": usable,
        "memory, GiB": round(pages / 2**30),
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions(*distributions: str) -> dict[str, str]:
    """Return the versions of Python, of this project and of `distributions`."""
    own = {"python": platform.python_version(), "acprop-core": acprop_core.__version__}
    return own | {name: importlib.metadata.version(name) for name in distributions}


def timed(run: Run, number: int = 1) -> float:
    """Return the seconds that one of `number` steps takes."""
    start = time.perf_counter()
    for _ in range(number):
        run.step()
    run.finish()
    return (time.perf_counter() - start) / number


def measure(runs: Mapping[str, Run], budget: float, label: str = "") -> dict[str, list[float]]:
    """Return the seconds of a step of each run, one a round: the n-th of all were measured next to each other.

    Every round each run has one turn, in random order. There are as many rounds as fit `budget` seconds, but at least
    `LEAST` and at most `MOST`, after two steps that warm up.
    """
    number, warm = {}, 0.0
    for name, run in runs.items():
        run.prepare()
        run.step()  # what is compiled or allocated once
        run.prepare()
        second = timed(run)
        number[name] = max(1, round(TURN / max(second, 1e-6)))
        warm += number[name] * second + REST
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    gc.collect()
    for _ in tqdm(range(min(MOST, max(LEAST, round(budget / warm)))), desc=label, leave=False):
        for name in random.sample(list(runs), len(runs)):
            runs[name].prepare()
            time.sleep(REST)
            seconds[name].append(timed(runs[name], number[name]))
    return seconds


def alternate(
    steps: Mapping[str, Callable[[], object]], least: int, most: int, budget: float
) -> dict[str, list[float]]:
    """Return the seconds of single steps, one of each run in every round, in random order.

    There are as many rounds as fit `budget` seconds, but at least `least` and at most `most`, after three that warm up.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for _ in range(3):
        warm = [timed(Run(step)) for step in steps.values()]
    gc.collect()
    for _ in range(min(most, max(least, round(budget / sum(warm))))):
        random.shuffle(names)
        for name in names:
            seconds[name].append(timed(Run(steps[name])))
    return seconds


def quartiles(values: Iterable[float]) -> tuple[float, float, float]:
    """Return the lower quartile, the median and the upper quartile."""
    low, middle, high = statistics.quantiles(list(values), n=4, method="inclusive")
    return low, middle, high


def ratio(seconds: Iterable[float], unit: Iterable[float]) -> tuple[float, float, float]:
    """Return the quartiles of the ratios of one round."""
    return quartiles(a / b for a, b in zip(seconds, unit, strict=True))


def save(name: str, rows: list[dict[str, Any]], given: argparse.Namespace, used: dict[str, str], **about: Any) -> Path:
    """Write the result `name` of `arguments()` measured with `versions()`; `about` is what its page has to say."""
    path = given.out / f"{name}.json"
    result = {"name": name, "quick": given.quick, "machine": machine(), "versions": used, **about, "rows": rows}
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the results in `folder` by their names."""
    results = (json.loads(path.read_text()) for path in sorted(folder.glob("*.json")))
    return {result["name"]: result for result in results}
