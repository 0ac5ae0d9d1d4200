"""The optimizer: hyperparameters, and the pure functions that apply the rule to containers of arrays."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from acprop_core._checks import (
    check_array,
    check_count,
    check_match,
    check_number,
    common_namespace,
    named,
    namespace_of_alike,
    warn,
)
from acprop_core._containers import align, flatten, names_and_leaves, unflatten
from acprop_core._dtypes import FLOATS, as_dtype, dtype_name, is_compensated, moment_dtypes_of
from acprop_core._quirks import add_one, as_array
from acprop_core.adapt import Row, check_params, decays_of, rows_of, step_at
from acprop_core.rule import has_decay

Container = Any  # an array, or nested dicts, lists, tuples and namedtuples of arrays and None


class State(NamedTuple):
    """The state of ACProp between steps.

    Attributes
    ----------
    count : int or 0-d integer array
        Number of updates done.
    mu : container of arrays
        First moment m of every parameter, in the structure of the parameters; zeros at the start.
    nu : container of real arrays
        Second central moment s of every parameter; zeros at the start.
    carry : container of arrays and None, or None
        With ``compensate=True``, the amount that each 16-bit parameter has lost to rounding, in its dtype; zeros at the
        start. None for other parameters, and without `compensate`.

    Examples
    --------
    >>> import numpy as np
    >>> ACProp().init(np.zeros(2))
    State(count=0, mu=array([0., 0.]), nu=array([0., 0.]), carry=None)
    """

    count: Any
    mu: Container
    nu: Container
    carry: Container | None = None


@dataclass(frozen=True)
class ACProp:
    r"""ACProp: momentum centering and asynchronous update (Zhuang et al. 2021).

    Each of these two ideas can be switched off: `centering` and `asynchronous`. Without them the same rule is AdaShift,
    AdaBelief, Adam or AdamW; see the notes.

    Step :math:`t = 1, 2, \dots`, with :math:`m_0 = s_0 = 0` and :math:`\hat s_0 := 1`:

    .. math::

        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        s_t &= \beta_2 s_{t-1} + (1 - \beta_2) |g_t - m_t|^2 + \varepsilon_{root} \\
        \hat s_{t-1} &= s_{t-1} / (1 - \beta_2^{t-1}) \\
        d_t &= \mathrm{clip}(g_t / (\sqrt{\hat s_{t-1}} + \varepsilon),\ -t^p,\ t^p) \\
        u_t &= -\alpha_t (d_t + \lambda x_{t-1})

    and the update :math:`u_t` is added to the parameter :math:`x_{t-1}`.

    Parameters
    ----------
    learning_rate : float, 0-d array, or callable
        :math:`\alpha`, at least 0. A callable is a schedule; it is called with the count of updates done, 0 at first,
        and may return any finite number, because a schedule that ends at 0 can end slightly below it.
    b1, b2 : float or 0-d array
        :math:`\beta_1, \beta_2`, decay rates of the two moments, in [0, 1). With ``b1=0`` and centering "current"
        :math:`m_t = g_t`, so the second moment vanishes and steps explode: a clip or centering "previous" is needed,
        and without both the constructor warns.
    eps : float or 0-d array
        :math:`\varepsilon`, added to the root; at least 0.
    eps_root : float or 0-d array
        :math:`\varepsilon_{root}`, added to the second moment at every step; at least 0. Must be positive if you
        differentiate through the update, because the square root has no derivative at 0.
    weight_decay : float, 0-d array, or callable
        :math:`\lambda`, decoupled weight decay, at least 0; it is multiplied by the learning rate. A callable is a
        schedule, as for the learning rate.
    mask : container of bool, prefix of one, or callable, optional
        Which parameters decay. A bool may stand for a whole sub-container. A callable makes it from the parameters.
    clip_exponent : float, optional
        :math:`p`, at least 0; None for no clip. With a clip no element moves by more than :math:`\alpha_t t^p`.
        It does not clip gradients. Use 0.25 unless you must follow the published recurrence to the letter: without a
        clip, an element takes a step millions of times too large at its first nonzero gradient after zeros, and
        likewise where its moments are zeros at a count above 0, as those of elements that were added during training.
    centering : {"current", "previous", "none"}
        "current" centres the second moment on :math:`m_t`, as the paper and its authors' code do; "previous" on
        :math:`m_{t-1}`, as the code of ``optax.contrib.acprop`` does. With "none" it is the average of
        :math:`|g_t|^2`, as in Adam.
    moment_dtype : dtype or its name, optional
        Real dtype of the moments; by default the parameter's, and float32 for 16-bit parameters. The array library
        itself must have it.
    compensate : bool
        Keep the amount that float16 and bfloat16 parameters lose to rounding, and add it to them as soon as it is
        large enough. It is an array of the parameter's dtype in the state, the carry. Otherwise updates smaller than
        half the last place of a parameter are lost. Parameter and carry together step as the equations say. No
        effect on other parameters.
    asynchronous : bool
        True divides the gradient :math:`g_t` by the root of the previous second moment :math:`\hat s_{t-1}`. False
        divides the mean of gradients :math:`\hat m_t` by that of the new one, :math:`\hat s_t`, as in Adam.

    Raises
    ------
    TypeError
        If a hyperparameter is of a wrong type.
    ValueError
        If a hyperparameter is out of its range or not finite. Arrays are not read, because they may be traced.

    Warns
    -----
    UserWarning
        If `b1` is 0 with centering "current" and no clip.

    Notes
    -----
    Zhuang, Ding, Tang, Dvornek, Tatikonda, Duncan: "Momentum Centering and Asynchronous Update for Adaptive Gradient
    Methods", NeurIPS 2021, arXiv:2110.05454, algorithm 2. The clip is ours, not the paper's; optax issue #1132
    describes the problem.

    The paper compares four optimizers, which the two switches make. With ``asynchronous=False``

    .. math::

        d_t = \mathrm{clip}(\hat m_t / (\sqrt{\hat s_t} + \varepsilon),\ -t^p,\ t^p), \quad
        \hat m_t = m_t / (1 - \beta_1^t), \quad \hat s_t = s_t / (1 - \beta_2^t)

    - ``asynchronous=True, centering="none"``: AdaShift with n = 1, element by element (Zhou et al. 2019,
      arXiv:1810.00143), except its first step, which AdaShift leaves out. `b1` has no effect on the steps.
    - ``asynchronous=False, centering="current"``: AdaBelief (Zhuang et al. 2020, arXiv:2010.07468), also
      ``optax.adabelief``.
    - ``asynchronous=False, centering="none"``: Adam (Kingma and Ba 2015, arXiv:1412.6980), with weight decay AdamW
      (Loshchilov and Hutter 2019, arXiv:1711.05101). ``eps=1e-8, eps_root=0.0, weight_decay=0.01`` are the defaults of
      ``torch.optim.AdamW``, which is the better choice where nothing moves between frameworks.

    With PyTorch, call `update` and `apply` under ``torch.no_grad()`` unless you want to differentiate through them,
    because PyTorch records all operations on parameters that require gradients.

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
    compensate: bool = False
    asynchronous: bool = True

    def __post_init__(self) -> None:
        self._check(lowest=0.0)
        if isinstance(self.b1, float) and self.b1 == 0.0 and self.clip_exponent is None and self.centering == "current":
            warn(
                "b1 is 0 with centering='current' and without a clip: then m_t = g_t, the residual g_t - m_t is 0, the "
                "second moment vanishes, and steps explode; use clip_exponent=0.25, or centering='previous'"
            )

    def _check(self, lowest: float) -> None:
        """Check all options, and make floats of numbers; `lowest` is for those that may be values of a schedule."""
        checked = {}
        for name in ("learning_rate", "b1", "b2", "eps", "eps_root", "weight_decay", "clip_exponent"):
            value = getattr(self, name)
            may_be_scheduled = name in ("learning_rate", "weight_decay")
            if not (may_be_scheduled and callable(value)) and not (name == "clip_exponent" and value is None):
                below = 1.0 if name in ("b1", "b2") else math.inf
                checked[name] = check_number(name, value, below, lowest if may_be_scheduled else 0.0)
        if self.centering not in ("current", "previous", "none"):
            raise ValueError(f"centering is {self.centering!r}; use 'current', 'previous' or 'none'")
        if self.moment_dtype is not None:
            checked["moment_dtype"] = dtype_name(self.moment_dtype)
            if checked["moment_dtype"] not in FLOATS:
                raise ValueError(
                    f"moment_dtype is {self.moment_dtype!r}; use one of {', '.join(FLOATS)}, or None for the "
                    "parameter's own (float32 for 16-bit parameters)"
                )
        for name in ("compensate", "asynchronous"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} is {getattr(self, name)!r}; use True or False")
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
            bfloat16, and `nu` of a complex parameter is real. `moment_dtype` overrides. `carry` is None unless
            `compensate` is set.

        Raises
        ------
        TypeError
            If a leaf is not a floating-point array, the leaves are of different array libraries, or the library
            lacks `moment_dtype`.

        Examples
        --------
        >>> import numpy as np
        >>> state = ACProp().init({"w": np.zeros(2, dtype=np.float16)})
        >>> state.count, state.nu["w"].dtype
        (0, dtype('float32'))
        """
        names, leaves = names_and_leaves(params)
        xp = common_namespace(("parameter", name, x) for name, x in zip(names, leaves, strict=True))
        for name, x in zip(names, leaves, strict=True):
            check_array("parameter", name, x)
        rows = [(None, None, None) if x is None else self._zeros(x, xp) for x in leaves]
        mu, nu, carry = (unflatten(params, [row[i] for row in rows]) for i in range(3))
        return State(0, mu, nu, carry if self.compensate else None)

    def update(self, grads: Container, state: State, params: Container | None = None) -> tuple[Container, State]:
        """Return the updates to add to the parameters, and the state after the step. No argument is written to.

        Parameters
        ----------
        grads : container of arrays
            Gradients, in the structure and shapes of the parameters. A gradient of None leaves its parameter and its
            moments as they are.
        state : State
            From `init`, or from the step before.
        params : container of arrays, optional
            The parameters before the step. Only weight decay and `compensate` need them; they also fix the dtypes of
            the updates.

        Returns
        -------
        updates : container of arrays
            In the dtypes of the parameters (of the gradients, where `params` is None). With `compensate` they are to be
            added in these dtypes, as `apply` does, because the carry is its rounding error.
        state : State
            The moments keep their dtypes, and `count` its kind: an int, or a 0-d array, which stops at the largest
            value of its dtype.

        Raises
        ------
        TypeError
            If a leaf is not a dense floating-point array, array libraries or devices are mixed, a gradient is complex
            and its parameter is not, the count is not an integer, a leaf of the mask is not a bool, or a schedule's
            value is not a number.
        ValueError
            If structures or shapes differ, there is weight decay or `compensate` and no `params`, the state was made
            with another `compensate`, the count is negative, or a schedule's value is not finite.

        Examples
        --------
        >>> import numpy as np
        >>> optimizer = ACProp(learning_rate=1e-3, clip_exponent=0.25)
        >>> params, grads = np.ones(2), np.array([0.5, 0.0])
        >>> updates, state = optimizer.update(grads, optimizer.init(params), params)
        >>> updates, state.count
        (array([-0.0005, -0.    ]), 1)
        """
        if not isinstance(state, State):
            raise TypeError(f"the state is a {type(state).__name__}; pass the State that init or update returned")
        check_params(self, params, has_decay(self.weight_decay))
        rows, xp = rows_of(Row(params, grads, *state[1:]), self.compensate)
        like = state.mu if params is None else params
        if xp is None:  # no arrays at all
            return like, state._replace(count=add_one(state.count))
        step = step_at(self, check_count(state.count), xp)
        results = list(map(step, rows, decays_of(self, like)))
        columns = list(zip(*results, strict=True))[: 4 if self.compensate else 3]
        updates, *kept = (unflatten(like, column) for column in columns)
        return updates, State(add_one(state.count), *kept)

    def apply(self, params: Container, updates: Container) -> Container:
        """Return the parameters after the step, ``params + updates``, in the dtypes of the parameters.

        Parameters
        ----------
        params, updates : container of arrays
            The parameters before the step, and the updates. An update of None leaves its parameter.

        Returns
        -------
        container of arrays
            New arrays, in the structure of `params`.

        Raises
        ------
        TypeError
            If a leaf is not a floating-point array, or array libraries are mixed.
        ValueError
            If structures or shapes differ.

        Examples
        --------
        >>> import numpy as np
        >>> params, updates = np.ones(2, np.float32), np.array([-0.5, 0.0], np.float32)
        >>> ACProp().apply({"w": params}, {"w": updates})
        {'w': array([0.5, 1. ], dtype=float32)}
        """
        leaves, new = (align(tree, params, "the container of updates") for tree in (params, updates))
        xp = namespace_of_alike([leaves, new])
        if xp is None:
            names = [name for name, _ in flatten(params)]
            xp = common_namespace(named(["parameter", "update"], names, [leaves, new]))
            for name, x, u in zip(names, leaves, new, strict=True):
                check_array("parameter", name, x)
                check_match("update", name, u, "parameter", x, optional=True)
        sums = [
            x if u is None else as_array(x + as_dtype(u, x.dtype, xp), xp) for x, u in zip(leaves, new, strict=True)
        ]
        return unflatten(params, sums)

    def _zeros(self, x: Any, xp: Any) -> tuple[Any, Any, Any]:
        mu, nu = moment_dtypes_of(x, self.moment_dtype, xp)
        real = x if mu == nu else xp.real(x)  # Dask warns of zeros that are real and like a complex array
        carry = xp.zeros_like(x) if self.compensate and is_compensated(x) else None
        return xp.zeros_like(x, dtype=mu), xp.zeros_like(real, dtype=nu), carry
