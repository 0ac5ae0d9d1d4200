"""Train a network on handwritten digits on eight devices, save it, and continue on four.

    python docs/examples/scale_jax.py [--steps 660] [--seed 1]

The accelerators are eight virtual CPU devices; if you have real ones, delete the line that makes these. The network,
the weights and the batches are the same as in digits.py. Parameters are divided among two devices ("model"), batches
among four ("data"), and the moments among all eight, as ZeRO does. After half of the steps orbax saves the run, and a
mesh of 2 x 2 devices continues it. The exit code is 1 if it ends elsewhere than the run that stayed on eight devices.
"""

import argparse
import os
import pathlib
import sys
import tempfile

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from acprop_optax import acprop
from digits import Digits

# with the clip, because pixels that are 0 for some steps and then are not would make plain ACProp explode
OPTIMIZER = acprop(1e-3, weight_decay=1e-4, clip_exponent=0.25)
PARAMS = {"w1": P(None, "model"), "b1": P("model"), "w2": P("model", None), "b2": P()}
MOMENTS = {"w1": P("data", "model"), "b1": P(("model", "data")), "w2": P(("model", "data"), None), "b2": P()}
ROWS = P("data")


def mesh_of(data: int, model: int) -> Mesh:
    """Return a mesh of the first devices."""
    devices = jax.devices()[: data * model]
    return jax.make_mesh((data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def loss(params: dict[str, jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    """Return the mean cross-entropy over a batch."""
    hidden = jax.nn.relu(x @ params["w1"] + params["b1"])
    logits = hidden @ params["w2"] + params["b2"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


class Run:
    """Parameters and optimizer state on one mesh, and the compiled step."""

    def __init__(self, mesh: Mesh, params: dict[str, np.ndarray]) -> None:
        on_mesh = {name: NamedSharding(mesh, spec) for name, spec in PARAMS.items()}
        moments = {name: NamedSharding(mesh, spec) for name, spec in MOMENTS.items()}
        whole = NamedSharding(mesh, P())
        abstract = jax.eval_shape(OPTIMIZER.init, params)
        state = jax.tree.map(lambda _: whole, abstract)
        state = (state[0]._replace(mu=moments, nu=moments), *state[1:])
        self.shardings = on_mesh, state
        self.params = jax.device_put(params, on_mesh)
        self.state = jax.jit(OPTIMIZER.init, out_shardings=state)(self.params)
        self._rows = NamedSharding(mesh, ROWS)

        def step(params, state, x, y):
            grads = jax.grad(loss)(params, x, y)
            updates, state = OPTIMIZER.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        self._step = jax.jit(step, out_shardings=self.shardings, donate_argnums=(0, 1))

    def step(self, x: np.ndarray, y: np.ndarray) -> None:
        batch = jax.device_put((x.astype("float32"), y), self._rows)
        self.params, self.state = self._step(self.params, self.state, *batch)
        # Virtual devices share a few threads: programs of two meshes at once would wait for each other for ever.
        jax.block_until_ready(self.params)

    def save(self, path: pathlib.Path) -> None:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, (self.params, self.state))

    def restore(self, path: pathlib.Path) -> None:
        here = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            (self.params, self.state),
            self.shardings,
        )
        with ocp.StandardCheckpointer() as checkpointer:
            self.params, self.state = checkpointer.restore(path, here)

    def report(self, name: str, data: Digits) -> dict[str, np.ndarray]:
        """Print step, accuracy and memory of the run; return its parameters."""
        params = jax.tree.map(np.asarray, self.params)
        leaves = jax.tree.leaves((self.state[0].mu, self.state[0].nu))
        there = sum(x.addressable_shards[0].data.nbytes for x in leaves)
        print(
            f"{name:32} step {int(self.state[0].count):4}  accuracy {data.accuracy(params):.4f}  "
            f"moments on a device: {there:6,} of {sum(x.nbytes for x in leaves):,} bytes"
        )
        return params


def main() -> int:
    """Train twice, once on one mesh and once on two; compare."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=660, help="training steps (30 epochs: 660)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the initial weights and the batches")
    arguments = parser.parse_args()
    data = Digits(arguments.steps, arguments.seed)
    weights = {name: x.astype("float32") for name, x in data.weights.items()}

    stays = Run(mesh_of(4, 2), weights)
    with tempfile.TemporaryDirectory() as folder:
        half = pathlib.Path(folder, "half")
        for i, batch in enumerate(data.batches()):
            if i == arguments.steps // 2:
                stays.save(half)
                stays.report("4 x 2 devices, saved", data)
                moves = Run(mesh_of(2, 2), weights)
                moves.restore(half)
                moves.report("2 x 2 devices, restored", data)
            stays.step(*batch)
            if i >= arguments.steps // 2:
                moves.step(*batch)

    a, b = stays.report("4 x 2 devices, to the end", data), moves.report("2 x 2 devices, to the end", data)
    difference = max(float(np.abs(a[name] - b[name]).max()) for name in a)
    print(f"Largest difference of a parameter: {difference:.1e}")
    return int(not difference < 1e-3)


if __name__ == "__main__":
    sys.exit(main())
