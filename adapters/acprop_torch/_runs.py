"""The run of an optimizer, read alike from ACProp, torch's Adam or AdamW, and a state_dict of one of them."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

import acprop_core
from acprop_core.adapt import with_values
from acprop_core.checkpoint import by_name
from acprop_torch._optimizer import ACProp
from acprop_torch._options import check_options, is_number, pair_of
from acprop_torch._state_dict import ACPROP, ADAM, Kind, check_state, in_our_words, read, refuse_incomplete

Optimizer = ACProp | torch.optim.Adam | torch.optim.AdamW  # AdamW is a subclass of Adam from torch 2.7 on only
Model = torch.nn.Module | Mapping[str, Tensor]
# Options of a group that the core has by the same name. Weight decay, its mask and other options are handled apart.
OPTIONS = ("eps", "eps_root", "clip_exponent", "centering", "compensate", "asynchronous")


class Run(NamedTuple):
    """The run of an optimizer in the words of ACProp, for any class.

    Attributes
    ----------
    kind : Kind
        What its class keeps.
    groups : list of dict
        The options of its parameter groups, with those that its class lacks. Groups of Adam have no `moment_dtype`.
    named : dict
        For every parameter of the model itself, and the group that it is in, or None.
    states : dict
        By name, for parameters that have taken a step.
    """

    kind: Kind
    groups: list[dict[str, Any]]
    named: dict[str, tuple[Tensor, int | None]]
    states: dict[str, dict[str, Any]]


def run_of(optimizer: Optimizer, model: Model) -> Run:
    """Return the run of an optimizer."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"the optimizer is a {type(optimizer).__name__}; pass an acprop_torch.ACProp, a torch.optim.Adam or AdamW. "
            "If it wraps one, pass a plain one that has loaded its state_dict"
        )
    kind = ACPROP if isinstance(optimizer, ACProp) else ADAM
    params = _parameters(model)
    owners = {p: i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    named = {name: (p, owners.pop(p, None)) for name, p in params.items()}
    if owners:
        p, i = next(iter(owners.items()))
        raise ValueError(
            f"parameter group {i} has a parameter of shape {tuple(p.shape)} that the model does not have; pass the "
            "model whose parameters the optimizer was made for"
        )
    states = {}
    for name, p in params.items():
        if own := optimizer.state.get(p):
            if not own.keys() >= {"step", *kind.moments}:
                refuse_incomplete(f"parameter {name!r}", own, kind)
            states[name] = in_our_words(kind, own)
    fixed = dict(kind.fixed)
    if kind is ADAM:  # before torch 2.7 the class alone says it
        fixed["decoupled_weight_decay"] = isinstance(optimizer, torch.optim.AdamW)
    groups = [{**fixed, **group} for group in optimizer.param_groups]
    _refuse_variants([kind] * len(groups), groups)
    return Run(kind, groups, named, states)


def run_of_state_dict(state_dict: dict[str, Any], model: Model) -> Run:
    """Return the run that a state_dict is of."""
    params = _parameters(model)
    saved, kinds, states = read(state_dict)
    _refuse_variants(kinds, saved)
    groups = [{**kind.fixed, **group} for kind, group in zip(kinds, saved, strict=True)]
    for i, group in enumerate(groups):
        needed = [*ADAM.options, *ADAM.fixed, "decoupled_weight_decay"]
        if missing := [key for key in needed if key not in group and key != "amsgrad"]:
            raise ValueError(
                f"parameter group {i} of the state_dict lacks {', '.join(map(repr, missing))}; load it into an "
                "optimizer of its class, and pass that"
            )
        check_options({"moment_dtype": None, **group}, True, functools.partial(str, f" of parameter group {i}"))
    rows = zip(_names(saved, list(params)), saved, strict=True)
    owners = by_name(
        (name, (key, i))
        for i, (names, group) in enumerate(rows)
        for name, key in zip(names, group["params"], strict=True)
    )
    for name, (key, i) in owners.items():
        if name not in params:
            raise ValueError(
                f"parameter group {i} of the state_dict has {name!r}, which the model does not have; pass the model "
                "whose parameters the optimizer was made for"
            )
        if key in states:
            check_state(key, states[key], params[name])
    named = {name: (p, owners[name][1] if name in owners else None) for name, p in params.items()}
    return Run(kinds[0], groups, named, {name: states[key] for name, (key, _) in owners.items() if key in states})


def hyperparameters_of(run: Run) -> acprop_core.ACProp:
    """Return the options of all groups as one optimizer of the core, or say why that is not possible."""
    remedy = "pass the hyperparameters to record to export_state, or prefer='own' to import_state"
    records: list[dict[str, Any]] = []
    decays = [float(group["weight_decay"]) for group in run.groups]
    # Adam's moments have the dtypes of the parameters; the core has one dtype for all
    dtypes = {p.dtype for p, i in run.named.values() if i is not None}
    of_adam = next(iter(dtypes)) if dtypes in ({torch.float16}, {torch.bfloat16}) else None
    for i, (group, decay) in enumerate(zip(run.groups, decays, strict=True)):
        if group["maximize"]:
            raise ValueError(f"parameter group {i} has maximize=True, which the other hosts do not have; {remedy}")
        if decay and not group["decoupled_weight_decay"]:
            raise ValueError(
                f"parameter group {i} has weight_decay={decay} with decoupled_weight_decay=False, the L2 form, which "
                f"the other hosts do not have; {remedy}"
            )
        b1, b2 = map(float, pair_of(group["betas"]))
        others = {key: float(x) if is_number(x := group[key]) else x for key in OPTIONS}
        others["moment_dtype"] = group.get("moment_dtype", of_adam)
        records.append({"learning_rate": float(group["lr"]), "b1": b1, "b2": b2, **others})
    for i, record in enumerate(records):
        if apart := [f"{key} {records[0][key]} and {x}" for key, x in record.items() if x != records[0][key]]:
            raise ValueError(
                f"parameter groups 0 and {i} have {', '.join(apart)}; the other hosts have one for all parameters. "
                f"{remedy}"
            )
    if len(set(decays) - {0.0}) > 1:
        raise ValueError(
            f"parameter groups have weight_decay {', '.join(map(str, decays))}; the other hosts have one, and a mask. "
            f"{remedy}"
        )
    mask = (
        None
        if len(set(decays)) == 1
        else {name: i is not None and decays[i] != 0.0 for name, (_, i) in run.named.items()}
    )
    # not by the constructor, because a schedule may have left numbers below 0
    return with_values(acprop_core.ACProp(), **records[0], weight_decay=max(decays, key=abs), mask=mask)


def _parameters(model: Model) -> dict[str, Tensor]:
    if not isinstance(model, torch.nn.Module | Mapping):
        raise TypeError(f"the model is a {type(model).__name__}; pass a Module, or a mapping of names to parameters")
    return dict(model.named_parameters() if isinstance(model, torch.nn.Module) else model)


def _refuse_variants(kinds: list[Kind], groups: list[dict[str, Any]]) -> None:
    """Refuse variants of Adam that keep more than two moments, or others."""
    reasons = {
        "amsgrad": "its steps divide by the largest second moment so far (max_exp_avg_sq)",
        "maximize": "its first moment is the mean of the negated gradients",
    }
    for i, (kind, group) in enumerate(zip(kinds, groups, strict=True)):
        for option, reason in reasons.items():
            if kind is ADAM and group[option]:
                raise ValueError(
                    f"parameter group {i} of Adam has {option}=True: {reason}, which the other hosts do not have; "
                    f"finish this run in PyTorch, or use an optimizer without {option}"
                )


def _names(saved: list[dict[str, Any]], names: list[str]) -> list[list[str]]:
    """Return the names of the parameters in each group of a state_dict, for a model with these names."""
    # torch.distributed.checkpoint puts names in the place of numbers
    own = [group.get("param_names", group["params"]) for group in saved]
    if saved and all(isinstance(name, str) for group in own for name in group):
        return own
    sizes = [len(group["params"]) for group in saved]
    if sizes == [len(names)]:
        return [names]
    raise ValueError(
        f"the state_dict has no names, and groups of {', '.join(map(str, sizes)) or 'no'} parameters, where the model "
        f"has {len(names)} in one order; pass the optimizer itself, or make it with named_parameters()"
    )
