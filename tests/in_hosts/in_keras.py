"""Keras on JAX: the loop without state, where an optax transform takes the place of keras.optimizers."""

from pathlib import Path

import jax
import keras
import optax

from acprop_optax import acprop
from runs import Run, check, data, jax_arrays, jax_loss, pickled, unpickled


def train(steps: int, resume: Path | None, save: Path) -> Run:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(16, activation="relu"), keras.layers.Dense(3)])
    x, _ = data()
    # begin
    transform = acprop(3e-2, weight_decay=1e-3, clip_exponent=0.25)
    params = [variable.value for variable in model.trainable_variables]
    others = [variable.value for variable in model.non_trainable_variables]
    state = transform.init(params)

    def loss_of(params: list, others: list) -> tuple[jax.Array, list]:
        logits, others = model.stateless_call(params, others, x, training=True)
        return jax_loss(logits), others

    @jax.jit
    def step(params: list, others: list, state: optax.OptState) -> tuple:
        grads_of = jax.value_and_grad(loss_of, has_aux=True)
        (loss, others), grads = grads_of(params, others)
        updates, state = transform.update(grads, state, params)
        return optax.apply_updates(params, updates), others, state, loss

    # end
    if resume is not None:
        params, others, state = unpickled(resume)
    losses = []
    while optax.tree.get(state, "count") < steps:
        params, others, state, loss = step(params, others, state)
        losses.append(float(loss))
    # begin write
    for variable, value in zip(model.trainable_variables, params, strict=True):
        variable.assign(value)  # so that model.predict and model.save see it
    # end write
    pickled(save, (params, others, state))
    return Run(losses, jax_arrays(params, state))


def test_keras(tmp_path: Path) -> None:
    check("keras", train, tmp_path)
