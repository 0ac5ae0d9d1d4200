"""Haiku: parameters are a dict of dicts."""

from pathlib import Path

import haiku
import jax
import optax

from acprop_optax import acprop
from runs import Run, check, data, jax_arrays, jax_loss, pickled, unpickled


def train(steps: int, resume: Path | None, save: Path) -> Run:
    x, _ = data()
    # begin
    net = haiku.transform(lambda x: haiku.nets.MLP([16, 3])(x))
    net = haiku.without_apply_rng(net)
    transform = acprop(3e-2, weight_decay=1e-3, clip_exponent=0.25)
    params = net.init(jax.random.key(0), x)
    state = transform.init(params)

    @jax.jit
    def step(params: haiku.Params, state: optax.OptState) -> tuple:
        grads_of = jax.value_and_grad(lambda p: jax_loss(net.apply(p, x)))
        loss, grads = grads_of(params)
        updates, state = transform.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    # end
    if resume is not None:
        params, state = unpickled(resume)
    losses = []
    while optax.tree.get(state, "count") < steps:
        params, state, loss = step(params, state)
        losses.append(float(loss))
    pickled(save, (params, state))
    return Run(losses, jax_arrays(params, state))


def test_haiku(tmp_path: Path) -> None:
    check("dm-haiku", train, tmp_path)
