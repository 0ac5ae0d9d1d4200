"""The options of a parameter group: their checks, and their translation into the rule's."""

import functools
import math
import sys
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

import acprop_core
from acprop_core.adapt import dtype_name, warn
from acprop_core.rule import Hyperparameters
from acprop_torch import _private as private
from acprop_torch._private import untraced

_NUMBERS = ("lr", "eps", "eps_root", "weight_decay", "clip_exponent")
_FLAGS = ("decoupled_weight_decay", "maximize", "foreach", "capturable", "differentiable", "fused")


def check_options(options: dict[str, Any], step: bool = False, owner: Callable[[], str] = str) -> None:
    """Refuse options out of range; at a step without reading tensors that may be on an accelerator.

    At a step the learning rate and the weight decay may be any finite number, because some schedules end a little below
    0. `owner` returns what an error adds to the name of an option, by default nothing.
    """
    if options["fused"] and options["differentiable"]:
        raise RuntimeError("`fused` does not support `differentiable`")
    if options["fused"] and options["foreach"]:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
    if options.get("amsgrad"):
        raise ValueError(
            f"amsgrad is {options['amsgrad']!r}, which is another algorithm than ACProp's; omit it, or use "
            "torch.optim.AdamW"
        )
    if not step:
        check_flags(options)
    lr, betas = options["lr"], pair_of(options["betas"])
    uncaptured_lists = options["foreach"] and not options["capturable"]
    if uncaptured_lists and isinstance(lr, Tensor):
        raise ValueError("lr as a Tensor is not supported for capturable=False and foreach=True")
    known = not (options["capturable"] or options["differentiable"] or torch.compiler.is_compiling())
    lowest = -sys.float_info.max if step else 0.0
    for name, what, x, low, below in (
        ("lr", "learning rate", lr, lowest, math.inf),
        ("eps", "epsilon value", options["eps"], 0.0, math.inf),
        ("eps_root", "eps_root value", options["eps_root"], 0.0, math.inf),
        ("betas[0]", "beta parameter at index 0", betas[0], 0.0, 1.0),
        ("betas[1]", "beta parameter at index 1", betas[1], 0.0, 1.0),
        ("weight_decay", "weight_decay value", options["weight_decay"], lowest, math.inf),
    ):
        value = x if type(x) is float else _value_of(name, what, x, step, known, owner)
        if not low <= value < below:
            upper = "finite" if below == math.inf else f"below {below:g}"
            wanted = "a finite number" if low < 0.0 else f"a number that is at least 0 and {upper}"
            raise ValueError(f"Invalid {what}: {x}; use {wanted} for {name + owner()}")
    if not step:  # afterwards schedulers may have replaced one of the two
        if isinstance(betas[0], Tensor) != isinstance(betas[1], Tensor):
            raise ValueError("betas must be either both floats or both Tensors")
        if uncaptured_lists and isinstance(betas[0], Tensor):
            raise ValueError("betas[0] as a Tensor is not supported for capturable=False and foreach=True")
    if not isinstance(options["moment_dtype"], torch.dtype | None):
        raise TypeError(f"moment_dtype is {options['moment_dtype']!r}; use a torch.dtype or None")
    clip_exponent = options["clip_exponent"]
    if not (clip_exponent is None or is_number(clip_exponent)):
        raise TypeError(f"clip_exponent is {clip_exponent!r}; use a number or None")
    if not isinstance(options["centering"], str):
        raise ValueError(f"centering is {options['centering']!r}; use 'current', 'previous' or 'none'")
    check_rule = _check_rule_untraced if torch.compiler.is_compiling() else _check_rule
    for name in ("compensate", "asynchronous"):
        if not isinstance(options[name], bool):
            raise TypeError(f"{name} is {options[name]!r}; use True or False")
    check_rule(as_plain(clip_exponent), options["centering"], options["moment_dtype"])


def pair_of(betas: Any) -> Any:
    """Return a sequence of two decay rates, such as a list, an array or a tensor; refuse anything else."""
    if type(betas) is tuple and len(betas) == 2:
        return betas
    is_sequence = isinstance(betas, Sequence) and not isinstance(betas, str)
    if (is_sequence or getattr(betas, "ndim", 0) == 1) and len(betas) == 2:
        return tuple(betas)
    raise ValueError(f"Invalid betas: {betas!r}; use two decay rates, such as (0.9, 0.999)")


def as_plain(x: Any) -> Any:
    """Return a number of another library, such as a NumPy scalar, as a float; tensors and None as they are."""
    return x if x is None or isinstance(x, Tensor) or type(x) in (float, int) else float(x)


def _without_axes(x: Any) -> Any:
    return x.squeeze() if isinstance(x, Tensor) and x.ndim else x


