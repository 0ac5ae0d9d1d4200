"""A pytest plugin: optax's own tests, with our transformations in the place of optax's.

    python -m pytest -p optax_in_place --pyargs optax.contrib._common_test

runs, of the tests that are parametrised by optimizers, those of the ones that were replaced.
"""

from typing import Any

import optax
from optax._src import alias

import acprop_optax

optax.contrib.acprop = acprop_optax.acprop
optax.contrib.scale_by_acprop = acprop_optax.scale_by_acprop
optax.adam = alias.adam = acprop_optax.acprop

# What is of Adam alone: the class of its state, and an option.
OF_ADAM = ("test_adam", "test_map_non_params_to_none")
OPTIONS_OF_ADAM = ("mu_dtype", "nesterov")
# Takes 20 seconds to compile; what it tests, test_gradient_accumulation tests too.
SLOW = ("test_multi_steps_mixed_precision0",)


def pytest_collection_modifyitems(items: list[Any]) -> None:
    items[:] = [item for item in items if _concerns_us(item.name, getattr(item.obj, "__x_params_repr__", ""))]


def _concerns_us(test: str, parameters: str) -> bool:
    if "opt_name" in parameters and not any(f"'{name}'" in parameters for name in ("acprop", "adam")):
        return False
    return test not in OF_ADAM + SLOW and not any(option in parameters for option in OPTIONS_OF_ADAM)
