"""The state of a parameter: how it begins, checks of a loaded one, and the translation of other optimizers' own."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from acprop_core.adapt import dtype_name, moment_dtypes
from acprop_torch._options import check_flags, check_options, is_number
from acprop_torch._private import overlap, scalar_dtype

MOMENTS = ("exp_avg", "exp_avg_var")

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)
_REAL = frozenset(_DTYPES[:4])
KEYS = {"step", *MOMENTS}
_EXPANDED = 1  # what `overlap` returns


class Kind(NamedTuple):
    """What a class of optimizers keeps, as far as it differs from ACProp.

    Attributes
    ----------
    moments : two str
        Their keys in the state of a parameter.
    options : tuple of str
        By these options a parameter group is known to be of this class.
    fixed : dict
        Options of ACProp that the class lacks, with the values that describe its steps.
    """

    moments: tuple[str, str]
    options: tuple[str, ...]
    fixed: dict[str, Any]


_OF_ALL = ("lr", "betas", "eps", "weight_decay")
ACPROP = Kind(MOMENTS, (*_OF_ALL, "eps_root"), {})
AUTHORS = Kind(MOMENTS, _OF_ALL, {"asynchronous": True, "centering": "current"})
ADAM = Kind(  # torch's Adam and AdamW, whose moments always have their parameter's dtype
    ("exp_avg", "exp_avg_sq"),
    (*_OF_ALL, "amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused"),
    {"asynchronous": False, "centering": "none", "eps_root": 0.0, "clip_exponent": None, "compensate": False},
)


def kind_of(group: dict[str, Any]) -> Kind:
    """Return the kind of optimizer that a saved parameter group is of, ACProp's if it is another."""
    if "eps_root" not in group and group.keys() >= {*ADAM.options}:
        return ADAM
    return ACPROP if {"eps_root", "maximize"} & group.keys() else AUTHORS


def begin(group: dict[str, Any], p: Tensor, count: float = 0.0, kind: Kind = ACPROP) -> dict[str, Tensor]:
    """Return the state of a parameter before its first step, or with another count."""
    zeros = {key: torch.zeros_like(p, dtype=dtype_of_moments(group, p), requires_grad=False) for key in kind.moments}
    return {"step": step_count(group, p, count), **zeros}


def step_count(group: dict[str, Any], p: Tensor, value: float) -> Tensor:
    """Return a step count as the state of this parameter keeps it."""
    on_device = group["capturable"] or group["fused"]
    dtype = scalar_dtype(is_fused=group["fused"])
    return torch.tensor(value, dtype=dtype, device=p.device if on_device else "cpu")


def dtype_of_moments(group: dict[str, Any], p: Tensor) -> torch.dtype:
    """Return the dtype of the moments of this parameter."""
    if "moment_dtype" not in group:  # a group of torch's Adam
        return p.dtype
    wanted = group["moment_dtype"]
    mu, _ = moment_dtypes(dtype_name(p.dtype), None if wanted is None else dtype_name(wanted))
    return getattr(torch, mu) if mu is not None else wanted.to_complex()


def has_carry(group: dict[str, Any], p: Tensor) -> bool:
    """Return whether the state of this parameter keeps a carry."""
    return group["compensate"] and p.dtype in (torch.float16, torch.bfloat16)


def check_steps(steps: Sequence[Any], name: Callable[[int], str]) -> list[int] | None:
    """Return the step counts, None if they are on a device, where they are not read.

    Refuse anything but floating-point tensors of one whole number.
    """
    with contextlib.suppress(AttributeError, TypeError, RuntimeError):  # raised by anything else
        if all(map(attrgetter("is_cpu"), steps)):
            counts = list(map(Tensor.item, steps))
            if all(map(float.is_integer, counts)) and min(counts) >= 0.0:
                return list(map(int, counts))
    for i, step in enumerate(steps):
        error: type[Exception]
        if not (isinstance(step, Tensor) and step.numel() == 1 and step.is_floating_point()):
            error, reason = TypeError, "not a floating-point tensor of one number"
        elif step.is_cpu and not (step.item() >= 0.0 and float(step.item()).is_integer()):
            error, reason = ValueError, "not a whole number that is at least 0"
        else:
            continue
        raise error(
            f"the step count in the state of {name(i)} is {step!r}, {reason}; load a state_dict, or use "
            "torch.tensor(float(count))"
        )
    return None


def check_moments(params: list[Tensor], moments: list[Any], state: Any, name: Callable[[int], str]) -> None:
    """Refuse parameters and moments that a step cannot read and write; `moments` are those in the state."""
    kinds = frozenset(_DTYPES) if any(map(Tensor.is_complex, params)) else _REAL
    with contextlib.suppress(AttributeError, TypeError):  # raised by anything but tensors
        if (
            kinds.issuperset(map(attrgetter("dtype"), moments))
            and {*map(attrgetter("layout"), moments)} == {torch.strided}
            and {*map(attrgetter("device"), moments)} == {*map(attrgetter("device"), params)}
            and _EXPANDED not in map(overlap, [*params, *moments])
        ):
            return
    for i, p in enumerate(params):
        check_tensors(name(i), state[p], p)
        refuse_expanded(name(i), p)
        for key in MOMENTS:
            refuse_expanded(f"{key} of {name(i)}", state[p][key])


