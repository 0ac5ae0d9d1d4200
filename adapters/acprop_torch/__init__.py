"""ACProp as a torch.optim.Optimizer: the rule of acprop_core, run on parameter groups in place."""

from acprop_torch._optimizer import ACProp

__all__ = ["ACProp"]
