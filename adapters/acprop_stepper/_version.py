"""Refuses a NumPy that is too old."""

import numpy as np

from acprop_core.adapt import check_version

check_version("acprop_stepper", np, (2, 0))