def plain_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers among checked options as a group keeps them, so that `torch.load` takes them by default."""
    numbers = {name: as_plain(options[name]) for name in _NUMBERS if name in options}
    if "betas" in options:
        numbers["betas"] = tuple(as_plain(_without_axes(x)) for x in pair_of(options["betas"]))
    return numbers


def lacks_residual(options: dict[str, Any]) -> bool:
    """Return whether the second moment stays 0, because m is g, and no clip bounds the steps then."""
    return bool(options["betas"][0] == 0) and options["centering"] == "current" and options["clip_exponent"] is None


def warn_of_no_residual() -> None:
    """Warn the line that called this package."""
    warn(
        "betas[0] is 0 with centering='current' and no clip_exponent: the residual g - m is then always 0, so that the "
        "second moment stays near 0 and steps become millions of times too large; use clip_exponent=0.25, or "
        "centering='previous'"
    )


def check_flags(options: dict[str, Any]) -> None:
    """Refuse flags that are not bools, because "no" would count as true."""
    for name in _FLAGS:
        if not isinstance(options[name], bool | None):
            raise TypeError(f"{name} is {options[name]!r}; use True or False")


def check_ways(group: dict[str, Any], params: list[Tensor], steps: list[Tensor], foreach: bool, scales: bool) -> None:
    """Refuse inputs that the chosen way to step does not support."""
    if group["capturable"] and not group["fused"]:
        supported = private.capturable_devices()
        for p, step in zip(params, steps, strict=True):
            if not p.device.type == step.device.type in supported:
                raise AssertionError(
                    f"If capturable=True, params and state_steps must be on supported devices: {supported}. "
                    f"{called(group, p)} is on {p.device}, its step count on {step.device}"
                )
    if scales and not group["fused"]:
        raise AssertionError("Expected grad_scale and found_inf to be None: only fused steps unscale gradients")
    if foreach and group["differentiable"]:
        raise AssertionError("_foreach ops don't support autograd")


def is_number(x: Any) -> bool:
    """Return whether `x` is a real number of Python, or of a library of arrays, such as a NumPy scalar or 0-d array."""
    if isinstance(x, Real):
        return not isinstance(x, bool)
    is_single = getattr(x, "shape", None) == () and not isinstance(x, Tensor)
    return is_single and any(kind in dtype_name(x.dtype) for kind in ("float", "int"))


def hyperparameters_of(group: dict[str, Any], traced: bool) -> Hyperparameters:
    """Return the options as the rule takes them; with `traced` no tensor is read."""

    def number(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return float(x)
        # a number on the host is read; on an accelerator that would synchronize with the device
        return float(x.item()) if x.is_cpu and not traced else _without_axes(x)

    b1, b2 = pair_of(group["betas"])
    return Hyperparameters(
        learning_rate=number(group["lr"]),
        b1=number(b1),
        b2=number(b2),
        eps=number(group["eps"]),
        eps_root=number(group["eps_root"]),
        weight_decay=number(group["weight_decay"]),
        clip_exponent=None if group["clip_exponent"] is None else float(group["clip_exponent"]),
        centering=group["centering"],
        asynchronous=group["asynchronous"],
        compensate=group["compensate"],
        l2=not group["decoupled_weight_decay"],
        maximize=group["maximize"],
    )


def called(group: dict[str, Any], p: Tensor) -> str:
    """Return the name of a parameter of a group for an error."""
    i = next(i for i, x in enumerate(group["params"]) if x is p)
    return f"parameter {group['param_names'][i]!r}" if "param_names" in group else f"parameter {i} of its group"


def _value_of(name: str, what: str, x: Any, step: bool, known: bool, owner: Callable[[], str]) -> float:
    """Return the value of a number or a tensor of one; 0 for a tensor that is not read."""
    if isinstance(x, Tensor):
        if x.numel() != 1:
            raise ValueError(f"Tensor {name} must be 1-element")
        if x.is_complex() or x.dtype is torch.bool or x.is_meta:
            raise TypeError(f"Invalid {what}: {x}; use a number, or a tensor of one real number, for {name + owner()}")
        return x.item() if not step or (known and x.is_cpu) else 0.0
    if not is_number(x):
        raise TypeError(f"Invalid {what}: {x!r}; use a number for {name + owner()}")
    try:
        return float(x)
    except OverflowError:
        return math.inf


@functools.lru_cache(typed=True)
def _check_rule(clip_exponent: Any, centering: Any, moment_dtype: Any) -> None:
    acprop_core.ACProp(clip_exponent=clip_exponent, centering=centering, moment_dtype=moment_dtype)


_check_rule_untraced = untraced(_check_rule)  # torch's compiler would warn of the cache
