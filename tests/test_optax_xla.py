"""What XLA makes of a training step on the CPU: nothing of the size of a parameter is copied or kept aside."""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from acprop_optax import _xla, acprop, scale_by_acprop

SIZE = 4_099
SMALL = 1_024  # bytes: the numbers of a step, each in a cache line of its own
BFLOAT16 = pytest.param(
    "bfloat16",
    marks=pytest.mark.skipif(
        jax.__version_info__ < (0, 10), reason="this XLA copies bfloat16 parameters with every optimizer"
    ),
)


def train_step(transform: optax.GradientTransformation) -> Callable[..., Any]:
    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = transform.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def compiled(transform: optax.GradientTransformation, dtype: str = "float32") -> Any:
    params = {"a": jnp.ones(SIZE, dtype), "b": jnp.ones((3, SIZE), dtype)}
    step = jax.jit(train_step(transform), donate_argnums=(0, 1))
    return step.lower(params, transform.init(params), params).compile()


def large_copies(program: Any) -> list[str]:
    """Return the copies of arrays as large as a parameter."""
    copies = re.findall(r"= (\w+\[([\d,]*)\]\S*) copy(?:-start)?\(", program.as_text())
    return [shape for shape, sizes in copies if math.prod(int(n) for n in sizes.split(",") if n) >= SIZE]


@pytest.mark.parametrize("dtype", ["float32", "float16", BFLOAT16])
@pytest.mark.parametrize(
    "transform",
    [
        acprop(1e-3),
        acprop(1e-3, clip_exponent=0.25),
        acprop(1e-3, clip_exponent=0.25, weight_decay=0.1, mask={"a": True, "b": False}),
        acprop(optax.linear_schedule(1e-3, 0.0, 10), clip_exponent=0.25),
        acprop(1e-3, centering="previous"),
        acprop(1e-3, asynchronous=False, weight_decay=0.1),
        acprop(1e-3, asynchronous=False, centering="none"),
        optax.inject_hyperparams(acprop)(1e-3, clip_exponent=0.25),
        optax.chain(acprop(1e-3)),
    ],
    ids=["plain", "clip", "decay", "schedule", "previous", "belief", "adam", "injected", "chain"],
)
def test_a_step_copies_nothing(transform: optax.GradientTransformation, dtype: str) -> None:
    program = compiled(transform, dtype)
    assert not large_copies(program)
    assert program.memory_analysis().temp_size_in_bytes < SMALL


@pytest.mark.parametrize("dtype", ["float32", BFLOAT16])
def test_synchronous_steps_centred_on_the_previous_mean_have_one_temporary(dtype: str) -> None:
    # g_t - m_{t-1}, of which all three results are made; optax.adabelief has it too, and two copies
    program = compiled(acprop(1e-3, asynchronous=False, centering="previous"), dtype)
    assert not large_copies(program)
    assert program.memory_analysis().temp_size_in_bytes < 4 * 4 * SIZE + SMALL


@pytest.mark.parametrize("dtype", ["float32", BFLOAT16])
@pytest.mark.parametrize("before", [optax.clip(1.0), optax.clip_by_global_norm(1.0), optax.add_noise(0.1, 0.5, 0)])
def test_in_a_chain_it_needs_no_more_than_adamw(before: optax.GradientTransformation, dtype: str) -> None:
    ours, adamw = (compiled(optax.chain(before, f(1e-3)), dtype) for f in (acprop, optax.adamw))
    assert large_copies(ours) == large_copies(adamw)
    assert ours.memory_analysis().temp_size_in_bytes < adamw.memory_analysis().temp_size_in_bytes + SMALL


def test_what_is_tested_can_be_seen() -> None:
    program = compiled(optax.contrib.acprop(1e-3))
    assert large_copies(program)
    assert program.memory_analysis().temp_size_in_bytes >= 2 * 4 * SIZE


def test_a_chain_of_its_parts_has_no_copy_but_one_temporary() -> None:
    # what becomes of d_t is not known to scale_by_acprop; so s_t comes after d_t itself, which is kept for that
    program = compiled(optax.chain(scale_by_acprop(clip_exponent=0.25), optax.scale_by_learning_rate(1e-3)))
    assert not large_copies(program)
    assert program.memory_analysis().temp_size_in_bytes < 4 * 4 * SIZE + SMALL


def test_a_scan_copies_nothing_in_its_loop() -> None:
    transform = acprop(1e-3, clip_exponent=0.25)
    step = train_step(transform)

    def train(params: Any, state: Any, grads: Any) -> Any:
        return jax.lax.scan(lambda carry, grad: (step(*carry, grad), None), (params, state), grads)[0]

    params = jnp.ones(SIZE)
    program = jax.jit(train, donate_argnums=(0, 1)).lower(params, transform.init(params), jnp.ones((5, SIZE))).compile()
    assert not large_copies(program)
    assert program.memory_analysis().temp_size_in_bytes < SMALL


@pytest.mark.parametrize("centering", ["current", "previous"])
def test_the_order_changes_no_bit(centering: str, monkeypatch: pytest.MonkeyPatch) -> None:
    params, grads = jnp.linspace(-1.0, 1.0, SIZE), jnp.sin(jnp.arange(float(SIZE))).at[:3].set(jnp.nan)
    transform = acprop(1e-3, clip_exponent=0.25, centering=centering)
    ordered = unordered = params, transform.init(params)
    steps = [jax.jit(train_step(transform)).lower(*ordered, grads).compile()]
    monkeypatch.setattr(_xla, "_after", lambda written, x, count: x)
    jax.clear_caches()  # JAX keeps the program of a parameter
    steps.append(jax.jit(train_step(transform)).lower(*ordered, grads).compile())
    jax.clear_caches()
    assert steps[0].as_text() != steps[1].as_text()
    for _ in range(5):
        ordered, unordered = (step(*carry, grads) for step, carry in zip(steps, (ordered, unordered), strict=True))
        for a, b in zip(jax.tree.leaves(ordered), jax.tree.leaves(unordered), strict=True):
            assert a.tobytes() == b.tobytes()
