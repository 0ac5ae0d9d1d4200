"""The transformations: `acprop`, and `scale_by_acprop` without learning rate and weight decay."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from acprop_core import ACProp
from acprop_core.adapt import check_count, check_params, is_compensated, step_at, with_values
from acprop_optax._trees import join, marks, named_leaves, side_by_side
from acprop_optax._xla import namespace, step_in_xla

_F = TypeVar("_F", bound=Callable[..., Any])


class CarryState(NamedTuple):
    """The state that `acprop` with `compensate` keeps in addition to the moments.

    Attributes
    ----------
    carry : pytree
        The amount that each 16-bit parameter has lost to rounding, in its dtype; None for other parameters.

    Examples
    --------
    >>> from acprop_optax import acprop
    >>> params = {"w": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2)}
    >>> acprop(1e-3, compensate=True).init(params)[3]
    CarryState(carry={'b': None, 'w': Array([0, 0], dtype=bfloat16)})
    """

    carry: Any


def _explains(function: _F) -> _F:
    """Return the function with errors that explain options which optax's Adam has and ACProp has not."""

    @functools.wraps(function)
    def explained(*args: Any, **options: Any) -> Any:
        for name, remedy in _OF_ADAM.items():
            if name in options:
                raise TypeError(f"{function.__name__} has no option {name}; {remedy}")
        return function(*args, **options)

    return cast("_F", explained)


_OF_ADAM = {
    "mu_dtype": "use moment_dtype, which is the dtype of both moments",
    "nesterov": "leave it out: the direction of ACProp is made from the gradient, not from the momentum",
}