def check_parameter(name: str, p: Tensor) -> None:
    """Refuse a parameter that cannot have a state."""
    if p.dtype not in _DTYPES:
        raise TypeError(
            f"{name} has dtype {p.dtype}, which ACProp cannot use; use one of {', '.join(map(str, _DTYPES))}, or no "
            "gradient"
        )
    if p.is_neg():
        raise RuntimeError(
            f"{name} is a lazily negated view, whose memory has the other sign and cannot be stepped; make its "
            "resolve_neg() the parameter"
        )
    refuse_expanded(name, p)


def refuse_complex(name: str, grad: Tensor) -> NoReturn:
    """Refuse a complex gradient of a real parameter, of which torch would drop the imaginary part."""
    raise TypeError(f"{name} is real and its gradient has dtype {grad.dtype}; take the real part of the gradient")


def refuse_layout(name: str, p: Tensor, grad: Tensor) -> NoReturn:
    """Refuse a nested parameter, or a gradient that is not dense."""
    if p.is_nested or grad.is_nested:
        raise RuntimeError(
            f"{name} is a nested tensor, or has a nested gradient; make the dense tensor of its values() the parameter"
        )
    raise RuntimeError("ACProp does not support sparse gradients, please consider SparseAdam instead")


def refuse_incomplete(name: str, state: dict[str, Any], kind: Kind = ACPROP) -> NoReturn:
    """Refuse a state that lacks something."""
    missing = ", ".join(sorted(map(repr, {"step", *kind.moments} - state.keys())))
    raise ValueError(f"the state of {name} lacks {missing}; clear `optimizer.state`, or load a state_dict")


def refuse_expanded(name: str, x: Tensor) -> None:
    """Refuse a tensor that cannot be written."""
    if overlap(x) == _EXPANDED:
        raise RuntimeError(
            f"{name} is expanded: several of its elements are one number in memory; pass the tensor that it was "
            "expanded from, or a clone"
        )


def check_state(key: Any, own: Any, p: Tensor) -> None:
    """Refuse the saved state of a parameter if no step of it could be taken."""
    check_tensors(f"parameter {key}", own, p)
    for name in (*MOMENTS, *(["carry"] if "carry" in own else [])):
        if own[name].shape != p.shape:
            raise ValueError(
                f"{name} of parameter {key} has shape {tuple(own[name].shape)}, the parameter {tuple(p.shape)}; load "
                "the state of this model"
            )
    if "carry" in own and p.dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(
            f"parameter {key} has a carry in the state, but is {p.dtype} here; add it to the parameter, which can hold "
            "it, and take it out of the state"
        )
    step = own["step"]
    if isinstance(step, Tensor) and step.numel() == 1 and step.is_floating_point() and (p.is_meta or not step.is_meta):
        step = 0.0 if step.is_meta else step.item()
    if not is_number(step):
        raise TypeError(f"step of parameter {key} is {step!r}; load a number, or a floating-point tensor of one")
    if not (float(step) >= 0.0 and float(step).is_integer()):
        raise ValueError(f"step of parameter {key} is {step!r}; load a whole number that is at least 0")


def check_tensors(owner: str, own: dict[str, Any], p: Tensor) -> None:
    """Refuse moments and a carry that are not dense floating-point tensors."""
    for name in (*MOMENTS, *(["carry"] if "carry" in own else [])):
        x = own[name]
        if not isinstance(x, Tensor) or not (x.is_floating_point() or (x.is_complex() and p.is_complex())):
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name} of {owner} is a {kind}; load a floating-point tensor")
        if x.layout is not torch.strided or (x.is_meta and not p.is_meta):
            kind = "without values" if x.is_meta else "nested" if x.is_nested else "sparse"
            raise ValueError(f"{name} of {owner} is {kind}; load a dense tensor")


def read(state_dict: dict[str, Any]) -> tuple[list[dict[str, Any]], list[Kind], dict[Any, dict[str, Any]]]:
    """Return the groups of a state_dict, the kind of each, and the states that are not empty; refuse other optimizers'.

    The states are in the words of ACProp: the second moment is `exp_avg_var`.
    """
    saved, states = state_dict.get("param_groups"), state_dict.get("state")
    if not isinstance(states, dict) or not isinstance(saved, list) or not all(isinstance(x, dict) for x in saved):
        raise ValueError(
            "the state_dict lacks a dict 'state' or a list of dicts 'param_groups'; pass the dict that state_dict() "
            "of ACProp returned, not a model's"
        )
    for key in (key for group in saved for key in group.get("params", ())):
        if not isinstance(states.get(key, {}), dict):
            raise TypeError(f"the state of parameter {key} is a {type(states[key]).__name__}; load a dict")
    states = {key: state for key, state in states.items() if isinstance(state, dict) and state}
    kinds = list(map(kind_of, saved))
    kind_of_key = {key: kind for kind, group in zip(kinds, saved, strict=True) for key in group.get("params", ())}
    parts = [(f"parameter group {i}", group, ("params", *kinds[i].options)) for i, group in enumerate(saved)]
    parts += [
        (f"the state of parameter {key}", state, ("step", *kind_of_key.get(key, ACPROP).moments))
        for key, state in states.items()
    ]
    for name, part, wanted in parts:
        if missing := [key for key in wanted if key not in part]:
            raise ValueError(
                f"{name} lacks {', '.join(map(repr, missing))}: it belongs to another optimizer; "
                "load one that ACProp saved"
            )
    if strays := [key for key in state_dict["state"] if isinstance(key, int) and key not in kind_of_key]:
        raise ValueError(
            f"the state_dict has the state of parameter {strays[0]}, which none of its parameter groups has; "
            "load the dict that state_dict() of ACProp returned"
        )
    return saved, kinds, {key: in_our_words(kind_of_key.get(key, ACPROP), state) for key, state in states.items()}


