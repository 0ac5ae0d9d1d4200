"""The step that is about to be taken."""

import functools
from typing import Any

from acprop_core import adapt, rule


class Upcoming:
    """What is known of a step before it is taken: for compiled code as numbers, for others as a function.

    Parameters
    ----------
    optimizer : acprop_core.ACProp
        Its schedules are called.
    count : int
        Number of updates done.
    xp : namespace
        The array library of the parameters.

    Attributes
    ----------
    hyper : rule.Hyperparameters
        The options of this step.
    count : int
        As passed.
    grad_scale : float
        Multiplies the gradients.
    """

    def __init__(self, optimizer: Any, count: int, xp: Any) -> None:
        self.hyper = adapt.hyperparameters_at(optimizer, count, xp)
        self.count = count
        self.grad_scale = 1.0
        self._xp = xp

    @functools.cached_property
    def step(self) -> adapt.Step:
        """The step of one row at a time."""
        step = adapt.Step(rule.numbers_of(self.hyper, self.count, self._xp), rule.flags_of(self.hyper), self._xp)
        return step if self.grad_scale == 1.0 else step.with_grad_scale(self.grad_scale)