@_explains
def acprop(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-16,
    eps_root: jax.typing.ArrayLike = 1e-16,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    *,
    clip_exponent: jax.typing.ArrayLike | None = None,
    centering: str = "current",
    asynchronous: bool = True,
    moment_dtype: Any = None,
    compensate: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Return the ACProp optimizer, a replacement of ``optax.contrib.acprop``.

    Parameters
    ----------
    learning_rate : float, 0-d array, or schedule
        At least 0. A schedule is called with the count of updates done, 0 at the first step, and may return any finite
        number.
    b1, b2 : float or 0-d array
        Decay rates of the two moments, in [0, 1); as in `scale_by_acprop`.
    eps, eps_root : float or 0-d array
        Added to the root of the second moment, and to the second moment at every step; at least 0.
    weight_decay : float, 0-d array, or schedule
        Decoupled decay, multiplied by the learning rate; as in ``optax.add_decayed_weights``.
    mask : pytree of bool, prefix of one, or callable, optional
        Which parameters decay; as in ``optax.add_decayed_weights``.
    clip_exponent : float, optional
        No element moves by more than ``learning_rate * t**clip_exponent`` at step t, weight decay aside; None for no
        clip. 0.25 is recommended. It does not clip gradients: chain ``optax.clip_by_global_norm`` before for that.
    centering : {"current", "previous", "none"}
        Centre the second moment on ``m_t`` as the paper does, on ``m_{t-1}`` as the code of ``optax.contrib.acprop``,
        or not at all, as Adam.
    asynchronous : bool
        Divide the gradient by the root of the previous second moment, or else the mean of gradients by that of the new
        one, as Adam and AdaBelief. `acprop_core.ACProp` says which combination is which published optimizer.
    moment_dtype : dtype or its name, optional
        Real dtype of the moments; by default the parameter's, and float32 for 16-bit parameters.
    compensate : bool
        Keep the amount that 16-bit parameters lose to rounding, and add it to them as soon as it is large enough; as in
        `acprop_core.ACProp`. Transformations after this one in a chain must not change the updates.

    Returns
    -------
    optax.GradientTransformationExtraArgs
        Its state is the state of the chain of `scale_by_acprop`, ``optax.add_decayed_weights`` and
        ``optax.scale_by_learning_rate``, with `compensate` followed by a `CarryState`. An update has
        the wider of the gradient's and the parameter's dtype, as in ``optax.adamw``; where there is a carry, the
        parameter's. It is rounded once, after the learning rate. Extra arguments of `update` are accepted and not used.

        A gradient of None leaves its leaf alone: the moments stay, the update is None, and where there are no moments
        the leaf of `params` may be of any type, such as a function. The same holds for integers, bools and keys, whose
        gradients may have the dtype float0 too; then the update is 0.

    Raises
    ------
    TypeError, ValueError
        As in `scale_by_acprop`; from `init` and `update`, for a mask of another structure, or with leaves that are
        not bools; for a learning rate or weight decay that is not a number, negative or not finite, or a value of a
        schedule that is not a finite number (arrays are not read); from `update`, if there is weight decay or
        `compensate` and no `params`, or the state was made with another `compensate`, or with or
        without a mask or schedule.

    Notes
    -----
    Zhuang et al. 2021, arXiv:2110.05454, algorithm 2; the equations are in `acprop_core.ACProp`.

    Examples
    --------
    >>> import optax
    >>> params, grads = {"w": jnp.ones(3)}, {"w": jnp.array([0.5, 0.0, -1.0])}
    >>> optimizer = acprop(1e-3, clip_exponent=0.25)
    >>> state = optimizer.init(params)
    >>> updates, state = optimizer.update(grads, state, params)
    >>> optax.apply_updates(params, updates)["w"]
    Array([0.9995, 1.    , 1.001 ], dtype=float32)
    """
    optimizer = _optimizer(
        learning_rate=learning_rate,
        b1=b1,
        b2=b2,
        eps=eps,
        eps_root=eps_root,
        weight_decay=weight_decay,
        clip_exponent=clip_exponent,
        centering=centering,
        asynchronous=asynchronous,
        moment_dtype=moment_dtype,
        compensate=compensate,
    )
    schedules = {name: x for name in ("learning_rate", "weight_decay") if callable(x := getattr(optimizer, name))}
    decays = isinstance(optimizer.weight_decay, jax.core.Tracer) or bool(optimizer.weight_decay != 0.0)
    # Which parameters decay is read from optax's own `masked`: it marks them with True, and leaves the others alone.
    decay = optax.GradientTransformation(optax.add_decayed_weights(optimizer.weight_decay).init, _mark)
    if mask is not None:
        decay = optax.masked(decay, lambda params: marks(mask, params))
    # The states come from the three transformations. The rule itself applies the last two, in its own dtypes, so that
    # an array of another dtype widens no other, and 16-bit updates are rounded once, after the learning rate.
    chain = optax.chain(_scale_by(optimizer), decay, optax.scale_by_learning_rate(optimizer.learning_rate))

    def init(params: optax.Params) -> optax.OptState:
        state = chain.init(params)
        if not compensate:
            return state
        _, leaves, tree = named_leaves("parameter", params)  # which may be abstract
        return (*state, CarryState(tree.unflatten([jnp.zeros_like(x) if is_compensated(x) else None for x in leaves])))

    def update(
        grads: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        check_params(optimizer, params, decays)
        parts = 4 if compensate else 3
        if isinstance(state, optax.ScaleByBeliefState) or not isinstance(state, tuple | list) or len(state) != parts:
            raise TypeError(
                f"the state is a {type(state).__name__} that does not belong to acprop with compensate={compensate}; "
                f"pass the one that its init or update returned, or {_RESUME}"
            )
        moments, decay_state, rate_state, *carry_state = state
        counters = {"learning_rate": rate_state, "weight_decay": getattr(decay_state, "inner_state", decay_state)}
        _check_origin("a mask", mask is not None, hasattr(decay_state, "inner_state"))
        for name in counters if counts_decay() else ("learning_rate",):
            _check_origin(f"a schedule of {name}", name in schedules, _counts(counters[name]))
        rows, tree = side_by_side(grads, moments, params, compensate, *(x.carry for x in carry_state))
        values = {}
        for name, schedule in schedules.items():  # each is called with the count that optax keeps for it
            counter = counters[name] if _counts(counters[name]) else moments
            values[name] = _number(name, schedule(counter.count))
        # as callables, because `step_at` then says which schedule returned a number that is not finite
        now = with_values(optimizer, **{name: lambda _, x=x: x for name, x in values.items()})
        if "learning_rate" in schedules:
            rate_state = rate_state._replace(count=optax.safe_increment(rate_state.count))
        decayed = [False] * len(rows)
        if decays:
            # from the rows, because leaves of `params` without gradient and moments may be of any type
            marked, decay_state = decay.update(tree.unflatten([row.param for row in rows]), decay_state)
            decayed = [mark is True for mark in tree.flatten_up_to(marked)]
        own = step_at(now, jnp.asarray(check_count(moments.count)), namespace)
        results = list(map(step_in_xla(own, optimizer, moments.count), rows, decayed))
        updates, moments = join(tree, results, moments, grads)
        carry_state = [CarryState(tree.unflatten([result[3] for result in results])) for _ in carry_state]
        return updates, (moments, decay_state, rate_state, *carry_state)

    return optax.GradientTransformationExtraArgs(init, update)


@_explains
def scale_by_acprop(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-16,
    eps_root: jax.typing.ArrayLike = 1e-16,
    *,
    clip_exponent: jax.typing.ArrayLike | None = None,
    centering: str = "current",
    asynchronous: bool = True,
    moment_dtype: Any = None,
) -> optax.GradientTransformation:
    """Return the transformation of gradients into directions, ``g_t / (sqrt(shat_{t-1}) + eps)``, clipped.

    Parameters
    ----------
    b1, b2 : float or 0-d array
        Decay rates of the two moments, in [0, 1). A 16-bit array of 1 stands for the numbers that round to it,
        because ``optax.inject_hyperparams`` rounds to the dtype of the parameters, and 0.999 is 1 in bfloat16.
    eps, eps_root : float or 0-d array
        Added to the root of the second moment, and to the second moment at every step; at least 0.
    clip_exponent : float, optional
        No element of d_t exceeds ``t**clip_exponent``; None for no clip. 0.25 is recommended. It does not clip
        gradients.
    centering, asynchronous, moment_dtype : str, bool, and dtype or its name
        As in `acprop`.

    Returns
    -------
    optax.GradientTransformation
        Its state is an ``optax.ScaleByBeliefState``: `count`, 0-d int32; `mu` and `nu`, pytrees like the parameters.
        Gradients of None, and the dtypes of updates, are as in `acprop`.

    Raises
    ------
    TypeError
        If a hyperparameter is not a number; from `init` and `update`, if the dtype of a leaf does not match, or the
        step count is not an integer.
    ValueError
        If a hyperparameter is out of its range or not finite (arrays are not read); from `update`, if
        structures or shapes differ.

    Notes
    -----
    Zhuang et al. 2021, arXiv:2110.05454, algorithm 2.

    Examples
    --------
    >>> import optax
    >>> rate = optax.scale_by_learning_rate(1e-3)
    >>> optimizer = optax.chain(scale_by_acprop(clip_exponent=0.25), rate)
    >>> params, grads = jnp.ones(2), jnp.array([0.5, -2.0])
    >>> updates, state = optimizer.update(grads, optimizer.init(params), params)
    >>> updates
    Array([-0.0005,  0.001 ], dtype=float32)
    """
    return _scale_by(
        _optimizer(
            b1=b1,
            b2=b2,
            eps=eps,
            eps_root=eps_root,
            clip_exponent=clip_exponent,
            centering=centering,
            asynchronous=asynchronous,
            moment_dtype=moment_dtype,
        )
    )


def _scale_by(optimizer: ACProp) -> optax.GradientTransformation:
    def init(params: optax.Params) -> optax.ScaleByBeliefState:
        _, leaves, tree = named_leaves("parameter", params)
        # Parameters may be abstract, so only the dtypes come from the core; zeros_like keeps each parameter's sharding.
        # Integers, bools and keys have zeros of their own dtype, as in optax; `update` refuses gradients of them.
        floats = [x if x is not None and jnp.issubdtype(x.dtype, jnp.inexact) else None for x in leaves]
        abstract = jax.eval_shape(optimizer.init, floats)
        mu, nu = (
            tree.unflatten(
                [
                    None if x is None else jnp.zeros_like(x, None if m is None else m.dtype)
                    for x, m in zip(leaves, like, strict=True)
                ]
            )
            for like in (abstract.mu, abstract.nu)
        )
        return optax.ScaleByBeliefState(jnp.zeros([], jnp.int32), mu, nu)

    def update(
        grads: optax.Updates, state: optax.ScaleByBeliefState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.ScaleByBeliefState]:
        rows, tree = side_by_side(grads, state, params)
        own = step_at(optimizer, jnp.asarray(check_count(state.count)), namespace).without_rate()
        step = step_in_xla(own, optimizer, state.count)
        results = [step(row, False) for row in rows]
        return join(tree, results, state, grads)

    return optax.GradientTransformation(init, update)


def _mark(params: Any, state: Any, _: Any = None) -> tuple[Any, Any]:
    """Mark the parameters that decay with True; count as ``optax.add_decayed_weights`` does if it has a schedule."""
    if _counts(state):
        state = state._replace(count=optax.safe_increment(state.count))
    return jax.tree.map(lambda _: True, params), state


def _counts(state: Any) -> bool:
    return "count" in getattr(state, "_fields", ())  # because every tuple has a method of this name


@functools.cache
def counts_decay() -> bool:
    """Return whether optax keeps a count for schedules of weight decay; older versions do not, and ACProp's is used."""
    # not at import, because JAX must not be used before jax.distributed.initialize
    return _counts(jax.eval_shape(optax.add_decayed_weights(lambda count: count).init, None))


_RESUME = (
    "resume another run with import_state(init(params), hyperparameters, "
    "*export_state(state, its_hyperparameters), prefer='own')"
)


def _check_origin(what: str, wanted: bool, given: bool) -> None:
    """Refuse the state of a transformation with a schedule or mask in one without, and the reverse."""
    if wanted != given:
        have, want = ("with" if x else "without" for x in (given, wanted))
        raise ValueError(
            f"the state was made {have} {what}, the transformation {want} it; pass the one that its init or update "
            f"returned, or {_RESUME}"
        )


def _optimizer(**hyperparameters: Any) -> ACProp:
    return ACProp(**{name: _number(name, value) for name, value in hyperparameters.items()})


def _number(name: str, value: Any) -> Any:
    """Return a hyperparameter as the rule can use it: NumPy's numbers as floats, JAX's in JAX's own width of float.

    inject_hyperparams turns numbers into arrays: 0 into an int32, others into the dtype of the parameters. In bfloat16
    0.999 is 1.
    """
    if not isinstance(value, jax.Array | np.ndarray | np.generic) or value.ndim:
        return value
    if not jnp.issubdtype(value.dtype, jnp.number) or jnp.issubdtype(value.dtype, jnp.complexfloating):
        return value
    below_one = _BELOW_ONE.get(value.dtype.name) if name in ("b1", "b2") else None
    if not isinstance(value, jax.Array):
        return below_one if below_one is not None and value == 1 else float(value)
    value = value.astype(float)
    return value if below_one is None else jnp.where(value == 1.0, below_one, value)


_BELOW_ONE = {"float16": 1.0 - 2.0**-13, "bfloat16": 1.0 - 2.0**-10}  # the middle of the numbers that round to 1
