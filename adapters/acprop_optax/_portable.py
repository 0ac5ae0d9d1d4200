"""Portable state: from an optax state to `acprop_core.save`, and from `acprop_core.load` to an optax state.

The moments may be anywhere in the state of a whole optimizer: a chain, MultiSteps, inject_hyperparams. Optax keeps
other counts of the same updates next to them, a schedule's for example; they are set with the moments.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from acprop_core import ACProp, State, checkpoint
from acprop_core.adapt import called, check_count, with_values
from acprop_optax._states import (
    KINDS,
    MOMENTS,
    carry_of,
    check_options,
    counts_in,
    known_in,
    moments_in,
    rewritten,
    value_of,
)
from acprop_optax._transform import CarryState
from acprop_optax._trees import is_bool, name_of

# What a ScaleByAdamState says of the hyperparameters. `acprop` keeps a ScaleByBeliefState, in every corner.
_ADAM = {"asynchronous": False, "centering": "none", "eps_root": 0.0, "clip_exponent": None}


def export_state(state: optax.OptState, optimizer: ACProp) -> tuple[ACProp, State]:
    """Return hyperparameters and state of an optax optimizer, for `acprop_core.save` or another `import_state`.

    Parameters
    ----------
    state : optax.OptState
        Holds the state of one `acprop` or `scale_by_acprop`, or of one of optax's own transformations below, at any
        depth.
    optimizer : acprop_core.ACProp
        The hyperparameters that the transformation was made with, because a transformation does not tell them. Numbers
        of ``optax.inject_hyperparams`` are read from the state. For the transformations of optax see the notes.

    Returns
    -------
    acprop_core.ACProp
        A mask is by name.
    acprop_core.State
        NumPy arrays by dotted name, such as ``layers.0.weight``, for pytrees of dicts, lists, flax and equinox modules.

    Raises
    ------
    ValueError
        If there is no such state or more than one, `compensate` differs between hyperparameters and state, or a mask or
        schedule, where the state is that of `acprop` or of one below, the hyperparameters of an ``optax.adam`` are not
        those of an Adam, schedules have counted other updates than ACProp, or there is a state that a portable state
        cannot hold: of another transformation that keeps arrays, such as ``optax.amsgrad``, of MultiSteps between two
        updates, or of ``apply_if_finite`` after an update that was not finite.
    TypeError
        If the arrays are traced or abstract, or the two moments of a parameter differ in dtype, as with `mu_dtype`.

    Notes
    -----
    These transformations of optax take the steps of `acprop_core.ACProp`, with their own defaults of `eps` and
    `weight_decay`:

    - ``optax.adam(rate, b1, b2, eps)`` and ``optax.adamw(rate, b1, b2, eps, weight_decay=decay, mask=mask)``:
      ``ACProp(rate, b1, b2, eps, eps_root=0.0, weight_decay=decay, mask=mask, asynchronous=False, centering="none")``.
      If their `eps_root` is not 0, they cannot move: optax adds it to the second moment at each use, and ACProp once at
      every step to the second moment itself.
    - ``optax.adabelief(rate, b1, b2, eps, eps_root)``: ``ACProp(rate, b1, b2, eps, eps_root, asynchronous=False)``.
    - ``optax.contrib.acprop(rate, b1, b2, eps, eps_root, decay, mask)``:
      ``ACProp(rate, b1, b2, eps, eps_root, decay, mask, centering="previous")``.

    Their states do not show everything. With `nesterov`, and in ``nadam``, ``radam``, ``yogi``, ``adamax``, ``lamb``
    and ``contrib.adopt``, the classes are the same and the steps are others. Such a state is exported like one of Adam
    or AdaBelief, and continues as such.

    Examples
    --------
    >>> from acprop_optax import acprop
    >>> opt_state = acprop(1e-3, clip_exponent=0.25).init({"w": jnp.ones(2)})
    >>> hyper, state = export_state(opt_state, ACProp(1e-3, clip_exponent=0.25))
    >>> state.count, state.mu
    (0, {'w': array([0., 0.], dtype=float32)})
    """
    moments = moments_in(state)
    count = check_count(checkpoint.to_numpy("step count", "", value_of(moments.count)))
    for name, other in counts_in(state):
        if other != min(count, 2**31 - 1):
            raise ValueError(f"{name} has counted {other} updates, ACProp {count}; a portable state has one count")
    _check_dtypes(moments)
    mu, nu = (
        {name: checkpoint.to_numpy("moment", name, x) for name, x in _named(tree).items() if x is not None}
        for tree in (moments.mu, moments.nu)
    )
    nu = {name: x.real for name, x in nu.items()}  # optax's own are complex where the parameter is; the rule's are real
    hyperparameters, carry = _hyperparameters(state, optimizer), None
    if hyperparameters.compensate:
        carries = _named(carry_of(state)).items()
        carry = {name: checkpoint.to_numpy("carry", name, x) for name, x in carries if name in mu}
    return hyperparameters, State(count, mu, nu, carry)


def import_state(
    state: optax.OptState, optimizer: ACProp, saved: ACProp, saved_state: State, *, prefer: str | None = None
) -> optax.OptState:
    """Return an optax state that continues the state which `acprop_core.load` or an `export_state` returned.

    Parameters
    ----------
    state : optax.OptState
        From `init` of the transformation, with `acprop`, `scale_by_acprop`, or a transformation of optax that
        `export_state` lists, at any depth.
    optimizer : acprop_core.ACProp
        The hyperparameters that the transformation was made with, as in `export_state`.
    saved : acprop_core.ACProp
        The hyperparameters of the saved state.
    saved_state : acprop_core.State
        Moments by name, in the shapes and dtypes of the moments in `state`; None becomes zeros.
    prefer : {"own", "saved"}, optional
        Whose hyperparameters to continue with if they differ; by default, differences are refused. "saved" sets the
        numbers of ``optax.inject_hyperparams``. Others cannot be set: make the transformation from the saved ones.

    Returns
    -------
    optax.OptState
        A new state of the same classes and dtypes. A count beyond the largest of optax becomes the largest, at which
        optax itself stops.

    Raises
    ------
    ValueError
        If hyperparameters differ, names are missing or surplus, shapes differ, there are no moments or more than one
        state of them, `optimizer` cannot be the hyperparameters of the transformation, or there is a state that a
        portable state cannot hold, as in `export_state`.
    TypeError
        If dtypes differ.

    Examples
    --------
    >>> from acprop_optax import acprop
    >>> hyper, zeros = ACProp(1e-3, clip_exponent=0.25), {"w": np.zeros(2, np.float32)}
    >>> opt_state = acprop(1e-3, clip_exponent=0.25).init({"w": jnp.ones(2)})
    >>> saved = State(7, zeros, zeros)
    >>> opt_state = import_state(opt_state, hyper, hyper, saved)
    >>> opt_state[0].count
    Array(7, dtype=int32)
    """
    saved = checkpoint.check_portable(saved, saved_state)
    moments = moments_in(state)
    _check_dtypes(moments)
    counts_in(state)
    own = _hyperparameters(state, optimizer)
    if checkpoint.choose(own, saved, prefer) is saved:
        state = rewritten(state, lambda x: _injected(x, saved))
        if lines := checkpoint.differences(_hyperparameters(state, optimizer), saved):
            raise ValueError(
                f"{'; '.join(lines)}. The transformation keeps its own; make it from the saved ones, "
                "or pass prefer='own'"
            )
    trees = [tree for tree in (moments.mu, moments.nu, carry_of(state)) if tree is not None]
    names, leaves = list(_named(moments.mu)), State(0, *(list(_named(tree).values()) for tree in trees))
    rows = checkpoint.match_names(saved_state, names, leaves._replace(nu=_real(leaves.nu)))
    mu, nu, *carry = (_filled(tree, [row[i] for row in rows]) for i, tree in enumerate(trees))

    def continued(x: Any) -> Any:
        if isinstance(x, MOMENTS):
            return type(x)(_counted(x.count, saved_state.count), mu, nu)
        if isinstance(x, CarryState):
            return CarryState(*carry or [None])  # as `init` made it for one array that has not 16 bits
        field = KINDS[type(x).__name__].counter
        return x if field is None else x._replace(**{field: _counted(getattr(x, field), saved_state.count)})

    return rewritten(state, continued)


def _check_dtypes(moments: Any) -> None:
    mu, nu = (_real(_named(tree)) for tree in (moments.mu, moments.nu))
    for name, x in mu.items():
        if x is not None and x.dtype != nu[name].dtype:
            raise TypeError(
                f"{called('first moment', name)} has dtype {x.dtype}, the second {nu[name].dtype}, and a portable "
                "state has one dtype for both; make the transformation without mu_dtype, and cast mu of its state"
            )


def _real(tree: Any) -> Any:
    """Return the shapes and real dtypes of arrays."""
    return jax.eval_shape(lambda arrays: jax.tree.map(jnp.real, arrays), tree)


def _hyperparameters(state: Any, optimizer: ACProp) -> ACProp:
    if not isinstance(optimizer, ACProp):
        raise TypeError(f"the hyperparameters are a {type(optimizer).__name__}; pass an acprop_core.ACProp")
    moments = moments_in(state)
    values: dict[str, Any] = {}
    for x in known_in(state):
        for name in _numbers_in(x):
            given, now = getattr(optimizer, name), value_of(x.hyperparams[name])
            # inject_hyperparams rounds to its own dtype; the number that was passed is then the one that is meant
            dtype = now.dtype if jnp.issubdtype(now.dtype, jnp.inexact) else float
            if callable(given) or given is None or jnp.asarray(given, dtype) != now:
                values[name] = float(now)
    present = {name: x for name, x in _named(moments.mu).items() if x is not None}
    if optimizer.mask is not None and not callable(optimizer.mask):
        names = [name for name, x in _leaves_of(moments.mu).items() if x is not None]
        marks = jax.tree.map(lambda mark, tree: [mark] * len(jax.tree.leaves(tree)), optimizer.mask, moments.mu)
        marked = zip(names, jax.tree.leaves(marks), strict=True)
        values["mask"] = {name: bool(mark) if is_bool(mark) else mark for name, mark in marked if name in present}
    portable = checkpoint.to_portable(with_values(optimizer, **values), present)
    check_options(state, portable)
    has = {name: getattr(portable, name) for name in _ADAM}
    if isinstance(moments, optax.ScaleByAdamState) and has != _ADAM:
        wrong = ", ".join(f"{name}={value!r}" for name, value in has.items() if value != _ADAM[name])
        raise ValueError(
            f"the hyperparameters have {wrong}, but the optax state is of optax.adam or optax.adamw; pass "
            "ACProp(..., eps_root=0.0, asynchronous=False, centering='none'). A transformation whose own eps_root is "
            "not 0 cannot move, because optax adds it at each use and ACProp to the second moment itself"
        )
    return portable


def _numbers_in(x: Any) -> list[str]:
    """Return the names of ACProp's numbers that inject_hyperparams keeps in this state, except scheduled ones."""
    if not type(x).__name__.startswith("Inject") or not any(
        isinstance(inner, MOMENTS) for inner in known_in(x.inner_state)
    ):
        return []
    scheduled = getattr(x, "hyperparams_states", {})
    return [name for name in checkpoint.HYPERPARAMETERS if name in x.hyperparams and name not in scheduled]


