"""Private names of torch, in this file only: the use of each, and its replacement in a torch that lacks it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, _compile, _utils
from torch._C._dynamo.guards import TensorGuards
from torch.optim import optimizer as _optimizer

from acprop_torch._version import VERSION

# The helpers of torch's own optimizers, so that this one refuses, finds and chooses as AdamW does.
# A step without gradients, or with them if differentiable; otherwise a decorator of a few lines.
use_grad_for_differentiable = _optimizer._use_grad_for_differentiable
# foreach=None: lists on accelerators only; otherwise False.
default_to_fused_or_foreach = _optimizer._default_to_fused_or_foreach
# Which devices and dtypes fused steps take; otherwise no check, and torch.compile says so.
device_dtype_check_for_fused = _optimizer._device_dtype_check_for_fused
# The dtype of step counts; otherwise float32, or float64 if that is the default dtype.
scalar_dtype: Any = _optimizer._get_scalar_dtype
# Has torch.compile call a function instead of tracing it; otherwise `torch.compiler.disable`, which is slow to import.
untraced = _compile._disable_dynamo

# One tensor from several, and back, at C speed; otherwise `torch.cat` of `reshape(-1)`, and `split` with `view_as`.
flatten_dense: Any = _utils._flatten_dense_tensors


def _unflatten_dense(flat: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Older versions of torch, 2.5 among them, lose the shapes of empty tensors."""
    return [part.view_as(x) for part, x in zip(_utils._unflatten_dense_tensors(flat, tensors), tensors, strict=True)]


unflatten_dense: Any = _utils._unflatten_dense_tensors if VERSION >= (2, 11) else _unflatten_dense

# Operations on lists. Nothing public does this; otherwise a loop over the tensors.
foreach_abs = torch._foreach_abs
foreach_add = torch._foreach_add
foreach_add_ = torch._foreach_add_
foreach_clamp_max_ = torch._foreach_clamp_max_
foreach_clamp_min = torch._foreach_clamp_min
foreach_copy_ = torch._foreach_copy_
foreach_div = torch._foreach_div
foreach_maximum = torch._foreach_maximum
foreach_mul = torch._foreach_mul
foreach_neg = torch._foreach_neg
foreach_round = torch._foreach_round
foreach_sqrt = torch._foreach_sqrt
foreach_sub = torch._foreach_sub

# 1 for an expanded tensor, whose elements share memory; otherwise look for a stride of 0 along more than one element.
overlap = torch._debug_has_internal_overlap
is_zerotensor = Tensor._is_zerotensor  # zeros without memory; otherwise `data_ptr() == 0` says it too


def likeness_of(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """Return a function that says whether as many others have the same types, devices, dtypes, shapes and strides.

    Otherwise a function that says no. This one asks in C++: 4,000 tensors in 0.3 ms, which took 3 ms in Python. It
    keeps not even a weak reference to a tensor, because torch.utils.swap_tensors refuses a tensor that has one.
    """
    return TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check


def is_intercepted() -> bool:
    """Return whether a transformation of torch.func or a dispatch mode takes torch's operations; otherwise False.

    What writes to memory without an operation would pass it by, and the memory may not be that of the tensor.
    """
    return torch._C._functorch.peek_interpreter_stack() is not None or torch._C._len_torch_dispatch_stack() > 0


def check_graph_capture(optimizer: torch.optim.Optimizer) -> None:
    """Refuse a step that a CUDA graph captures without capturable=True."""
    if hasattr(optimizer, "_accelerator_graph_capture_health_check"):
        optimizer._accelerator_graph_capture_health_check()
    else:  # torch before 2.9
        optimizer._cuda_graph_capture_health_check()


def capturable_devices() -> list[str]:
    """Return the types of device on which a step can be captured; otherwise "cuda" and "xpu"."""
    return _optimizer._get_capturable_supported_devices()
