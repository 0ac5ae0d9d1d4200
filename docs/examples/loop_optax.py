"""Train, stop half way, resume: the bits are those of a run without a stop."""

import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
from flax import nnx
from jax import Array
from sklearn.datasets import load_digits

from acprop_optax import acprop

STEPS, WARMUP, BATCH, PARTS = 240, 16, 64, 2


class Model(nnx.Module):
    """Two layers, and a norm between them."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        # dtype: compute in bfloat16; the parameters stay float32
        self.hidden = nnx.Linear(64, 64, dtype=jnp.bfloat16, rngs=rngs)
        self.norm = nnx.LayerNorm(64, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.out = nnx.Linear(64, 10, dtype=jnp.bfloat16, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.out(self.dropout(nnx.gelu(self.norm(self.hidden(x)))))


def matrices(params: nnx.State) -> nnx.State:
    """Return what decays: neither biases nor norms."""
    return jax.tree.map(lambda x: x.ndim > 1, params)


RATE = optax.warmup_cosine_decay_schedule(1e-3, 1e-2, WARMUP, STEPS)
TRANSFORM = optax.MultiSteps(
    optax.chain(
        optax.clip_by_global_norm(1.0),
        acprop(RATE, weight_decay=0.01, mask=matrices, clip_exponent=0.25),
    ),
    every_k_schedule=PARTS,
)


def start() -> tuple[Model, nnx.Optimizer]:
    """Return a new model and its optimizer."""
    model = Model(nnx.Rngs(0))
    return model, nnx.Optimizer(model, TRANSFORM, wrt=nnx.Param)


@nnx.jit
def step(model: Model, optimizer: nnx.Optimizer, x: Array, y: Array) -> None:
    """Take a part of a batch; the last part of a batch moves the parameters."""

    def loss_of(model: Model) -> Array:
        logits = model(x).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    optimizer.update(model, nnx.grad(loss_of)(model))


def train(run: tuple, x: np.ndarray, y: np.ndarray, steps: range) -> None:
    """Train the model of a run."""
    model, optimizer = run
    model.train()
    for number in steps:
        # the batch is made from the number of the step, so nothing of it is saved
        batch = np.random.default_rng(number).integers(len(x), size=BATCH)
        for part in np.split(batch, PARTS):
            step(model, optimizer, x[part], y[part])


def state_of(model: Model, optimizer: nnx.Optimizer) -> dict:
    """Return what a checkpoint holds: parameters, keys of dropout, moments."""
    return nnx.to_pure_dict(nnx.state({"model": model, "optimizer": optimizer}))


def bits(model: Model, optimizer: nnx.Optimizer) -> list[bytes]:
    """Return the bits of parameters, moments and counts."""
    arrays = nnx.state(model, nnx.Param), nnx.state(optimizer)
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(arrays)]


def main() -> None:
    """Train without a stop, train with one, compare."""
    digits = load_digits()
    x, y = (digits.data / 16).astype(np.float32), digits.target

    whole = start()
    train(whole, x[:1500], y[:1500], range(STEPS))

    files = orbax.checkpoint.StandardCheckpointer()
    with tempfile.TemporaryDirectory() as folder:
        stopped = start()
        train(stopped, x[:1500], y[:1500], range(STEPS // 2))
        files.save(f"{folder}/run", state_of(*stopped))
        files.wait_until_finished()

        resumed = start()  # in a new process, usually
        wanted = jax.eval_shape(lambda: state_of(*resumed))
        saved = files.restore(f"{folder}/run", wanted)
    files.close()
    nnx.update({"model": resumed[0], "optimizer": resumed[1]}, saved)
    train(resumed, x[:1500], y[:1500], range(STEPS // 2, STEPS))

    model = resumed[0]
    model.eval()
    right = model(x[1500:]).argmax(1) == y[1500:]
    print("test accuracy above 0.85:", float(right.mean()) > 0.85)
    print("the bits of a run without a stop:", bits(*resumed) == bits(*whole))


if __name__ == "__main__":
    main()
