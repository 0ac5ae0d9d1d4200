"""The rule compiled, in one pass over the memory of the tensors: by Numba on a CPU that has it, or by torch.compile."""

import functools
import importlib.util
import operator
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from operator import attrgetter
from typing import Any, NamedTuple

import array_api_compat.torch as xp
import torch
from torch import Tensor

from acprop_core import _rule
from acprop_core._step import Step
from acprop_torch._steps import (
    PLAIN,
    Options,
    Row,
    as_tensors,
    blocks,
    bring,
    by_kind,
    check_shapes,
    contiguous,
    count_steps,
    in_tiles,
    namespace,
    numbers_of_each,
    on_a_cpu,
    transposed,
)

_MIN_PER_THREAD = 2**21  # elements: fewer are not worth a thread


def fused_step(
    lists: Row,
    steps: list[Tensor],
    options: Options,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    known: dict[str, Any],
) -> None:
    """Run the compiled rule on gradients divided by `grad_scale`; change nothing where `found_inf` is not 0.

    `known` is what a step leaves for the next one of the same optimizer and group.
    """
    if torch.compiler.is_compiling():  # by the user: the step becomes a part of that graph
        skip = None if found_inf is None else found_inf.squeeze() != 0
        for row, step in zip(map(Row, *lists), steps, strict=True):
            _step_in_place(row, options.at(step), options.decays, options.decoupled, grad_scale, skip)
            step.add_(1 if skip is None else (~skip).to(step.dtype))
        return
    for device, members, own_steps in _by_device(lists, steps):
        if device.type != "cpu":
            scale, skip = (None if x is None else x.to(device, non_blocking=True) for x in (grad_scale, found_inf))
            _on_accelerator(members, own_steps, options, scale, skip)
        elif found_inf is None or not found_inf.item():
            _on_cpu(members, own_steps, options, grad_scale, known)


def _by_device(lists: Row, steps: list[Tensor]) -> Iterator[tuple[torch.device, Row, list[Tensor]]]:
    if on_a_cpu(lists):
        yield lists.param[0].device, lists, steps
        return
    devices: dict[torch.device, list[int]] = {}
    for i, param in enumerate(lists.param):
        devices.setdefault(param.device, []).append(i)
    for device, chosen in devices.items():
        yield device, Row(*([column[i] for i in chosen] for column in lists)), [steps[i] for i in chosen]


