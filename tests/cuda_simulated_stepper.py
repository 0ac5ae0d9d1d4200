"""The stepper's engine "cuda" with the kernel in Numba's simulator: NumPy's arrays stand in for CuPy's.

Run by test_cupy.py in a process with NUMBA_ENABLE_CUDASIM=1: prints a line for each finding, and at the end how many
cases it has run.
"""

import contextlib
import functools
import sys
import warnings
from typing import Any
from unittest import mock

import numpy as np

from acprop_core.kernels import cuda
from acprop_stepper import Stepper, _cuda, _engines, _stepper
from agreement import violations
from cases import CASES
from cuda_simulated import CHUNK, Program, is_chosen
from hosts import BACKENDS, engines_of


@functools.cache
def program_of(flags: Any, param_dtype: str, moment_dtype: str, capability: tuple[int, int]) -> Any:
    assert capability == (9, 0)
    return Program(flags, param_dtype, moment_dtype)


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
        mock.patch.object(cuda, "program_of", program_of),
        mock.patch.object(cuda, "CHUNK", CHUNK),
    ):
        yield


def run_suite() -> int:
    """Run cases of the reference suite; print where they leave its bounds, or differ from the kernel of a CPU."""
    backend = BACKENDS["stepper_numba"]
    chosen = [case for case in CASES if is_chosen(case) and not backend.cannot_take(case)]
    for case in chosen:
        expected = backend.run(case)
        before = Program.launches
        with on_imitated_device():
            got = backend.run(case)
        kinds = len({x for x in case.dtypes if not x.startswith("complex")})
        if Program.launches != before + kinds * case.steps:
            print(f"{case}: {Program.launches - before} launches in {case.steps} steps of {kinds} dtypes")
        for finding in violations(case, got, backend.complex_as_real):
            print(f"{case}: {finding}")
        for a, b in zip(got, expected, strict=True):
            for leaf in a:
                for name, x, y in zip(a[leaf]._fields, a[leaf], b[leaf], strict=True):
                    if x is not None and x.tobytes() != y.tobytes() and "complex" not in case.leaves[leaf][0]:
                        print(f"{case}: {name} of {leaf} differs from the CPU")
    return len(chosen)


def results(engine: str | None) -> list[Any]:
    """Return what steps leave with gradients at other places, in other layouts, absent, scaled, and all absent."""
    rng = np.random.default_rng(0)

    def draw(size: int = 37) -> list[Any]:
        wide = rng.standard_normal((size, 2)).astype(np.float32)
        return [wide[:, 0].copy(), wide[:, 1], rng.standard_normal(()).astype(np.float32), wide[:0, 0].copy()]

    params = [x.copy() for x in draw()]
    options = {"weight_decay": 0.1, "mask": [True, False, True, False], "clip_exponent": 0.25}
    stepper = Stepper(params, 0.1, **options, clip_norm=2.0, nonfinite="skip", engine=engine)
    steps = [draw() for _ in range(4)]
    steps[1][0] = steps[1][3] = None
    steps[2][2] = np.float32(np.nan)
    steps[3] = [None] * 4
    steps += [steps[0]] * 2
    records = [stepper.step(grads) for grads in steps]
    if engine is None and engines_of(stepper) != ["cuda"]:
        print(f"the engines are {engines_of(stepper)}")
    return [str(records), *(x.tobytes() for x in params), *(x.tobytes() for x in stepper.state.mu + stepper.state.nu)]


if __name__ == "__main__":
    warnings.simplefilter("ignore", RuntimeWarning)  # NumPy warns of infinities, as in the suite
    expected = results("numba")
    with on_imitated_device():
        if results(None) != expected:
            print("steps with unusual gradients: other bits than the CPU")
    print(f"{run_suite()} cases, {Program.launches} launches", file=sys.stderr)
