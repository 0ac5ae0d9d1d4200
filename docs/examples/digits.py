"""Train one network on handwritten digits with one optimizer in three frameworks, and in one run through all of them.

    python docs/examples/digits.py [--steps 660] [--seed 1] [--out out]

The same two-layer network (64-64-10, ReLU) starts from the same weights and sees the same batches of scikit-learn's
digits: in NumPy with gradients written by hand, in JAX with optax, and in PyTorch. A fourth run begins in NumPy,
continues in JAX and ends in PyTorch; its optimizer state moves through files. These runs are in float64, so only
rounding makes them differ: each framework adds up its gradients in another order.

The optimizer itself rounds alike. To show that, NumPy trains once more in float32, and the optimizers of the others are
given its gradients: their float32 parameters have the same bits, at every step.

A table and a picture show how far apart the runs are. The exit code is 1 if that is further than rounding explains, or
if PyTorch's parameters are not NumPy's to the bit where the gradients are. JAX and PyTorch are used if they are
installed.

A fifth run has no clip. Pixels in the digits' margins are 0 for some steps and then are not, so plain ACProp explodes.
Therefore every example of ours sets clip_exponent=0.25.
"""

import argparse
import importlib.util
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import matplotlib as mpl
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from acprop_core import ACProp, load, save
from acprop_stepper import Stepper, export_state, import_state

Arrays = dict[str, np.ndarray]

HYPER = {"learning_rate": 1e-3, "weight_decay": 1e-4, "clip_exponent": 0.25}
BATCH = 64

# The published bound on a parameter after one step in float64, in machine epsilons (docs/guarantees.md).
PARAM_BOUND = 2.5

# Of Okabe and Ito, who chose them for colour-blind readers too.
COLOURS = ("#56B4E9", "#E69F00", "#009E73", "#000000")


class NumPy:
    """Gradients by hand, parameters updated in place by Stepper."""

    def __init__(self, params: Arrays, saved: pathlib.Path | None = None, **hyper: float | None) -> None:
        self._params = {name: x.copy() for name, x in params.items()}
        self._stepper = Stepper(self._params, **{**HYPER, **hyper})
        if saved is not None:
            import_state(self._stepper, *load(saved))

    def step(self, x: np.ndarray, y: np.ndarray) -> float:
        loss, grads = self.gradients(x, y)
        self.update(grads)
        return loss

    def update(self, grads: Arrays) -> None:
        self._stepper.step(grads)

    def gradients(self, x: np.ndarray, y: np.ndarray) -> tuple[float, Arrays]:
        p = self._params
        hidden = np.maximum(x @ p["w1"] + p["b1"], 0.0)
        logits = hidden @ p["w2"] + p["b2"]
        logits -= logits.max(axis=1, keepdims=True)
        log_probability = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))

        d_logits = (np.exp(log_probability) - np.eye(10, dtype=x.dtype)[y]) / len(y)
        d_hidden = (d_logits @ p["w2"].T) * (hidden > 0.0)
        grads = {
            "w1": x.T @ d_hidden,
            "b1": d_hidden.sum(axis=0),
            "w2": hidden.T @ d_logits,
            "b2": d_logits.sum(axis=0),
        }
        return float(-log_probability[np.arange(len(y)), y].mean()), grads

    def params(self) -> Arrays:
        return self._params

    def save(self, path: pathlib.Path) -> None:
        save(path, *export_state(self._stepper))


