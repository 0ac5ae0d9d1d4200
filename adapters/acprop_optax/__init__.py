"""ACProp as an optax gradient transformation: the rule of acprop_core, walked over pytrees.

The states are optax's own classes, so any code that reads the state of ``optax.contrib.acprop`` reads these.
"""

from acprop_optax import _version as _version  # first: it refuses a JAX or optax that is too old
from acprop_optax._portable import export_state, import_state
from acprop_optax._transform import CarryState, acprop, scale_by_acprop

__all__ = ["CarryState", "acprop", "export_state", "import_state", "scale_by_acprop"]
