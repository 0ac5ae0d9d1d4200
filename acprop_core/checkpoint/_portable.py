"""The state that every host can export and import: NumPy arrays by name, and hyperparameters as Python numbers.

NumPy is imported in the functions that need it, because acprop_torch imports this module and works without NumPy.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

from acprop_core._checks import called, check_arithmetic, check_compensation, check_count, check_mask
from acprop_core._containers import align, names_and_leaves
from acprop_core._dtypes import dtype_name
from acprop_core._optimizer import ACProp, Container, State
from acprop_core._quirks import has_no_content, readable_by_numpy
from acprop_core.adapt import with_values

HYPERPARAMETERS = tuple(field.name for field in dataclasses.fields(ACProp))
CALLABLES = ("learning_rate", "weight_decay", "mask")  # may be callables, which a file cannot hold


def to_numpy(what: str, name: str, x: Any) -> Any:
    """Return an array of any library as a NumPy array, and None as None.

    Parameters
    ----------
    what, name : str
        "first moment" or another kind of leaf, and the dotted name of its parameter, for the error.
    x : array or None
        The array. Its memory is shared where the library allows it.

    Returns
    -------
    numpy.ndarray or None
        bfloat16 has the dtype of ml_dtypes.

    Raises
    ------
    TypeError
        If the array is traced, has no content, or cannot be read for another reason.

    Examples
    --------
    >>> import numpy as np
    >>> to_numpy("first moment", "weight", np.zeros(2))
    array([0., 0.])
    """
    import numpy as np

    if x is None:
        return None
    check_arithmetic(what, name, x)
    if has_no_content(x):
        raise TypeError(
            f"{called(what, name)} is a meta tensor, without content; pass the state that export_state of a sharded "
            "optimizer returned on the first rank"
        )
    try:
        is_bfloat16 = dtype_name(getattr(x, "dtype", "")) == "bfloat16"
        array = np.asarray(readable_by_numpy(x, is_bfloat16))
        if is_bfloat16 and array.dtype == np.int16:
            import ml_dtypes

            return array.view(ml_dtypes.bfloat16)
        return array
    except Exception as error:  # libraries raise different types for arrays that are traced, abstract or on a device
        raise TypeError(f"{called(what, name)} cannot be made a NumPy array: {error}") from error


def by_name(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return (name, leaf) pairs as a dict.

    Parameters
    ----------
    pairs : iterable of (str, leaf)
        As `flatten` yields them.

    Returns
    -------
    dict
        From name to leaf.

    Raises
    ------
    ValueError
        If two leaves have one name.

    Examples
    --------
    >>> by_name([("a", 1), ("b", 2)])
    {'a': 1, 'b': 2}
    """
    named: dict[str, Any] = {}
    for name, leaf in pairs:
        if name in named:
            raise ValueError(f"two arrays are called {name!r}, but dotted paths must be unique; rename a key")
        named[name] = leaf
    return named


def to_portable(optimizer: ACProp, like: Container) -> ACProp:
    """Return `optimizer` with hyperparameters that are Python numbers, and the mask by dotted name.

    Parameters
    ----------
    optimizer : ACProp
        Its numbers may be 0-d arrays of any library.
    like : container
        In the structure of the parameters.

    Returns
    -------
    ACProp
        Callables are kept.

    Raises
    ------
    TypeError, ValueError
        If the mask does not match `like`.

    Examples
    --------
    >>> params = {"layer": {"weight": 0, "bias": 0}}
    >>> to_portable(ACProp(mask={"layer": True}), params).mask
    {'layer.weight': True, 'layer.bias': True}
    """
    values = {name: getattr(optimizer, name) for name in HYPERPARAMETERS}
    values = {name: float(value) if hasattr(value, "dtype") else value for name, value in values.items()}
    if optimizer.mask is not None and not callable(optimizer.mask):
        names, leaves = names_and_leaves(like)
        marks = check_mask(list(align(optimizer.mask, like, "the mask", prefix=True)), names, leaves)
        values["mask"] = by_name(zip(names, marks, strict=True))
    return with_values(optimizer, **values)


