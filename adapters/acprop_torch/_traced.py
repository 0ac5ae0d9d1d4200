"""The way to step where no number may be read on the host: under capturable, differentiable and torch.compile."""

from collections.abc import Callable
from typing import Any

import array_api_compat.torch as xp
import torch
from torch import Tensor

from acprop_core.adapt import Row, Step
from acprop_core.rule import Flags, Numbers
from acprop_torch._rows import Batch, map_row, rows_of, skip_of, step_of


def prepare(batch: Batch, differentiable: bool) -> Callable[[], None]:
    """Return the step of a batch, one tensor after the other."""

    def run() -> None:
        for row, done in zip(rows_of(batch.columns), batch.steps, strict=True):
            step = step_of(batch, done, namespace_for(row))
            # derivatives need the old values, which are overwritten
            update, *kept = step(map_row(Tensor.clone, row) if differentiable else row)
            row.param.add_(update)
            _replace(row, kept, None)
            done.add_(1)

    return run


def prepare_fused(batch: Batch) -> Callable[[], None]:
    """Return the step of a batch that divides gradients by `grad_scale` and does nothing where `found_inf` is not 0."""

    def run() -> None:
        skip = skip_of(batch)
        for row, done in zip(rows_of(batch.columns), batch.steps, strict=True):
            step = step_of(batch, done)
            step_in_place(row, step.numbers, step.flags, skip)
            done.add_(1 if skip is None else (~skip).to(done.dtype))

    return run


def step_in_place(row: Row, numbers: Numbers, flags: Flags, skip: Tensor | None) -> None:
    """Step a row, or leave it as it is where the 0-d tensor `skip` is true."""
    update, *kept = Step(numbers, flags, namespace_for(row))(row)
    _replace(row, kept, skip, row.param + update)


def _replace(row: Row, kept: Any, skip: Tensor | None, param: Tensor | None = None) -> None:
    for old, new in zip((row.param, row.mu, row.nu, row.carry), (param, *kept), strict=True):
        if old is not None and new is not None:
            old.copy_(new if skip is None else torch.where(skip, old, new))


def namespace_for(row: Row) -> Any:
    """Return torch as the namespace of a step of this row."""
    if not torch.compiler.is_compiling():
        return xp
    return _traceable if row.carry is None else _keeping_casts


@torch.library.custom_op("acprop::narrowed", mutates_args=())
def _narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype, copy=True)


_narrowed.register_fake(lambda x, dtype: torch.empty_like(x, dtype=dtype))


class _Traceable:
    """The namespace for torch's compiler, which in versions before 2.9 cannot read the `clip` of array-api-compat."""

    clip = staticmethod(torch.clamp)

    def __getattr__(self, name: str) -> Any:
        return getattr(xp, name)


class _KeepingCasts(_Traceable):
    """The namespace for torch's compiler, which leaves out a rounding to 16 bits that is widened again.

    No rounding error would then be left to carry. The compiler does not look into a custom operator.
    """

    def astype(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return _narrowed(x, dtype) if dtype.itemsize == 2 else xp.astype(x, dtype)


_traceable, _keeping_casts = _Traceable(), _KeepingCasts()