class Jax:
    """Gradients by jax.grad, updates by the optax transform, the whole step compiled."""

    def __init__(self, params: Arrays, saved: pathlib.Path | None = None) -> None:
        import jax
        import jax.numpy as jnp
        import optax

        from acprop_optax import acprop, import_state

        jax.config.update("jax_enable_x64", True)
        transform = acprop(**HYPER)
        self._params = jax.tree.map(jnp.asarray, params)
        self._state = transform.init(self._params)
        if saved is not None:
            self._state = import_state(self._state, ACProp(**HYPER), *load(saved))

        def loss(params: Arrays, x: np.ndarray, y: np.ndarray) -> float:
            hidden = jax.nn.relu(x @ params["w1"] + params["b1"])
            logits = hidden @ params["w2"] + params["b2"]
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        def update(grads, state, params):
            updates, state = transform.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        @jax.jit
        def step(params, state, x, y):
            value, grads = jax.value_and_grad(loss)(params, x, y)
            return *update(grads, state, params), value

        self._step, self._update = step, jax.jit(update)

    def step(self, x: np.ndarray, y: np.ndarray) -> float:
        self._params, self._state, loss = self._step(self._params, self._state, x, y)
        return float(loss)

    def update(self, grads: Arrays) -> None:
        self._params, self._state = self._update(grads, self._state, self._params)

    def params(self) -> Arrays:
        return {name: np.asarray(x) for name, x in self._params.items()}

    def save(self, path: pathlib.Path) -> None:
        from acprop_optax import export_state

        save(path, *export_state(self._state, ACProp(**HYPER)))


class Torch:
    """Gradients by autograd, parameters updated in place by the torch optimizer."""

    def __init__(self, params: Arrays, saved: pathlib.Path | None = None) -> None:
        import torch

        from acprop_torch import ACProp, import_state

        options = {**HYPER, "lr": HYPER["learning_rate"]}
        del options["learning_rate"]
        self._torch = torch
        self._params = {name: torch.tensor(x, requires_grad=True) for name, x in params.items()}
        self._optimizer = ACProp(self._params.values(), **options)
        if saved is not None:
            import_state(self._optimizer, self._params, *load(saved))

    def step(self, x: np.ndarray, y: np.ndarray) -> float:
        p = self._params
        hidden = self._torch.relu(self._torch.from_numpy(x) @ p["w1"] + p["b1"])
        logits = hidden @ p["w2"] + p["b2"]
        loss = self._torch.nn.functional.cross_entropy(logits, self._torch.from_numpy(y))
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        return loss.item()

    def update(self, grads: Arrays) -> None:
        for name, p in self._params.items():
            p.grad = self._torch.from_numpy(grads[name])
        self._optimizer.step()

    def params(self) -> Arrays:
        return {name: x.detach().numpy() for name, x in self._params.items()}

    def save(self, path: pathlib.Path) -> None:
        from acprop_torch import export_state

        save(path, *export_state(self._optimizer, self._params))


@dataclass
class Run:
    """The results of one training run."""

    name: str
    losses: list[float] = field(default_factory=list)
    params: Arrays = field(default_factory=dict)
    accuracy: float = 0.0
    seconds: float = 0.0
    difference: float = 0.0  # largest difference of any parameter from the NumPy run


