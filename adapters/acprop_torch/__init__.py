"""ACProp as a torch.optim.Optimizer: the rule of acprop_core, run on parameter groups in place."""

from acprop_torch import _version as _version  # first: it refuses a torch that is too old
from acprop_torch._optimizer import ACProp
from acprop_torch._portable import export_state, import_state

__all__ = ["ACProp", "export_state", "import_state"]
