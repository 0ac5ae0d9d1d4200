"""ACProp for NumPy without a framework: parameters updated in place, in tiles that stay in the processor's cache."""

from collections.abc import Callable
from typing import Any

import numpy as np

from acprop_core import ACProp, State
from acprop_core._containers import flatten
from acprop_core._rule import displacement, rule

__all__ = ["Stepper"]

Container = Any  # an array, or nested dicts, lists, tuples and namedtuples of arrays and None

# Elements a tile: four operands and the rule's temporaries stay in a 1 MiB second-level cache. Smaller tiles pay for
# the interpreter, larger ones for memory.
_TILE = 32768


class Stepper:
    """Steps NumPy parameters in place.

    Parameters
    ----------
    params : container of arrays
        Writeable floating-point NumPy arrays, which stay the caller's. Every step changes them in place.
    learning_rate, b1, b2, eps, eps_root, weight_decay, mask, clip_exponent, centering, moment_dtype
        As in `acprop_core.ACProp`.

    Attributes
    ----------
    functional : acprop_core.ACProp
        The same optimizer as pure functions.
    params : container of arrays
        What was given.
    state : acprop_core.State
        Step count and moments; the moments are updated in place.

    Raises
    ------
    TypeError
        If a parameter is not a floating-point NumPy array, or an option of a wrong type.
    ValueError
        If a parameter is read-only, or an option out of its range.

    Examples
    --------
    >>> import numpy as np
    >>> params = {"weight": np.ones((2, 3)), "bias": np.zeros(3)}
    >>> stepper = Stepper(params, learning_rate=1e-3, clip_exponent=0.25)
    >>> stepper.step({"weight": np.full((2, 3), 0.5), "bias": np.ones(3)})
    >>> params["bias"]
    array([-0.001, -0.001, -0.001])
    """

    def __init__(
        self,
        params: Container,
        learning_rate: float | Callable[[int], float] = 1e-3,
        b1: float = 0.9,
        b2: float = 0.999,
        eps: float = 1e-16,
        eps_root: float = 1e-16,
        weight_decay: float = 0.0,
        mask: Container | Callable[[Container], Container] | None = None,
        *,
        clip_exponent: float | None = None,
        centering: str = "current",
        moment_dtype: Any = None,
    ) -> None:
        self.functional = ACProp(
            learning_rate,
            b1,
            b2,
            eps,
            eps_root,
            weight_decay,
            mask,
            clip_exponent=clip_exponent,
            centering=centering,
            moment_dtype=moment_dtype,
        )
        self.params = params
        self.state: State = self.functional.init(params)
        for name, x in flatten(params):
            if x is not None and not (isinstance(x, np.ndarray) and x.flags.writeable):
                raise ValueError(
                    f"parameter {name!r} is read-only or not a NumPy array; a stepper writes into its parameters, "
                    "so give it a writeable copy"
                )

    def step(self, grads: Container) -> None:
        """Update the parameters in place.

        Parameters
        ----------
        grads : container of arrays
            Gradients, in the structure and shapes of the parameters; they are not written to. A gradient of None
            leaves its parameter and its moments as they are.

        Raises
        ------
        TypeError, ValueError
            As `acprop_core.ACProp.update`; nothing has changed then.
        """
        _, leaves = self.functional.match(grads, self.state, self.params)
        step = self.functional.at(self.state.count, np)
        for leaf in leaves:
            if leaf.grad is None:
                continue
            k, dtype, real_dtype = step.coefficients(leaf.mu.dtype, leaf.param.dtype)
            # nditer cuts operands of any memory order into 1-D tiles, casting where the rule runs in another dtype
            with np.nditer(
                [leaf.param, leaf.grad, leaf.mu, leaf.nu],
                flags=["external_loop", "buffered", "zerosize_ok"],
                op_flags=[["readwrite"], ["readonly"], ["readwrite"], ["readwrite"]],
                op_dtypes=[dtype, dtype, dtype, real_dtype],
                casting="unsafe",
                buffersize=_TILE,
            ) as tiles:
                for param, grad, mu, nu in tiles:
                    d, new_mu, new_nu = rule(grad, mu, nu, k, np)
                    param += displacement(d, param if leaf.decay else None, k)
                    mu[...] = new_mu
                    nu[...] = new_nu
        self.state = self.state._replace(count=self.state.count + 1)
