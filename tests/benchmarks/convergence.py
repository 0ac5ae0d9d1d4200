"""Train small networks on real data with ACProp, AdamW, AdaBelief and SGD, each at every learning rate of one grid.

    python tests/benchmarks/convergence.py [quick] [--out FOLDER]

Four tasks (tasks.py), five seeds. A seed sets the weights that a run starts from and the batches that it sees, the same
for every optimizer and rate. All take the same number of steps at a constant rate, in float32, with the defaults of
their libraries otherwise, except that b1 or the momentum is 0.9, and 0.5 for the GAN. The rate of an optimizer is the
one with the best median score on the validation data (at a tie, the lowest median loss there); what is reported is the
score on the test data, which chooses nothing. A run has diverged if its loss on the validation data ends higher than it
began, or is not finite. The runs of one optimizer on one task are a single program: `jax.vmap` over rates and seeds,
`jax.lax.scan` over steps. Written are convergence.json, and what convergence_report.py makes of it.
"""

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from acprop_optax import acprop

sys.path.insert(0, str(Path(__file__).parents[2] / "docs" / "examples"))
import convergence_report
import record
from tasks import TASKS, Task

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
SEEDS = tuple(range(5))
POINTS = 20  # of a curve, after the start
LIBRARIES = ("jax", "optax", "numpy", "scikit-learn")
Make = Callable[[Any, float], optax.GradientTransformation]  # from the learning rate and the momentum
OPTIMIZERS: dict[str, Make] = {
    "ACProp": lambda rate, b1: acprop(rate, b1, clip_exponent=0.25),
    "AdamW": lambda rate, b1: optax.adamw(rate, b1),
    "AdaBelief": lambda rate, b1: optax.adabelief(rate, b1),
    "SGD with momentum": lambda rate, b1: optax.sgd(rate, b1),
    "ACProp without the clip": lambda rate, b1: acprop(rate, b1),
}
QUICK = {"rates": (1e-3, 1e-2, 1e-1), "seeds": (0, 1), "shorter": 10, "optimizers": ("ACProp", "AdamW")}


def beginnings(task: Task, seeds: tuple[int, ...]) -> tuple[Any, Any]:
    """Return the parameters, (seeds, ...), and the batches, (seeds, points, steps of a point, ...)."""
    rngs = [np.random.default_rng([seed, *task.name.encode()]) for seed in seeds]
    params = [task.start(rng) for rng in rngs]
    batches = [task.batches(rng, task.steps) for rng in rngs]

    def by_points(*runs: np.ndarray) -> np.ndarray:
        return np.stack([x.reshape(POINTS, -1, *x.shape[1:]) for x in runs])

    return jax.tree.map(lambda *x: np.stack(x), *params), jax.tree.map(by_points, *batches)


def train(task: Task, make: Make, rate: Any, params: Any, batches: Any) -> Any:
    """Return the losses on the validation data, (points + 1,), and the scores in the end, there and on the test data.

    The rate may be traced.
    """
    transform = make(rate, task.momentum)

    def step(carry: Any, batch: Any) -> Any:
        params, state = carry
        updates, state = transform.update(task.grads(params, batch), state, params)
        return (optax.apply_updates(params, updates), state), None

    def stretch(carry: Any, batches: Any) -> Any:
        carry, _ = jax.lax.scan(step, carry, batches)
        return carry, task.validate(carry[0])[0]

    first, _ = task.validate(params)
    (params, _), losses = jax.lax.scan(stretch, (params, transform.init(params)), batches)
    return jnp.append(first, losses), task.validate(params)[1], task.test(params)[1]


def sweep(task: Task, make: Make, rates: tuple[float, ...], seeds: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """Return what `train` does for each rate and seed, (rates, seeds, ...)."""

    def one(rate: Any, params: Any, batches: Any) -> Any:
        return train(task, make, rate, params, batches)

    program = jax.jit(jax.vmap(jax.vmap(one, (None, 0, 0)), (0, None, None)))
    results = program(jnp.asarray(rates, jnp.float32), *beginnings(task, seeds))
    return tuple(np.asarray(x, np.float64) for x in results)


def rows(task: Task, name: str, rates: tuple[float, ...], results: tuple[np.ndarray, ...]) -> list[dict[str, Any]]:
    """Return a row for each rate; None stands for what is not finite."""
    losses, validation, test = results
    sign = -1.0 if task.more_is_better else 1.0
    order = []
    found: list[dict[str, Any]] = []
    for i, rate in enumerate(rates):
        ends = worst_if_not_finite(losses[i, :, -1])
        order.append((statistics.median(worst_if_not_finite(sign * validation[i])), statistics.median(ends)))
        found.append(
            {
                "task": task.name,
                "optimizer": name,
                "rate": rate,
                "chosen": False,
                "start": float(np.median(losses[i, :, 0])),
                "diverged": sum(bool(not end <= start) for start, end in zip(losses[i, :, 0], ends, strict=True)),
                "validation": plain(validation[i]),
                "test": plain(test[i]),
            }
        )
    best = min(range(len(rates)), key=order.__getitem__)
    every = task.steps // POINTS
    found[best] |= {
        "chosen": True,
        "steps": [every * point for point in range(POINTS + 1)],
        "losses": [plain(of_seed) for of_seed in losses[best]],
    }
    return found


def worst_if_not_finite(values: np.ndarray) -> list[float]:
    return [float(x) if np.isfinite(x) else np.inf for x in values]


def plain(values: np.ndarray) -> list[float | None]:
    """Return numbers for JSON, of five digits."""
    return [float(f"{x:.5g}") if np.isfinite(x) else None for x in values]


def measure(
    makers: Sequence[Callable[[], Task]],
    optimizers: Mapping[str, Make],
    rates: tuple[float, ...],
    seeds: tuple[int, ...],
    shorter: int,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the rows of every optimizer on every task, and about each task what its table says."""
    tasks = [task._replace(steps=task.steps // shorter) for task in (make() for make in makers)]
    progress = tqdm(total=len(tasks) * len(optimizers), unit="sweep")
    found = []
    for task in tasks:
        for name, make in optimizers.items():
            progress.set_description(f"{task.name}, {name}")
            found += rows(task, name, rates, sweep(task, make, rates, seeds))
            progress.update()
    progress.close()
    about = {
        task.name: {
            "score": task.score,
            "more is better": task.more_is_better,
            "reference": task.reference,
            "loss": task.loss,
            "steps": task.steps,
        }
        for task in tasks
    }
    return found, about


def main() -> None:
    """Run everything, write the results, print the table."""
    given = record.arguments(__doc__)
    rates, seeds, shorter, names = QUICK.values() if given.quick else (RATES, SEEDS, 1, tuple(OPTIMIZERS))
    found, about = measure(TASKS, {name: OPTIMIZERS[name] for name in names}, rates, seeds, shorter)
    used = record.versions(*LIBRARIES)
    print(convergence_report.write(record.save("convergence", found, given, used, tasks=about)))


if __name__ == "__main__":
    main()
