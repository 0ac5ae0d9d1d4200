"""The way to step of fused=True on a CPU with Numba: one compiled call for all tensors of a parameter group."""

import functools
import importlib.util
import operator
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, cycle
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from acprop_core.adapt import Row
from acprop_torch._private import is_zerotensor
from acprop_torch._rows import PLAIN, Batch, check_shapes, count_steps, step_of

_MIN_PER_THREAD = 2**21  # elements: fewer are not worth a thread


class Memory(NamedTuple):
    """Where rows are in memory. It keeps no tensor alive."""

    # Not even weak references to tensors: torch.utils.swap_tensors refuses a tensor that has one.
    ids: list[int]  # of everything except the gradients
    shapes: list[torch.Size]
    dtypes: tuple[str, str]  # of parameters and moments
    table: Any  # (5, n) int64 array of addresses, in the order of Row
    sizes: Any  # (n,) int64 array of numbers of elements


@functools.cache
def has_numba() -> bool:
    """Return whether Numba is installed."""
    return importlib.util.find_spec("numba") is not None


def memory_of(columns: Row, known: Memory | None) -> Memory | None:
    """Return where plain rows alike in dtypes are, or None; `known` is the result of the step before.

    With many small parameters these questions cost more than the step. So of parameters, moments and carries that have
    the identities, addresses, shapes and dtypes of the last step, and are contiguous, the rest is not asked again. An
    identity alone would not do: a new tensor may have the one of a tensor that is gone, and `x.data = y` keeps it.
    """
    import numpy as np

    param, grad, mu, nu, carry = columns
    if not are_plain(columns, whole=known is None):
        return None
    lasting = [*param, *mu, *nu, *(carry if carry[0] is not None else [])]
    dtypes = _name(grad[0].dtype), _name(mu[0].dtype)
    addresses = np.fromiter(map(Tensor.data_ptr, chain(grad, lasting)), np.int64).reshape(-1, len(grad))
    table = addresses[[1, 0, 2, 3, -1]]  # without carries the last row is not read
    if known is not None and table.all() and _is_same(known, columns, lasting, dtypes, table):
        return known._replace(table=table)
    if not are_plain(columns):
        return None
    check_shapes(columns)
    sizes = np.fromiter(map(Tensor.numel, grad), np.int64)
    return Memory(list(map(id, lasting)), list(map(attrgetter("shape"), grad)), dtypes, table, sizes)


def _is_same(known: Memory, columns: Row, lasting: list[Tensor], dtypes: tuple[str, str], table: Any) -> bool:
    """Return whether everything except the gradients has stayed where it was, and everything has the same shapes."""
    shape, dtype = attrgetter("shape"), attrgetter("dtype")
    # The shapes are compared one by one: a list of them would be work for the garbage collector.
    return (
        known.ids == list(map(id, lasting))
        and known.dtypes == dtypes
        and all(map(operator.eq, map(shape, chain(columns.grad, lasting)), cycle(known.shapes)))
        and {*map(dtype, [*columns.param, *lasting[3 * len(columns.param) :]])} == {columns.grad[0].dtype}
        and {*map(dtype, [*columns.mu, *columns.nu])} == {columns.mu[0].dtype}
        and bool((table[[0, 2, 3, 4]] == known.table[[0, 2, 3, 4]]).all())
        and all(map(Tensor.is_contiguous, lasting))
    )


def are_plain(columns: Row, whole: bool = True) -> bool:
    """Return whether all tensors, or the gradients alone, are contiguous CPU memory that holds their very values."""
    param, grad, mu, nu, carry = columns
    carries = [x for x in carry if x is not None]
    if len(carries) not in (0, len(carry)):
        return False
    own, moments = ([*param, *grad, *carries], [*mu, *nu]) if whole else (list(grad), [])
    tensors = [*own, *moments]
    return (
        PLAIN.issuperset(map(type, tensors))
        and all(map(attrgetter("is_cpu"), tensors))
        and _are_compiled({*map(attrgetter("dtype"), own)}, {*map(attrgetter("dtype"), moments or mu[:1])})
        and all(map(Tensor.is_contiguous, tensors))
        and not any(map(Tensor.is_neg, tensors))
        and not (whole and any(map(is_zerotensor, tensors)))  # gradients without memory have no address either
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
    own, moments = row.param.element_size(), row.mu.element_size()

    def run() -> None:
        # Both before the compiled step: when it returns, Python looks for signals, and their exceptions must find
        # everything done.
        count_steps(batch.steps)
        torch.autograd.graph.increment_version(batch.columns.param)  # autograd does not see it happen
        if threads < 2:
            kernel(memory.table, sizes, *rest)
            return

        def part(first: int, last: int) -> None:
            kernel(*cpu.part_of(memory.table, sizes, [own, own, moments, moments, own], first, last), *rest)

        cuts = np.linspace(0, sizes.sum(), threads + 1).astype(np.int64)
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(part, cuts[:-1], cuts[1:]))

    return run
