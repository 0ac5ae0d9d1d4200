"""Second oracles: other people's Adam, AdamW, AdaBelief and ACProp, and AdaShift's equations, take the same steps.

They differ from ours in one place on purpose: where eps is below the smallest normal number, ours is raised to it. No
eps of this table is.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import pytest

import acprop_optax
from acprop_core import ACProp

STEPS = 1000
Step = tuple[np.ndarray, np.ndarray | None, np.ndarray]  # update, first moment or None, second moment
Run = Callable[[np.ndarray, np.ndarray], Iterator[Step]]  # from gradients and parameters before each step

# Adam, and what makes the others of it. The rate makes updates about as large as the parameters, because an optimizer
# that works in place shows its update only as the difference of two parameters.
ADAM = {"learning_rate": 0.5, "eps": 1e-8, "eps_root": 0.0, "asynchronous": False, "centering": "none"}
DECAY = {"weight_decay": 0.1}
BELIEF = {"learning_rate": 0.5, "asynchronous": False}
SHIFT = {"learning_rate": 1.0, "eps": 1e-8, "eps_root": 0.0, "centering": "none"}
L2 = {"decoupled_weight_decay": False}


def same(x: np.ndarray) -> np.ndarray:
    return x


def core(options: dict[str, Any], enter: Callable[..., Any] = same, leave: Callable[..., Any] = same) -> Run:
    optimizer = ACProp(**options)

    def run(grads: np.ndarray, params: np.ndarray) -> Iterator[Step]:
        state = optimizer.init(enter(params[0]))
        for g, x in zip(grads, params, strict=True):
            update, state = optimizer.update(enter(g), state, enter(x))
            yield leave(update), leave(state.mu), leave(state.nu)

    return run


def core_on_torch(options: dict[str, Any]) -> Run:
    import torch

    return core(options, torch.tensor, lambda x: x.numpy().copy())


def transformation(transform: Any) -> Run:
    update = jax.jit(transform.update)

    def run(grads: np.ndarray, params: np.ndarray) -> Iterator[Step]:
        state = transform.init(jax.numpy.asarray(params[0]))
        for g, x in zip(grads, params, strict=True):
            u, state = update(g, state, x)
            yield np.array(u), np.array(state[0].mu), np.array(state[0].nu)

    return run


def torch_optimizer(make: Callable[[Any], Any]) -> Run:
    import torch

    def run(grads: np.ndarray, params: np.ndarray) -> Iterator[Step]:
        p = torch.nn.Parameter(torch.tensor(params[0]))
        optimizer = make([p])
        for g, x in zip(grads, params, strict=True):
            with torch.no_grad():
                p.copy_(torch.tensor(x))
            p.grad = torch.tensor(g)
            optimizer.step()
            _, mu, nu = optimizer.state[p].values()
            yield p.detach().numpy().astype(np.float64) - x, mu.numpy().copy(), nu.numpy().copy()

    return run


def ours_in_torch(options: dict[str, Any]) -> Run:
    import acprop_torch

    options = {"lr": options["learning_rate"], **{k: v for k, v in options.items() if k != "learning_rate"}}
    return torch_optimizer(lambda params: acprop_torch.ACProp(params, **options))


def theirs_in_torch(name: str, **options: Any) -> Run:
    import torch

    return torch_optimizer(lambda params: getattr(torch.optim, name)(params, lr=0.5, **options))


def adashift() -> Run:
    """AdaShift (Zhou et al. 2019, arXiv:1810.00143) with n = 1, element by element; it leaves step 1 out."""

    def run(grads: np.ndarray, params: np.ndarray) -> Iterator[Step]:
        b2, v = grads.dtype.type(0.999), np.zeros_like(grads[0])
        for t, g in enumerate(grads, 1):
            d = g / (np.sqrt(v / (1 - b2 ** (t - 1))) + g.dtype.type(1e-8)) if t > 1 else np.zeros_like(g)
            v = b2 * v + (1 - b2) * g**2
            yield -d, None, v

    return run


def on_optax(make: Callable[..., Any], **options: Any) -> Callable[[], Run]:
    return lambda: transformation(make(**options))


# Ours: a name is a corner, and where it runs
part = functools.partial
OURS: dict[str, Callable[[], Run]] = {
    "Adam, core": part(core, ADAM),
    "Adam, core on torch": part(core_on_torch, ADAM),
    "Adam, acprop_optax": on_optax(acprop_optax.acprop, **ADAM),
    "Adam, acprop_torch": part(ours_in_torch, ADAM),
    "Adam with L2, acprop_torch": part(ours_in_torch, ADAM | DECAY | L2),
    "AdamW, core": part(core, ADAM | DECAY),
    "AdamW, core on torch": part(core_on_torch, ADAM | DECAY),
    "AdamW, acprop_optax": on_optax(acprop_optax.acprop, **ADAM, **DECAY),
    "AdamW, acprop_torch": part(ours_in_torch, ADAM | DECAY),
    "AdaBelief, core": part(core, BELIEF),
    "AdaBelief, acprop_optax": on_optax(acprop_optax.acprop, **BELIEF),
    "AdaBelief on the previous mean, core": part(core, BELIEF | {"centering": "previous"}),
    "AdaShift, core": part(core, SHIFT),
    "ACProp, core": part(core, {"learning_rate": 0.5}),
    "ACProp on the previous mean, core": part(core, {"learning_rate": 0.5, "centering": "previous"}),
}


class Peer(NamedTuple):
    """A published implementation, ours to compare it with, and the bounds for float32.

    The bounds are those of update, mu and nu in machine epsilons, each at most twice what was measured.
    """

    theirs: Callable[[], Run]
    ours: list[str]
    float32: tuple[float, float, float]
    first: int = 1  # the first step whose update is compared
    needs: str = "optax"


# Measured: 7.3e-15, 4.6e-16 and 4.5e-15
FLOAT64 = (1e-12, 1e-12, 1e-12)
# Measured: 79, 3.5 and 54. Theirs computes 1 - b**t in float32, and the weights of its averages do not add to one.
OF_OPTAX = (150.0, 6.5, 100.0)
# Measured: 23, 2 and 54. Theirs computes 1 - b**t in float64; the weights of its second moment do not add to one.
OF_TORCH = (45.0, 3.5, 100.0)
# Measured: 28 and 110, for the same reasons
OF_ADASHIFT = (55.0, 0.0, 210.0)

PEERS = {
    "optax.adam": Peer(on_optax(optax.adam, learning_rate=0.5), ["Adam, core", "Adam, acprop_optax"], OF_OPTAX),
    "optax.adamw": Peer(
        on_optax(optax.adamw, learning_rate=0.5, **DECAY), ["AdamW, core", "AdamW, acprop_optax"], OF_OPTAX
    ),
    "optax.adabelief": Peer(
        on_optax(optax.adabelief, learning_rate=0.5), ["AdaBelief, core", "AdaBelief, acprop_optax"], OF_OPTAX
    ),
    "optax.contrib.acprop": Peer(
        on_optax(optax.contrib.acprop, learning_rate=0.5), ["ACProp on the previous mean, core"], OF_OPTAX
    ),
    "AdaShift": Peer(adashift, ["AdaShift, core"], OF_ADASHIFT, first=2),
    "torch.optim.Adam": Peer(
        part(theirs_in_torch, "Adam"),
        ["Adam, core", "Adam, core on torch", "Adam, acprop_torch"],
        OF_TORCH,
        needs="torch",
    ),
    "torch.optim.Adam with decay": Peer(
        part(theirs_in_torch, "Adam", **DECAY), ["Adam with L2, acprop_torch"], OF_TORCH, needs="torch"
    ),
    "torch.optim.AdamW": Peer(
        part(theirs_in_torch, "AdamW", **DECAY),
        ["AdamW, core", "AdamW, core on torch", "AdamW, acprop_torch"],
        OF_TORCH,
        needs="torch",
    ),
}
CORNERS = [name for name in OURS if name.endswith(", core")]


def streams(dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the gradients, of sizes from 1e-3 to 1e3 and one that begins with zeros, and the parameters."""
    rng = np.random.default_rng(18)
    grads = rng.normal(0.3, 1.0, (STEPS, 8)) * 10.0 ** np.array([-3, -2, -1, 0, 1, 2, 3, 0])
    grads[: STEPS // 2, -1] = 0.0
    return grads.astype(dtype), rng.normal(size=grads.shape).astype(dtype)


@functools.cache
def trajectory(make: Callable[[], Run], dtype: str) -> list[np.ndarray | None]:
    """Return updates, first and second moments, (steps, elements)."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", dtype == "float64")
    try:
        columns = zip(*make()(*streams(dtype)), strict=True)
    finally:
        jax.config.update("jax_enable_x64", before)
    return [None if column[0] is None else np.stack(column).astype(np.float64) for column in columns]


def distances(peer: Peer, ours: str, dtype: str) -> list[float]:
    """Return how far update, mu and nu are apart at most, relative to the peer's largest so far of each element."""
    theirs, mine = (trajectory(make, dtype) for make in (peer.theirs, OURS[ours]))
    apart = []
    for begin, x, y in zip((peer.first - 1, 0, 0), theirs, mine, strict=True):
        if x is None:
            apart.append(0.0)
            continue
        assert x.shape == y.shape == (STEPS, 8)
        largest = np.maximum(np.maximum.accumulate(np.abs(x)), float(np.finfo(dtype).smallest_normal))
        apart.append(float(np.max(np.abs(x - y)[begin:] / largest[begin:])))
    return apart


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(("name", "ours"), [(name, ours) for name, peer in PEERS.items() for ours in peer.ours])
def test_a_peer_takes_the_same_steps(name: str, ours: str, dtype: str) -> None:
    peer = PEERS[name]
    pytest.importorskip(peer.needs)
    unit, bounds = (1.0, FLOAT64) if dtype == "float64" else (float(np.finfo(dtype).eps), peer.float32)
    for what, apart, bound in zip(("update", "mu", "nu"), distances(peer, ours, dtype), bounds, strict=True):
        assert apart <= bound * unit, f"{what} is {apart / unit:.3g} apart"


@pytest.mark.parametrize(("name", "corner"), [(name, corner) for name in PEERS for corner in CORNERS])
def test_a_peer_is_one_corner_and_no_other(name: str, corner: str) -> None:
    peer = PEERS[name]
    pytest.importorskip(peer.needs)
    assert (max(distances(peer, corner, "float64")) < 1e-12) == (corner in peer.ours)
