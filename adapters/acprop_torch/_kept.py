"""What a compiled step has prepared, kept for the next step.

It is used again as long as tensors and options are the same, which a few calls find out. All that the checks of a step
depend on is compared: for each tensor its type, device, dtype, layout, shape and strides, and of all but the gradients
the address; the options; the counts, by the kernel. No parameter, gradient or state is kept, not even weakly: what was
removed must be freed, and torch.utils.swap_tensors refuses tensors with weak references. So all are looked up anew.
"""

from collections.abc import Sequence
from itertools import chain
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor

from acprop_core.adapt import Row
from acprop_torch._cuda import Scaling
from acprop_torch._numba import Compiled, has_memory
from acprop_torch._options import check_options, hyperparameters_of
from acprop_torch._private import is_intercepted, likeness_of
from acprop_torch._rows import Batch, local_columns, note_sharded

_NUMBERS = ("lr", "betas", "eps", "eps_root", "weight_decay", "clip_exponent")
_OTHERS = (
    *("decoupled_weight_decay", "maximize", "foreach", "capturable", "differentiable", "fused"),
    *("centering", "asynchronous", "moment_dtype", "compensate"),
)
_options_of = itemgetter(*_NUMBERS, *_OTHERS)
# A view of freed memory has its offset as its address. Memory is seldom at so low an address, and is looked at then.
_LOW = 2**32
_CONSTANT = float, int, type(None), str, torch.dtype  # a number of NumPy is a float, too


def _are_constant(options: Sequence[Any], compiled: Compiled) -> bool:
    """Return whether the same objects mean the same options: lists, and tensors the host reads, may have changed."""
    betas = options[1]
    if type(betas) is not tuple:
        return False
    values = [*betas, *options[:1], *options[2:]]
    if not compiled.reads_options:
        values = [x for x in values if not isinstance(x, Tensor) or x.is_cpu]
    return all(isinstance(x, _CONSTANT) for x in values)


class Kept:
    """The prepared step of all groups.

    Parameters
    ----------
    groups : list of dict
        The parameter groups.
    batches : dict of int to Batch
        For each group of which a parameter has a gradient: all rows, which must be plain.
    compiled : Compiled
        The step of these batches.
    are_made : bool
        Whether the rows are made from the parameters: from complex or sharded ones.
    """

    def __init__(
        self, groups: list[dict[str, Any]], batches: dict[int, Batch], compiled: Compiled, are_made: bool
    ) -> None:
        self._compiled = compiled
        self._are_made = are_made
        self._options = list(map(_options_of, groups))
        self._batches = {group: i for i, group in enumerate(batches)}  # their numbers in `compiled`
        self._lengths = [len(batches[i].steps) if i in batches else 0 for i in range(len(groups))]
        columns = [[x for batch in batches.values() for x in batch.columns[i] if x is not None] for i in range(5)]
        params, grads, *others = *columns, [x for batch in batches.values() for x in batch.steps]
        kept = [*params, *chain.from_iterable(others)]
        self._addresses = list(map(Tensor.data_ptr, kept))
        self._are_alike = likeness_of([*kept, *grads])

    @staticmethod
    def of(groups: list[dict[str, Any]], batches: dict[int, Batch], compiled: Compiled) -> "Kept | None":
        """Return what to keep; None if an option might change its value in place, or the host reads a scale."""
        is_scaled = any(batch.grad_scale is not None or batch.found_inf is not None for batch in batches.values())
        if is_scaled and compiled.reads_options:
            return None
        if not all(_are_constant(_options_of(group), compiled) for group in groups):
            return None
        params = [p for group in groups for p in group["params"] if p.grad is not None]
        rows = [p for batch in batches.values() for p in batch.columns.param]
        if len(params) != len(rows):
            return None
        return Kept(groups, batches, compiled, not all(map(is_, params, rows)))

    def run(self, groups: list[dict[str, Any]], state: Any, scaling: Scaling) -> bool:
        """Step all groups if they are as they were; return False if they are not, and nothing has changed then."""
        if is_intercepted() or (self._compiled.reads_options and any(x is not None for x in scaling)):
            return False
        try:
            if len(groups) != len(self._lengths) or not all(map(self._has_options, range(len(groups)), groups)):
                return False
            params: list[Any] = []
            for group, length in zip(groups, self._lengths, strict=True):
                own = [p for p in group["params"] if p.grad is not None]
                if len(own) != length:
                    return False
                params += own
            states = [state[p] for p in params]
            grads: list[Any] = [p.grad for p in params]
            mus, nus = ([own[name] for own in states] for name in ("exp_avg", "exp_avg_var"))
            columns = Row(params, grads, mus, nus, [own.get("carry") for own in states])
            if self._are_made:
                if any(hasattr(p, "to_local") and p.placements != p.grad.placements for p in params):
                    return False  # such gradients are sent, by all processes alike, where the step is prepared
                columns = local_columns(columns, has_complex=True)
            params, grads, mus, nus, carries = columns
            kept = [*params, *mus, *nus, *(x for x in carries if x is not None), *(own["step"] for own in states)]
            if len(kept) != len(self._addresses) or not self._are_alike(*kept, *grads):
                return False
            if list(map(Tensor.data_ptr, kept)) != self._addresses:
                return False
        except (KeyError, TypeError, AttributeError, RuntimeError):  # of something that `step` refuses by name
            return False
        addresses = list(map(Tensor.data_ptr, grads))
        if min(addresses) < _LOW and not all(map(has_memory, grads)):
            return False
        if not self._compiled.set_gradients(addresses):
            return False
        self._compiled.run(params, scaling)
        if self._are_made:
            note_sharded(groups)
        return True

    def _has_options(self, i: int, group: dict[str, Any]) -> bool:
        options = _options_of(group)
        known = self._options[i]
        if all(map(is_, options, known)):
            return True
        if not (
            all(map(is_, options[len(_NUMBERS) :], known[len(_NUMBERS) :])) and _are_constant(options, self._compiled)
        ):
            return False
        check_options(group, True, lambda: f" of parameter group {i}")
        if i in self._batches and not self._compiled.set_options(self._batches[i], hyperparameters_of(group, False)):
            return False
        self._options[i] = options
        return True
