"""Which torch is installed; an older one than the oldest that works is refused."""

import torch

from acprop_core.adapt import check_version

VERSION = check_version("acprop_torch", torch, (2, 5, 1))
