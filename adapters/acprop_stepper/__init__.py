"""ACProp for NumPy and CuPy arrays without a framework: in place, at the speed of memory, all of a step or nothing."""

from acprop_stepper import _version as _version  # first: it refuses a NumPy that is too old
from acprop_stepper._portable import export_state, import_state
from acprop_stepper._stepper import Stepper, StepRecord

__all__ = ["StepRecord", "Stepper", "export_state", "import_state"]
