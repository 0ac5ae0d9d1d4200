"""Pytrees: their leaves as rows, their names, and masks."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from acprop_core.adapt import Row, called, check_row


def side_by_side(
    grads: Any, state: Any, params: Any, compensate: bool = False, carry: Any = None
) -> tuple[list[Row], Any]:
    """Return the leaves as rows, None among them, and their tree; refuse trees that do not match."""
    if not isinstance(state, optax.ScaleByBeliefState):
        raise TypeError(f"the state is a {type(state).__name__}; pass the one that init or update returned")
    names, mu, tree = named_leaves("first moment", state.mu)
    absent = [None] * len(names)
    columns: dict[str, list[Any]] = {"parameter": absent, "carry": absent}
    others = {"second moment": state.nu, "gradient": grads}
    others |= {} if params is None else {"parameter": params}
    others |= {"carry": carry} if compensate else {}
    for what, other in others.items():
        try:
            leaves = tree.flatten_up_to(other)
        except ValueError as error:
            raise ValueError(f"the {what}s are not in the structure of the first moments: {error}") from None
        columns[what] = [as_jax(what, name, x) for name, x in zip(names, leaves, strict=True)]
    order = (columns["parameter"], columns["gradient"], mu, columns["second moment"], columns["carry"])
    rows = [Row(*row) for row in zip(*order, strict=True)]
    for name, row in zip(names, rows, strict=True):
        check_row(name, row, compensate, has_params=params is not None)
    return rows, tree


def join(tree: Any, results: list[Any], state: optax.ScaleByBeliefState) -> tuple[Any, optax.ScaleByBeliefState]:
    """Return the updates and the next state."""
    updates, mu, nu = (tree.unflatten([result[i] for result in results]) for i in range(3))
    return updates, optax.ScaleByBeliefState(optax.safe_increment(state.count), mu, nu)


def marks(mask: Any, params: Any) -> Any:
    """Return a mask as a tree, made from the parameters if it is callable; refuse leaves that are not bools.

    Optax would take any leaf for its truth, "no" for True.
    """
    leaves = jax.tree.leaves(mask)
    if leaves and all(map(callable, leaves)):  # asked as in optax, because a module that is a mask may be callable too
        mask = mask(params)
    for path, mark in jax.tree_util.tree_flatten_with_path(mask)[0]:
        if str(getattr(mark, "dtype", type(mark).__name__)) != "bool" or getattr(mark, "shape", ()) != ():
            raise TypeError(f"{called('mask', name_of(path))} is {mark!r}; use True (decay) or False")
    try:
        jax.tree.map(lambda mark, subtree: None, mask, params)
    except ValueError as error:
        raise ValueError(f"the mask is not in the structure of the parameters: {error}") from None
    return mask


def name_of(path: Any) -> str:
    """Return the dotted name of a leaf."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def named_leaves(what: str, tree: Any) -> tuple[list[str], list[Any], Any]:
    """Return the names of the leaves, the leaves as arrays, and their tree."""
    pairs, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is None)
    names = [name_of(path) for path, _ in pairs]
    return names, [as_jax(what, name, x) for name, (_, x) in zip(names, pairs, strict=True)], structure


def as_jax(what: str, name: str, x: Any) -> Any:
    """Return a leaf as an array; None and abstract arrays as they are. Python's integers count as floats."""
    if x is None or isinstance(x, jax.ShapeDtypeStruct):
        return x
    try:
        x = jnp.asarray(x)
    except (TypeError, ValueError):  # ValueError of some containers, which arrive here if structures differ
        raise TypeError(
            f"{called(what, name)} is a {type(x).__name__} ({x!r:.40}); pass an array or a number"
        ) from None
    is_python_int = getattr(x, "weak_type", False) and jnp.issubdtype(x.dtype, jnp.integer)  # keys have no weak_type
    return x.astype(float) if is_python_int else x
