"""Train on two Dask workers, lose them in the middle, and resume from the checkpoint to the same bits.

    python docs/examples/scale_dask.py [--steps 30] [--features 1024]

Softmax regression on random cosine features of scikit-learn's digits. The weights are one dask.array, chunk by chunk
in the memory of two worker processes. Every five steps a checkpoint is written and read again. After that, Dask need
not remember how every chunk was made since the first step. In a second run the workers are killed between two
checkpoints, and the run continues in a new cluster. The exit code is 1 if the two runs end with different bits.
"""

import argparse
import os
import pathlib
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import dask
import dask.array as da
import numpy as np
from distributed import Client, LocalCluster, wait
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from acprop_core import ACProp, State, load, save

# with the clip, because gradients that are 0 for some steps and then are not would make plain ACProp explode
OPTIMIZER = ACProp(1e-2, clip_exponent=0.25)
EVERY = 5  # steps between two checkpoints


class Problem:
    """Features and labels, in NumPy on the client; a run sends the features to the workers in chunks."""

    def __init__(self, features: int) -> None:
        x, y = load_digits(return_X_y=True)
        rng = np.random.default_rng(0)
        lifted = np.cos(x / 16.0 @ rng.normal(size=(64, features)) + rng.uniform(0, 2 * np.pi, features))
        split = train_test_split(lifted.astype("float32") / 8, y, test_size=360, random_state=0, stratify=y)
        self.train_x, self.test_x, train_y, self.test_y = split
        self.one_hot = np.eye(10, dtype="float32")[train_y]
        self.chunk = features // 2

    def accuracy(self, weight: np.ndarray) -> float:
        return float(((self.test_x @ weight).argmax(axis=1) == self.test_y).mean())


@contextmanager
def two_workers() -> Iterator[Client]:
    """Start two worker processes of one thread each, and stop them."""
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0", host="127.0.0.1") as cluster,
        Client(cluster) as client,
    ):
        yield client


def train(problem: Problem, start: int, stop: int, folder: pathlib.Path) -> np.ndarray:
    """Train from the checkpoint of step `start` to step `stop`, and write checkpoints; return the weights."""
    x = da.from_array(problem.train_x, chunks=(-1, problem.chunk)).persist()
    for count in range(start, stop):
        if count == start or count % EVERY == 0:
            params, state = restored(problem, folder, count)
        logits = x @ params["weight"]
        exponentials = da.exp(logits - logits.max(axis=1, keepdims=True))
        errors = exponentials / exponentials.sum(axis=1, keepdims=True) - problem.one_hot
        grads = {"weight": x.T @ errors / len(problem.one_hot)}
        updates, state = OPTIMIZER.update(grads, state, params)
        params, state = dask.persist(OPTIMIZER.apply(params, updates), state)  # otherwise the graph grows
        if state.count % EVERY == 0:
            save(folder / f"{state.count}.safetensors", OPTIMIZER, state)
            np.save(folder / f"{state.count}.npy", params["weight"].compute())
    wait(params)
    return params["weight"].compute()


def restored(problem: Problem, folder: pathlib.Path, count: int) -> tuple[dict[str, da.Array], State]:
    """Return parameters and state of a checkpoint, in chunks; new ones for step 0."""

    def chunked(array: np.ndarray) -> dict[str, da.Array]:
        return {"weight": da.from_array(array, chunks=(problem.chunk, -1))}

    if count == 0:
        params = chunked(np.zeros((problem.train_x.shape[1], 10), "float32"))
        return params, OPTIMIZER.init(params)
    weight = np.load(folder / f"{count}.npy")
    _, state = load(folder / f"{count}.safetensors", {"weight": weight})
    return chunked(weight), State(state.count, chunked(state.mu["weight"]), chunked(state.nu["weight"]))


def main() -> int:
    """Train twice, the second time with a disaster; compare."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=30, help="training steps, at least 10")
    parser.add_argument("--features", type=int, default=1024, help="random features, an even number")
    arguments = parser.parse_args()
    problem = Problem(arguments.features)

    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        (folder / "a").mkdir()
        (folder / "b").mkdir()
        lost = arguments.steps // 2 + 1
        with two_workers() as client:
            undisturbed = train(problem, 0, arguments.steps, folder / "a")
            print(f"undisturbed       step {arguments.steps:3}  accuracy {problem.accuracy(undisturbed):.4f}")
            train(problem, 0, lost, folder / "b")
            for worker in client.run(os.getpid).values():
                os.kill(worker, signal.SIGKILL)
        last = max(int(path.stem) for path in (folder / "b").glob("*.npy"))
        print(f"workers killed    step {lost:3}  last checkpoint: step {last}")
        with two_workers():
            resumed = train(problem, last, arguments.steps, folder / "b")
        print(f"resumed           step {arguments.steps:3}  accuracy {problem.accuracy(resumed):.4f}")

    same = undisturbed.tobytes() == resumed.tobytes()
    print("The two runs end with the same bits." if same else "The two runs end apart.")
    return int(not same)


if __name__ == "__main__":
    sys.exit(main())
