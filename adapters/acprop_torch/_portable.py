"""Portable state: from a torch optimizer to `acprop_core.save`, and from `acprop_core.load` to a torch optimizer."""

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

import acprop_core
from acprop_core import State
from acprop_core.adapt import with_values
from acprop_core.checkpoint import check_portable, choose, match_names, to_numpy
from acprop_torch._optimizer import ACProp
from acprop_torch._options import is_number, pair_of
from acprop_torch._state_dict import MOMENTS, begin, dtype_of_moments, has_carry

if TYPE_CHECKING:  # slow to import; where there are sharded tensors, it has been imported
    from torch.distributed.tensor import DTensor

Model = torch.nn.Module | Mapping[str, Tensor]
# Options of a group that the core has by the same name. Weight decay, its mask and other options are handled apart.
_OPTIONS = ("eps", "eps_root", "clip_exponent", "centering", "moment_dtype", "compensate", "asynchronous")


def export_state(
    optimizer: ACProp, model: Model, hyperparameters: acprop_core.ACProp | None = None
) -> tuple[acprop_core.ACProp, State]:
    """Return hyperparameters and state of an optimizer, for `acprop_core.save` or another adapter's `import_state`.

    If parameters are sharded (DTensor, as FSDP2 and tensor parallelism make them), call it on every rank: it gathers
    their moments, one parameter after the other. The first rank of the mesh, rank 0, is the one that can save them.

    Parameters
    ----------
    optimizer : ACProp
        Its groups may differ in `weight_decay` if that is 0 or one other number; it becomes the mask.
    model : Module, or mapping of names to parameters
        Gives every parameter its name, as ``named_parameters`` does.
    hyperparameters : acprop_core.ACProp, optional
        To record instead of the optimizer's own, if the core cannot express these.

    Returns
    -------
    acprop_core.ACProp
        The learning rate is the current one, even if a scheduler set it.
    acprop_core.State
        Copies, as NumPy arrays by name. The moments of a parameter that has taken no step yet (frozen, without a
        gradient so far, or not in the optimizer) are None. A complex parameter counts as two real ones, as in the
        optimizer: its moments are real with a last axis of two, as in ``torch.view_as_real``.

        If parameters are sharded, only the first rank has the arrays. The others have tensors of torch's "meta" device,
        with a shape and no content, which `save` and `import_state` refuse.

    Raises
    ------
    ValueError
        If parameters have taken different numbers of steps, the model lacks one of the optimizer's, or groups
        differ, maximize, or decay in the L2 form, which the core cannot express.
    TypeError
        If the optimizer is not an ACProp.

    Notes
    -----
    Errors are raised before anything is gathered, so that no rank waits for one that has failed.

    Examples
    --------
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = ACProp(model.parameters(), lr=1e-3, clip_exponent=0.25)
    >>> model(torch.ones(1, 2)).sum().backward()
    >>> optimizer.step()
    >>> hyper, state = export_state(optimizer, model)
    >>> hyper.learning_rate, state.count, sorted(state.mu)
    (0.001, 1, ['bias', 'weight'])
    """
    named = _named(optimizer, model)
    if hyperparameters is None:
        hyperparameters = _hyperparameters(optimizer, named)
    if not isinstance(hyperparameters, acprop_core.ACProp):
        raise TypeError(f"the hyperparameters are a {type(hyperparameters).__name__}; pass an acprop_core.ACProp")
    states = {name: optimizer.state[p] for name, (p, _) in named.items() if optimizer.state.get(p)}
    counts = {int(state["step"]): name for name, state in states.items()}
    if len(counts) > 1:
        (few, late), *_, (many, early) = sorted(counts.items())
        raise ValueError(
            f"{late!r} has taken {few} steps, {early!r} {many}; the other hosts count the steps of all parameters "
            "together. Within PyTorch use state_dict"
        )

    compensates = any(group["compensate"] for group in optimizer.param_groups)
    keys = (*MOMENTS, "carry") if compensates else MOMENTS
    keep = _keeps([p for p, _ in named.values()])
    # Gather all of them before the first conversion to NumPy, which may fail on this rank while others wait for it.
    whole = {key: {name: _whole(state[key], keep) for name, state in states.items() if key in state} for key in keys}

    def kept(key: str) -> dict[str, Any]:
        found = whole[key]
        return {name: to_numpy("moment", name, found.get(name)) if keep else found.get(name) for name in named}

    return hyperparameters, State(next(iter(counts), 0), *map(kept, keys))


