"""Steppers that are made from another: by pickling, deep-copying, or importing a state."""

from typing import Any

import numpy as np

from acprop_core import ACProp, State
from acprop_core.adapt import flatten, unflatten


def new(kind: Any, params: Any, functional: ACProp, options: tuple[Any, ...]) -> Any:
    """Return a stepper with options that another has; the constructor would refuse or warn of some of them."""
    stepper = kind.__new__(kind)
    stepper._begin(params, functional, *options)
    return stepper


def restored(kind: Any, params: Any, functional: ACProp, options: tuple[Any, ...], state: State) -> Any:
    """Return an unpickled or copied stepper, which owns its parameters: those that are read-only become copies."""
    # joblib maps large arrays from a file, and Ray and others unpickle from a buffer that is shared
    leaves = [x for _, x in flatten(params)]
    own = [np.array(x) if isinstance(x, np.ndarray) and not x.flags.writeable else x for x in leaves]
    if any(x is not y for x, y in zip(own, leaves, strict=True)):
        params = unflatten(params, own)
    stepper = new(kind, params, functional, options)
    stepper.load_state(state)
    return stepper
