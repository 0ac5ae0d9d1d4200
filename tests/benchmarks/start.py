"""What a fresh process takes to import a framework, then an optimizer's package, and to do a first step; as JSON.

    python tests/benchmarks/start.py bench_torch "AdamW, fused" torch torch

steps.py starts it. It imports nothing before that is measured.
"""

import importlib
import json
import sys
import time


def main() -> None:
    """Print the seconds."""
    script, name, framework, package = sys.argv[1:]
    times = [time.perf_counter()]
    for module in (framework, package):
        importlib.import_module(module)
        times.append(time.perf_counter())
    contender = importlib.import_module(script).CONTENDERS[name]
    grads = importlib.import_module("steps").gradients(1, 1_000)
    start = time.perf_counter()
    contender.make(grads, "float32").step()
    first = time.perf_counter() - start
    print(json.dumps({"framework": times[1] - times[0], "package": times[2] - times[1], "first step": first}))


if __name__ == "__main__":
    main()
