"""The options of a parameter group: their checks, and their translation into the rule's."""

import functools
import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

import acprop_core
from acprop_core.rule import Hyperparameters
from acprop_torch._private import to_scalar, untraced

_FLAGS = ("decoupled_weight_decay", "maximize", "foreach", "capturable", "differentiable", "fused")


def check_options(options: dict[str, Any], step: bool = False) -> None:
    """Refuse options out of range; at a step without reading tensors, which may be on an accelerator."""
    if options["fused"] and options["differentiable"]:
        raise RuntimeError("`fused` does not support `differentiable`")
    if options["fused"] and options["foreach"]:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
    if not step:
        check_flags(options)
    lr, betas = options["lr"], options["betas"]
    if not (isinstance(betas, tuple | list) and len(betas) == 2):
        raise ValueError(f"Invalid betas: {betas!r}; use two decay rates, such as (0.9, 0.999)")
    uncaptured_lists = options["foreach"] and not options["capturable"]
    if uncaptured_lists and isinstance(lr, Tensor):
        raise ValueError("lr as a Tensor is not supported for capturable=False and foreach=True")
    _check_value("lr", "learning rate", lr, math.inf, step)
    _check_value("eps", "epsilon value", options["eps"], math.inf, step)
    _check_value("eps_root", "eps_root value", options["eps_root"], math.inf, step)
    for i in (0, 1):
        _check_value(f"betas[{i}]", f"beta parameter at index {i}", betas[i], 1.0, step)
    _check_value("weight_decay", "weight_decay value", options["weight_decay"], math.inf, step)
    if not step:  # afterwards schedulers may have replaced one of the two
        if isinstance(betas[0], Tensor) != isinstance(betas[1], Tensor):
            raise ValueError("betas must be either both floats or both Tensors")
        if uncaptured_lists and isinstance(betas[0], Tensor):
            raise ValueError("betas[0] as a Tensor is not supported for capturable=False and foreach=True")
    if not isinstance(options["moment_dtype"], torch.dtype | None):
        raise TypeError(f"moment_dtype is {options['moment_dtype']!r}; use a torch.dtype or None")
    if not (options["clip_exponent"] is None or is_number(options["clip_exponent"])):
        raise TypeError(f"clip_exponent is {options['clip_exponent']!r}; use a number or None")
    if not isinstance(options["centering"], str):
        raise ValueError(f"centering is {options['centering']!r}; use 'current' or 'previous'")
    check_rule = _check_rule_untraced if torch.compiler.is_compiling() else _check_rule
    check_rule(*(options[name] for name in ("clip_exponent", "centering", "moment_dtype", "compensate")))


def check_flags(options: dict[str, Any]) -> None:
    """Refuse flags that are not bools, because "no" would count as true."""
    for name in _FLAGS:
        if not isinstance(options[name], bool | None):
            raise TypeError(f"{name} is {options[name]!r}; use True or False")


def is_number(x: Any) -> bool:
    """Return whether `x` is a number of Python or NumPy."""
    return isinstance(x, Real) and not isinstance(x, bool)


def hyperparameters_of(group: dict[str, Any], traced: bool) -> Hyperparameters:
    """Return the options as the rule takes them; with `traced` no tensor is read."""

    def number(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return float(x)
        # a number on the host is read; on an accelerator that would synchronize with the device
        return x.item() if x.is_cpu and not traced else to_scalar(x)

    b1, b2 = group["betas"]
    return Hyperparameters(
        learning_rate=number(group["lr"]),
        b1=number(b1),
        b2=number(b2),
        eps=number(group["eps"]),
        eps_root=number(group["eps_root"]),
        weight_decay=number(group["weight_decay"]),
        clip_exponent=group["clip_exponent"],
        centering=group["centering"],
        compensate=group["compensate"],
        l2=not group["decoupled_weight_decay"],
        maximize=group["maximize"],
    )


def called(group: dict[str, Any], p: Tensor) -> str:
    """Return the name of a parameter of a group for an error."""
    i = next(i for i, x in enumerate(group["params"]) if x is p)
    return f"parameter {group['param_names'][i]!r}" if "param_names" in group else f"parameter {i} of its group"


def _check_value(name: str, what: str, x: Any, below: float, step: bool) -> None:
    if isinstance(x, Tensor):
        if x.numel() != 1:
            raise ValueError(f"Tensor {name} must be 1-element")
        if x.is_complex() or x.dtype is torch.bool or x.is_meta:
            raise TypeError(f"Invalid {what}: {x}; use a number, or a tensor of one real number, for {name}")
        value = 0.0 if step else x.item()
    elif is_number(x):
        try:
            value = float(x)
        except OverflowError:
            value = math.inf
    else:
        raise TypeError(f"Invalid {what}: {x!r}; use a number for {name}")
    if not 0.0 <= value < below:
        upper = "finite" if below == math.inf else f"below {below:g}"
        raise ValueError(f"Invalid {what}: {x}; use a number that is at least 0 and {upper}")


@functools.lru_cache(typed=True)
def _check_rule(clip_exponent: Any, centering: Any, moment_dtype: Any, compensate: Any) -> None:
    acprop_core.ACProp(
        clip_exponent=clip_exponent, centering=centering, moment_dtype=moment_dtype, compensate=compensate
    )


_check_rule_untraced = untraced(_check_rule)  # torch's compiler would warn of the cache