class Digits:
    """scikit-learn's digits, the initial weights and the batches, which all runs share."""

    def __init__(self, steps: int, seed: int) -> None:
        x, y = load_digits(return_X_y=True)
        split = train_test_split(x / 16.0, y, test_size=360, random_state=0, stratify=y)
        self.train_x, self.test_x, self.train_y, self.test_y = split
        self._rng_seed, self.steps = seed, steps
        rng = np.random.default_rng(seed)
        self.weights = {
            "w1": rng.normal(size=(64, 64)) * np.sqrt(2 / 64),
            "b1": np.zeros(64),
            "w2": rng.normal(size=(64, 10)) * np.sqrt(2 / 64),
            "b2": np.zeros(10),
        }

    def batches(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        rng = np.random.default_rng(self._rng_seed + 1)
        for _ in range(self.steps):
            rows = rng.integers(len(self.train_y), size=BATCH)
            yield self.train_x[rows], self.train_y[rows]

    def predict(self, p: Arrays, x: np.ndarray) -> np.ndarray:
        return np.maximum(x @ p["w1"] + p["b1"], 0.0) @ p["w2"] + p["b2"]

    def accuracy(self, params: Arrays) -> float:
        return float((self.predict(params, self.test_x).argmax(axis=1) == self.test_y).mean())


def train(
    name: str, data: Digits, hosts: list[Callable[..., NumPy | Jax | Torch]], weights: Arrays | None = None
) -> Run:
    """Train with the hosts in turn, each for an equal share of the steps; the optimizer's state goes through a file."""
    run = Run(name)
    start = time.perf_counter()
    share = -(-data.steps // len(hosts))  # rounded up
    host = hosts[0](weights or data.weights)
    with tempfile.TemporaryDirectory() as folder:
        for i, (x, y) in enumerate(tqdm(data.batches(), total=data.steps, desc=f"{name:22}", unit="step")):
            if i and i % share == 0:
                file = pathlib.Path(folder, f"{i}.safetensors")
                host.save(file)
                host = hosts[i // share](host.params(), file)
            run.losses.append(host.step(x, y))
    run.params = host.params()
    run.seconds = time.perf_counter() - start
    run.accuracy = data.accuracy(run.params)
    return run


def replay(data: Digits, hosts: dict[str, Callable[..., NumPy | Jax | Torch]]) -> dict[str, list[float]]:
    """Train NumPy in float32, and give its gradients to all; return how far each is from NumPy, step by step."""
    weights = {name: x.astype(np.float32) for name, x in data.weights.items()}
    first = NumPy(weights)
    others = {name: host(weights) for name, host in hosts.items() if host is not NumPy}
    differences: dict[str, list[float]] = {name: [] for name in others}
    for x, y in tqdm(data.batches(), total=data.steps, desc=f"{'float32, given':22}", unit="step"):
        _, grads = first.gradients(x.astype(np.float32), y)
        first.update(grads)
        for name, host in others.items():
            host.update(grads)
            differences[name].append(_distance(host.params(), first.params()))
    return differences


def main() -> int:
    """Run everything, print the table, save the picture."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=660, help="training steps of each run (30 epochs: 660)")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"), help="folder for the picture")
    parser.add_argument("--seed", type=int, default=1, help="seed of the initial weights and the batches")
    arguments = parser.parse_args()
    data = Digits(arguments.steps, arguments.seed)

    hosts: dict[str, Callable[..., NumPy | Jax | Torch]] = {"NumPy": NumPy}
    for name, host, modules in (("JAX + optax", Jax, ("jax", "optax")), ("PyTorch", Torch, ("torch",))):
        missing = [m for m in modules if importlib.util.find_spec(m) is None]
        if missing:
            print(f"{name} is left out: install {' and '.join(missing)} to include it")
        else:
            hosts[name] = host

    runs = [train(name, data, [host]) for name, host in hosts.items()]
    if importlib.util.find_spec("safetensors") is None:
        print("The run through all of them is left out: install safetensors to include it")
    elif len(hosts) > 1:
        runs.append(train(" > ".join(name.partition(" ")[0] for name in hosts), data, list(hosts.values())))
    first = runs[0]
    for run in runs:
        run.difference = _distance(run.params, first.params)
    allowed = _allowed(data, first)
    exploded = train("without the clip", data, [lambda params: NumPy(params, clip_exponent=None)])
    given = replay(data, hosts)

    print(f"\n{'framework':24}{'train loss':>12}{'test accuracy':>15}{'largest difference':>20}{'seconds':>9}")
    for run in [*runs, exploded]:
        loss = np.mean(run.losses[-len(run.losses) // 10 :])
        difference = "(exploded)" if run is exploded else f"{run.difference:.1e}"
        print(f"{run.name:24}{loss:12.5f}{run.accuracy:15.4f}{difference:>20}{run.seconds:9.1f}")
    print(f"\nRounding alone allows a difference of {allowed:.1e} after {data.steps} steps.")
    if given:
        print("In float32, with NumPy's gradients, the largest difference of any parameter in the run:")
    for name, differences in given.items():
        equal = sum(difference == 0.0 for difference in differences)
        print(f"{name:24}{max(differences):.1e} (none after {equal} of {data.steps} steps)")
    picture = _draw(runs, exploded, given, arguments.out)
    print(f"Loss curves: {picture}")

    apart = [run.name for run in runs if not run.difference <= allowed]
    if apart:
        print(f"These runs are further from NumPy's than rounding explains: {', '.join(apart)}", file=sys.stderr)
    inexact = any(difference != 0.0 for difference in given.get("PyTorch", []))
    if inexact:
        print("PyTorch's parameters are not NumPy's to the bit, though the gradients are", file=sys.stderr)
    return 1 if apart or inexact else 0


def _allowed(data: Digits, first: Run) -> float:
    """Return how far two runs may end apart if every step of both keeps the published bound.

    A parameter's error in one step is at most PARAM_BOUND epsilons of parameter and update, and the clip bounds updates
    by lr t^p. Each of the two runs has such an error. Training then amplifies early errors. To measure by how much, the
    same run is repeated from weights that are off by 1e-9, far above rounding.
    """
    rng = np.random.default_rng(0)
    weights = {name: x + 1e-9 * rng.choice([-1.0, 1.0], size=x.shape) for name, x in data.weights.items()}
    nudged = train("(amplification)", data, [NumPy], weights)
    amplification = max(1.0, _distance(nudged.params, first.params) / 1e-9)
    updates = HYPER["learning_rate"] * np.arange(1.0, data.steps + 1) ** HYPER["clip_exponent"]
    largest = max(float(np.abs(x).max()) for params in (data.weights, first.params) for x in params.values())
    return float(2 * PARAM_BOUND * np.finfo(float).eps * amplification * (updates + largest).sum())


def _distance(a: Arrays, b: Arrays) -> float:
    return max(float(np.abs(a[name] - b[name]).max()) for name in a)


def _draw(runs: list[Run], exploded: Run, given: dict[str, list[float]], folder: pathlib.Path) -> pathlib.Path:
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    def smooth(losses: list[float]) -> np.ndarray:
        window = min(20, len(losses))
        return np.convolve(losses, np.ones(window) / window, mode="valid")

    plt.rcParams.update({"font.size": 12, "legend.frameon": False})  # for the width of a phone
    heights = (3, 2.4, 2.2) if given else (3, 2.4)
    figure, (top, middle, *bottom) = plt.subplots(
        len(heights), 1, figsize=(6, 1.6 + sum(heights)), sharex=True, height_ratios=heights, layout="constrained"
    )
    colours = dict(zip((run.name for run in runs), COLOURS, strict=False))
    for run, width in zip(runs, np.linspace(9.0, 1.5, len(runs)), strict=True):
        top.semilogy(smooth(run.losses), color=colours[run.name], linewidth=width, label=run.name)
    top.semilogy(smooth(exploded.losses), color="0.55", linewidth=1.2, label="without the clip")
    top.set_ylabel("training loss\n(mean of 20 steps)")
    top.set_title("One optimizer, three frameworks:\nACProp on handwritten digits", fontsize=12)
    top.legend(loc="center", bbox_to_anchor=(0.5, 0.36), ncols=2, fontsize=10, columnspacing=1.0)
    for run in runs[1:]:
        difference = np.abs(np.array(run.losses) - np.array(runs[0].losses))
        middle.semilogy(np.maximum(difference, 1e-18), ".", color=colours[run.name], markersize=3, label=run.name)
    middle.axhline(np.finfo(float).eps, color="0.55", linestyle=":", label="machine epsilon")
    middle.set_ylim(5e-19, 1e-12)
    middle.set_ylabel("distance of losses\nfrom NumPy's, float64\n(0 drawn at 1e-18)")
    if len(runs) > 1:
        middle.legend(loc="upper right", ncols=2, fontsize=10, columnspacing=1.0, handlelength=1.2)
    for axes in bottom:
        for (name, differences), width in zip(given.items(), (4.0, 1.5), strict=False):
            axes.plot(differences, color=colours[name], linewidth=width, label=name)
        axes.set_yscale("symlog", linthresh=1e-9)
        axes.set_ylim(-5e-10, 1e-6)
        axes.set_yticks([0.0, 1e-9, 1e-8, 1e-7, 1e-6], ["0", "", "$10^{-8}$", "", "$10^{-6}$"])
        axes.set_ylabel("distance of parameters,\nfloat32, with\nNumPy's gradients")
        axes.legend(loc="center right", fontsize=10)
    (bottom or [middle])[-1].set_xlabel("step")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "digits.png"
    figure.savefig(path, dpi=160)
    plt.close(figure)
    return path


if __name__ == "__main__":
    sys.exit(main())