def _injected(x: Any, saved: ACProp) -> Any:
    numbers = {name: getattr(saved, name) for name in _numbers_in(x)}
    new = {
        name: jax.tree.map(lambda old, value=value: jnp.asarray(value, old.dtype), x.hyperparams[name])
        for name, value in numbers.items()
        if isinstance(value, float)
    }
    return x._replace(hyperparams={**x.hyperparams, **new}) if new else x


def _is_leaf(x: Any) -> bool:
    # a Variable of flax.nnx is a node around one array, which has the Variable's name
    return x is None or any(c.__name__ == "Variable" and c.__module__.startswith("flax.nnx") for c in type(x).__mro__)


def _leaves_of(tree: Any) -> dict[str, Any]:
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_leaf)
    return checkpoint.by_name((name_of(path), value_of(x)) for path, x in pairs)


def _named(tree: Any) -> dict[str, Any]:
    """Return the leaves by name; None for integers, bools and keys, which are not optimized and have no moments."""
    leaves = _leaves_of(tree).items()
    return {name: x if x is not None and jnp.issubdtype(x.dtype, jnp.inexact) else None for name, x in leaves}


def _filled(tree: Any, arrays: list[Any]) -> Any:
    leaves, structure = jax.tree.flatten(tree, is_leaf=_is_leaf)
    new = [jax.tree.map(lambda old, x=x: _placed(x, old), leaf) for leaf, x in zip(leaves, arrays, strict=True)]
    return jax.tree.unflatten(structure, new)


def _placed(x: Any, old: Any) -> jax.Array:
    """Return a copy of `x` where the array `old` is and in its dtype, or zeros for None."""
    new = jnp.zeros_like(old) if x is None else jnp.array(x, old.dtype)
    return jax.device_put(new, old.sharding) if getattr(old, "committed", False) else new


def _counted(old: Any, count: int) -> Any:
    return jax.tree.map(lambda x: _placed(np.asarray(min(count, np.iinfo(x.dtype).max), x.dtype), x), old)