def import_state(
    optimizer: ACProp, model: Model, saved: acprop_core.ACProp, state: State, *, prefer: str | None = None
) -> None:
    """Give an optimizer the state that `acprop_core.load` or an `export_state` returned; it is copied.

    If parameters are sharded, call it on every rank with the whole state, as each of them loads it. A rank takes its
    part of one parameter after the other, and waits for no other rank.

    Parameters
    ----------
    optimizer : ACProp
        For the parameters of `model`, or some of them.
    model : Module, or mapping of names to parameters
        Gives every parameter its name.
    saved : acprop_core.ACProp
        The hyperparameters of the state.
    state : acprop_core.State
        Moments by name, in the shapes of the parameters and the dtypes that the optimizer keeps. A parameter whose
        moments are None has not taken a step yet.
    prefer : {"own", "saved"}, optional
        Whose hyperparameters to continue with if they differ; by default, differences are refused.

    Raises
    ------
    ValueError
        If hyperparameters differ, names are missing or surplus, shapes differ, or the optimizer cannot have the saved
        hyperparameters; nothing has changed then.
    TypeError
        If dtypes differ, a moment has no content, or the optimizer is not an ACProp; nothing has changed then.

    Notes
    -----
    The step counts of torch.optim are float32, so that one beyond 2**24 is rounded.

    Examples
    --------
    >>> import numpy as np
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = ACProp(model.parameters(), lr=1e-3, clip_exponent=0.25)
    >>> zeros = {"weight": np.zeros((1, 2), np.float32), "bias": np.zeros(1, np.float32)}
    >>> import_state(optimizer, model, acprop_core.ACProp(1e-3, clip_exponent=0.25), State(7, zeros, zeros))
    >>> optimizer.state[model.bias]["step"]
    tensor(7.)
    """
    saved = check_portable(saved, state)
    named = _named(optimizer, model)
    options: list[dict[str, Any]] = [{} for _ in optimizer.param_groups]
    if prefer == "saved":
        options = list(_options(optimizer, named, saved))
    elif prefer != "own":  # the core need not be able to express the options then
        choose(_hyperparameters(optimizer, named), saved, prefer)
    groups = [{**group, **new} for group, new in zip(optimizer.param_groups, options, strict=True)]
    owners = [(p, None if i is None else groups[i]) for p, i in named.values()]
    like = [None if group is None else _like(group, p) for p, group in owners]
    compensated = [group is not None and has_carry(group, p) for p, group in owners]
    carries = [p if has_carry else None for (p, _), has_carry in zip(owners, compensated, strict=True)]
    compensates = any(group["compensate"] for group in groups)
    rows = match_names(state, list(named), State(0, like, like, carries if compensates else None))
    new_states = [
        None if row[0] is None else _state_of(name, group, p, state.count, row)
        for name, (p, group), row in zip(named, owners, rows, strict=True)
        if group is not None
    ]
    for group, new in zip(optimizer.param_groups, options, strict=True):
        for key, value in new.items():
            _set(group, key, value)
    for p, new_state in zip((p for p, group in owners if group is not None), new_states, strict=True):
        optimizer.state.pop(p, None)
        if new_state is not None:
            optimizer.state[p] = new_state


_Named = dict[str, tuple[Tensor, int | None]]  # the parameter, and which group it is in


def _named(optimizer: ACProp, model: Model) -> _Named:
    if not isinstance(optimizer, ACProp):
        raise TypeError(
            f"the optimizer is a {type(optimizer).__name__}; pass an acprop_torch.ACProp. If it wraps one, pass a "
            "plain one that has loaded its state_dict"
        )
    if not isinstance(model, torch.nn.Module | Mapping):
        raise TypeError(f"the model is a {type(model).__name__}; pass a Module, or a mapping of names to parameters")
    groups = {p: i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    pairs = model.named_parameters() if isinstance(model, torch.nn.Module) else model.items()
    named = {name: (p, groups.pop(p, None)) for name, p in pairs}
    if groups:
        p, i = next(iter(groups.items()))
        raise ValueError(
            f"parameter group {i} has a parameter of shape {tuple(p.shape)} that the model does not have; pass the "
            "model whose parameters the optimizer was made for"
        )
    return named


def _hyperparameters(optimizer: ACProp, named: _Named) -> acprop_core.ACProp:
    """Return the options of all groups as one optimizer of the core, or say why that is not possible."""
    remedy = "pass the hyperparameters to record to export_state, or prefer='own' to import_state"
    records: list[dict[str, Any]] = []
    decays = [float(group["weight_decay"]) for group in optimizer.param_groups]
    for i, (group, decay) in enumerate(zip(optimizer.param_groups, decays, strict=True)):
        if group["maximize"]:
            raise ValueError(f"parameter group {i} has maximize=True, which the other hosts do not have; {remedy}")
        if decay and not group["decoupled_weight_decay"]:
            raise ValueError(
                f"parameter group {i} has weight_decay={decay} with decoupled_weight_decay=False, the L2 form, which "
                f"the other hosts do not have; {remedy}"
            )
        b1, b2 = map(float, pair_of(group["betas"]))
        others = {key: float(x) if is_number(x := group[key]) else x for key in _OPTIONS}
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
        None if len(set(decays)) == 1 else {name: i is not None and decays[i] != 0.0 for name, (_, i) in named.items()}
    )
    # not by the constructor, because a schedule may have left numbers below 0
    return with_values(acprop_core.ACProp(), **records[0], weight_decay=max(decays, key=abs), mask=mask)


