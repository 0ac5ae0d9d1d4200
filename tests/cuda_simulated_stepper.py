"""The stepper's engine "cuda" with the kernel in Numba's simulator: NumPy's arrays replace CuPy's.

Run by test_cupy.py in a process with NUMBA_ENABLE_CUDASIM=1: prints a line for each finding, and at the end how many
cases it has run.
"""

import contextlib
import functools
import sys
import warnings
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np

from acprop_core.kernels import cuda
from acprop_stepper import Stepper, _cuda, _engines, _stepper
from agreement import violations
from cases import CASES
from cuda_simulated import CHUNK, Launcher
from hosts import BACKENDS, engines_of

# few, because the simulator is slow, and runs more of them for torch: the kernel is the same
CHOSEN = (
    *("decay-clip-float32", "decay-clip-float64", "decay-clip-complex64", "shape-()", "shape-(0,)"),
    *("mask-container", "mixed-dtypes", "adabelief-default-float32", "adam-decay-clip-bfloat16"),
)


@functools.cache
def launcher_of(flags: Any, param_dtype: str, moment_dtype: str, capability: tuple[int, int]) -> Any:
    assert capability == (9, 0)
    return Launcher(flags, param_dtype, moment_dtype)


def engines(buffers: Any, engine: Any, xp: Any, threads: int) -> Any:
    return _engines._engines_on_cuda(buffers, None)


@contextlib.contextmanager
def on_imitated_device() -> Any:
    """Have a stepper of NumPy arrays run as one of CuPy arrays does where numba-cuda is installed."""
    with (
        mock.patch.object(_stepper, "engines_of", engines),
        mock.patch.object(_engines, "_capability_of", return_value=(9, 0)),
        mock.patch.object(_engines, "why_no_numba_cuda", return_value=None),
        mock.patch.object(_cuda, "address", lambda x: x.ctypes.data),
        mock.patch.object(_cuda, "stream", return_value=(0, 7)),
        mock.patch.object(cuda, "launcher_of", launcher_of),
        mock.patch.object(cuda, "CHUNK", CHUNK),
    ):
        yield


def run_suite() -> int:
    """Run cases of the reference suite; print where they leave its bounds, or differ from the kernel of a CPU."""
    backend = BACKENDS["stepper_numba"]
    chosen = [case for case in CASES if str(case) in CHOSEN]
    assert len(chosen) == len(CHOSEN)
    for case in chosen:
        expected = backend.run(case)
        before = Launcher.launches
        with on_imitated_device():
            got = backend.run(case)
        kinds = len({x for x in case.dtypes if not x.startswith("complex")})
        if Launcher.launches != before + kinds * case.steps:
            print(f"{case}: {Launcher.launches - before} launches in {case.steps} steps of {kinds} dtypes")
        for finding in violations(case, got, backend.complex_as_real):
            print(f"{case}: {finding}")
        for a, b in zip(got, expected, strict=True):
            for leaf in a:
                for name, x, y in zip(a[leaf]._fields, a[leaf], b[leaf], strict=True):
                    if x is not None and x.tobytes() != y.tobytes() and "complex" not in case.leaves[leaf][0]:
                        print(f"{case}: {name} of {leaf} differs from the CPU")
    return len(chosen)


def results(engine: str | None, dtype: Any, compensate: bool) -> list[Any]:
    """Return what steps leave with gradients at other places, in other layouts, absent, scaled, and all absent."""
    rng = np.random.default_rng(0)

    def draw(size: int = 21) -> list[Any]:
        wide = rng.standard_normal((size, 2)).astype(dtype)
        return [wide[:, 0].copy(), wide[:, 1], rng.standard_normal(()).astype(dtype), wide[:0, 0].copy()]

    params = [x.copy() for x in draw()]
    options: Any = {
        "compensate": compensate,
        "weight_decay": 0.1,
        "mask": [True, False, True, False],
        "clip_exponent": 0.25,
    }
    stepper = Stepper(params, 0.1, **options, clip_norm=2.0, nonfinite="skip", engine=engine)
    steps = [draw() for _ in range(4)]
    steps[1][0] = steps[1][3] = None
    steps[2][2] = np.array(np.nan, dtype)
    steps[3] = [None] * 4
    steps += [steps[0]] * 2
    records = [stepper.step(grads) for grads in steps]
    if engine is None and engines_of(stepper) != ["cuda"]:
        print(f"the engines are {engines_of(stepper)}")
    state = stepper.state
    arrays = [*params, *state.mu, *state.nu, *(state.carry or [])]
    return [str(records), *(x.tobytes() for x in arrays if x is not None)]


if __name__ == "__main__":
    warnings.simplefilter("ignore", RuntimeWarning)  # NumPy warns of infinities, as in the suite
    for kind in ((np.float32, False), (ml_dtypes.bfloat16, True)):
        expected = results("numba", *kind)
        with on_imitated_device():
            if results(None, *kind) != expected:
                print(f"{kind}: other bits than the CPU")
    print(f"{run_suite()} cases, {Launcher.launches} launches", file=sys.stderr)
