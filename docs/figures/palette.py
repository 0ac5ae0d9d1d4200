"""One look for all figures: a colour for each optimizer, on every page, and a size that a phone can show.

Colours are of Okabe and Ito, which the colour-blind tell apart. Several ways to step of one optimizer share its hue and
differ in shade and marker. A figure is `WIDTH` inches wide: on a screen of 390 pixels its letters have about ten.
"""

from pathlib import Path
from typing import Any

import matplotlib as mpl

WIDTH = 6.0
STYLE = {
    "font.size": 12,
    "axes.titlesize": 12,
    "axes.labelsize": 12,
    "legend.fontsize": 12,
    "legend.frameon": False,
    "legend.handlelength": 1.2,
    "legend.handletextpad": 0.5,
    "legend.columnspacing": 1.0,
    "legend.borderaxespad": 0.1,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
MARKERS = "osv^DXP*<>hpd8"
COLOURS = {
    "ACProp": "#0072B2",
    "ACProp without the clip": "#56B4E9",  # where both are in one panel
    "Adam": "#D55E00",
    "AdamW": "#D55E00",
    "AdaBelief": "#009E73",
    "AdaShift": "#CC79A7",
    "RMSProp": "#E69F00",
    "SGD with momentum": "#111111",
}
# The contenders of the benchmarks of steps: a shade each
CONTENDERS = {
    "ACProp, fused": COLOURS["ACProp"],
    "acprop_optax": COLOURS["ACProp"],
    "Stepper, Numba": COLOURS["ACProp"],
    "ACProp, default flags": "#56B4E9",
    "ACProp, foreach": "#56B4E9",
    "Stepper, threads=2": COLOURS["ACProp"],
    "Stepper, tiles": "#56B4E9",
    "ACProp, for-loop": "#7B8FD9",
    "functional core": "#7B8FD9",
    "ACProp, compiled step": "#1B2A6B",
    "ACProp, fused without Numba": "#4B3FBF",
    "ACProp, fused, compensate": "#00A0C6",
    "acprop_optax, compensate": "#00A0C6",
    "Stepper, Numba, compensate": "#00A0C6",
    "eager ACProp": "#767676",  # ACProp of others
    "optax.contrib.acprop": "#767676",
    "AdamW, fused": COLOURS["AdamW"],
    "optax.adamw": COLOURS["AdamW"],
    "scikit-learn Adam": COLOURS["Adam"],
    "AdamW, foreach": "#E69F00",
    "torch.optim.AdamW": "#E69F00",
    "thinc Adam": "#E69F00",
    "optimi AdamW": "#9C4A1A",
    "optimi AdamW, Kahan": "#6B2E0B",
    "optax.adabelief": COLOURS["AdaBelief"],
    "pytorch_optimizer AdaBelief": COLOURS["AdaBelief"],
    "eager torch, textbook form": "#333333",  # the last shade: markers go by their order
}


def look(contender: str) -> dict[str, str]:
    """Return the colour and the marker of a contender of the benchmarks of steps, the same in every panel."""
    colour = CONTENDERS[contender]
    shades = list(dict.fromkeys(CONTENDERS.values()))
    return {"color": colour, "marker": MARKERS[shades.index(colour)]}


def pyplot() -> Any:
    """Return matplotlib's pyplot, without a window and in the style of all figures."""
    mpl.use("agg")
    mpl.rcParams.update(STYLE)
    from matplotlib import pyplot as plt

    return plt


def save(figure: Any, file: Path) -> None:
    """Write the picture, twice as fine as a phone shows it, and close it."""
    figure.savefig(file, dpi=160)
    pyplot().close(figure)
