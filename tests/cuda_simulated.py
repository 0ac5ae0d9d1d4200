"""The kernels of CUDA devices in Numba's simulator, which runs them as Python, thread by thread, in memory of the host.

Run by test_cuda.py in a process with NUMBA_ENABLE_CUDASIM=1: prints a line for each finding, and at the end how many
cases it has run. A CPU is used in place of the device, so that all of the adapter's code for CUDA runs but the driver.
"""

import contextlib
import ctypes
import itertools
import sys
import warnings
from typing import Any, NamedTuple
from unittest import mock

import ml_dtypes
import numpy as np
import torch
from numba import cuda as simulated
from numba.cuda.simulator import kernel as simulator

from acprop_core import rule
from acprop_core.kernels import cpu, cuda, element, scalars
from acprop_torch import _cuda, _numba
from agreement import violations
from cases import CASES, Case
from hosts import BACKENDS

THREADS, CHUNK = 2, 8  # few, so that small arrays have several chunks, and threads several turns


def view(address: Any, dtype: Any, n: int) -> np.ndarray:
    """Return n numbers at an address, which must be aligned as a device wants it."""
    assert address % min(n * dtype.itemsize, 16) == 0
    return np.frombuffer((ctypes.c_char * (n * dtype.itemsize)).from_address(int(address)), dtype)


def reader(dtype: Any, n: int) -> Any:
    if dtype.kind == "i":  # Python's, as Numba's integers do not mix with unsigned ones here
        return lambda address: int(view(address, dtype, 1)[0])
    return lambda address: view(address, dtype, 1)[0] if n == 1 else tuple(view(address, dtype, n))


def writer(dtype: Any, n: int) -> Any:
    def write(address: Any, values: Any) -> None:
        for x in (values,) if n == 1 else values:
            assert x.dtype == dtype  # nothing is computed wider
        view(address, dtype, n)[:] = values

    return write


def access(dtype: Any) -> element.Access:
    """Return how a dtype is read and written, by NumPy's own conversions."""
    if dtype.itemsize > 2:
        return element.Access(dtype, *[lambda x: x] * 3)

    def rounded(x: np.float32) -> np.float32:
        assert x.dtype == np.float32
        return x.astype(dtype).astype(np.float32)

    return element.Access(
        *(np.dtype(np.uint16), lambda x: x.view(dtype).astype(np.float32), lambda x: x.astype(dtype).view(np.uint16)),
        rounded,
    )


DTYPES = {x.name: x for x in map(np.dtype, (np.float32, np.float64, np.float16, ml_dtypes.bfloat16))}
MEMORY = cuda.Memory(
    {name: access(dtype) for name, dtype in DTYPES.items()},
    scalars.NAMESPACE,
    scalars.MAKERS,
    reader,
    writer,
    lambda f: f,
)