def _on_accelerator(
    lists: Row, steps: list[Tensor], options: Options, grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    check_shapes(lists)
    # Nothing is read here: that would wait for all that is under way.
    skip = None if found_inf is None else found_inf.squeeze() != 0
    k = as_tensors(options.at(torch.stack(steps)))
    for i, row in enumerate(map(Row, *lists)):
        own = numbers_of_each(k, lambda x, i=i: x[i])
        flat = contiguous(row)
        is_memory = (
            flat is not None and PLAIN.issuperset(map(type, row[:4])) and not (row.param.is_neg() or row.grad.is_neg())
        )
        seen = flat.map(_memory) if flat is not None and is_memory else row
        _compiled()(seen.map(Tensor.detach), own, options.decays, options.decoupled, grad_scale, skip)
    torch.autograd.graph.increment_version(lists.param)
    torch._foreach_add_(steps, 1 if skip is None else (~skip).to(steps[0].dtype))


def _on_cpu(
    lists: Row, steps: list[Tensor], options: Options, grad_scale: Tensor | None, known: dict[str, Any]
) -> None:
    memory = _memory_of(lists, known) if _has_numba() else None
    if memory is not None and len({*map(Tensor.item, steps)}) == 1:  # the usual case
        _with_numba(memory, lists.param, steps, options, grad_scale)
        return
    check_shapes(lists)
    for count, alike, counted in by_kind(lists, steps, one_device=True):
        # What is not plain memory keeps to the rule as it is, operation by operation. So do 16-bit tensors without
        # Numba: on the way to their new values the rule rounds in between, which torch's compiler would leave out.
        plain: list[Row | None] = list(map(Row, *alike))
        if not _is_plain(alike):
            flat = [contiguous(row) for row in map(Row, *alike)]
            plain = [row if row is not None and _is_plain(transposed([row])) else None for row in flat]
        rows = transposed([row for row in plain if row is not None])
        if rows.param:
            own_steps = [step for step, row in zip(counted, plain, strict=True) if row is not None]
            if (memory := _memory_of(rows, {}) if _has_numba() else None) is not None:
                _with_numba(memory, rows.param, own_steps, options, grad_scale)
            else:
                _with_inductor(rows, own_steps, options.at(count), options, grad_scale)
        others = [i for i, row in enumerate(plain) if row is None]
        if others:
            rest = Row(*([column[i] for i in others] for column in alike))
            if grad_scale is not None:
                pairs = zip(rest.grad, rest.mu, strict=True)
                rest = rest._replace(grad=[grad.to(mu.dtype) / grad_scale for grad, mu in pairs])
            count_steps([counted[i] for i in others])
            in_tiles(rest, options.at(count), options)


@functools.cache
def _has_numba() -> bool:
    return importlib.util.find_spec("numba") is not None


def _is_plain(lists: Row) -> bool:
    """Return whether all is contiguous memory of a CPU, of dtypes that are compiled, and says what the values are."""
    columns = [*lists[:4], *_carries(lists)]
    tensors = [x for column in columns for x in column]
    own, moments = ({*map(attrgetter("dtype"), chain(*some))} for some in (columns[:2] + columns[4:], columns[2:4]))
    return (
        PLAIN.issuperset(map(type, tensors))
        and all(map(attrgetter("is_cpu"), tensors))
        and _is_compiled(own, moments or own)
        and all(map(Tensor.is_contiguous, tensors))
        and not any(map(Tensor.is_neg, lists.param + lists.grad))  # moments are made here, and are not
        and not any(map(Tensor._is_zerotensor, lists.grad))
    )


def _is_compiled(own: set[torch.dtype], moments: set[torch.dtype]) -> bool:
    if not _has_numba():
        return own == moments and own in ({torch.float32}, {torch.float64})
    from acprop_core import _numba16

    return len(own) == len(moments) == 1 and _numba16.seen_as(_name(*own), _name(*moments)) is not None


def _carries(lists: Row) -> list[list[Tensor]]:
    """Return the column of the carries, if all rows have one."""
    return [] if not lists.carry or any(x is None for x in lists.carry) else [lists.carry]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Memory(NamedTuple):
    """Where rows lie: int64 arrays of their (4 or 5, n) addresses and of their (n,) numbers of elements."""

    dtypes: tuple[str, str]  # of parameters and moments
    addresses: Any
    sizes: Any


def _memory_of(lists: Row, known: dict[str, Any]) -> Memory | None:
    """Return where plain rows alike in dtypes lie; None if they are not.

    With many small parameters these questions cost more than the step. So parameters, moments and carries that are the
    objects of the last step, at the same addresses and still contiguous, are not asked again: gradients are new, have
    the dtype and shape of their parameters, and answer for them.
    """
    import numpy as np

    def ask(question: Any, *columns: list[Tensor]) -> Any:
        return np.fromiter(map(question, chain(*columns)), np.int64).reshape(len(columns), -1)

    carries = _carries(lists)
    lasting = (lists.param, lists.mu, lists.nu, *carries)
    dtype = lists.grad[0].dtype
    if known and _are_same(known["lasting"], lasting) and _is_plain(Row([], lists.grad, [], [], [])):
        before: Memory = known["memory"]
        addresses = ask(Tensor.data_ptr, *lists[:4], *carries)
        stayed = addresses == before.addresses  # but for the gradients
        stayed = stayed[0].all() and stayed[2:].all() and all(map(Tensor.is_contiguous, chain(*lasting)))
        if stayed and dtype == known["dtype"] and (ask(Tensor.numel, lists.grad) == before.sizes).all():
            return before._replace(addresses=addresses)
    known.clear()
    if not _is_plain(lists):
        return None
    addresses, sizes = ask(Tensor.data_ptr, *lists[:4], *carries), ask(Tensor.numel, *lists[:4])
    check_shapes(lists)
    memory = Memory((_name(dtype), _name(lists.mu[0].dtype)), addresses, sizes[0])
    known.update(lasting=lasting, memory=memory, dtype=dtype)
    return memory


def _are_same(olds: tuple[list[Tensor], ...], news: tuple[list[Tensor], ...]) -> bool:
    return [*map(len, olds)] == [*map(len, news)] and all(map(operator.is_, chain(*olds), chain(*news)))


def _with_numba(
    memory: Memory, params: list[Tensor], steps: list[Tensor], options: Options, grad_scale: Tensor | None
) -> None:
    import numpy as np

    from acprop_core import _numba, _numba16

    dtypes, addresses, sizes = memory
    own, moments = (np.empty(0, seen) for seen in _numba16.seen_as(*dtypes) or ())
    dtype = np.dtype("float64" if "float64" in dtypes else "float32")
    low = _numba16.format_of(dtypes[0]) if len(addresses) == 5 else None
    k = _numba.scalars_of(Step(options.at(int(steps[0].item())), xp).numbers_for(dtype)[0], dtype)
    decay = _numba.NO_DECAY if not options.decays else _numba.DECOUPLED if options.decoupled else _numba.L2
    factor = dtype.type(1.0 if grad_scale is None else 1.0 / grad_scale.item())
    # Of nothing, so that it is compiled before anything changes: whoever interrupts the compiler stops no half step.
    _numba.step_each(addresses[:, :0], sizes[:0], own, moments, k, low, decay, factor)
    # Both before the compiled step: when it returns Python looks for signals, whose exception must find all of it done.
    count_steps(steps)
    torch.autograd.graph.increment_version(params)  # autograd does not see it happen
    threads = min(torch.get_num_threads(), int(sizes.sum()) // _MIN_PER_THREAD)
    if threads < 2:
        _numba.step_each(addresses, sizes, own, moments, k, low, decay, factor)
    else:
        # each thread has an equal part of the memory, as if the tensors lay one behind the other
        ends = np.cumsum(sizes)
        widths = np.array([x.itemsize for x in (own, own, moments, moments, own)])[: len(addresses), None]

        def run(first: int, last: int) -> None:
            start, stop = (np.clip(cut - (ends - sizes), 0, sizes) for cut in (first, last))
            _numba.step_each(addresses + widths * start, stop - start, own, moments, k, low, decay, factor)

        cuts = np.linspace(0, ends[-1], threads + 1).astype(np.int64)
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(run, cuts[:-1], cuts[1:]))


def _with_inductor(
    lists: Row, steps: list[Tensor], k: _rule.Coefficients, options: Options, grad_scale: Tensor | None
) -> None:
    count_steps(steps)
    torch.autograd.graph.increment_version(lists.param)
    # Arguments of the compiled function: numbers it would build in. It would convert them anew for every few elements.
    k = as_tensors(k, lists.mu[0].dtype)
    for block in blocks(lists, tile=sys.maxsize):
        _compiled()(block.row.map(_memory), k, options.decays, options.decoupled, grad_scale, None)
        for name in ("param", "mu", "nu") if block.members else ():
            bring([getattr(block.row, name)], name, [block], torch._foreach_copy_)


def _memory(x: Tensor) -> Tensor:
    """Return a contiguous tensor as a 1-D one that knows nothing of it, lest the compiler tells them apart by shape."""
    flat = torch.empty(0, dtype=x.dtype, device=x.device)
    return flat.set_(x.untyped_storage(), x.storage_offset(), (x.numel(),), (1,))


@functools.cache
def _compiled() -> Any:
    # One program for each combination of dtypes and options; sizes and numbers are arguments. Past the limit on
    # programs torch would run this uncompiled without a word, hence `fullgraph`, which makes that an error.
    return torch.compile(  # type: ignore[call-overload]  # torch's annotations lack the limit
        _step_in_place, dynamic=True, fullgraph=True, recompile_limit=256
    )


def _step_in_place(
    row: Row,
    k: _rule.Coefficients,
    decays: bool,
    decoupled: bool,
    grad_scale: Tensor | None,
    skip: Tensor | None,
) -> None:
    param, grad, mu, nu, carry = row
    if grad_scale is not None:
        grad = grad.to(mu.dtype) / grad_scale
    update, *kept = Step(k, namespace(carry), decoupled)(grad, mu, nu, param, decays, carry)
    for old, new in zip((param, mu, nu, carry), (param + update, *kept), strict=True):
        if old is not None:
            old.copy_(new if skip is None else torch.where(skip, old, new))
