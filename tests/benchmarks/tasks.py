"""Four small tasks on real data that needs no download, as pure functions that `jax.vmap` can run many times at once.

Everything random comes from NumPy's generator, seeded: the weights that a run starts from and the batches that it sees
depend on the task and the seed alone, so that every optimizer at every learning rate gets the same.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from language_model import docstrings

Arrays = dict[str, Any]
Measure = Callable[[Arrays], tuple[jax.Array, jax.Array]]


class Task(NamedTuple):
    """What to train, and how to tell how good it is."""

    name: str
    score: str  # what is reported
    more_is_better: bool
    loss: str  # what is drawn against the steps, and must fall
    momentum: float  # b1, for each optimizer
    steps: int
    start: Callable[[np.random.Generator], Arrays]  # the parameters before the first step
    batches: Callable[[np.random.Generator, int], Any]  # of so many steps, stacked
    grads: Callable[[Arrays, Any], Arrays]  # of the parameters, from a batch
    validate: Measure  # loss and score on what chooses the learning rate
    test: Measure  # the same on what is reported
    reference: float | None = None  # the score that no training is expected to pass


class Split(NamedTuple):
    """Training, validation and test data."""

    train: Any
    validation: Any
    test: Any


def digits() -> tuple[Split, Split]:
    """Return the images, (n, 64) from 0 to 1, and the labels of scikit-learn's digits: 1,077, 360 and 360."""
    x, y = load_digits(return_X_y=True)
    x, test_x, y, test_y = train_test_split((x / 16.0).astype(np.float32), y, test_size=360, random_state=0, stratify=y)
    x, validation_x, y, validation_y = train_test_split(x, y, test_size=360, random_state=0, stratify=y)
    return Split(x, validation_x, test_x), Split(y, validation_y, test_y)


def dense(rng: np.random.Generator, rows: int, columns: int, gain: float = 2.0) -> np.ndarray:
    """Return weights of variance gain / rows."""
    return (rng.normal(size=(rows, columns)) * np.sqrt(gain / rows)).astype(np.float32)


def classifier(name: str, steps: int, start: Callable[..., Arrays], logits: Callable[..., jax.Array]) -> Task:
    """Return the task of telling the digits apart, in batches of 32."""
    images, labels = digits()

    def cross_entropy(params: Arrays, x: jax.Array, y: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y).mean()

    def grads(params: Arrays, rows: jax.Array) -> Arrays:
        return jax.grad(cross_entropy)(params, jnp.asarray(images.train)[rows], jnp.asarray(labels.train)[rows])

    def measure(x: np.ndarray, y: np.ndarray) -> Measure:
        return lambda params: (cross_entropy(params, x, y), (logits(params, x).argmax(-1) == y).mean())

    return Task(
        name,
        "test accuracy",
        True,
        "validation loss",
        0.9,
        steps,
        start,
        lambda rng, steps: rng.integers(len(labels.train), size=(steps, 32)),
        grads,
        measure(images.validation, labels.validation),
        measure(images.test, labels.test),
    )


def mlp() -> Task:
    """Return the digits by 64 hidden units, ReLU: the network of docs/examples/digits.py."""

    def start(rng: np.random.Generator) -> Arrays:
        return {
            "w1": dense(rng, 64, 64),
            "b1": np.zeros(64, np.float32),
            "w2": dense(rng, 64, 10),
            "b2": np.zeros(10, np.float32),
        }

    def logits(p: Arrays, x: jax.Array) -> jax.Array:
        return jax.nn.relu(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]

    return classifier("digits, MLP", 1200, start, logits)


