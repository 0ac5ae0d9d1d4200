"""ACProp, written once against the Python array API standard. See `ACProp`."""

from acprop_core._checkpoint import load, save
from acprop_core._optimizer import ACProp, State

__all__ = ["ACProp", "State", "load", "save"]
__version__ = "0.1.0"
