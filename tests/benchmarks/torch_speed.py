"""Time of one step of the torch optimizer beside torch.optim.AdamW, ratios in one process, interleaved: medians.

    OMP_NUM_THREADS=1 taskset -c 0 python tests/benchmarks/torch_speed.py [quick] [cuda]

In float32, for one large tensor and many small ones, in each of torch's ways to step. Also printed: the seconds of the
first step, in which a fused rule is compiled, and the largest temporary memory of a step as torch's allocators saw it.
"""

import statistics
import sys
import time
from collections.abc import Callable
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from acprop_torch import ACProp, _fused

WAYS = {"for-loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}


def parameters(arrays: int, size: int, device: str) -> list[torch.Tensor]:
    params = [torch.ones(size, device=device, requires_grad=True) for _ in range(arrays)]
    for p in params:
        p.grad = torch.randn(size, device=device)
    return params


def seconds_of(step: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_of(step: Callable[[], object], device: str) -> int:
    """Return the bytes that a step holds at most beyond those that were there before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    held = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def compare(way: str, flags: dict[str, bool], arrays: int, size: int, device: str, rounds: int) -> None:
    theirs = torch.optim.AdamW(parameters(arrays, size, device), **flags)
    ours = ACProp(parameters(arrays, size, device), clip_exponent=0.25, **flags)
    first = seconds_of(ours.step, device)
    seconds_of(theirs.step, device)
    pairs = [
        (seconds_of(theirs.step, device), seconds_of(ours.step, device)) for _ in tqdm(range(rounds), way, leave=False)
    ]
    ratio = statistics.median(our / their for their, our in pairs)
    unit = statistics.median(their for their, _ in pairs)
    print(
        f"    {way:24}{ratio:6.2f} x AdamW's {1e3 * unit:8.2f} ms;"
        f" first step {first:5.2f} s, temporaries {peak_of(ours.step, device) / 2**20:6.1f} MiB"
    )


def main() -> None:
    """Print one line a shape and way."""
    device = "cuda" if "cuda" in sys.argv[1:] else "cpu"
    shapes = {"cpu": [(1, 2**24), (100, 10_000), (1_000, 1_000)], "cuda": [(1, 100_000_000), (1_000, 100_000)]}[device]
    rounds = 5 if "quick" in sys.argv[1:] else 25
    for arrays, size in shapes:
        print(f"torch {torch.__version__}, {device}, {arrays:,} x {size:,} float32, {torch.get_num_threads()} threads")
        for way, flags in WAYS.items():
            compare(way, flags, arrays, size, device, rounds)
        if device == "cpu":
            with mock.patch.object(_fused, "_has_numba", return_value=False):
                compare("fused, without Numba", {"fused": True}, arrays, size, device, rounds)


if __name__ == "__main__":
    main()
