"""One check for every host: a run that stops half way and resumes ends with the bits of one that did not.

Each file in this folder trains a tiny model in one host, with random weights on the synthetic data below. The lines
between its marks "# begin" and "# end" are those that docs/howto-trainers.md shows. `check` runs them with ACProp, and
with AdamW in its place.
"""

import importlib.metadata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

STEPS = 40
HALF = STEPS // 2


class Run(NamedTuple):
    """The losses of a run in order, and the parameters and state in which it ended."""

    losses: Sequence[float]
    arrays: list[np.ndarray]


# Trains until so many steps are done: from a checkpoint, or from the start where it is None. Saves one at the end.
Train = Callable[[int, Path | None, Path], Run]
REPORT: list[str] = []


def data() -> tuple[np.ndarray, np.ndarray]:
    """Return 64 points in 8 dimensions, and to which of three classes each belongs."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 8), dtype=np.float32)
    return x, (x @ rng.standard_normal((8, 3), dtype=np.float32)).argmax(1)


def check(host: str, train: Train, folder: Path, what: str = "") -> None:
    """Resume to the bit, and learn nearly as much as AdamW does by the same lines."""
    whole = train(STEPS, None, folder / "whole")
    train(HALF, None, folder / "half")
    resumed = train(STEPS, folder / "half", folder / "resumed")
    assert_same(whole.arrays, resumed.arrays)
    with mock.patch.dict(train.__globals__, yardsticks(train.__globals__)):
        yardstick = train(STEPS, None, folder / "adamw")
    compare(host, whole.losses, yardstick.losses, what)


def assert_same(first: list[np.ndarray], second: list[np.ndarray]) -> None:
    """Assert that arrays are equal bit for bit."""
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.tobytes() == b.tobytes()


def compare(host: str, losses: Sequence[float], yardstick: Sequence[float], what: str = "") -> None:
    """Assert that the loss fell by at least three quarters of what it fell with AdamW; report both."""
    name = f"{host} {importlib.metadata.version(host)} {what}"
    REPORT.append(f"{name:45} loss from {losses[0]:.4f} to {losses[-1]:.4f}; AdamW {yardstick[-1]:.4f}")
    fell = losses[0] - yardstick[-1]
    assert fell > 0
    assert losses[0] - losses[-1] > 0.75 * fell


def yardsticks(names: dict[str, Any]) -> dict[str, Any]:
    """Return what stands for ACProp in a host's file when its lines are run with AdamW."""
    if "ACProp" in names:
        import torch

        class AdamW(torch.optim.AdamW):
            def __init__(self, params: Any, lr: float = 1e-3, *, clip_exponent: float, **options: Any) -> None:
                options.pop("compensate", None)
                super().__init__(params, lr, **{"weight_decay": 0.0, **options})

        return {"ACProp": AdamW}
    import optax

    def adamw(rate: Any, *, clip_exponent: float, weight_decay: float = 0.0) -> optax.GradientTransformation:
        return optax.adamw(rate, weight_decay=weight_decay)

    return {"acprop": adamw}


# torch


def torch_data() -> tuple[Any, Any]:
    """Return the data as tensors."""
    import torch

    return tuple(map(torch.from_numpy, data()))


def torch_net() -> Any:
    """Return a network with the same weights each time."""
    import torch

    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))


def torch_arrays(model: Any, optimizer: Any) -> list[np.ndarray]:
    """Return parameters and state: moments, carries and counts."""
    import torch

    tensors = list(model.state_dict().values())
    for state in optimizer.state_dict()["state"].values():
        tensors += [state[key] for key in sorted(state) if state[key] is not None]
    tensors = [torch.as_tensor(x).detach() for x in tensors]
    return [(x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy().copy() for x in tensors]


# JAX


def jax_loss(logits: Any) -> Any:
    """Return the mean loss of logits for all data."""
    import optax

    return optax.softmax_cross_entropy_with_integer_labels(logits, data()[1]).mean()


def jax_arrays(*trees: Any) -> list[np.ndarray]:
    """Return copies of all arrays in some containers."""
    import jax

    return [np.array(x) for x in jax.tree.leaves(trees)]


def pickled(path: Path, tree: Any) -> None:
    """Write containers of JAX arrays, for hosts that leave checkpoints to others."""
    import pickle

    import jax

    path.write_bytes(pickle.dumps(jax.tree.map(np.asarray, tree)))


def unpickled(path: Path) -> Any:
    """Read what `pickled` wrote."""
    import pickle

    return pickle.loads(path.read_bytes())
