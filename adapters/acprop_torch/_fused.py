"""The rule compiled, in one pass over the memory of the tensors: by Numba on a CPU that has it, or by torch.compile."""

import functools
import importlib.util
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from operator import attrgetter
from typing import Any

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
    contiguous,
    count_steps,
    in_tiles,
    numbers_of_each,
    transposed,
)

_MIN_PER_THREAD = 2**21  # elements: fewer are not worth a thread


def fused_step(
    lists: Row, steps: list[Tensor], options: Options, grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    """Run the compiled rule on gradients divided by `grad_scale`; change nothing where `found_inf` is not 0."""
    if torch.compiler.is_compiling():  # by the user: the step becomes a part of that graph
        skip = None if found_inf is None else found_inf.squeeze() != 0
        for row, step in zip(map(Row, *lists), steps, strict=True):
            _step_in_place(*row, options.at(step), options.decays, options.decoupled, grad_scale, skip)
            step.add_(1 if skip is None else (~skip).to(step.dtype))
        return
    for device, members, own_steps in _by_device(lists, steps):
        if device.type != "cpu":
            scale, skip = (None if x is None else x.to(device, non_blocking=True) for x in (grad_scale, found_inf))
            _on_accelerator(members, own_steps, options, scale, skip)
        elif found_inf is None or not found_inf.item():
            for count, alike, counted in by_kind(members, own_steps):
                _on_cpu(alike, counted, options.at(count), options, grad_scale)


def _by_device(lists: Row, steps: list[Tensor]) -> Iterator[tuple[torch.device, Row, list[Tensor]]]:
    if all(map(attrgetter("is_cpu"), lists.param)):
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
    # Nothing is read here: that would wait for all that is under way.
    skip = None if found_inf is None else found_inf.squeeze() != 0
    k = as_tensors(options.at(torch.stack(steps)))
    for i, row in enumerate(map(Row, *lists)):
        own = numbers_of_each(k, lambda x, i=i: x[i])
        flat = contiguous(row)
        seen = row if flat is None else map(_memory, flat)
        _compiled()(*(x.detach() for x in seen), own, options.decays, options.decoupled, grad_scale, skip)
    torch.autograd.graph.increment_version(lists.param)
    torch._foreach_add_(steps, 1 if skip is None else (~skip).to(steps[0].dtype))


def _on_cpu(
    lists: Row, steps: list[Tensor], k: _rule.Coefficients, options: Options, grad_scale: Tensor | None
) -> None:
    plain, others = _sorted(lists)
    if plain.param:
        (_with_numba if _has_numba() else _with_inductor)(plain, steps, k, options, grad_scale)
    else:
        count_steps(steps)
    if others.param:
        if grad_scale is not None:
            pairs = zip(others.grad, others.mu, strict=True)
            others = others._replace(grad=[grad.to(mu.dtype) / grad_scale for grad, mu in pairs])
        in_tiles(others, k, options)


@functools.cache
def _has_numba() -> bool:
    return importlib.util.find_spec("numba") is not None


def _sorted(lists: Row) -> tuple[Row, Row]:
    """Return the rows whose tensors are contiguous memory of float32 or float64, all of one, and the others.

    The others keep to the rule as it is, operation by operation. Among them are those with 16-bit tensors: on the way
    to their new values the rule rounds to 16 bits in between, which a compiler would leave out.
    """
    if {column[0].dtype for column in lists} not in ({torch.float32}, {torch.float64}):
        return transposed([]), lists
    # With many small parameters this is what counts, so it is asked in few words where all are plain.
    if _are_memory(lists) and all(map(Tensor.is_contiguous, chain(*lists))):
        plain, others = lists, transposed([])
    else:
        dense = [contiguous(row) if _are_memory(transposed([row])) else None for row in map(Row, *lists)]
        plain = transposed([row for row in dense if row is not None])
        others = transposed([row for row, flat in zip(map(Row, *lists), dense, strict=True) if flat is None])
    return plain, others


def _are_memory(lists: Row) -> bool:
    """Return whether the memory of the tensors says what their values are."""
    return (
        PLAIN.issuperset(map(type, chain(*lists)))
        and all(map(attrgetter("is_cpu"), chain(*lists)))
        and not any(map(Tensor.is_neg, chain(lists.param, lists.grad)))  # moments are made here, and are not
        and not any(map(Tensor._is_zerotensor, lists.grad))
    )


def _with_numba(
    lists: Row, steps: list[Tensor], k: _rule.Coefficients, options: Options, grad_scale: Tensor | None
) -> None:
    import numpy as np

    from acprop_core import _numba

    like = np.empty(0, str(lists.mu[0].dtype).removeprefix("torch."))
    k = _numba.scalars_of(Step(k, xp).numbers_for(lists.mu[0].dtype)[0], like.dtype)
    decay = _numba.NO_DECAY if not options.decays else _numba.DECOUPLED if options.decoupled else _numba.L2
    factor = like.dtype.type(1.0 if grad_scale is None else 1.0 / grad_scale.item())
    all_sizes = np.array([list(map(Tensor.numel, column)) for column in lists])
    sizes = all_sizes[0]
    if wrong := np.flatnonzero((all_sizes != sizes).any(axis=0)).tolist():
        shapes = ", ".join(str(tuple(column[wrong[0]].shape)) for column in lists)
        raise RuntimeError(
            f"a parameter, its gradient, exp_avg and exp_avg_var have the shapes {shapes}; clear `optimizer.state`, or "
            "load the state of this model"
        )
    addresses = np.array([list(map(Tensor.data_ptr, column)) for column in lists])
    # Both before the compiled step: when it returns Python looks for signals, whose exception must find all of it done.
    count_steps(steps)
    torch.autograd.graph.increment_version(lists.param)  # autograd does not see it happen
    threads = min(torch.get_num_threads(), int(sizes.sum()) // _MIN_PER_THREAD)
    if threads < 2:
        _numba.step_each(addresses, sizes, like, k, decay, factor)
    else:
        # each thread has an equal part of the memory, as if the tensors lay one behind the other
        ends = np.cumsum(sizes)

        def run(low: int, high: int) -> None:
            start, stop = (np.clip(cut - (ends - sizes), 0, sizes) for cut in (low, high))
            _numba.step_each(addresses + start * like.itemsize, stop - start, like, k, decay, factor)

        cuts = np.linspace(0, ends[-1], threads + 1).astype(np.int64)
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(run, cuts[:-1], cuts[1:]))


def _with_inductor(
    lists: Row, steps: list[Tensor], k: _rule.Coefficients, options: Options, grad_scale: Tensor | None
) -> None:
    count_steps(steps)
    torch.autograd.graph.increment_version(lists.param)
    k = as_tensors(k)  # arguments of the compiled function: numbers it would build in
    for block in blocks(lists, tile=sys.maxsize):
        _compiled()(*map(_memory, block.row), k, options.decays, options.decoupled, grad_scale, None)
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
    param: Tensor,
    grad: Tensor,
    mu: Tensor,
    nu: Tensor,
    k: _rule.Coefficients,
    decays: bool,
    decoupled: bool,
    grad_scale: Tensor | None,
    skip: Tensor | None,
) -> None:
    if grad_scale is not None:
        grad = grad.to(mu.dtype) / grad_scale
    update, new_mu, new_nu = Step(k, xp, decoupled)(grad, mu, nu, param, decays)
    for old, new in ((param, param + update), (mu, new_mu), (nu, new_nu)):
        old.copy_(new if skip is None else torch.where(skip, old, new))
