"""ACProp as an optax gradient transformation: the rule of acprop_core, walked over pytrees.

The states are optax's own classes, so whatever reads the state of ``optax.contrib.acprop`` reads these.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from acprop_core import ACProp
from acprop_core._checks import check_leaves
from acprop_optax._state import export_state, import_state

__all__ = ["acprop", "export_state", "import_state", "scale_by_acprop"]


def acprop(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-16,
    eps_root: jax.typing.ArrayLike = 1e-16,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    *,
    clip_exponent: float | None = None,
    centering: str = "current",
    moment_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Return the ACProp optimizer, in the place of ``optax.contrib.acprop``.

    Parameters
    ----------
    learning_rate : float, 0-d array, or schedule
        A schedule is called with the count of updates done, 0 at the first step.
    b1, b2, eps, eps_root, clip_exponent, centering, moment_dtype
        As in `scale_by_acprop`.
    weight_decay : float or 0-d array
        Decoupled decay, multiplied by the learning rate; as in ``optax.add_decayed_weights``.
    mask : pytree of bool, prefix of one, or callable, optional
        Which parameters decay; as in ``optax.add_decayed_weights``.

    Returns
    -------
    optax.GradientTransformationExtraArgs
        The chain of `scale_by_acprop`, ``optax.add_decayed_weights`` and ``optax.scale_by_learning_rate``.

    Raises
    ------
    TypeError, ValueError
        As in `scale_by_acprop`, and for a learning rate or weight decay that is negative or not finite.

    Examples
    --------
    >>> import optax
    >>> params = {"w": jnp.ones(3)}
    >>> optimizer = acprop(1e-3, clip_exponent=0.25)
    >>> state = optimizer.init(params)
    >>> updates, state = optimizer.update({"w": jnp.array([0.5, 0.0, -1.0])}, state, params)
    >>> optax.apply_updates(params, updates)["w"]
    Array([0.9995, 1.    , 1.001 ], dtype=float32)
    """
    # checked, and made Python floats: a NumPy float64 would widen float32 updates in 64-bit mode
    checked = ACProp(learning_rate=learning_rate, weight_decay=weight_decay)
    chain = optax.chain(
        scale_by_acprop(
            b1, b2, eps, eps_root, clip_exponent=clip_exponent, centering=centering, moment_dtype=moment_dtype
        ),
        optax.add_decayed_weights(checked.weight_decay, mask),
        optax.scale_by_learning_rate(checked.learning_rate),
    )

    def update(
        grads: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        updates, state = chain.update(grads, state, params, **extra_args)
        # a learning rate or decay that is an array, as from inject_hyperparams, would widen 16-bit updates
        return optax.tree_utils.tree_cast_like(updates, grads if params is None else params), state

    return optax.GradientTransformationExtraArgs(chain.init, update)


def scale_by_acprop(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-16,
    eps_root: jax.typing.ArrayLike = 1e-16,
    *,
    clip_exponent: float | None = None,
    centering: str = "current",
    moment_dtype: Any = None,
) -> optax.GradientTransformation:
    """Return the transformation of gradients g_t into d_t = g_t / (sqrt(shat_{t-1}) + eps), clipped.

    Parameters
    ----------
    b1, b2, eps, eps_root, clip_exponent, centering, moment_dtype
        As in `acprop_core.ACProp`.

    Returns
    -------
    optax.GradientTransformation
        Its state is an ``optax.ScaleByBeliefState``: `count`, 0-d int32; `mu` and `nu`, pytrees like the parameters.

    Raises
    ------
    TypeError
        If a hyperparameter is no number; from `init` and `update`, if a leaf is of a dtype that does not fit.
    ValueError
        If a hyperparameter is out of its range or not finite (arrays are not looked into); from `update`, if shapes
        differ.

    Notes
    -----
    Zhuang et al. 2021, arXiv:2110.05454, algorithm 2.
    """
    optimizer = ACProp(
        learning_rate=1.0,
        b1=b1,
        b2=b2,
        eps=eps,
        eps_root=eps_root,
        clip_exponent=clip_exponent,
        centering=centering,
        moment_dtype=moment_dtype,
    )

    def init(params: optax.Params) -> optax.ScaleByBeliefState:
        names, leaves, tree = _flatten(params)
        check_leaves({"parameter": leaves}, names)
        _, mu, nu = optimizer.init(leaves)
        return optax.ScaleByBeliefState(jnp.zeros([], jnp.int32), tree.unflatten(mu), tree.unflatten(nu))

    def update(
        grads: optax.Updates, state: optax.ScaleByBeliefState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.ScaleByBeliefState]:
        names, g, tree = _flatten(grads)
        mu, nu = ([jnp.asarray(x) for x in tree.flatten_up_to(moment)] for moment in (state.mu, state.nu))
        x = g if params is None else [jnp.asarray(x) for x in tree.flatten_up_to(params)]
        owner = "gradient" if params is None else "parameter"
        check_leaves({owner: x, "gradient": g, "first moment": mu, "second moment": nu}, names)
        step = optimizer.at(jnp.asarray(state.count), jnp)
        rows = [step.without_rate(*row) for row in zip(g, mu, nu, x, strict=True)]
        d, mu, nu = (tree.unflatten([row[i] for row in rows]) for i in range(3))
        return d, optax.ScaleByBeliefState(optax.safe_increment(state.count), mu, nu)

    return optax.GradientTransformation(init, update)


def _flatten(tree: Any) -> tuple[list[str], list[jax.Array], Any]:
    pairs, structure = jax.tree_util.tree_flatten_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in pairs]
    return names, [jnp.asarray(x) for _, x in pairs], structure
