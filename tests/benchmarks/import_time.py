"""Milliseconds that `import acprop_core` adds to a bare interpreter with array_api_compat: median of 15 processes."""

import statistics
import subprocess
import sys
import time


def milliseconds(code: str) -> float:
    """Return how long a fresh interpreter takes to run `code`."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    """Measure both in turns, so that whatever else the machine does falls on both."""
    codes = ("import array_api_compat", "import array_api_compat, acprop_core")
    pairs = [tuple(map(milliseconds, codes)) for _ in range(15)]
    base, added = statistics.median(a for a, _ in pairs), statistics.median(b - a for a, b in pairs)
    print(f"import acprop_core adds {added:.0f} ms to the {base:.0f} ms of python and array_api_compat (limit: 80)")


if __name__ == "__main__":
    main()
