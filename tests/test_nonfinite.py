"""What a gradient that is not finite does in each host, and how to be safe from it.

That it spoils no other element holds everywhere (test_extremes.py). The stepper's own guard is tested in
test_stepper.py, and a GradScaler's in test_torch_around.py and test_torch_compiled.py.
"""

import pytest

pytest.importorskip("torch")

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

import acprop_optax
import acprop_torch
from acprop_core import ACProp

HYPER: dict[str, Any] = {"learning_rate": 0.1, "clip_exponent": 0.25}
BAD = [math.nan, math.inf, -math.inf]
GOOD = np.array([1.0, -2.0, 0.5], np.float32)
HUGE = 1e30  # finite in float32, and its square is not

pytestmark = pytest.mark.promise("not finite")


def poisoned(bad: float) -> np.ndarray:
    return np.where(np.arange(3) == 1, np.float32(bad), GOOD)


def guarded(optimizer: ACProp, grads: Any, state: Any, params: Any) -> Any:
    """Do the step if what it leaves is finite: the user's code of docs/reliability.md."""
    updates, new_state = optimizer.update(grads, state, params)
    new_params = optimizer.apply(params, updates)
    if all(abs(x).max() < math.inf for x in (new_params, new_state.mu, new_state.nu)):  # NaN is not
        return new_params, new_state
    return params, state


@pytest.mark.parametrize("backend", ["NumPy", "PyTorch", "JAX"])
@pytest.mark.parametrize("bad", [*BAD, HUGE])
def test_the_functional_core_with_the_guard_of_the_page(backend: str, bad: float) -> None:
    to: Any = {"NumPy": np.array, "PyTorch": torch.tensor, "JAX": jnp.asarray}[backend]
    optimizer = ACProp(**HYPER)
    params, twin = to(np.ones(3, np.float32)), to(np.ones(3, np.float32))
    state, twin_state = optimizer.init(params), optimizer.init(twin)
    for t in range(6):
        if t == 3:
            with np.errstate(over="ignore", invalid="ignore"):
                params, state = guarded(optimizer, to(poisoned(bad)), state, params)
        params, state = guarded(optimizer, to(GOOD * (t + 1)), state, params)
        updates, twin_state = optimizer.update(to(GOOD * (t + 1)), twin_state, twin)
        twin = optimizer.apply(twin, updates)
    assert state.count == twin_state.count == 6
    for x, y in zip((params, *state[1:]), (twin, *twin_state[1:]), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.promise("not finite", backend="JAX")
@pytest.mark.parametrize("bad", [*BAD, HUGE])
def test_the_same_under_jit(bad: float) -> None:
    optimizer = ACProp(**HYPER)

    @jax.jit
    def step(grads: Any, state: Any, params: Any) -> Any:
        updates, new_state = optimizer.update(grads, state, params)
        old, new = (params, state), (optimizer.apply(params, updates), new_state)
        finite = jnp.array([jnp.isfinite(x).all() for x in jax.tree.leaves(new)]).all()
        return jax.tree.map(lambda x, y: jnp.where(finite, x, y), new, old)

    params = jnp.ones(3)
    state = optimizer.init(params)._replace(count=jnp.asarray(0))
    params, state = before = step(GOOD, state, params)
    after = step(poisoned(bad), state, params)
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(x, y)


def optax_run(transform: Any, gradients: list[np.ndarray]) -> Any:
    params = jnp.ones(3)
    state = transform.init(params)
    update = jax.jit(transform.update)
    for g in gradients:
        updates, state = update(jnp.asarray(g), state, params)
        params = optax.apply_updates(params, updates)
    return params, optax.tree.get(state, "mu"), optax.tree.get(state, "nu")


@pytest.mark.promise("not finite", backend="optax")
@pytest.mark.parametrize("bad", BAD)
def test_apply_if_finite_leaves_out_what_is_not(bad: float) -> None:
    safe = optax.apply_if_finite(acprop_optax.acprop(**HYPER), 5)
    for x, y in zip(optax_run(safe, [GOOD, poisoned(bad), -GOOD]), optax_run(safe, [GOOD, -GOOD]), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.promise("not finite", backend="optax")
def test_apply_if_finite_asks_for_the_gradients_and_not_for_their_squares() -> None:
    steps = [GOOD, poisoned(HUGE), -GOOD, GOOD]
    params, *_ = optax_run(optax.apply_if_finite(acprop_optax.acprop(**HYPER), 5), steps)
    np.testing.assert_array_equal(np.isfinite(params), [True, False, True])
    # cured by a bound whose square is finite
    bounded = optax.chain(optax.clip(1e15), acprop_optax.acprop(**HYPER))
    for x in optax_run(optax.apply_if_finite(bounded, 5), steps):
        assert np.isfinite(x).all()


def torch_run(gradients: list[np.ndarray], before: Any = lambda x: True, **flags: Any) -> list[torch.Tensor]:
    x = torch.ones(3, requires_grad=True)
    optimizer = acprop_torch.ACProp([x], lr=0.1, clip_exponent=0.25, **flags)
    for g in gradients:
        x.grad = torch.from_numpy(g)
        if before(x):
            optimizer.step()
    state = optimizer.state[x]
    return [x.detach(), state["exp_avg"], state["exp_avg_var"], state["step"]]


@pytest.mark.promise("not finite", backend="torch")
@pytest.mark.parametrize("flags", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("bad", [*BAD, HUGE])
def test_torch_without_a_scaler_asks_for_the_norm(flags: dict[str, bool], bad: float) -> None:
    def finite_and_bounded(x: Any) -> bool:
        norm = torch.nn.utils.clip_grad_norm_([x], 1e15)
        return bool(norm.isfinite())

    # float32 cannot hold the norm of HUGE either, so that it counts as infinite
    safe = torch_run([GOOD, poisoned(bad), -GOOD], finite_and_bounded, **flags)
    for x, y in zip(safe, torch_run([GOOD, -GOOD], **flags), strict=True):
        assert torch.equal(x, y)
    spoiled, *_ = torch_run([GOOD, poisoned(bad), -GOOD, GOOD], **flags)
    assert spoiled.isfinite().tolist() == [True, False, True]
