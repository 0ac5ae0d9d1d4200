"""The way to step of fused=True on a CPU with Numba: one compiled call for all tensors of a parameter group."""

import functools
import importlib.util
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from acprop_core import kernels
from acprop_core.adapt import Row, warn
from acprop_torch._private import is_zerotensor, likeness_of
from acprop_torch._rows import PLAIN, Batch, check_shapes, count_steps, step_of

_MIN_PER_THREAD = 2**21  # elements: fewer are not worth a thread


class Memory(NamedTuple):
    """Where rows are in memory. It keeps no tensor alive."""

    number: int  # of tensors
    are_alike: Callable[..., bool]  # whether tensors have the types, devices, dtypes, shapes and strides of these
    dtypes: tuple[str, str]  # of parameters and moments
    table: Any  # (5, n) int64 array of addresses, in the order of Row
    sizes: Any  # (n,) int64 array of numbers of elements


@functools.cache
def has_numba() -> bool:
    """Return whether Numba can be used. Warn if it is installed and cannot."""
    why = kernels.why_no_numba()
    if why is not None and importlib.util.find_spec("numba") is not None:
        warn(f"fused=True compiles by torch.compile, because Numba cannot be used: {why}", RuntimeWarning)
    return why is None


def memory_of(columns: Row, known: Memory | None) -> Memory | None:
    """Return where plain rows alike in dtypes are, or None; `known` is the result of the step before.

    To check whether they are plain takes longer than the step if there are many small ones. So it is checked again only
    if a tensor differs from the last step's in more than address and values. The addresses are read at every step.
    """
    import numpy as np

    param, grad, mu, nu, carry = columns
    tensors = [*param, *grad, *mu, *nu, *(x for x in carry if x is not None)]
    if known is None or len(tensors) != known.number or not known.are_alike(*tensors):
        if not are_plain(columns):
            return None
        check_shapes(columns)
        dtypes = _name(grad[0].dtype), _name(mu[0].dtype)
        sizes = np.fromiter(map(Tensor.numel, grad), np.int64)
        known = Memory(len(tensors), likeness_of(tensors), dtypes, None, sizes)
    addresses = np.fromiter(map(Tensor.data_ptr, tensors), np.int64).reshape(-1, len(grad))
    return known._replace(table=addresses[[0, 1, 2, 3, -1]])  # without carries the last row is not read


def are_plain(columns: Row) -> bool:
    """Return whether all tensors are contiguous CPU memory that holds their values as they are."""
    param, grad, mu, nu, carry = columns
    carries = [x for x in carry if x is not None]
    if len(carries) not in (0, len(carry)):
        return False
    own, moments = [*param, *grad, *carries], [*mu, *nu]
    tensors = [*own, *moments]
    return (
        PLAIN.issuperset(map(type, tensors))
        and all(map(attrgetter("is_cpu"), tensors))
        and _are_compiled({*map(attrgetter("dtype"), own)}, {*map(attrgetter("dtype"), moments)})
        and all(map(Tensor.is_contiguous, tensors))
        and not any(map(Tensor.is_neg, tensors))
        and not any(map(is_zerotensor, tensors))
    )


def _are_compiled(own: set[torch.dtype], moments: set[torch.dtype]) -> bool:
    if not has_numba():
        return own == moments and own in ({torch.float32}, {torch.float64})
    from acprop_core.kernels.sixteen_bits import is_readable

    return len(own) == len(moments) == 1 and is_readable(_name(*own), _name(*moments))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def prepare(batch: Batch, memory: Memory, count: int) -> Callable[[], None]:
    """Return the step of a batch that is in this memory, and has taken `count` steps."""
    import numpy as np

    from acprop_core.kernels import cpu

    step = step_of(batch, count)
    row, sizes = Row(*(column[0] for column in batch.columns)), memory.sizes
    numbers, flags, *_ = step.cast_for(row.mu.dtype, row.param.dtype, has_carry=row.carry is not None)
    kernel = cpu.kernel_of(flags, *memory.dtypes)
    rest = np.full(sizes.size, int(flags.decay)), cpu.numbers_for(numbers, memory.dtypes[1]), np.zeros(1, np.int64)
    # Call the kernel on zero tensors first. Compiling takes seconds; if Ctrl-C arrives then, nothing has changed.
    kernel(memory.table[:, :0], sizes[:0], *rest)
    threads = min(torch.get_num_threads(), int(sizes.sum()) // _MIN_PER_THREAD)
    widths = row.param.element_size(), row.mu.element_size()
    done = rest[-1]
    done[0] = 0

    def run() -> None:
        torch.autograd.graph.increment_version(batch.columns.param)  # because autograd does not see the step
        try:
            if threads < 2:
                kernel(memory.table, sizes, *rest)
            else:
                cuts = np.linspace(0, sizes.sum(), threads + 1).astype(np.int64)
                parts = [cpu.part_of(memory.table, sizes, widths, *pair) for pair in itertools.pairwise(cuts)]
                _in_threads([functools.partial(kernel, *part, *rest) for part in parts], done)
        finally:
            # Python handles signals when the kernel returns; their exceptions must find the step counted, and an
            # exception before it must not.
            if done[0]:
                count_steps(batch.steps)

    return run


def _in_threads(functions: list[Callable[[], None]], done: Any) -> None:
    """Call each function in a thread of its own, once all threads have started; if one cannot start, call none."""
    gate = threading.Lock()  # not an Event, because a release is one call in C, which no signal interrupts
    gate.acquire()
    started = False

    def call(function: Callable[[], None]) -> None:
        with gate:
            pass
        if started:
            function()

    with ThreadPoolExecutor(len(functions)) as pool:
        try:
            for function in functions:
                pool.submit(call, function)
            done[0] = started = True
        finally:
            gate.release()
