"""The optimizer: hyperparameters, and the pure functions that carry the rule over containers of arrays."""

import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from array_api_compat import is_numpy_array

from acprop_core import _rule
from acprop_core._checks import (
    COMPLEX_OF,
    FLOATS,
    REAL_OF,
    check_count,
    check_leaves,
    check_number,
    common_namespace,
    dtype_name,
    library,
)
from acprop_core._containers import align, flatten, unflatten
from acprop_core._rule import Array, as_dtype

Container = Any  # an array, or nested dicts, lists, tuples and namedtuples of arrays and None


class State(NamedTuple):
    """What ACProp remembers between steps.

    Attributes
    ----------
    count : int or 0-d integer array
        Number of updates done.
    mu : container of arrays
        First moment m of every parameter, in the structure of the parameters; zeros at the start.
    nu : container of real arrays
        Second central moment s of every parameter; zeros at the start.
    """

    count: Any
    mu: Container
    nu: Container


class Leaf(NamedTuple):
    """One parameter (or None) with all that a step needs for it."""

    name: str
    grad: Any
    mu: Any
    nu: Any
    param: Any
    decay: bool


@dataclass(frozen=True)
class ACProp:
    r"""ACProp: momentum centering and asynchronous update (Zhuang et al. 2021).

    Step :math:`t = 1, 2, \dots`, with :math:`m_0 = s_0 = 0` and :math:`\hat s_0 := 1`:

    .. math::

        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        s_t &= \beta_2 s_{t-1} + (1 - \beta_2) |g_t - m_t|^2 + \varepsilon_{root} \\
        \hat s_{t-1} &= s_{t-1} / (1 - \beta_2^{t-1}) \\
        d_t &= \mathrm{clip}(g_t / (\sqrt{\hat s_{t-1}} + \varepsilon),\ -t^p,\ t^p) \\
        u_t &= -\alpha_t (d_t + \lambda x_{t-1})

    and :math:`u_t` is what is added to the parameter :math:`x_{t-1}`.

    Parameters
    ----------
    learning_rate : float, 0-d array, or callable
        :math:`\alpha`, at least 0. A callable (a schedule) is given the count of updates done, 0 at the first step.
    b1, b2 : float or 0-d array
        :math:`\beta_1, \beta_2`, decay rates of the two moments, in [0, 1).
    eps : float or 0-d array
        :math:`\varepsilon`, added to the root; at least 0.
    eps_root : float or 0-d array
        :math:`\varepsilon_{root}`, added to the second moment at every step; at least 0. Must be positive if you
        differentiate through the update, because the square root has no derivative at 0.
    weight_decay : float or 0-d array
        :math:`\lambda`, decoupled weight decay, at least 0; it is multiplied by the learning rate.
    mask : container of bool, prefix of one, or callable, optional
        Which parameters decay. A bool may stand for a whole sub-container. A callable makes it from the parameters.
    clip_exponent : float, optional
        :math:`p`, at least 0; None for no clip. With a clip no element moves by more than :math:`\alpha_t t^p`.
        Use 0.25 unless you must follow the published recurrence to the letter: without a clip an element whose
        gradient was 0 and then is not takes a step millions of times too large.
    centering : {"current", "previous"}
        "current" centres the second moment on :math:`m_t`, as the paper and its authors' code do; "previous" on
        :math:`m_{t-1}`, as the code of ``optax.contrib.acprop`` does.
    moment_dtype : dtype or its name, optional
        Real dtype in which the moments are kept. By default that of the parameter, and float32 for 16-bit
        parameters. It must be one that the array library itself has.

    Raises
    ------
    TypeError
        If a hyperparameter is of a wrong type.
    ValueError
        If a hyperparameter is out of its range or not finite. Arrays are not looked into: they may be traced.

    Notes
    -----
    Zhuang, Ding, Tang, Dvornek, Tatikonda, Duncan: "Momentum Centering and Asynchronous Update for Adaptive Gradient
    Methods", NeurIPS 2021, arXiv:2110.05454, algorithm 2. The clip is ours, not the paper's; optax issue #1132
    describes what it cures.

    Optimizers with equal hyperparameters are equal. They can be hashed if their hyperparameters can (an array or a
    dict cannot) and pickled if these can.

    Examples
    --------
    >>> import numpy as np
    >>> params = {"weight": np.ones((2, 3)), "bias": np.zeros(3)}
    >>> optimizer = ACProp(learning_rate=1e-3, clip_exponent=0.25)
    >>> state = optimizer.init(params)
    >>> grads = {"weight": np.full((2, 3), 0.5), "bias": np.ones(3)}
    >>> updates, state = optimizer.update(grads, state, params)
    >>> params = optimizer.apply(params, updates)
    >>> state.count, params["bias"]
    (1, array([-0.001, -0.001, -0.001]))
    """

    learning_rate: Any = 1e-3
    b1: Any = 0.9
    b2: Any = 0.999
    eps: Any = 1e-16
    eps_root: Any = 1e-16
    weight_decay: Any = 0.0
    mask: Container | Callable[[Container], Container] | None = None
    clip_exponent: float | None = None
    centering: str = "current"
    moment_dtype: Any = None

    def __post_init__(self) -> None:
        checked = {}
        if not callable(self.learning_rate):
            checked["learning_rate"] = check_number("learning_rate", self.learning_rate)
        for name in ("b1", "b2"):
            checked[name] = check_number(name, getattr(self, name), below=1.0)
        for name in ("eps", "eps_root", "weight_decay"):
            checked[name] = check_number(name, getattr(self, name))
        if self.clip_exponent is not None:
            checked["clip_exponent"] = check_number("clip_exponent", self.clip_exponent)
        if self.centering not in ("current", "previous"):
            raise ValueError(f"centering is {self.centering!r}; give 'current' or 'previous'")
        if self.moment_dtype is not None:
            checked["moment_dtype"] = dtype_name(self.moment_dtype)
            if checked["moment_dtype"] not in FLOATS:
                raise ValueError(
                    f"moment_dtype is {self.moment_dtype!r}; give one of {', '.join(FLOATS)}, or None for the "
                    "parameter's own (float32 for 16-bit parameters)"
                )
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def init(self, params: Container) -> State:
        """Return the state before the first step: a count of 0, and moments of zeros.

        Parameters
        ----------
        params : container of arrays
            Real or complex floating-point arrays of any shape, all of one array library.

        Returns
        -------
        State
            `mu` and `nu` in the shapes and dtypes of the parameters, with two exceptions: float32 for float16 and
            bfloat16, and `nu` of a complex parameter is real. `moment_dtype` overrides.

        Raises
        ------
        TypeError
            If a leaf is not a floating-point array, the leaves are of different array libraries, or the library
            lacks `moment_dtype`.
        """
        names, leaves = _unzip(params)
        groups = {"parameter": leaves}
        xp = common_namespace(groups, names)
        check_leaves(groups, names)
        mu: list[Any] = []
        nu: list[Any] = []
        for x in leaves:
            if x is None:
                mu.append(None)
                nu.append(None)
                continue
            mu_dtype, nu_dtype = self._moment_dtypes(x.dtype, xp)
            real = x if mu_dtype == nu_dtype else xp.real(x)  # Dask warns of a real zeros_like of a complex array
            mu.append(xp.zeros_like(x, dtype=mu_dtype))
            nu.append(xp.zeros_like(real, dtype=nu_dtype))
        return State(0, unflatten(params, mu), unflatten(params, nu))

    def update(self, grads: Container, state: State, params: Container | None = None) -> tuple[Container, State]:
        """Return what to add to the parameters, and the state after the step. Nothing is written to.

        Parameters
        ----------
        grads : container of arrays
            Gradients, in the structure and shapes of the parameters. A gradient of None leaves its parameter and its
            moments as they are.
        state : State
            From `init`, or from the step before.
        params : container of arrays, optional
            The parameters before the step. Only weight decay needs them; they also fix the dtypes of the updates.

        Returns
        -------
        updates : container of arrays
            In the dtypes of the parameters (of the gradients, where `params` is None).
        state : State
            The moments keep their dtypes, and `count` its kind: an int, or a 0-d array, which stops at the largest
            value of its dtype.

        Raises
        ------
        TypeError
            If a leaf is not a floating-point array, array libraries are mixed, a gradient is complex and its
            parameter is not, the count is no integer, a leaf of the mask no bool, or the schedule's value no number.
        ValueError
            If structures or shapes differ, there is weight decay and no `params`, or the count or the schedule's
            value is out of range.
        """
        xp, leaves = self.match(grads, state, params)
        step = self.at(check_count(state.count), xp)
        results = [
            (None, leaf.mu, leaf.nu)
            if leaf.grad is None
            else step(leaf.grad, leaf.mu, leaf.nu, leaf.grad if params is None else leaf.param, leaf.decay)
            for leaf in leaves
        ]
        like = state.mu if params is None else params
        updates, mu, nu = (unflatten(like, [result[i] for result in results]) for i in range(3))
        return updates, State(_next(state.count, xp), mu, nu)

    def apply(self, params: Container, updates: Container) -> Container:
        """Return the parameters after the step, ``params + updates``, in the dtypes of the parameters.

        Parameters
        ----------
        params, updates : container of arrays
            The parameters before the step, and what `update` returned. An update of None leaves its parameter.

        Raises
        ------
        TypeError
            If a leaf is not a floating-point array, or array libraries are mixed.
        ValueError
            If structures or shapes differ.
        """
        names, leaves = _unzip(params)
        groups = {"parameter": leaves, "update": list(align(updates, params, "the container of updates"))}
        xp = common_namespace(groups, names)
        check_leaves(groups, names)
        return unflatten(
            params,
            [
                x if u is None else _like(x + as_dtype(u, x.dtype, xp), x, xp)
                for x, u in zip(*groups.values(), strict=True)
            ],
        )

    def match(self, grads: Container, state: State, params: Container | None) -> tuple[Any, list["Leaf"]]:
        """Return the namespace of all arrays, and the leaves side by side: the checks of `update`, see there."""
        decays = not (isinstance(self.weight_decay, float) and self.weight_decay == 0.0)
        if decays and params is None:
            raise ValueError(
                f"weight_decay is {self.weight_decay!r}, which needs the parameters: call update(grads, state, params)"
            )
        like, owner = (state.mu, "first moment") if params is None else (params, "parameter")
        names, params_ = _unzip(like)
        groups = {owner: params_}
        for what, tree in (("gradient", grads), ("first moment", state.mu), ("second moment", state.nu)):
            groups[what] = list(align(tree, like, f"the container of {what}s"))
        xp = common_namespace(groups, names)
        check_leaves(groups, names)
        decay = self._decay(params, names) if decays else [False] * len(names)
        columns = (names, groups["gradient"], groups["first moment"], groups["second moment"], params_, decay)
        return xp, [Leaf(*row) for row in zip(*columns, strict=True)]

    def at(self, count: Any, xp: Any) -> "Step":
        """Return step ``count + 1``, for one array at a time: what the adapters build their loops on."""
        learning_rate = self.learning_rate
        if callable(learning_rate):
            learning_rate = check_number(f"learning_rate({count})", learning_rate(count))
        return Step(_rule.coefficients(self, count, learning_rate, xp), xp)

    def _moment_dtypes(self, dtype: Any, xp: Any) -> tuple[Any, Any]:
        kind = dtype_name(dtype)
        real = self.moment_dtype or {"float16": "float32", "bfloat16": "float32"}.get(kind) or REAL_OF.get(kind, kind)
        mu = COMPLEX_OF.get(real) if kind in REAL_OF else real
        if mu is None or not hasattr(xp, mu):
            raise TypeError(
                f"moment_dtype is {real!r}, in which {library(xp)} cannot keep the moments of {kind} parameters; "
                "choose a wider one"
            )
        return getattr(xp, mu), getattr(xp, real)

    def _decay(self, params: Container, names: list[str]) -> list[bool]:
        if self.mask is None:
            return [True] * len(names)
        mask = self.mask(params) if callable(self.mask) else self.mask
        leaves = list(align(mask, params, "the mask", prefix=True))
        for name, leaf in zip(names, leaves, strict=True):
            if type(leaf).__name__ not in ("bool", "bool_"):
                raise TypeError(f"the mask of {name!r} is {leaf!r}; give True (decay) or False")
        return leaves


