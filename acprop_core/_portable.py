"""What every host shares to hand a state on: names, arrays of NumPy, hyperparameters as plain numbers, and what fits.

A portable state is an `ACProp` whose hyperparameters are Python's own, and a `State` whose moments are dicts of NumPy
arrays by dotted name; None stands for a parameter that has no moments yet. So is its carry, if there is one. The
adapters make and take such pairs.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from array_api_compat import array_namespace, is_cupy_array, is_torch_array

from acprop_core._checks import (
    called,
    check_arithmetic,
    check_compensation,
    check_count,
    check_leaves,
    check_mask,
    dtype_name,
)
from acprop_core._containers import align, flatten
from acprop_core._optimizer import ACProp, Container, State

Rename = Mapping[str, str | None] | Callable[[str], str | None]
Transform = Mapping[str, Callable[[Any], Any]] | Callable[[str, Any], Any]
HYPERPARAMETERS = tuple(field.name for field in dataclasses.fields(ACProp))


def to_numpy(what: str, name: str, x: Any) -> Any:
    """Return an array of any library as a NumPy array, and None as None."""
    import numpy as np

    if x is None:
        return None
    check_arithmetic(what, name, x)
    if is_torch_array(x) and x.is_meta:
        raise TypeError(
            f"{called(what, name)} is a meta tensor, without content; take what export_state of a sharded optimizer "
            "returned on the first rank"
        )
    try:
        if is_torch_array(x):
            x = x.detach().cpu().resolve_conj()
            if dtype_name(x.dtype) == "bfloat16":  # NumPy has it from ml_dtypes, which torch does not know
                import ml_dtypes

                return x.contiguous().view(array_namespace(x).int16).numpy().view(ml_dtypes.bfloat16)
        elif is_cupy_array(x):
            x = x.get()
        return np.asarray(x)
    except Exception as error:  # whatever a library raises for what is traced, abstract or on a device
        raise TypeError(f"{called(what, name)} cannot be made a NumPy array: {error}") from error


def by_name(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return (name, leaf) pairs as a dict; refuse a name that stands for two."""
    named: dict[str, Any] = {}
    for name, leaf in pairs:
        if name in named:
            raise ValueError(f"two arrays are called {name!r}; dotted paths must tell them apart: rename a key")
        named[name] = leaf
    return named


def portable(optimizer: ACProp, like: Container) -> ACProp:
    """Return `optimizer` with Python's numbers and the mask by dotted name, for parameters structured as `like`."""
    values = {name: getattr(optimizer, name) for name in HYPERPARAMETERS}
    for name, value in values.items():
        if hasattr(value, "dtype"):
            values[name] = float(value)
    if optimizer.mask is not None and not callable(optimizer.mask):
        pairs = list(flatten(like))
        names = [name for name, _ in pairs]
        marks = check_mask(
            list(align(optimizer.mask, like, "the mask", prefix=True)), names, [leaf for _, leaf in pairs]
        )
        values["mask"] = by_name(zip(names, marks, strict=True))
    return ACProp(**values)


def checked(saved: ACProp, state: State) -> ACProp:
    """Return the hyperparameters of a state that is to be imported, portable; refuse what is not such a pair."""
    if not (isinstance(saved, ACProp) and isinstance(state, State)):
        raise TypeError(
            f"to import are a {type(saved).__name__} and a {type(state).__name__}; give the acprop_core.ACProp and the "
            "State that load or export_state returned"
        )
    if not all(isinstance(tree, dict) for tree in (state.mu, state.nu, state.carry or {})):
        raise TypeError("the saved moments are no dicts by name; give the State that load or export_state returned")
    for what, tree in (("first moment", state.mu), ("second moment", state.nu)):
        for name, x in tree.items():
            if x is not None and not (hasattr(x, "shape") and hasattr(x, "dtype")):
                raise TypeError(f"{called(what, str(name))} is a {type(x).__name__} ({x!r:.40}); give an array")
    if not isinstance(check_count(state.count), int):
        raise TypeError(f"the step count (state.count) is {state.count!r}; give an int")
    check_compensation(saved.compensate, state.carry)
    return portable(saved, state.mu)


def choose(own: ACProp, saved: ACProp, prefer: str | None) -> ACProp:
    """Return the hyperparameters to go on with; refuse those that differ, unless `prefer` says whose to take."""
    if prefer not in (None, "own", "saved"):
        raise ValueError(f"prefer is {prefer!r}; give 'own' or 'saved', or None to refuse what differs")
    if prefer is None and (lines := differences(own, saved)):
        raise ValueError(
            f"hyperparameters differ: {'; '.join(lines)}. Make them equal, or say whose to take: "
            "prefer='own' or prefer='saved'"
        )
    return saved if prefer == "saved" else own


def differences(own: ACProp, saved: ACProp) -> list[str]:
    """Return a line for each hyperparameter that makes the two differ; a mask matters only where there is decay."""
    lines = [
        f"{name} is {mine!r} here and {theirs!r} in the saved state"
        for name in HYPERPARAMETERS
        if name != "mask" and (mine := getattr(own, name)) != (theirs := getattr(saved, name))
    ]
    if own.weight_decay and saved.weight_decay and own.mask != saved.mask:
        if callable(own.mask) or callable(saved.mask):
            lines.append(f"mask is {own.mask!r} here and {saved.mask!r} in the saved state")
        else:
            here, there = own.mask or {}, saved.mask or {}
            apart = [name for name in {**here, **there} if here.get(name, True) != there.get(name, True)]
            lines += [
                f"mask is {here.get(n, True)} here and {there.get(n, True)} in the saved state for {n!r}" for n in apart
            ]
    return lines


