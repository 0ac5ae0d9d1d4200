"""Pytrees: their leaves as rows, their names, and masks."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from acprop_core.adapt import Row, called, check_row


def side_by_side(
    grads: Any, state: Any, params: Any, compensate: bool = False, carry: Any = None
) -> tuple[list[Row], Any]:
    """Return the leaves as rows, None among them, and their tree; refuse trees that do not match.

    Rows without gradient are not checked, because no step is computed from them. If a row has no moments either, its
    parameter may be of any type, such as a function in an equinox module, and is None in the row.
    """
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
            columns[what] = tree.flatten_up_to(other)
        except ValueError as error:
            raise ValueError(f"the {what}s are not in the structure of the first moments: {error}") from None
    columns["gradient"] = [
        None if is_gradient_of_none(grad, m) else grad for m, grad in zip(mu, columns["gradient"], strict=True)
    ]
    used = [any(x is not None for x in leaves) for leaves in zip(mu, columns["gradient"], strict=True)]
    columns["parameter"] = [x if use else None for x, use in zip(columns["parameter"], used, strict=True)]
    for what, column in columns.items():
        columns[what] = [as_jax(what, name, x) for name, x in zip(names, column, strict=True)]
    order = (columns["parameter"], columns["gradient"], mu, columns["second moment"], columns["carry"])
    rows = [Row(*row) for row in zip(*order, strict=True)]
    for name, row in zip(names, rows, strict=True):
        if row.grad is not None:
            check_row(name, row, compensate, has_params=params is not None)
    return rows, tree


def is_gradient_of_none(grad: Any, mu: Any) -> bool:
    """Return whether this is the gradient that JAX gives to integers, bools and keys: of its dtype float0."""
    return (
        getattr(grad, "dtype", None) == jax.dtypes.float0
        and mu is not None
        and not jnp.issubdtype(mu.dtype, jnp.inexact)
    )


def widened(row: Row) -> Row:
    """Return a row whose update has the wider of the gradient's and the parameter's dtype, as in ``optax.adamw``.

    A carry is the rounding error of an addition in the parameter's dtype, so such a row stays as it is.
    """
    if row.param is None or row.grad is None or row.carry is not None:
        return row
    if row.param.dtype == row.grad.dtype and not row.param.weak_type:
        return row
    with jax.numpy_dtype_promotion("standard"):
        return row._replace(param=row.param.astype(jnp.promote_types(row.param.dtype, row.grad.dtype)))


def join(
    tree: Any, results: list[Any], state: optax.ScaleByBeliefState, grads: Any
) -> tuple[Any, optax.ScaleByBeliefState]:
    """Return the updates and the next state."""
    updates, mu, nu = ([result[i] for result in results] for i in range(3))
    for i, grad in enumerate(tree.flatten_up_to(grads)):
        if is_gradient_of_none(grad, mu[i]) and not jnp.issubdtype(mu[i].dtype, jax.dtypes.prng_key):
            updates[i] = mu[i]  # zeros of the leaf's dtype, because ``optax.apply_updates`` cannot add None or float0
    count = optax.safe_increment(state.count)
    return tree.unflatten(updates), optax.ScaleByBeliefState(count, tree.unflatten(mu), tree.unflatten(nu))


def marks(mask: Any, params: Any) -> Any:
    """Return a mask as a tree of bools, made from the parameters if it is callable; refuse leaves of other values.

    Exact 0 and 1 are bools. Optax would take any leaf for its truth, "no" for True.
    """
    leaves = jax.tree.leaves(mask)
    if leaves and all(map(callable, leaves)):  # asked as in optax, because a module that is a mask may be callable too
        mask = mask(params)
    for path, mark in jax.tree_util.tree_flatten_with_path(mask)[0]:
        if not is_bool(mark):
            raise TypeError(f"{called('mask', name_of(path))} is {mark!r}; use True (decay) or False")
    try:
        return jax.tree.map(lambda mark, subtree: bool(mark), mask, params)
    except ValueError as error:
        raise ValueError(f"the mask is not in the structure of the parameters: {error}") from None


def is_bool(mark: Any) -> bool:
    """Return whether a mark is True or False, as a bool, a 0-d array, or 1 or 0."""
    dtype = getattr(mark, "dtype", np.dtype(type(mark)))
    if np.ndim(mark) or (not jnp.issubdtype(dtype, np.bool_) and not jnp.issubdtype(dtype, np.integer)):
        return False
    return mark in (0, 1)


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
        x = x if isinstance(x, jax.Array) else jnp.asarray(x)
    except (TypeError, ValueError):  # ValueError of some containers, which arrive here if structures differ
        raise TypeError(
            f"{called(what, name)} is a {type(x).__name__} ({x!r:.40}); pass an array or a number"
        ) from None
    is_python_int = getattr(x, "weak_type", False) and jnp.issubdtype(x.dtype, jnp.integer)  # keys have no weak_type
    return x.astype(float) if is_python_int else x
