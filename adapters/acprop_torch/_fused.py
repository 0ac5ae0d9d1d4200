"""The rule compiled, in one pass over the memory of the tensors: by Numba on a CPU that has it, or by torch.compile."""

import functools
import importlib.util
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

import array_api_compat.torch as xp
import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors

from acprop_core import _rule
from acprop_core._step import Step
from acprop_torch._steps import Numbers, Row, advance, alike, as_tensors, blocks, contiguous, each_step, in_tiles

_SHARE = 2**21  # elements: fewer are not worth a thread
_NOTHING = Row([], [], [], [])


def fused(
    lists: Row, steps: list[Tensor], numbers: Numbers, grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    """Run the compiled rule on gradients divided by `grad_scale`; change nothing where `found_inf` is 1."""
    devices: dict[torch.device, list[int]] = {}
    for i, param in enumerate(lists.param):
        devices.setdefault(param.device, []).append(i)
    for device, chosen in devices.items():
        if len(devices) > 1:
            on_device = Row(*([column[i] for i in chosen] for column in lists)), [steps[i] for i in chosen]
        else:
            on_device = lists, steps
        if device.type != "cpu":
            scale, skip = (None if x is None else x.to(device, non_blocking=True) for x in (grad_scale, found_inf))
            _on_accelerator(*on_device, numbers, scale, skip)
        elif found_inf is None or not found_inf.item():
            for count, members in _alike(*on_device):
                _on_cpu(members, numbers.at(count), numbers, grad_scale)
            advance(on_device[1])


def _on_accelerator(
    lists: Row, steps: list[Tensor], numbers: Numbers, grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    # Nothing is read here: that would wait for all that is under way.
    k = as_tensors(numbers.at(torch.stack(steps)))
    for i, row in enumerate(zip(*lists, strict=True)):
        own = each_step(k, lambda x, i=i: x[i])
        _compiled()(*(x.detach() for x in row), own, numbers.decays, numbers.decoupled, grad_scale, found_inf)
    torch._foreach_add_(steps, 1 if found_inf is None else 1 - found_inf.squeeze())


def _alike(lists: Row, steps: list[Tensor]) -> Iterator[tuple[int, Row]]:
    """Do what `alike` does, but quicker where all tensors are alike, which is when their number counts."""
    counts = set(map(Tensor.item, steps))
    if len(counts) == 1 and len({x.dtype for x in chain(*lists)}) == 1:
        yield int(counts.pop()), lists
    else:
        for count, rows in alike(lists, steps):
            yield count, _transposed(rows)


def _on_cpu(lists: Row, k: _rule.Coefficients, numbers: Numbers, grad_scale: Tensor | None) -> None:
    rows: list[Row] = []
    if {column[0].dtype for column in lists} not in ({torch.float32}, {torch.float64}):
        # what the rule rounds to 16 bits on its way a compiler would not, so these keep to the rule as it is
        rows, lists = list(map(Row, *lists)), _NOTHING
    elif not all(map(Tensor.is_contiguous, chain(*lists))):
        ordered = [(contiguous(row), row) for row in map(Row, *lists)]
        rows = [row for dense, row in ordered if dense is None]
        lists = _transposed([dense for dense, _ in ordered if dense is not None])
    if lists.param:
        (_with_numba if importlib.util.find_spec("numba") else _with_inductor)(lists, k, numbers, grad_scale)
    if rows:
        if grad_scale is not None:
            rows = [row._replace(grad=row.grad.to(row.mu.dtype) / grad_scale) for row in rows]
        in_tiles(rows, k, numbers)


def _transposed(rows: list[Row]) -> Row:
    return Row(*map(list, zip(*rows, strict=True))) if rows else _NOTHING


def _with_numba(lists: Row, k: _rule.Coefficients, numbers: Numbers, grad_scale: Tensor | None) -> None:
    import numpy as np

    from acprop_core import _numba

    like = np.empty(0, str(lists.mu[0].dtype).removeprefix("torch."))
    k = _numba.scalars_of(Step(k, xp).numbers_for(lists.mu[0].dtype)[0], like.dtype)
    decay = _numba.NO_DECAY if not numbers.decays else _numba.DECOUPLED if numbers.decoupled else _numba.L2
    scale = like.dtype.type(1.0 if grad_scale is None else 1.0 / grad_scale.item())
    sizes = np.array(list(map(Tensor.numel, lists.param)))
    addresses = np.array([list(map(Tensor.data_ptr, column)) for column in lists])
    threads = min(torch.get_num_threads(), int(sizes.sum()) // _SHARE)
    if threads < 2:
        _numba.step_each(addresses, sizes, like, k, decay, scale)
    else:
        # each thread has an equal part of the memory, as if the tensors lay one behind the other
        ends = np.cumsum(sizes)

        def run(low: int, high: int) -> None:
            start, stop = (np.clip(cut - (ends - sizes), 0, sizes) for cut in (low, high))
            _numba.step_each(addresses + start * like.itemsize, stop - start, like, k, decay, scale)

        cuts = np.linspace(0, ends[-1], threads + 1).astype(np.int64)
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(run, cuts[:-1], cuts[1:]))
    # which lets autograd learn that the memory has changed
    torch.autograd.graph.increment_version(chain(lists.param, lists.mu, lists.nu))


def _with_inductor(lists: Row, k: _rule.Coefficients, numbers: Numbers, grad_scale: Tensor | None) -> None:
    k = as_tensors(k)  # arguments of the compiled function: numbers it would build in
    for block in blocks([Row(*row) for row in zip(*lists, strict=True)], tile=sys.maxsize):
        _compiled()(*map(_memory, block.row), k, numbers.decays, numbers.decoupled, grad_scale, None)
        for name in ("param", "mu", "nu") if block.members else ():
            owners = [getattr(row, name) for row in block.members]
            torch._foreach_copy_(owners, _unflatten_dense_tensors(getattr(block.row, name), owners))
    torch.autograd.graph.increment_version(chain(lists.param, lists.mu, lists.nu))


def _memory(x: Tensor) -> Tensor:
    """Return a contiguous tensor as a 1-D one that knows nothing of it, lest the compiler tells them apart by shape."""
    return torch.empty(0, dtype=x.dtype).set_(x.untyped_storage(), x.storage_offset(), (x.numel(),), (1,))


@functools.cache
def _compiled() -> Any:
    return torch.compile(_step_in_place, dynamic=True)


def _step_in_place(
    param: Tensor,
    grad: Tensor,
    mu: Tensor,
    nu: Tensor,
    k: _rule.Coefficients,
    decays: bool,
    decoupled: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    if grad_scale is not None:
        grad = grad.to(mu.dtype) / grad_scale
    update, new_mu, new_nu = Step(k, xp, decoupled)(grad, mu, nu, param, decays)
    if found_inf is None:
        param.add_(update)
        mu.copy_(new_mu)
        nu.copy_(new_nu)
    else:
        for old, new in ((param, param + update), (mu, new_mu), (nu, new_nu)):
            old.copy_(torch.where(found_inf == 1, old, new))