def _options(optimizer: ACProp, named: _Named, saved: acprop_core.ACProp) -> Iterator[dict[str, Any]]:
    """Yield the options of each group that correspond to the saved hyperparameters."""
    for name in ("learning_rate", "weight_decay", "mask"):
        if callable(getattr(saved, name)):
            raise ValueError(
                f"the saved {name} is a callable, which a torch optimizer cannot have; pass another to load, or "
                "prefer='own' to import_state"
            )
    mask: Any = saved.mask or {}
    for i in range(len(optimizer.param_groups)):
        names = [name for name, (_, own) in named.items() if own == i]
        decay = {mask.get(name, True) for name in names}
        if len(decay) > 1 and saved.weight_decay:
            raise ValueError(
                f"some parameters of group {i} decay in the saved state and some do not; "
                "put these into a group of their own"
            )
        yield {
            "lr": saved.learning_rate,
            "betas": (saved.b1, saved.b2),
            "weight_decay": saved.weight_decay if any(decay) else 0.0,
            "decoupled_weight_decay": True,
            "maximize": False,
            **{key: getattr(saved, key) for key in _OPTIONS},
            "moment_dtype": None if saved.moment_dtype is None else getattr(torch, saved.moment_dtype),
        }


def _set(group: dict[str, Any], key: str, value: Any) -> None:
    # fill tensors in place, because a captured or compiled step reads the same tensors
    own = group[key]
    if isinstance(own, Tensor):
        own.fill_(value)
    elif key == "betas" and isinstance(own[0], Tensor):
        for tensor, number in zip(own, value, strict=True):
            tensor.fill_(number)
    else:
        group[key] = value


def _like(group: dict[str, Any], p: Tensor) -> Tensor:
    return _real(torch.empty(p.shape, dtype=dtype_of_moments(group, p), device="meta"))


def _state_of(name: str, group: dict[str, Any], p: Tensor, count: int, row: tuple[Any, Any, Any]) -> dict[str, Tensor]:
    made = begin(group, p, float(count))
    if has_carry(group, p):
        made["carry"] = torch.zeros_like(p, requires_grad=False)
    for key, x in zip((*MOMENTS, "carry"), row, strict=True):
        if x is not None:
            whole = made[key]
            own = whole.to_local() if _is_sharded(whole) else whole
            _real(own).copy_(_part(_from_numpy(to_numpy("moment", name, x)), p))
    return made


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x


def _is_sharded(x: Tensor) -> TypeGuard["DTensor"]:
    return hasattr(x, "to_local")


def _keeps(params: Iterable[Tensor]) -> bool:
    """Return whether this rank keeps the gathered tensors, as the first of a mesh does."""
    meshes = [p.device_mesh for p in params if _is_sharded(p)]
    return not meshes or any(mesh.get_rank() == mesh.mesh.flatten()[0] for mesh in meshes)


def _whole(x: Tensor, keep: bool) -> Tensor:
    """Return a copy of a tensor on the CPU, whole if it is sharded; only its shape on a rank that does not keep it."""
    if _is_sharded(x):
        there: Any = x.to(x.device_mesh.device_type)  # FSDP2 may have offloaded it
        x = there.full_tensor()
    x = _real(x.detach().resolve_conj())
    return x.to("cpu", copy=True) if keep else x.to("meta")


def _part(x: Tensor, p: Tensor) -> Tensor:
    """Return the part of a whole tensor that this rank has of `p`; a last axis that `p` lacks stays whole."""
    if not _is_sharded(p):
        return x
    from torch.distributed.tensor import distribute_tensor

    # src_data_rank=None: each rank has the whole and cuts its own part; otherwise rank 0 would send one to each
    return distribute_tensor(x, p.device_mesh, p.placements, src_data_rank=None).to_local()


def _from_numpy(x: Any) -> Tensor:
    import numpy as np

    x = np.array(x)  # torch takes no read-only memory
    if x.dtype.name == "bfloat16":  # ml_dtypes'
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)
