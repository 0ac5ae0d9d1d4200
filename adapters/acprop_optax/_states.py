"""The states in an optimizer of optax: which are known, what they count, and which options they show."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from acprop_core import ACProp
from acprop_optax._transform import CarryState, counts_decay


class _Kind(NamedTuple):
    """What a portable state knows of a class of states: which field counts updates, and which need not be kept.

    The other fields hold more states.
    """

    counter: str | None = None
    unused: tuple[str, ...] = ()


# By name, because optax does not export all of them.
KINDS = {
    "ScaleByBeliefState": _Kind("count", ("mu", "nu")),
    "ScaleByAdamState": _Kind("count", ("mu", "nu")),
    "CarryState": _Kind(None, ("carry",)),
    "ScaleByScheduleState": _Kind("count"),
    "WeightDecaySchedule": _Kind("count"),
    "WrappedScheduleState": _Kind("count"),
    "InjectHyperparamsState": _Kind("count", ("hyperparams",)),
    "InjectStatefulHyperparamsState": _Kind("count", ("hyperparams",)),
    "MultiStepsState": _Kind("gradient_step", ("mini_step", "acc_grads", "skip_state")),  # 0 and zeros after an update
    "MaskedState": _Kind(),
    "PartitionState": _Kind(),
    # reports of the last update; `counts_in` refuses if they have an effect on the next one
    "ApplyIfFiniteState": _Kind(None, ("notfinite_count", "last_finite", "total_notfinite")),
    "ZeroNansState": _Kind(None, ("found_nan",)),
}
MOMENTS = (optax.ScaleByBeliefState, optax.ScaleByAdamState)
# The states in a chain of `acprop` and of optax's own. In another one, made by hand, a mask may be of something else.
_CHAIN = re.compile(
    "ScaleBy(Belief|Adam)State( (Empty|Masked)State| WeightDecaySchedule)? (Empty|ScaleBySchedule)State( CarryState)?"
)


def _is_known(x: Any) -> bool:
    return type(x).__name__ in KINDS and hasattr(x, "_fields")


def rewritten(tree: Any, change: Callable[[Any], Any]) -> Any:
    """Return `tree` with `change` applied to every state of a known class, also within others."""

    def visit(x: Any) -> Any:
        if not _is_known(x):
            return x
        unused = KINDS[type(x).__name__].unused
        x = change(x)
        return x._replace(**{name: rewritten(getattr(x, name), change) for name in x._fields if name not in unused})

    return jax.tree.map(visit, tree, is_leaf=_is_known)


def known_in(tree: Any) -> list[Any]:
    """Return the states of known classes, also those within others."""
    found: list[Any] = []

    def note(x: Any) -> Any:
        found.append(x)
        return x

    rewritten(tree, note)
    return found


def moments_in(tree: Any) -> Any:
    """Return the state that holds the moments."""
    _check(tree)
    found = [x for x in known_in(tree) if isinstance(x, MOMENTS)]
    if len(found) != 1:
        raise ValueError(
            f"the optax state holds {len(found)} states with moments of ACProp; pass a state with one, from init of "
            "acprop, scale_by_acprop, optax.adam, adamw, adabelief or contrib.acprop, or of an optimizer that contains "
            "one of them"
        )
    return found[0]


def carry_of(tree: Any) -> Any:
    return next((x.carry for x in known_in(tree) if isinstance(x, CarryState)), None)


def counts_in(tree: Any) -> list[tuple[str, int]]:
    """Return how many updates each state next to ACProp's has counted; refuse what a portable state cannot hold."""
    counts = []
    for x in known_in(tree):
        name = type(x).__name__
        field = KINDS[name].counter
        if name == "MultiStepsState" and (mini_step := int(value_of(x.mini_step))):
            raise ValueError(
                f"MultiSteps has accumulated the gradients of {mini_step} mini-steps, which a portable state cannot "
                "hold; call this after an update"
            )
        if name == "ApplyIfFiniteState" and (n := int(value_of(x.notfinite_count))):
            raise ValueError(
                f"apply_if_finite has skipped the last {n} updates, which a portable state cannot hold; call this "
                "after an update that was finite"
            )
        if field is not None and not isinstance(x, MOMENTS):
            counts.append((name, int(value_of(getattr(x, field)))))
    return counts


def _check(tree: Any) -> None:
    """Refuse states of other classes if they hold arrays, because these would begin again."""
    for x in jax.tree.leaves(tree, is_leaf=lambda x: hasattr(x, "_fields")):
        if _is_known(x):
            counter, unused = KINDS[type(x).__name__]
            _check([getattr(x, name) for name in x._fields if name != counter and name not in unused])
        elif type(x).__name__ == "ScaleByAmsgradState":
            raise ValueError(
                "the optax state is of optax.amsgrad, which divides by the root of the largest second moment so far; a "
                "portable state cannot hold that, and no other host could continue it. Continue with optax.amsgrad"
            )
        elif jax.tree.leaves(x):
            raise ValueError(
                f"the optax state holds {type(x).__name__}, which a portable state cannot hold: its transformation "
                "would begin again. Pass the part of the state that is acprop's, and save the rest yourself"
            )


def check_options(state: Any, optimizer: ACProp) -> None:
    """Refuse options that the state shows and the hyperparameters lack, or the reverse."""
    rows = [("compensate", _has(state, "CarryState"), optimizer.compensate)]
    chain = next(filter(_is_chain, jax.tree.leaves(state, is_leaf=_is_chain)), None)
    if chain is not None:
        *decay, rate = (x for x in chain[1:] if not isinstance(x, CarryState))
        kinds = [("learning_rate", "ScaleByScheduleState", rate)]
        if decay and counts_decay():
            kinds.append(("weight_decay", "WeightDecaySchedule", decay))
        if any(hasattr(x, "hyperparams") for x in known_in(state)):
            kinds = []  # a number of inject_hyperparams, under any name, may be scheduled there
        for name, kind, part in kinds:
            wanted = callable(getattr(optimizer, name))
            # the schedule that the hyperparameters have may be of a transformation outside of the chain
            rows.append((f"a schedule of {name}", _has(state if wanted else part, kind), wanted))
        if decay and optimizer.weight_decay != 0.0:
            rows.append(("mask", _has(decay, "MaskedState"), optimizer.mask is not None))
    for what, given, wanted in rows:
        if given != wanted:
            have, want = ("with" if x else "without" for x in (given, wanted))
            raise ValueError(
                f"the optax state was made {have} {what}, the hyperparameters are {want} it; pass the hyperparameters "
                "of the transformation"
            )


def _is_chain(x: Any) -> bool:
    return type(x) in (tuple, list) and _CHAIN.fullmatch(" ".join(type(part).__name__ for part in x)) is not None


def _has(state: Any, kind: str) -> bool:
    return kind in {type(x).__name__ for x in known_in(state)}


def value_of(x: Any) -> Any:
    return next(iter(jax.tree.leaves(x)), None)
