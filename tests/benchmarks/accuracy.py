"""Test accuracy on scikit-learn's digits: ACProp with and without the clip, AdamW and SGD, each at its best rate.

    python tests/benchmarks/accuracy.py [--steps 660]

Every optimizer sweeps the same learning rates over the same five seeds; the rate with the best median is shown. The
network and the batches are those of docs/examples/digits.py, in float32.
"""

import argparse
import statistics
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from acprop_optax import acprop

sys.path.insert(0, str(Path(__file__).parents[2] / "docs" / "examples"))
from digits import Digits

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SEEDS = range(5)
OPTIMIZERS = {
    "ACProp, clip_exponent=0.25": lambda lr: acprop(lr, clip_exponent=0.25),
    "ACProp, no clip": acprop,
    "AdamW (optax)": optax.adamw,
    "SGD, momentum 0.9 (optax)": lambda lr: optax.sgd(lr, momentum=0.9),
}


def accuracy(transform: optax.GradientTransformation, steps: int, seed: int) -> float:
    """Return the test accuracy after training with `transform`."""
    data = Digits(steps, seed)

    def loss(params, x, y):
        logits = jax.nn.relu(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def step(carry, batch):
        params, state = carry
        updates, state = transform.update(jax.grad(loss)(params, *batch), state, params)
        return (optax.apply_updates(params, updates), state), None

    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), data.weights)
    x, y = (jnp.asarray(np.stack(column)) for column in zip(*data.batches(), strict=True))
    (params, _), _ = jax.jit(lambda *carry: jax.lax.scan(step, carry, (x.astype(jnp.float32), y)))(
        params, transform.init(params)
    )
    return data.accuracy(jax.tree.map(np.asarray, params))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=660)
    steps = parser.parse_args().steps
    progress = tqdm(total=len(OPTIMIZERS) * len(RATES) * len(SEEDS), desc="accuracy", unit="run")
    print(f"{'optimizer':28}{'best rate':>10}{'median':>9}{'lowest':>9}{'highest':>9}   at 1e-3: median, lowest")
    for name, make in OPTIMIZERS.items():
        results = {}
        for rate in RATES:
            results[rate] = []
            for seed in SEEDS:
                results[rate].append(accuracy(make(rate), steps, seed))
                progress.update()
        best = max(RATES, key=lambda rate, results=results: statistics.median(results[rate]))
        r, default = results[best], results[1e-3]
        print(
            f"{name:28}{best:10.0e}{statistics.median(r):9.4f}{min(r):9.4f}{max(r):9.4f}"
            f"{statistics.median(default):20.4f}{min(default):9.4f}"
        )
    progress.close()


if __name__ == "__main__":
    main()
