"""The names of a portable state: match them with the names here, or rename them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from acprop_core._optimizer import ACProp, State
from acprop_core.adapt import Row, called, check_row, dtype_name, with_values
from acprop_core.checkpoint._portable import by_name

Rename = Mapping[str, str | None] | Callable[[str], str | None]
Transform = Mapping[str, Callable[[Any], Any]] | Callable[[str, Any], Any]


def match_names(saved: State, names: Sequence[str], like: State) -> list[tuple[Any, Any, Any]]:
    """Return the saved moments and carry of each of `names`.

    Parameters
    ----------
    saved : State
        Dicts of arrays by dotted name.
    names : sequence of str
        The names here.
    like : State
        The state with which the host itself would begin: lists in the order of `names`. Its carry is None if the host
        keeps none.

    Returns
    -------
    list of (mu, nu, carry)
        None where the saved state has no array for it, or the host keeps no carry.

    Raises
    ------
    ValueError
        If names are missing or surplus, or shapes differ.
    TypeError
        If dtypes differ.

    Examples
    --------
    >>> import numpy as np
    >>> one, zeros = np.ones(1), [np.zeros(1)]
    >>> match_names(State(3, {"w": one}, {"w": one}), ["w"], State(0, zeros, zeros))
    [(array([1.]), array([1.]), None)]
    """
    carries = [None] * len(names) if like.carry is None else like.carry
    here = by_name(zip(names, zip(like.mu, like.nu, carries, strict=True), strict=True))
    known = {**saved.mu, **saved.nu}
    if missing := [name for name, own in here.items() if own[0] is not None and name not in known]:
        raise ValueError(
            f"the saved state lacks {_list(missing)}; it has {_list(list(saved.mu))}; use load(path, rename=...)"
        )
    present = [name for name in known if saved.mu.get(name) is not None or saved.nu.get(name) is not None]
    if surplus := [name for name in present if name not in here]:
        raise ValueError(
            f"the saved state has {_list(surplus)}, but there is no such parameter here; use load(path, rename=...), "
            "where None leaves it out"
        )
    kept = {} if like.carry is None or saved.carry is None else saved.carry
    rows = [(saved.mu.get(name), saved.nu.get(name), kept.get(name)) for name in names]
    for name, row, own in zip(names, rows, here.values(), strict=True):
        if (row[0] is None) != (row[1] is None):
            raise ValueError(f"one moment of {name!r} is None and the other is not; pass both or neither")
        for what, x, mine in zip(("first moment", "second moment", "carry"), row, own, strict=True):
            if x is not None:
                _check_match(what, name, x, mine, own[0])
    return rows


def _check_match(what: str, name: str, x: Any, mine: Any, first: Any) -> None:
    leaf = called(what, name)
    if mine is None and first is not None:
        raise TypeError(
            f"{leaf} is an array, but the parameter here is not of 16 bits; add it to the parameter, which can hold "
            "it, and take it out of the saved state"
        )
    if mine is None:
        raise ValueError(f"{leaf} is an array, but there is no parameter here; leave it out")
    if tuple(x.shape) != tuple(mine.shape):
        shapes = f"{tuple(x.shape)}, here it is {tuple(mine.shape)}"
        raise ValueError(f"{leaf} has shape {shapes}; use load(path, transform=...)")
    if dtype_name(x.dtype) != dtype_name(mine.dtype):
        raise TypeError(
            f"{leaf} has dtype {x.dtype}, here it is {dtype_name(mine.dtype)}; "
            f"{'' if what == 'carry' else 'set moment_dtype, or '}convert it by load(path, transform=...)"
        )


def rename_state(
    optimizer: ACProp, state: State, rename: Rename | None, transform: Transform | None
) -> tuple[ACProp, State]:
    """Return a portable state under other names and with other arrays.

    Parameters
    ----------
    optimizer : ACProp
        Its mask is renamed.
    state : State
        Dicts of arrays by dotted name.
    rename, transform : mapping, callable, or None
        As `load` takes them.

    Returns
    -------
    optimizer : ACProp
        With the new names in the mask.
    state : State
        Without the parameters whose new name is None.

    Raises
    ------
    TypeError, ValueError
        If `rename` or `transform` is not valid, has an unknown name, or does not lead to a valid state.

    Examples
    --------
    >>> import numpy as np
    >>> state = State(0, {"w": np.zeros((1, 2))}, {"w": np.zeros((1, 2))})
    >>> rename_state(ACProp(), state, {"w": "kernel"}, {"kernel": np.ravel})[1].mu
    {'kernel': array([0., 0.])}
    """
    for what, bridge in (("rename", rename), ("transform", transform)):
        if not (bridge is None or callable(bridge) or isinstance(bridge, Mapping)):
            raise TypeError(f"{what} is {bridge!r}; pass a mapping by name, or a callable")
    if isinstance(transform, Mapping) and (wrong := [name for name, x in transform.items() if not callable(x)]):
        raise TypeError(f"transform of {wrong[0]!r} is {transform[wrong[0]]!r}; pass a function from array to array")
    new = {name: _new_name(name, rename) for name in state.mu}
    _refuse_unknown("rename", rename, new)
    kept = {name: now for name, now in new.items() if now is not None}
    names = by_name((now, name) for name, now in kept.items())
    _refuse_unknown("transform", transform, names)
    mu, nu, *carry = (
        {now: _transformed(now, tree[name], transform) for now, name in names.items()}
        for tree in (state.mu, state.nu, state.carry)
        if tree is not None
    )
    for name in names:
        check_row(name, Row(None, None, mu[name], nu[name]), has_params=False)
    if isinstance(optimizer.mask, dict):
        optimizer = with_values(optimizer, mask={now: optimizer.mask[name] for now, name in names.items()})
    return optimizer, State(state.count, mu, nu, *carry)


def _new_name(name: str, rename: Rename | None) -> str | None:
    new = name if rename is None else rename(name) if callable(rename) else rename.get(name, name)
    if not isinstance(new, str | None):
        raise TypeError(f"rename makes {new!r} of {name!r}; return a name, or None to leave it out")
    return new


def _transformed(name: str, x: Any, transform: Transform | None) -> Any:
    import numpy as np

    if x is None or transform is None:
        return x
    if callable(transform):
        return np.asarray(transform(name, x))
    return np.asarray(transform[name](x)) if name in transform else x


def _refuse_unknown(what: str, mapping: Any, names: Mapping[str, Any]) -> None:
    if isinstance(mapping, Mapping) and (unknown := [name for name in mapping if name not in names]):
        raise ValueError(f"{what} names {_list(unknown)}, which the saved state lacks; it has {_list(list(names))}")


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:5])) or "nothing"
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
