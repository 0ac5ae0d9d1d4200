"""Portable state: from a torch optimizer to `acprop_core.save`, and from `acprop_core.load` to a torch optimizer."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

import acprop_core
from acprop_core import State
from acprop_core.checkpoint import check_portable, choose, match_names, to_numpy
from acprop_torch._runs import OPTIONS, Model, Optimizer, Run, hyperparameters_of, run_of, run_of_state_dict
from acprop_torch._state_dict import MOMENTS, Kind, begin, dtype_of_moments, has_carry
from acprop_torch._version import VERSION

if TYPE_CHECKING:  # slow to import; where there are sharded tensors, it has been imported
    from torch.distributed.tensor import DTensor


def export_state(
    optimizer: Optimizer | dict[str, Any], model: Model, hyperparameters: acprop_core.ACProp | None = None
) -> tuple[acprop_core.ACProp, State]:
    """Return hyperparameters and state of an optimizer, for `acprop_core.save` or another adapter's `import_state`.

    If parameters are sharded (DTensor, as FSDP2 and tensor parallelism make them), call it on every rank: it gathers
    their moments, one parameter after the other. The first rank of the mesh, rank 0, is the one that can save them.

    Parameters
    ----------
    optimizer : ACProp, torch.optim.Adam, torch.optim.AdamW, or the state_dict of one of them
        Its groups may differ in `weight_decay` if that is 0 or one other number; it becomes the mask. A state_dict
        should have names, as if the optimizer was made with ``named_parameters``. Without names it must have one group
        of as many parameters as the model, and their order is taken to be the model's.
    model : Module, or mapping of names to parameters
        Gives every parameter its name, as ``named_parameters`` does.
    hyperparameters : acprop_core.ACProp, optional
        To record instead of the optimizer's own, if the core cannot express these.

    Returns
    -------
    acprop_core.ACProp
        The learning rate is the current one, even if a scheduler set it. Adam and AdamW are
        ``ACProp(..., eps_root=0.0, asynchronous=False, centering="none")``. Their moments have the dtype of their
        parameters; if that is float16 or bfloat16 for all, it is the `moment_dtype`.
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
        differ, maximize, or decay in the L2 form, which the core cannot express. If Adam has ``amsgrad=True``, or a
        state_dict does not tell the names of its parameters.
    TypeError
        If the optimizer is not an ACProp, Adam or AdamW.

    Notes
    -----
    Errors are raised before anything is gathered, so that no rank waits for one that has failed.

    Examples
    --------
    >>> from acprop_torch import ACProp
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = ACProp(model.parameters(), lr=1e-3, clip_exponent=0.25)
    >>> model(torch.ones(1, 2)).sum().backward()
    >>> optimizer.step()
    >>> hyper, state = export_state(optimizer, model)
    >>> hyper.learning_rate, state.count, sorted(state.mu)
    (0.001, 1, ['bias', 'weight'])
    """
    run = run_of_state_dict(optimizer, model) if isinstance(optimizer, dict) else run_of(optimizer, model)
    if hyperparameters is None:
        hyperparameters = hyperparameters_of(run)
    if not isinstance(hyperparameters, acprop_core.ACProp):
        raise TypeError(f"the hyperparameters are a {type(hyperparameters).__name__}; pass an acprop_core.ACProp")
    counts = {int(state["step"]): name for name, state in run.states.items()}
    if len(counts) > 1:
        (few, late), *_, (many, early) = sorted(counts.items())
        raise ValueError(
            f"{late!r} has taken {few} steps, {early!r} {many}; the other hosts count the steps of all parameters "
            "together. Within PyTorch use state_dict"
        )

    compensates = any(group["compensate"] for group in run.groups)
    keys = (*MOMENTS, "carry") if compensates else MOMENTS
    keep = _keeps([p for p, _ in run.named.values()])
    # Gather all of them before the first conversion to NumPy, which may fail on this rank while others wait for it.
    whole = {key: {name: _whole(x[key], keep) for name, x in run.states.items() if key in x} for key in keys}

    def kept(key: str) -> dict[str, Any]:
        found = whole[key]
        return {name: to_numpy("moment", name, found.get(name)) if keep else found.get(name) for name in run.named}

    return hyperparameters, State(next(iter(counts), 0), *map(kept, keys))


def import_state(
    optimizer: Optimizer, model: Model, saved: acprop_core.ACProp, state: State, *, prefer: str | None = None
) -> None:
    """Give an optimizer the state that `acprop_core.load` or an `export_state` returned; it is copied.

    If parameters are sharded, call it on every rank with the whole state, as each of them loads it. A rank takes its
    part of one parameter after the other, and waits for no other rank.

    Parameters
    ----------
    optimizer : ACProp, torch.optim.Adam or torch.optim.AdamW
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
        hyperparameters, as Adam and AdamW no `eps_root`; nothing has changed then.
    TypeError
        If dtypes differ, a moment has no content, or the optimizer is not an ACProp, Adam or AdamW; nothing has changed
        then.

    Notes
    -----
    The step counts of torch.optim are float32, so that one beyond 2**24 is rounded.

    Examples
    --------
    >>> import numpy as np
    >>> from acprop_torch import ACProp
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = ACProp(model.parameters(), lr=1e-3, clip_exponent=0.25)
    >>> zeros = {"weight": np.zeros((1, 2), "float32"), "bias": np.zeros(1, "float32")}
    >>> saved = acprop_core.ACProp(1e-3, clip_exponent=0.25), State(7, zeros, zeros)
    >>> import_state(optimizer, model, *saved)
    >>> optimizer.state[model.bias]["step"]
    tensor(7.)
    """
    saved = check_portable(saved, state)
    run = run_of(optimizer, model)
    options: list[dict[str, Any]] = [{} for _ in optimizer.param_groups]
    if prefer != "own":
        _refuse_foreign(run.kind, saved)
    if prefer == "saved":
        options = list(_options(optimizer, run, saved))
    elif prefer != "own":  # the core need not be able to express the options then
        choose(hyperparameters_of(run), saved, prefer)
    groups = [{**group, **new} for group, new in zip(run.groups, options, strict=True)]
    owners = [(p, None if i is None else groups[i]) for p, i in run.named.values()]
    like = [None if group is None else _like(group, p) for p, group in owners]
    compensated = [group is not None and has_carry(group, p) for p, group in owners]
    carries = [p if has_carry else None for (p, _), has_carry in zip(owners, compensated, strict=True)]
    compensates = any(group["compensate"] for group in groups)
    rows = match_names(state, list(run.named), State(0, like, like, carries if compensates else None))
    new_states = [
        None if row[0] is None else _state_of(name, group, p, state.count, row, run.kind)
        for name, (p, group), row in zip(run.named, owners, rows, strict=True)
        if group is not None
    ]
    for group, new in zip(optimizer.param_groups, options, strict=True):
        for key, value in new.items():
            _set(group, key, value)
    for p, new_state in zip((p for p, group in owners if group is not None), new_states, strict=True):
        optimizer.state.pop(p, None)
        if new_state is not None:
            optimizer.state[p] = new_state


def _refuse_foreign(kind: Kind, saved: acprop_core.ACProp) -> None:
    """Refuse hyperparameters that no optimizer of this kind can have."""
    if apart := [f"{key}={getattr(saved, key)!r}" for key, x in kind.fixed.items() if getattr(saved, key) != x]:
        raise ValueError(
            f"torch.optim.Adam and AdamW cannot have {', '.join(apart)}, as the saved state has; import it into an "
            "acprop_torch.ACProp with these options, or use prefer='own' to continue as Adam does"
        )


def _options(optimizer: Optimizer, run: Run, saved: acprop_core.ACProp) -> Iterator[dict[str, Any]]:
    """Yield the options of each group that correspond to the saved hyperparameters."""
    for name in ("learning_rate", "weight_decay", "mask"):
        if callable(getattr(saved, name)):
            raise ValueError(
                f"the saved {name} is a callable, which a torch optimizer cannot have; pass another to load, or "
                "prefer='own' to import_state"
            )
    mask: Any = saved.mask or {}
    for i, group in enumerate(optimizer.param_groups):
        names = [name for name, (_, own) in run.named.items() if own == i]
        decay = {mask.get(name, True) for name in names}
        if len(decay) > 1 and saved.weight_decay:
            raise ValueError(
                f"some parameters of group {i} decay in the saved state and some do not; "
                "put these into a group of their own"
            )
        weight_decay = saved.weight_decay if any(decay) else 0.0
        if weight_decay and "decoupled_weight_decay" not in group and not run.groups[i]["decoupled_weight_decay"]:
            raise ValueError(
                f"weight_decay={weight_decay} of the saved state is decoupled, which Adam of torch before 2.7 cannot "
                "have; use AdamW, or prefer='own' to continue with the L2 form"
            )
        options = {
            "lr": saved.learning_rate,
            "betas": (saved.b1, saved.b2),
            "weight_decay": weight_decay,
            "decoupled_weight_decay": True,
            "maximize": False,
            **{key: getattr(saved, key) for key in OPTIONS},
            "moment_dtype": None if saved.moment_dtype is None else getattr(torch, saved.moment_dtype),
        }
        yield {key: value for key, value in options.items() if key in group}


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


def _state_of(
    name: str, group: dict[str, Any], p: Tensor, count: int, row: tuple[Any, Any, Any], kind: Kind
) -> dict[str, Tensor]:
    made = begin(group, p, float(count), kind)
    if has_carry(group, p):
        made["carry"] = torch.zeros_like(p, requires_grad=False)
    for key, x in zip((*kind.moments, "carry"), row, strict=True):
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

    # src_data_rank=None: each rank has the whole and cuts its own part; otherwise rank 0 sends one to each, as it does
    # in torch before 2.7, which cannot be asked
    cuts: Any = {"src_data_rank": None} if VERSION >= (2, 7) else {}
    return distribute_tensor(x, p.device_mesh, p.placements, **cuts).to_local()


def _from_numpy(x: Any) -> Tensor:
    import numpy as np

    x = np.array(x)  # torch takes no read-only memory
    if x.dtype.name == "bfloat16":  # ml_dtypes'
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)
