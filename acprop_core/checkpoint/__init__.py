"""A run in one file, `save` and `load`; and, for adapters, the state that every host can import.

A portable state is a pair. Its `ACProp` has hyperparameters that are Python numbers, and its `State` has moments that
are dicts of NumPy arrays by dotted name. None stands for a parameter without moments.
"""

from acprop_core.checkpoint._file import load, save
from acprop_core.checkpoint._names import match_names, rename_state
from acprop_core.checkpoint._portable import (
    HYPERPARAMETERS,
    by_name,
    check_portable,
    choose,
    differences,
    to_numpy,
    to_portable,
)

__all__ = [
    "HYPERPARAMETERS",
    "by_name",
    "check_portable",
    "choose",
    "differences",
    "load",
    "match_names",
    "rename_state",
    "save",
    "to_numpy",
    "to_portable",
]