def in_our_words(kind: Kind, state: dict[str, Any]) -> dict[str, Any]:
    """Return the state of a parameter with the keys that ACProp has for it."""
    if kind.moments == MOMENTS:
        return state
    return {"step": state["step"], **{ours: state[key] for ours, key in zip(MOMENTS, kind.moments, strict=True)}}


def _translated_group(i: int, kind: Kind, saved: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    rectified = saved.get("rectify") or any(x is not None for row in saved.get("buffer", ()) for x in row)
    for option, used in (("amsgrad", saved.get("amsgrad")), ("rectify", rectified)):
        if used:
            raise ValueError(
                f"parameter group {i} comes from a run with {option}=True, which is another algorithm than ACProp's; "
                "finish that run with the optimizer that began it, or start anew"
            )
    wanted = {key: kind.fixed[key] for key in ("asynchronous", "centering")}
    if apart := [f"{key}={own[key]!r}" for key, value in wanted.items() if own[key] != value]:
        origin = "torch.optim.Adam or AdamW" if kind is ADAM else "the authors' ACProp"
        raise ValueError(
            f"parameter group {i} is of {origin}, whose moments mean something else with {' and '.join(apart)}, as "
            "here; make this optimizer with "
            f"{' and '.join(f'{key}={value!r}' for key, value in wanted.items())}, or start anew"
        )
    kept = {key: value for key, value in saved.items() if key not in ("amsgrad", "rectify", "buffer")}
    eps_root = saved["eps"] if kind is AUTHORS else ADAM.fixed["eps_root"]
    return {**{key: value for key, value in own.items() if key != "params"}, **kept, "eps_root": eps_root}


def _translated_state(kind: Kind, group: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    if kind is AUTHORS:  # their code adds eps to the second moment when it is used, not when it is made
        return {**state, "exp_avg_var": state["exp_avg_var"] + group["eps"]}
    if kind is ADAM and group["maximize"]:  # it averages the negated gradient, ACProp the gradient itself
        return {**state, "exp_avg": -state["exp_avg"]}
    return state


def checked(state_dict: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return a state_dict, translated if it is the authors' or Adam's; refuse one that cannot be continued here."""
    saved, kinds, states = read(state_dict)
    if len(saved) != len(optimizer.param_groups):  # the base class refuses it
        return state_dict
    groups = [
        # an ACProp that did not say so was older than the option, and asynchronous
        {**group, "asynchronous": group.get("asynchronous", True)}
        if kind is ACPROP
        else _translated_group(i, kind, group, own)
        for i, (kind, group, own) in enumerate(zip(kinds, saved, optimizer.param_groups, strict=True))
    ]
    for i, group in enumerate(groups):
        options = {**optimizer.defaults, **group}
        check_options(options, True, functools.partial(str, f" of parameter group {i}"))
        check_flags(options)
    new = {**state_dict, "param_groups": groups, "state": {**state_dict["state"], **states}}
    for key, _, p in owners(new, optimizer):
        if own := new["state"].get(key):
            check_state(key, own, p)
    for kind, group in zip(kinds, groups, strict=True):
        for key in states.keys() & {*group["params"]}:
            new["state"][key] = _translated_state(kind, group, states[key])
    return new


def owners(saved: dict[str, Any], optimizer: torch.optim.Optimizer) -> Iterator[tuple[Any, dict[str, Any], Tensor]]:
    """Yield for each parameter its key in a state_dict, its group and itself."""
    keys = (key for group in saved["param_groups"] for key in group["params"])
    return ((next(keys, None), group, p) for group in optimizer.param_groups for p in group["params"])


def restore_dtypes(saved: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Give the loaded moments their own dtypes, because the base class has cast them to their parameter's."""
    for key, group, p in owners(saved, optimizer):
        for name in MOMENTS if saved["state"].get(key) else ():
            moment = saved["state"][key][name]
            optimizer.state[p][name] = moment.to(p.device, dtype_of_moments(group, p), copy=True)
        for name in {"step", "carry"} & optimizer.state.get(p, {}).keys():  # the base class may share them with `saved`
            optimizer.state[p][name] = optimizer.state[p][name].clone()