def check_portable(saved: ACProp, state: State) -> ACProp:
    """Return the hyperparameters of a state that is to be imported, with Python numbers.

    Parameters
    ----------
    saved : ACProp
        The saved hyperparameters.
    state : State
        The saved state.

    Returns
    -------
    ACProp
        As `to_portable` returns it.

    Raises
    ------
    TypeError, ValueError
        If `load` or `export_state` could not have returned the two.

    Examples
    --------
    >>> import numpy as np
    >>> check_portable(ACProp(np.float64(0.5)), State(0, {}, {})).learning_rate
    0.5
    """
    if not (isinstance(saved, ACProp) and isinstance(state, State)):
        raise TypeError(
            f"import_state got a {type(saved).__name__} and a {type(state).__name__}; pass the acprop_core.ACProp and "
            "the State that load or export_state returned"
        )
    trees = {"first moment": state.mu, "second moment": state.nu, "carry": {} if state.carry is None else state.carry}
    for what, tree in trees.items():
        if not isinstance(tree, dict):
            raise TypeError(
                "the saved moments are not dicts by name; pass the State that load or export_state returned"
            )
        for name, x in tree.items():
            if x is not None and not (hasattr(x, "shape") and hasattr(x, "dtype")):
                raise TypeError(f"{called(what, str(name))} is a {type(x).__name__} ({x!r:.40}); pass an array")
    if not isinstance(check_count(state.count), int):
        raise TypeError(f"the step count (state.count) is {state.count!r}; pass an int")
    check_compensation(saved.compensate, state.carry, state.mu)
    return to_portable(saved, state.mu)


def choose(own: ACProp, saved: ACProp, prefer: str | None) -> ACProp:
    """Return the hyperparameters to continue with.

    Parameters
    ----------
    own, saved : ACProp
        The host's hyperparameters and the saved ones, both portable.
    prefer : {"own", "saved"} or None
        Which to take. None refuses differences.

    Returns
    -------
    ACProp
        One of the two.

    Raises
    ------
    ValueError
        If the hyperparameters differ and `prefer` is None, or `prefer` is another value.

    Examples
    --------
    >>> choose(ACProp(b1=0.8), ACProp(b1=0.9), prefer="saved").b1
    0.9
    """
    if prefer not in (None, "own", "saved"):
        raise ValueError(f"prefer is {prefer!r}; use 'own' or 'saved', or None to refuse differences")
    if prefer is None and (lines := differences(own, saved)):
        raise ValueError(
            f"hyperparameters differ: {'; '.join(lines)}. Make them equal, or say which to take: "
            "prefer='own' or prefer='saved'"
        )
    return saved if prefer == "saved" else own


def differences(own: ACProp, saved: ACProp) -> list[str]:
    """Return a line for each hyperparameter that makes the two differ.

    Parameters
    ----------
    own, saved : ACProp
        The host's hyperparameters and the saved ones, both portable.

    Returns
    -------
    list of str
        Empty if the two take the same steps. Masks count only if both have weight decay.

    Examples
    --------
    >>> differences(ACProp(b1=0.8), ACProp())
    ['b1 is 0.8 here and 0.9 in the saved state']
    """
    pairs = {name: (getattr(own, name), getattr(saved, name)) for name in HYPERPARAMETERS}
    here, there = pairs.pop("mask")
    apart = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    if own.weight_decay and saved.weight_decay and here != there:
        if callable(here) or callable(there):
            apart["mask"] = here, there
        else:
            here, there = here or {}, there or {}
            marks = {name: (here.get(name, True), there.get(name, True)) for name in {**here, **there}}
            apart |= {f"mask of {name!r}": pair for name, pair in marks.items() if pair[0] != pair[1]}
    return [f"{name} is {mine!r} here and {theirs!r} in the saved state" for name, (mine, theirs) in apart.items()]