def arrange(saved: State, names: Sequence[str], like: State) -> list[tuple[Any, Any, Any]]:
    """Return (mu, nu, carry) for each of `names`, None where the saved state has nothing for it or the host no carry.

    `like` holds, as lists in the order of `names`, what the host itself would begin with; no carry if it keeps none.

    Raises
    ------
    ValueError
        If names are missing or surplus, or shapes differ.
    TypeError
        If dtypes differ.
    """
    by_name((name, None) for name in names)
    carries = [None] * len(names) if like.carry is None else like.carry
    here = dict(zip(names, zip(like.mu, like.nu, carries, strict=True), strict=True))
    if missing := [
        name for name, (own, *_) in here.items() if own is not None and name not in {**saved.mu, **saved.nu}
    ]:
        raise ValueError(f"the saved state lacks {_list(missing)}; it has {_list(list(saved.mu))}. Use rename=")
    there = [name for moments in (saved.mu, saved.nu) for name, x in moments.items() if x is not None]
    if surplus := [name for name in dict.fromkeys(there) if name not in here]:
        raise ValueError(
            f"the saved state has {_list(surplus)}, for which there is no parameter here; use rename=, whose None "
            "leaves out"
        )
    kept = {} if like.carry is None or saved.carry is None else saved.carry
    rows = [(saved.mu.get(name), saved.nu.get(name), kept.get(name)) for name in names]
    for name, row, own in zip(names, rows, here.values(), strict=True):
        if (row[0] is None) != (row[1] is None):
            raise ValueError(f"of the moments of {name!r} one is None and the other is not; give both or neither")
        for what, x, mine in zip(("first moment", "second moment", "carry"), row, own, strict=True):
            if x is None:
                continue
            if mine is None and own[0] is not None:
                raise TypeError(
                    f"{called(what, name)} is an array, but the parameter here is not of 16 bits; add it to the "
                    "parameter, which can hold it, and take it out of the saved state"
                )
            if mine is None:
                raise ValueError(
                    f"{called(what, name)} is an array, for which there is no parameter here; leave it out"
                )
            if tuple(x.shape) != tuple(mine.shape):
                raise ValueError(
                    f"{called(what, name)} has shape {tuple(x.shape)}, here it is {tuple(mine.shape)}; use transform="
                )
            if dtype_name(x.dtype) != dtype_name(mine.dtype):
                raise TypeError(
                    f"{called(what, name)} has dtype {x.dtype}, here it is {dtype_name(mine.dtype)}; set moment_dtype, "
                    "or convert it by transform="
                )
    return rows


def renamed(
    optimizer: ACProp, state: State, rename: Rename | None, transform: Transform | None
) -> tuple[ACProp, State]:
    """Return a portable state under other names, without those whose new name is None, and with arrays transformed."""
    for what, bridge in (("rename", rename), ("transform", transform)):
        if not (bridge is None or callable(bridge) or isinstance(bridge, Mapping)):
            raise TypeError(f"{what} is {bridge!r}; give a mapping by name, or a callable")
    if isinstance(transform, Mapping) and (wrong := [name for name, x in transform.items() if not callable(x)]):
        raise TypeError(f"transform of {wrong[0]!r} is {transform[wrong[0]]!r}; give a function from array to array")
    new = {name: _new_name(name, rename) for name in state.mu}
    _refuse_unknown("rename", rename, new)
    kept = {name: now for name, now in new.items() if now is not None}
    trees = [tree for tree in (state.mu, state.nu, state.carry) if tree is not None]
    trees = [by_name((now, tree[name]) for name, now in kept.items()) for tree in trees]
    _refuse_unknown("transform", transform, trees[0])
    mu, nu, *carry = ({name: _transformed(name, x, transform) for name, x in tree.items()} for tree in trees)
    check_leaves({"first moment": list(mu.values()), "second moment": list(nu.values())}, list(mu))
    if isinstance(optimizer.mask, dict):
        mask = {now: optimizer.mask[name] for name, now in kept.items()}
        optimizer = dataclasses.replace(optimizer, mask=mask)
    return optimizer, State(state.count, mu, nu, *carry)


def _new_name(name: str, rename: Rename | None) -> str | None:
    new = name if rename is None else rename(name) if callable(rename) else rename.get(name, name)
    if not isinstance(new, str | None):
        raise TypeError(f"rename makes {new!r} of {name!r}; give a name, or None to leave it out")
    return new


def _transformed(name: str, x: Any, transform: Transform | None) -> Any:
    import numpy as np

    if x is None or transform is None:
        return x
    if callable(transform):
        return np.asarray(transform(name, x))
    return np.asarray(transform[name](x)) if name in transform else x


def _refuse_unknown(what: str, mapping: Any, names: Iterable[str]) -> None:
    if isinstance(mapping, Mapping) and (unknown := [name for name in mapping if name not in set(names)]):
        raise ValueError(f"{what} names {_list(unknown)}, which the saved state lacks; it has {_list(list(names))}")


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:5])) or "nothing"
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
