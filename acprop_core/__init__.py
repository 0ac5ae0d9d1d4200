"""ACProp, written once against the Python array API standard: `ACProp`, its `State`, and `save` and `load` of a run.

The functions are pure, and take arrays of any library that follows the standard. Importing this package imports no
array library. The adapters acprop_optax, acprop_torch and acprop_stepper take the same steps through the interfaces of
their frameworks.
"""

import importlib
from typing import TYPE_CHECKING, Any

from acprop_core._optimizer import ACProp, State

if TYPE_CHECKING:
    from acprop_core.checkpoint import load, save

__all__ = ["ACProp", "State", "load", "save"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Imported when it is used, because files need NumPy and safetensors and nothing else here does.
    if name in ("load", "save"):
        return getattr(importlib.import_module("acprop_core.checkpoint"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
