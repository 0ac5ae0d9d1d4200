"""Which torch is installed, and the oldest that works."""

import torch

OLDEST = (2, 5)

VERSION = tuple(map(int, torch.__version__.split(".")[:2]))

if VERSION < OLDEST:
    raise ImportError(
        f"acprop_torch needs torch {OLDEST[0]}.{OLDEST[1]} or newer, and torch {torch.__version__} is installed; "
        "upgrade torch"
    )
