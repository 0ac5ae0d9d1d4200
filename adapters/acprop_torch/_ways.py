"""The choice of a way to step."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from acprop_torch import _fused, _lists, _tiles, _traced
from acprop_torch import _private as private
from acprop_torch._kept import Kept
from acprop_torch._numba import Compiled
from acprop_torch._rows import Batch

Runs = list[Callable[[], None]]


def on_lists(group: dict[str, Any], params: list[Tensor]) -> bool:
    """Return whether to run on lists of tensors; by default as AdamW does."""
    if group["foreach"] is None and group["fused"] is None:
        _, foreach = private.default_to_fused_or_foreach(params, group["differentiable"])
        return foreach and (group["capturable"] or not isinstance(group["lr"], Tensor))
    return bool(group["foreach"])


def prepare(group: dict[str, Any], batch: Batch, traced: bool, foreach: bool) -> tuple[Batch | None, Runs]:
    """Return the rows of a group for Numba, which steps those of all groups at once, and the steps of the others."""
    is_default = group["foreach"] is None and group["fused"] is None and all(p.is_cpu for p in batch.columns.param)
    match group["fused"] or False, traced, foreach:
        case True, False, _:
            return _fused.prepare(batch)
        case True, True, _:
            return None, [_traced.prepare_fused(batch)]
        case False, True, True:
            return None, [_lists.prepare_traced(batch)]
        case False, True, False:
            return None, [_traced.prepare(batch, group["differentiable"])]
        case False, False, True:
            return None, [_lists.prepare(batch)]
        case _ if is_default:
            return _fused.prepare_default(batch)
        case _:
            return None, [_tiles.prepare(batch)]


def together(groups: list[dict[str, Any]], prepared: list[tuple[Batch | None, Runs]]) -> tuple[Runs, Kept | None]:
    """Return the steps of all groups, and what to keep of them if Numba steps everything."""
    runs = [run for _, others in prepared for run in others]
    batches = {i: batch for i, (batch, _) in enumerate(prepared) if batch is not None}
    if not batches:
        return runs, None
    compiled = Compiled(list(batches.values()))

    def run() -> None:
        # It has the addresses alone. So `batches` must live until here: they may hold copies, such as gradients that
        # were placed otherwise.
        first, *_ = batches.values()
        params = [p for batch in batches.values() for p in batch.columns.param]
        compiled.run(params, (first.grad_scale, first.found_inf))

    return [*runs, run], None if runs else Kept.of(groups, batches, compiled)
