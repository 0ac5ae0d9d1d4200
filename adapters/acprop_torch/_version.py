"""Which torch is installed, and the oldest that works."""

import torch

OLDEST = (2, 5)

VERSION = tuple(map(int, torch.__version__.split(".")[:2]))

if VERSION < OLDEST:
    raise ImportError(
        f"acprop_torch needs torch {'.'.join(map(str, OLDEST))} or newer, and torch {torch.__version__} is installed; "
        "upgrade torch"
    )
