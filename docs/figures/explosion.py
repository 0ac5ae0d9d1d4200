"""Show the start-up explosion of plain ACProp, its cure by clip_exponent=0.25, and Adam.

    python docs/figures/explosion.py [--quick] [--out out]

There are two runs, in float64. The first is the Rosenbrock function from (0, 0), learning rate 1e-4, 1,000 steps: the
setting of optax issue #1132. The second is the network of docs/examples/digits.py on scikit-learn's digits, learning
rate 1e-3, 30 epochs; `--quick` trains for 3. explosion.png shows the loss and the largest element of each update;
explosion.json and .md have the largest and the last of them.
"""

import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from tqdm import tqdm

from acprop_optax import acprop
from output import options, table, write
from palette import COLOURS, WIDTH, pyplot

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))
from digits import Digits

CLIP = 0.25
RATES = {"rosenbrock": 1e-4, "digits": 1e-3}
OPTIMIZERS: dict[str, Callable[[float], optax.GradientTransformation]] = {
    "ACProp, no clip": acprop,
    f"ACProp, clip_exponent={CLIP}": lambda rate: acprop(rate, clip_exponent=CLIP),
    "Adam": optax.adam,
}
TITLES = {"rosenbrock": "Rosenbrock from (0, 0)", "digits": "digits, 64-64-10 network"}
COLOUR_OF = dict(zip(OPTIMIZERS, ("ACProp without the clip", "ACProp", "Adam"), strict=True))


class Run(NamedTuple):
    """The losses before each step, the largest element of each update, and the last parameters."""

    losses: np.ndarray
    largest: np.ndarray
    params: Any


def rosenbrock(params: jax.Array, _: None = None) -> jax.Array:
    """Return (1 - x)^2 + 100 (y - x^2)^2."""
    x, y = params
    return (1.0 - x) ** 2 + 100.0 * (y - x**2) ** 2


def cross_entropy(params: dict[str, jax.Array], batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Return the mean loss of the two-layer network of digits.py on one batch."""
    x, y = batch
    hidden = jax.nn.relu(x @ params["w1"] + params["b1"])
    logits = hidden @ params["w2"] + params["b2"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def train(loss: Callable[..., jax.Array], optimizer: optax.GradientTransformation, params: Any, batches: Any) -> Run:
    """Take one step per batch; `batches` are stacked along the first axis of each array."""

    def step(carry: Any, batch: Any) -> tuple[Any, tuple[jax.Array, jax.Array]]:
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, state = optimizer.update(grads, state, params)
        largest = jnp.stack([jnp.abs(u).max() for u in jax.tree.leaves(updates)]).max()
        return (optax.apply_updates(params, updates), state), (value, largest)

    params = jax.tree.map(jnp.asarray, params)
    (params, _), (losses, largest) = jax.jit(lambda carry: jax.lax.scan(step, carry, batches))(
        (params, optimizer.init(params))
    )
    return Run(np.asarray(losses), np.asarray(largest), jax.tree.map(np.asarray, params))


def run_all(data: Digits) -> dict[str, dict[str, Run]]:
    """Return {problem: {optimizer: run}}."""
    x, y = (jnp.stack(part) for part in zip(*data.batches(), strict=True))
    runs: dict[str, dict[str, Run]] = {problem: {} for problem in RATES}
    jobs = [(problem, name) for problem in RATES for name in OPTIMIZERS]
    for problem, name in tqdm(jobs, unit="run"):
        optimizer = OPTIMIZERS[name](RATES[problem])
        if problem == "rosenbrock":
            runs[problem][name] = train(rosenbrock, optimizer, jnp.zeros(2), jnp.zeros(1000))
        else:
            runs[problem][name] = train(cross_entropy, optimizer, data.weights, (x, y))
    return runs


def draw(runs: dict[str, dict[str, Run]]) -> Figure:
    """Draw losses above and the largest element of each update below, a column per problem."""
    figure, panels = pyplot().subplots(2, len(runs), figsize=(WIDTH, 7.2), sharex="col", layout="constrained")
    for (top, bottom), (problem, by_name) in zip(panels.T, runs.items(), strict=True):
        for name, run in by_name.items():
            t = np.arange(1, len(run.losses) + 1)
            style = {"color": COLOURS[COLOUR_OF[name]], "linestyle": "--" if name == "Adam" else "-", "linewidth": 1.6}
            top.loglog(t, run.losses, label=name, **style)
            bottom.loglog(t, run.largest, **style)
        bottom.loglog(t, RATES[problem] * t**CLIP, ":", color="black", label=f"bound of the clip, lr · $t^{{{CLIP}}}$")
        top.set_title(f"{TITLES[problem]}\nlr = {RATES[problem]:g}")
        bottom.set_xlabel("step t")
        for axes in (top, bottom):
            axes.grid(alpha=0.3)
    panels[0, 0].set_ylabel("loss")
    panels[1, 0].set_ylabel("largest step of any parameter")
    figure.legend(*_all_labels(panels[:, 0]), loc="outside lower center", ncols=1, handlelength=2.4)
    return figure


def _all_labels(panels: np.ndarray) -> tuple[list[object], list[str]]:
    pairs = [pair for axes in panels for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
    return [handle for handle, _ in pairs], [label for _, label in pairs]


def main() -> None:
    """Train, draw and write."""
    given = options(__doc__)
    data = Digits(steps=22 * (3 if given.quick else 30), seed=1)
    with jax.enable_x64(True):
        runs = run_all(data)
    numbers = {
        problem: {
            name: {
                "steps": len(run.losses),
                "largest loss": float(run.losses.max()),
                "last loss": float(run.losses[-len(run.losses) // 10 :].mean()),
                "largest step": float(run.largest.max()),
                "at step": int(run.largest.argmax()) + 1,
            }
            for name, run in by_name.items()
        }
        for problem, by_name in runs.items()
    }
    for name, run in runs["digits"].items():
        numbers["digits"][name]["test accuracy"] = data.accuracy(run.params)
    header = ["", "largest loss", "loss, last tenth", "largest step", "at step", "test accuracy"]
    rows = [
        [
            f"{TITLES[problem]}: {name}",
            *(f"{row[key]:.3g}" for key in ("largest loss", "last loss", "largest step")),
            str(row["at step"]),
            f"{row['test accuracy']:.3f}" if "test accuracy" in row else "",
        ]
        for problem, by_name in numbers.items()
        for name, row in by_name.items()
    ]
    write(given.out, "explosion", draw(runs), numbers, table(header, rows))


if __name__ == "__main__":
    main()