class Launcher:
    """As `cuda.Launcher`, in the simulator."""

    launches = 0

    def __init__(self, flags: rule.Flags, param_dtype: str, moment_dtype: str) -> None:
        flags = flags._replace(decay=rule.Decay.NONE, scaled=True)
        kernels = cuda.numbers_kernel_of, cuda.step_kernel_of
        self.kernels = [simulated.jit(f(flags, param_dtype, moment_dtype, MEMORY, THREADS)) for f in kernels]
        self._make_numbers, self._step = 0, 1

    def _launch(self, device: int, stream: int, kernel: int, blocks: int, threads: int, arguments: Any) -> None:
        Launcher.launches += 1
        if kernel == self._make_numbers:
            blocks = -(-arguments[1] // THREADS)  # as many as there are arrays
        self.kernels[kernel][blocks, THREADS](*arguments)

    run = cuda.Launcher.run


def run_in_turn(manager: Any, grid_point: Any, *args: Any) -> None:
    """Run the threads of a block one after the other, in every second block from the last to the first.

    In place of the simulator's own loop, which runs them at once, and asks without a pause whether they have ended:
    most of the time would go there. Threads of these kernels do not wait for each other; one that did would fail.
    """
    places = list(np.ndindex(*manager._block_dim))
    for place in places[:: -1 if sum(grid_point) % 2 else 1]:
        thread = simulator.BlockThread(lambda: manager._f(*args), manager, grid_point, place, manager._debug)
        thread.abort = True  # if it waits
        thread.start()
        thread.join()
        if thread.exception:
            raise thread.exception[0].with_traceback(thread.exception[1])


simulator.BlockManager.run = run_in_turn


def part_of(kind: Any, table: Any, options: Any, has_overlap: bool) -> Any:
    names = _numba._name(kind.param), _numba._name(kind.moments)
    return _cuda.Part(Launcher(kind.flags, *names), kind.device, table, options)


@contextlib.contextmanager
def on_imitated_device() -> Any:
    """Have the fused step of torch on a CPU run as on a CUDA device."""
    with (
        mock.patch.object(_numba, "_Part", part_of),
        mock.patch.object(_cuda, "_stream_of", return_value=(7, False)),
        mock.patch.object(_cuda, "_pinned", lambda size: torch.empty(size, dtype=torch.uint8)),
        mock.patch.object(torch.cuda, "device", contextlib.nullcontext),
    ):
        yield


def run_suite(pick: Any) -> int:
    """Run cases of the reference suite; print where they leave its bounds, or differ from the kernel of a CPU."""
    backend = BACKENDS["torch_fused"]
    chosen = [case for case in CASES if pick(case) and not backend.cannot_take(case)]
    for case in chosen:
        expected = backend.run(case)
        before = Launcher.launches
        with on_imitated_device():
            got = backend.run(case)
        if Launcher.launches < before + 2 * case.steps:
            print(f"{case}: the kernel was not used")
        for finding in violations(case, got, backend.complex_as_real):
            print(f"{case}: {finding}")
        for a, b in zip(got, expected, strict=True):
            for leaf in a:
                for name, x, y in zip(a[leaf]._fields, a[leaf], b[leaf], strict=True):
                    if x is not None and x.tobytes() != y.tobytes():
                        print(f"{case}: {name} of {leaf} differs from the CPU")
    return len(chosen)


def is_chosen(case: Case) -> bool:
    """Return whether a case is short, and of dtypes that are compiled."""
    is_short = case.steps <= 60 and not case.random
    return (is_short and not str(case).startswith("moment-dtype")) or str(case) == "compensated-100"


SIZES = [1, 3, 4, 0, 29, 8, 16, 17]
OPTIONS = np.array(
    [[1e-2, 0.9, 0.999, 1e-8, 1e-16, 0.1, 0.25, 0.0, 0.125], [1e-1, 0.8, 0.99, 1e-3, 0.0, 0.2, 0.1, 1.0, 0.125]]
)


class Model(NamedTuple):
    """Arrays of odd sizes, and counts of two widths: some decay, in either form, some are of another group."""

    flags: rule.Flags
    dtypes: tuple[str, str]
    rows: list[list[np.ndarray]]
    counts: list[np.ndarray]

    def table(self) -> np.ndarray:
        table = np.zeros((element.ROWS, len(SIZES)), np.int64)
        for i, (row, count) in enumerate(zip(self.rows, self.counts, strict=True)):
            table[: element.SIZE, i] = [x.ctypes.data for x in (*row, count)]
            table[element.SIZE :, i] = len(row[0]), i % 3, i % 2, count.dtype == np.float64
        return table

    def content(self) -> list[bytes]:
        return [x.tobytes() for x in (*itertools.chain(*self.rows), *self.counts)]


def model(flags: rule.Flags, dtype: Any, own_shift: int, shift: int) -> Model:
    """Return a model of random numbers; parameters, and moments, begin so many elements behind aligned memory."""
    rng = np.random.default_rng(0)
    own, moments = np.dtype(dtype), np.dtype(np.float64 if dtype is np.float64 else np.float32)
    kinds = (own, own_shift), (own, own_shift), (moments, shift), (moments, shift), (own, own_shift)
    rows = [[np.abs(rng.standard_normal(n + k)).astype(x)[k:] for x, k in kinds] for n in SIZES]
    counts = [np.array(float(i), np.float64 if i % 2 else np.float32) for i in range(len(SIZES))]
    return Model(flags, (own.name, moments.name), rows, counts)


def on_device(model: Model, found: float) -> list[bytes]:
    scaling = torch.tensor([8.0]), torch.tensor([found])
    _cuda.Part(Launcher(model.flags, *model.dtypes), torch.device("cpu"), model.table(), OPTIONS).run({}, scaling)
    return model.content()


def on_cpu(model: Model) -> list[bytes]:
    kernel = cpu.kernel_of(model.flags, *model.dtypes)
    kernel(model.table(), OPTIONS, cpu.shared(sum(SIZES), sum(SIZES)), True)
    return model.content()


def run_models() -> None:
    """Step arrays of odd sizes, aligned and not, with a scale; then with an infinity, which must change nothing."""
    for kind in (
        (rule.Flags(clipped=True), np.float32, 0, 0),
        (rule.Flags(centering=rule.Centering.NONE, asynchronous=False), np.float32, 1, 0),
        (rule.Flags(centering=rule.Centering.PREVIOUS), np.float64, 0, 0),
        (rule.Flags(format=rule.FORMATS["bfloat16"]), ml_dtypes.bfloat16, 0, 0),
        (rule.Flags(format=rule.FORMATS["float16"], asynchronous=False), np.float16, 0, 1),
    ):
        if on_device(model(*kind), 0.0) != on_cpu(model(*kind)):
            print(f"{kind}: other bits than the CPU")
        if on_device(model(*kind), 1.0) != model(*kind).content():
            print(f"{kind}: changed in spite of an infinity")


if __name__ == "__main__":
    warnings.simplefilter("ignore", RuntimeWarning)  # NumPy warns of infinities, as in the suite
    torch.set_num_threads(1)
    with mock.patch.object(cuda, "CHUNK", CHUNK), mock.patch.object(torch.cuda, "device", contextlib.nullcontext):
        with on_imitated_device():
            run_models()
        done = run_suite(is_chosen)
    print(f"{done} cases, {Launcher.launches} launches", file=sys.stderr)