class Step:
    """One step of an optimizer, for one array at a time: the casts around the rule.

    The rule runs in float32, or in float64 where parameter or moments have it; each result goes back to the dtype
    that it came from.
    """

    def __init__(self, k: _rule.Coefficients, xp: Any) -> None:
        self._k = k
        self._xp = _Standard2022(xp) if getattr(xp, "__array_api_version__", "2025") < "2023.12" else xp
        self._cast: dict[tuple[str, bool], tuple[_rule.Coefficients, Any, Any]] = {}

    def __call__(self, grad: Array, mu: Array, nu: Array, param: Array, decay: bool) -> tuple[Array, Array, Array]:
        """Return (u_t, m_t, s_t); the update has the dtype of `param`, whose values matter only with `decay`."""
        d, new_mu, new_nu = self._run(grad, mu, nu, param)
        k, dtype, _ = self.coefficients(mu.dtype, param.dtype)
        update = _rule.displacement(d, as_dtype(param, dtype, self._xp) if decay else None, k)
        return _like(update, param, self._xp), new_mu, new_nu

    def direction(self, grad: Array, mu: Array, nu: Array, param: Array) -> tuple[Array, Array, Array]:
        """Return (d_t, m_t, s_t), the step before learning rate and decay, for hosts that bring their own."""
        d, new_mu, new_nu = self._run(grad, mu, nu, param)
        return _like(d, param, self._xp), new_mu, new_nu

    def coefficients(self, *dtypes: Any) -> tuple[_rule.Coefficients, Any, Any]:
        """Return the numbers, and the dtype and its real dtype, with which to run the rule on these dtypes."""
        kinds = [dtype_name(dtype) for dtype in dtypes]
        real = "float64" if any(kind in ("float64", "complex128") for kind in kinds) else "float32"
        is_complex = any(kind in REAL_OF for kind in kinds)
        if (real, is_complex) not in self._cast:
            real_dtype = getattr(self._xp, real)
            dtype = getattr(self._xp, COMPLEX_OF[real]) if is_complex else real_dtype
            k = _rule.cast(self._k, real_dtype, is_complex, _SMALLEST_NORMAL[real], self._xp)
            self._cast[real, is_complex] = k, dtype, real_dtype
        return self._cast[real, is_complex]

    def _run(self, grad: Array, mu: Array, nu: Array, param: Array) -> tuple[Array, Array, Array]:
        xp = self._xp
        k, dtype, real_dtype = self.coefficients(mu.dtype, param.dtype)
        d, new_mu, new_nu = _rule.rule(
            as_dtype(grad, dtype, xp), as_dtype(mu, dtype, xp), as_dtype(nu, real_dtype, xp), k, xp
        )
        return d, _like(new_mu, mu, xp), _like(new_nu, nu, xp)


