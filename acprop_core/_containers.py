"""Containers of arrays: an array, or nested dicts, lists, tuples and namedtuples of arrays and None.

Anything else is a leaf; None means that there is no array. The name of a leaf is its dotted path,
``layers.0.weight``, as PyTorch names parameters.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from itertools import repeat
from typing import Any


def flatten(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (name, leaf) for every leaf of `tree`, depth first; the name of a bare array is empty."""
    children = _children(tree)
    if children is None:
        yield path, tree
        return
    for key, child in children.items():
        if isinstance(child, _NODES):
            yield from flatten(child, _join(path, key))
        else:  # without another generator: the five containers of a step of four small arrays then take a third less
            yield _join(path, key), child


def names_and_leaves(tree: Any) -> tuple[list[str], list[Any]]:
    """Return the names and the leaves of `tree`, in the same order."""
    pairs = list(flatten(tree))
    return [name for name, _ in pairs], [leaf for _, leaf in pairs]


def align(tree: Any, like: Any, what: str, prefix: bool = False, path: str = "") -> list[Any]:
    """Return the leaves of `tree` in the order of `like`, whose structure it must have.

    With `prefix`, a leaf of `tree` may stand for a whole sub-container of `like`.

    Raises
    ------
    ValueError
        If the structures differ; the message calls the tree `what` and names the place.
    """
    children, expected = _children(tree), _children(like)
    if expected is None and children is None:
        return [tree]
    if children is None and prefix:
        return [tree for _ in flatten(like)]
    if children is None or expected is None:
        have, want = ("one value" if x is None else "a container" for x in (children, expected))
        raise ValueError(
            f"{what}{_at(path)} is {have} ({type(tree).__name__}) where the parameters have {want} "
            f"({type(like).__name__}); use the structure of the parameters"
        )
    if children.keys() != expected.keys():
        if missing := [_join(path, key) for key in expected if key not in children]:
            raise ValueError(f"{what} lacks {_list(missing)}; use the structure of the parameters")
        surplus = [_join(path, key) for key in children if key not in expected]
        raise ValueError(f"{what} has {_list(surplus)}, which the parameters lack; leave that out")
    leaves = [children[key] for key in expected]
    if _are_leaves([*leaves, *expected.values()]):
        return leaves
    return [x for key, child in expected.items() for x in align(children[key], child, what, prefix, _join(path, key))]


def unflatten(like: Any, leaves: Iterable[Any]) -> Any:
    """Return a container with the structure of `like` and these leaves, in the order of `flatten`."""
    leaves = iter(leaves)
    children = _children(like)
    if children is None:
        return next(leaves)
    if _are_leaves(children.values()):
        new = dict(zip(children, leaves, strict=False))
    else:
        new = {key: unflatten(child, leaves) for key, child in children.items()}
    if type(like) is dict:
        return new
    if isinstance(like, dict):
        tree = copy.copy(like)  # keeps subclasses that carry more than their items, such as defaultdict
        tree.update(new)
        return tree
    return type(like)(**new) if hasattr(like, "_fields") else type(like)(new.values())


_NODES = (dict, list, tuple)


def _children(node: Any) -> Mapping[Any, Any] | None:
    if isinstance(node, dict):
        return node
    if isinstance(node, list | tuple):
        fields: Iterable[Any] = getattr(node, "_fields", range(len(node)))
        return dict(zip(fields, node, strict=True))
    return None


def _are_leaves(children: Iterable[Any]) -> bool:
    return not any(map(issubclass, set(map(type, children)), repeat(_NODES)))  # one question for each type


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _at(path: str) -> str:
    return f" at {path!r}" if path else ""


def _list(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:3]))
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
