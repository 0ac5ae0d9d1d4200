"""A namespace in which the rule runs on many tensors at once: its arrays are lists, its operators torch._foreach_*."""

from typing import Any

import torch

float32 = torch.float32
float64 = torch.float64


class TensorList:
    """Tensors of one dtype and device, treated as one array; a number or a 0-d tensor beside it holds for all."""

    def __init__(self, tensors: tuple[torch.Tensor, ...] | list[torch.Tensor]) -> None:
        self.tensors = tensors

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors[0].dtype

    @property
    def shape(self) -> tuple[int]:
        return (len(self.tensors),)

    def __neg__(self) -> "TensorList":
        return TensorList(torch._foreach_neg(self.tensors))

    def __add__(self, other: Any) -> "TensorList":
        return TensorList(torch._foreach_add(self.tensors, _operand(other)))

    def __sub__(self, other: Any) -> "TensorList":
        return TensorList(torch._foreach_sub(self.tensors, _operand(other)))

    def __mul__(self, other: Any) -> "TensorList":
        return TensorList(torch._foreach_mul(self.tensors, _operand(other)))

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> "TensorList":
        return TensorList(torch._foreach_div(self.tensors, _operand(other)))


def sqrt(x: TensorList) -> TensorList:
    return TensorList(torch._foreach_sqrt(x.tensors))


def clip(x: TensorList, low: Any, high: Any) -> TensorList:
    clipped = torch._foreach_clamp_min(x.tensors, _operand(low))
    torch._foreach_clamp_max_(clipped, _operand(high))
    return TensorList(clipped)


def abs(x: TensorList) -> TensorList:
    return TensorList(torch._foreach_abs(x.tensors))


def round(x: TensorList) -> TensorList:
    return TensorList(torch._foreach_round(x.tensors))


def where(condition: torch.Tensor, x: TensorList, y: TensorList) -> TensorList:
    return TensorList([torch.where(condition, a, b) for a, b in zip(x.tensors, y.tensors, strict=True)])


def astype(x: Any, dtype: torch.dtype) -> Any:
    return TensorList([y.to(dtype) for y in x.tensors]) if isinstance(x, TensorList) else x.to(dtype)


def _operand(x: Any) -> Any:
    return x.tensors if isinstance(x, TensorList) else x