class _Standard2022:
    """A namespace of the standard 2022.12, with the `clip` that it lacks."""

    def __init__(self, xp: Any) -> None:
        self._xp = xp

    def __getattr__(self, name: str) -> Any:
        return getattr(self._xp, name)

    def clip(self, x: Array, low: Any, high: Any) -> Array:
        if low is not None:
            x = self._xp.where(x < low, self._xp.asarray(low, dtype=x.dtype), x)
        if high is not None:
            x = self._xp.where(x > high, self._xp.asarray(high, dtype=x.dtype), x)
        return x


_SMALLEST_NORMAL = {"float32": 2.0**-126, "float64": 2.0**-1022}


def _unzip(tree: Container) -> tuple[list[str], list[Any]]:
    pairs = list(flatten(tree))
    return [name for name, _ in pairs], [leaf for _, leaf in pairs]


def _like(x: Array, like: Array, xp: Any) -> Array:
    x = as_dtype(x, like.dtype, xp)
    return x if x.shape else xp.asarray(x)  # NumPy's operators make scalars of 0-d arrays


def _next(count: Any, xp: Any) -> Any:
    if isinstance(count, numbers.Integral):
        return int(count) + 1
    last = xp.iinfo(count.dtype).max
    if is_numpy_array(count):
        return xp.asarray(min(int(count) + 1, last), dtype=count.dtype)
    return xp.where(count < last, count + 1, count)
