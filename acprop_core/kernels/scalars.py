"""Namespaces of the rule for Numba, in which every array is a number."""

import math
import types
from typing import Any

import numpy as np
from numba.extending import register_jitable

from acprop_core.kernels.element import OF_NUMBERS

_inlined = register_jitable(forceinline=True)


@_inlined
def _clip(x: Any, low: Any, high: Any) -> Any:
    # np.minimum and np.maximum treat NaN in a way that stops vectorisation; here too NaN stays NaN
    return low if x < low else (high if x > high else x)


@_inlined
def _maximum(x: Any, y: Any) -> Any:
    return x if x > y or x != x else y


@_inlined
def _where(condition: Any, x: Any, y: Any) -> Any:
    return x if condition else y


NAMESPACE = {
    **{"sqrt": np.sqrt, "abs": np.abs, "real": np.real, "conj": np.conj, "round": np.rint},
    **{"clip": _clip, "maximum": _maximum, "where": _where},
}
"""For `rule.step`; `rounded` must be added."""

for _function in OF_NUMBERS:
    register_jitable(_function)


# `rule.numbers_of` is called with an int and floats here, so it uses Python's `math`. But Numba must know the types of
# the rest too, which is for arrays and never runs.
@register_jitable
def _astype(x: Any, dtype: Any) -> Any:
    return x * 1


@register_jitable
def _full_like(x: Any, value: Any) -> Any:
    return value


@register_jitable
def _ones_like(x: Any) -> Any:
    return 1.0


@register_jitable
def _result_type(x: Any) -> Any:
    return x


MAKERS = types.ModuleType("makers")
"""For `rule.numbers_of`."""
vars(MAKERS).update(
    **{"expm1": math.expm1, "log": math.log, "float64": np.float64, "int32": np.int32, "where": _where},
    **{"astype": _astype, "full_like": _full_like, "ones_like": _ones_like, "result_type": _result_type},
)