def convolutional() -> Task:
    """Return the digits by two convolutions of 3 x 3 with 8 and 16 channels, ReLU, and maxima over 2 x 2 after each."""

    def start(rng: np.random.Generator) -> Arrays:
        return {
            "w1": dense(rng, 9, 8),
            "b1": np.zeros(8, np.float32),
            "w2": dense(rng, 9 * 8, 16),
            "b2": np.zeros(16, np.float32),
            "w3": dense(rng, 4 * 16, 10),
            "b3": np.zeros(10, np.float32),
        }

    def layer(x: jax.Array, w: jax.Array, b: jax.Array) -> jax.Array:
        # as a product of matrices: many convolutions at once, each with weights of its own, are slow on a CPU
        n, side, _, channels = x.shape
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        shifted = [padded[:, i : i + side, j : j + side] for i in range(3) for j in range(3)]
        y = jax.nn.relu(jnp.concatenate(shifted, axis=-1).reshape(-1, 9 * channels) @ w + b)
        return y.reshape(n, side // 2, 2, side // 2, 2, -1).max(axis=(2, 4))

    def logits(p: Arrays, x: jax.Array) -> jax.Array:
        x = layer(layer(x.reshape(-1, 8, 8, 1), p["w1"], p["b1"]), p["w2"], p["b2"])
        return x.reshape(len(x), -1) @ p["w3"] + p["b3"]

    return classifier("digits, convolutional", 600, start, logits)


def transformer() -> Task:
    """Return the next character of the docstrings of Python's standard library, by attention to the last 32."""
    context, batch, width, heads, depth = 32, 8, 32, 2, 1
    characters, text = np.unique(np.frombuffer(docstrings().encode("ascii"), np.uint8), return_inverse=True)
    cuts = len(text) * 8 // 10, len(text) * 9 // 10
    parts = Split(*np.split(text.astype(np.int32), cuts))

    def start(rng: np.random.Generator) -> Arrays:
        params = {
            "token": dense(rng, len(characters), width, 0.02**2 * len(characters)),
            "position": dense(rng, context, width, 0.02**2 * context),
            "head": dense(rng, width, len(characters), 1.0),
            "scale": np.ones(width, np.float32),
        }
        for i in range(depth):
            params |= {
                f"scale1_{i}": np.ones(width, np.float32),
                f"scale2_{i}": np.ones(width, np.float32),
                f"qkv_{i}": dense(rng, width, 3 * width, 1.0),
                f"out_{i}": dense(rng, width, width, 1.0),
                f"up_{i}": dense(rng, width, 4 * width),
                f"down_{i}": dense(rng, 4 * width, width, 1.0),
            }
        return params

    def normal(x: jax.Array, scale: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale

    mask = np.tril(np.ones((context, context), bool))

    def logits(p: Arrays, tokens: jax.Array) -> jax.Array:
        n = len(tokens)
        x = (p["token"][tokens] + p["position"]).reshape(n * context, width)
        for i in range(depth):
            qkv = normal(x, p[f"scale1_{i}"]) @ p[f"qkv_{i}"]
            q, k, v = qkv.reshape(n, context, 3, heads, width // heads).transpose(2, 0, 3, 1, 4)
            weights = jnp.where(mask, q @ k.swapaxes(-1, -2) / np.sqrt(width // heads), -jnp.inf)
            attended = (jax.nn.softmax(weights) @ v).swapaxes(1, 2).reshape(n * context, width)
            x = x + attended @ p[f"out_{i}"]
            x = x + jax.nn.relu(normal(x, p[f"scale2_{i}"]) @ p[f"up_{i}"]) @ p[f"down_{i}"]
        return (normal(x, p["scale"]) @ p["head"]).reshape(n, context, -1)

    def cross_entropy(params: Arrays, windows: jax.Array) -> jax.Array:
        found = logits(params, windows[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(found, windows[:, 1:]).mean()

    def windows(part: np.ndarray, starts: np.ndarray) -> np.ndarray:
        return part[starts[..., None] + np.arange(context + 1)]

    def measure(part: np.ndarray) -> Measure:
        held_out = windows(part, np.linspace(0, len(part) - context - 1, 64).astype(int))

        def both(params: Arrays) -> tuple[jax.Array, jax.Array]:
            value = cross_entropy(params, held_out)
            return value, value

        return both

    return Task(
        "characters, transformer",
        "test loss",
        False,
        "validation loss",
        0.9,
        600,
        start,
        lambda rng, steps: windows(parts.train, rng.integers(len(parts.train) - context, size=(steps, batch))),
        jax.grad(cross_entropy),
        measure(parts.validation),
        measure(parts.test),
    )


def frechet(x: jax.Array, mean: jax.Array, root: jax.Array) -> jax.Array:
    """Return the squared Fréchet distance of two normal distributions, with the moments of `x` and `mean`, `root` ** 2.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C2^1/2 C1 C2^1/2)^1/2), Dowson and Landau 1982.
    """
    centred = x - x.mean(0)
    covariance = centred.T @ centred / (len(x) - 1)
    middle = jnp.linalg.eigvalsh(root @ covariance @ root)
    distance = ((x.mean(0) - mean) ** 2).sum() + jnp.trace(covariance) + (root * root).sum()
    return distance - 2.0 * jnp.sqrt(jnp.maximum(middle, 0.0)).sum()


def gan() -> Task:
    """Return two small networks against each other: one draws digits, the other tells them from scikit-learn's.

    The score is the squared Fréchet distance to held-out digits in the first 16 principal components of the training
    images. Both networks have the same optimizer and rate, and step at the same time.
    """
    images, _ = digits()
    noise, hidden, batch = 16, 64, 32
    mean = images.train.mean(0)
    axes = np.linalg.svd(images.train - mean, full_matrices=False)[2][:16].T
    judged = np.random.default_rng(0).normal(size=(512, noise)).astype(np.float32)

    def start(rng: np.random.Generator) -> Arrays:
        return {
            "draw": {
                "w1": dense(rng, noise, hidden),
                "b1": np.zeros(hidden, np.float32),
                "w2": dense(rng, hidden, 64, 1.0),
                "b2": np.zeros(64, np.float32),
            },
            "tell": {
                "w1": dense(rng, 64, hidden),
                "b1": np.zeros(hidden, np.float32),
                "w2": dense(rng, hidden, 1, 1.0),
                "b2": np.zeros(1, np.float32),
            },
        }

    def draw(p: Arrays, z: jax.Array) -> jax.Array:
        return jax.nn.sigmoid(jax.nn.leaky_relu(z @ p["w1"] + p["b1"], 0.2) @ p["w2"] + p["b2"])

    def tell(p: Arrays, x: jax.Array) -> jax.Array:
        return jax.nn.leaky_relu(x @ p["w1"] + p["b1"], 0.2) @ p["w2"] + p["b2"]

    def grads(params: Arrays, rows_and_noise: tuple[jax.Array, jax.Array]) -> Arrays:
        rows, z = rows_and_noise
        real = jnp.asarray(images.train)[rows]

        def drawer(p: Arrays) -> jax.Array:
            return jax.nn.softplus(-tell(params["tell"], draw(p, z))).mean()

        def teller(p: Arrays) -> jax.Array:
            drawn = draw(params["draw"], z)
            return jax.nn.softplus(-tell(p, real)).mean() + jax.nn.softplus(tell(p, drawn)).mean()

        return {"draw": jax.grad(drawer)(params["draw"]), "tell": jax.grad(teller)(params["tell"])}

    def batches(rng: np.random.Generator, steps: int) -> tuple[np.ndarray, np.ndarray]:
        rows = rng.integers(len(images.train), size=(steps, batch))
        return rows, rng.normal(size=(steps, batch, noise)).astype(np.float32)

    def distance_to(real: np.ndarray) -> Callable[[Any], jax.Array]:
        there = (real - mean) @ axes
        values, vectors = np.linalg.eigh(np.cov(there.T))
        root = ((vectors * np.sqrt(values)) @ vectors.T).astype(np.float32)
        return lambda drawn: frechet((drawn - mean) @ axes, there.mean(0), root)

    def measure(real: np.ndarray) -> Measure:
        distance_of = distance_to(real)

        def both(params: Arrays) -> tuple[jax.Array, jax.Array]:
            distance = distance_of(draw(params["draw"], judged))
            return distance, distance

        return both

    return Task(
        "digits, GAN",
        "test Fréchet distance",
        False,
        "validation Fréchet distance",
        0.5,  # as in the paper's GANs, and usual there
        4800,
        start,
        batches,
        grads,
        measure(images.validation),
        measure(images.test),
        float(distance_to(images.test)(images.train)),
    )


TASKS = (mlp, convolutional, transformer, gan)
