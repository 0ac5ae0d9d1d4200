"""Portable state: from a stepper to `acprop_core.save`, and from `acprop_core.load` to a stepper."""

from acprop_core import ACProp, State
from acprop_core.adapt import flatten, unflatten, with_values
from acprop_core.checkpoint import by_name, check_portable, choose, match_names, to_numpy, to_portable
from acprop_stepper._stepper import Stepper


def export_state(stepper: Stepper) -> tuple[ACProp, State]:
    """Return hyperparameters and state of a stepper, for `acprop_core.save` or another adapter's `import_state`.

    Parameters
    ----------
    stepper : Stepper
        Its `clip_norm`, `nonfinite`, `engine` and `threads` are its own and are not exported.

    Returns
    -------
    ACProp
        A mask is by name.
    State
        Copies, as NumPy arrays by dotted name.

    Raises
    ------
    ValueError
        If two parameters have one dotted name.
    TypeError
        If it is not a stepper.

    Examples
    --------
    >>> import numpy as np
    >>> stepper = Stepper({"layer": [np.ones(2)]}, 1e-3, clip_exponent=0.25)
    >>> hyper, state = export_state(stepper)
    >>> hyper.learning_rate, state.mu
    (0.001, {'layer.0': array([0., 0.])})
    """
    _check(stepper)
    state = stepper.state
    kept = (
        {name: to_numpy("moment", name, x) for name, x in by_name(flatten(tree)).items()}
        for tree in (state[1:] if stepper.functional.compensate else state[1:3])
    )
    return _hyperparameters(stepper), State(state.count, *kept)


def import_state(stepper: Stepper, saved: ACProp, state: State, *, prefer: str | None = None) -> None:
    """Give a stepper the state that `acprop_core.load` or an `export_state` returned; it is copied.

    Parameters
    ----------
    stepper : Stepper
        Its parameters have the dotted names of the state.
    saved : ACProp
        The hyperparameters of the state.
    state : State
        Moments by name, in the shapes of the parameters and the dtypes that the stepper keeps; None becomes zeros.
    prefer : {"own", "saved"}, optional
        Whose hyperparameters to continue with if they differ; by default, differences are refused.

    Raises
    ------
    ValueError
        If hyperparameters differ, names are missing or surplus, or shapes differ; nothing has changed then.
    TypeError
        If dtypes differ, or an argument is of a wrong type; nothing has changed then.
    RuntimeError
        If called from within a step of this stepper.

    Examples
    --------
    >>> import numpy as np
    >>> stepper = Stepper({"w": np.ones(2)}, 1e-3, clip_exponent=0.25)
    >>> zeros = {"w": np.zeros(2)}
    >>> hyper = ACProp(1e-3, clip_exponent=0.25)
    >>> import_state(stepper, hyper, State(7, zeros, zeros))
    >>> stepper.state.count
    7
    """
    _check(stepper)
    saved = check_portable(saved, state)
    chosen = choose(_hyperparameters(stepper), saved, prefer)
    target = stepper._with(saved) if chosen is saved else stepper
    fresh = target.functional.init(target.params)
    trees = [tree for tree in fresh[1:] if tree is not None]
    leaves = [[leaf for _, leaf in flatten(tree)] for tree in trees]
    rows = match_names(state, [name for name, _ in flatten(fresh.mu)], State(0, *leaves))
    kept = (
        [zero if row[i] is None else target._xp.asarray(row[i]) for row, zero in zip(rows, zeros, strict=True)]
        for i, zeros in enumerate(leaves)
    )
    target.load_state(State(state.count, *map(unflatten, trees, kept)))
    if target is not stepper:
        stepper._become(target)


def _check(stepper: Stepper) -> None:
    if not isinstance(stepper, Stepper):
        raise TypeError(f"the stepper is a {type(stepper).__name__}; pass an acprop_stepper.Stepper")


def _hyperparameters(stepper: Stepper) -> ACProp:
    optimizer = stepper.functional
    if callable(optimizer.mask):  # the parameters are known, so its bools can be recorded
        optimizer = with_values(optimizer, mask=optimizer.mask(stepper.params))
    return to_portable(optimizer, stepper.params)
