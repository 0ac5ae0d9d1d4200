"""Refuses a JAX or an optax that is too old."""

import jax
import optax

from acprop_core.adapt import check_version

check_version("acprop_optax", jax, (0, 6, 0))
check_version("acprop_optax", optax, (0, 2, 5))
