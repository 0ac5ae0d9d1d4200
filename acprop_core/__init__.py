"""ACProp, written once against the Python array API standard: `ACProp`, its `State`, and `save` and `load` of a run.

The functions are pure, and take arrays of any library that follows the standard. Importing this package imports no
array library. The adapters acprop_optax, acprop_torch and acprop_stepper give the same steps in the habits of their
frameworks.
"""

from acprop_core._checkpoint import load, save
from acprop_core._optimizer import ACProp, State

__all__ = ["ACProp", "State", "load", "save"]
__version__ = "0.1.0"
