"""Threads, forks and other processes: no step is lost, none is seen half done, and no two runs mix.

What is promised differs from host to host. The functional core and optax are pure: any number of threads may use one
optimizer. A stepper makes threads wait for each other. A torch optimizer, like those of torch, belongs to one thread;
two optimizers may step in two threads.
"""

import copy
import functools
import itertools
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import acprop_optax
from acprop_core import ACProp, State
from acprop_stepper import Stepper
from promises import attempt

try:
    import torch

    import acprop_torch
except ModuleNotFoundError:  # the oldest versions are tested without
    torch = None  # type: ignore[assignment]

pytestmark = pytest.mark.promise("concurrency")

HYPER = {"learning_rate": 0.1, "weight_decay": 0.1, "clip_exponent": 0.25}
ENGINES = ("numba", "tiles")
WAYS: dict[str, dict[str, bool]] = {"for-loop": {}, "foreach": {"foreach": True}, "fused": {"fused": True}}
SIZE = 3000
needs_torch = pytest.mark.skipif(torch is None, reason="needs torch")


def schedule(count: Any) -> Any:
    return 0.1 / (1.0 + count)


def together(*runs: Callable[[], Any]) -> list[Any]:
    """Run all at once, each in a thread of its own, and return what they return.

    Meanwhile Python switches between threads 500 times as often as it does by itself.
    """
    barrier = threading.Barrier(len(runs))
    interval = sys.getswitchinterval()

    def begin(run: Callable[[], Any]) -> Any:
        barrier.wait()
        return run()

    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(len(runs)) as pool:
            return list(pool.map(begin, runs))
    finally:
        sys.setswitchinterval(interval)


def numbers(seed: int, dtype: Any = np.float64) -> list[Any]:
    """Return a parameter and six gradients."""
    return list(np.random.default_rng(seed).normal(size=(7, SIZE)).astype(dtype))


def same(a: Any, b: Any) -> bool:
    leaves, others = jax.tree.leaves(a), jax.tree.leaves(b)
    pairs = zip(map(np.asarray, leaves), map(np.asarray, others), strict=True)
    return all(x.dtype == y.dtype and x.tobytes() == y.tobytes() for x, y in pairs)


# Runs, each from its own start; what they return is all that there is afterwards


def run_core(like: Callable[[Any], Any], optimizer: ACProp, seed: int) -> Any:
    x, *grads = map(like, numbers(seed, np.float32))
    state = optimizer.init(x)
    for g in grads:
        updates, state = optimizer.update(g, state, x)
        x = optimizer.apply(x, updates)
    return x, state


def run_optax(update: Any, init: Any, seed: int) -> Any:
    x, *grads = map(jnp.asarray, numbers(seed, np.float32))
    state = init(x)
    for g in grads:
        updates, state = update(g, state, x)
        x = optax.apply_updates(x, updates)
    return x, state


def run_stepper(engine: str, seed: int, threads: int = 1) -> Any:
    x, *grads = numbers(seed)
    stepper = Stepper(x, **HYPER, engine=engine, threads=threads)
    for g in grads:
        stepper.step(g)
    return x, stepper.state


def run_torch(flags: dict[str, bool], seed: int) -> Any:
    x, *grads = map(torch.from_numpy, numbers(seed))
    optimizer = acprop_torch.ACProp([x.requires_grad_()], lr=0.1, weight_decay=0.1, clip_exponent=0.25, **flags)
    for g in grads:
        x.grad = g
        optimizer.step()
    return x.detach().numpy(), optimizer.state_dict()["state"]


# Threads


@pytest.mark.parametrize("backend", ["NumPy", "JAX", "torch core"])
@pytest.mark.parametrize("rate", [0.1, schedule], ids=["number", "schedule"])
def test_threads_share_one_functional_optimizer(backend: str, rate: Any) -> None:
    if backend == "torch core" and torch is None:
        pytest.skip("needs torch")
    like = {"NumPy": np.asarray, "JAX": jnp.asarray}.get(backend) or torch.from_numpy
    optimizer = ACProp(rate, weight_decay=0.1, clip_exponent=0.25)
    alone = [run_core(like, optimizer, seed) for seed in (0, 1, 2, 0)]
    found = together(*(lambda seed=seed: run_core(like, optimizer, seed) for seed in (0, 1, 2, 0)))
    for a, b in zip(alone, found, strict=True):
        with attempt(backend):
            assert same(a, b)


def test_threads_share_one_transformation() -> None:
    transform = acprop_optax.acprop(schedule, weight_decay=0.1, clip_exponent=0.25)
    for update in (transform.update, jax.jit(transform.update)):  # compiled by whoever comes first
        run = functools.partial(run_optax, update, transform.init)
        found = together(*(functools.partial(run, seed) for seed in (0, 1, 2, 0)))
        for seed, b in zip((0, 1, 2, 0), found, strict=True):
            with attempt("optax"):
                assert same(run(seed), b)


@pytest.mark.parametrize("backend", ENGINES)
def test_threads_on_one_stepper_wait_for_each_other(backend: str) -> None:
    """Every state that is seen meanwhile is one between two steps."""
    size = 30_000  # so that a step takes a while, in which a state that is read too soon would be seen
    x, g = np.ones(size), np.linspace(-1.0, 1.0, size)
    serial = Stepper(x.copy(), **HYPER, engine=backend)
    expected = [serial.state]
    for _ in range(80):
        serial.step(g)
        expected.append(serial.state)
    stepper = Stepper(x, **HYPER, engine=backend)

    def steps() -> list[Any]:
        return [stepper.step(g).count for _ in range(20)]

    def looks() -> list[Any]:
        return [stepper.state for _ in range(40)]

    *counts, seen, _ = together(*[steps] * 4, looks, looks)
    with attempt(backend):
        assert sorted(itertools.chain(*counts)) == list(range(1, 81))
        assert same((x, stepper.state), (serial.params, serial.state))
    for state in seen:
        with attempt(backend):
            assert same(state, expected[state.count])


@pytest.mark.parametrize("backend", ENGINES)
def test_a_state_is_loaded_between_two_steps(backend: str) -> None:
    g = np.linspace(-1.0, 1.0, SIZE)
    serial = Stepper(np.ones(SIZE), engine=backend)
    expected = [serial.state]
    for _ in range(40):
        serial.step(g)
        expected.append(serial.state)
    stepper = Stepper(np.ones(SIZE), engine=backend)

    def steps() -> None:
        for _ in range(20):
            stepper.step(g)

    def loads() -> None:
        for _ in range(20):
            stepper.load_state(expected[0])

    together(steps, steps, loads)
    assert same(stepper.state, expected[stepper.state.count])


@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize("threads", [1, 2])
def test_two_steppers_in_two_threads(backend: str, threads: int) -> None:
    found = together(*(lambda seed=seed: run_stepper(backend, seed, threads) for seed in (0, 1)))
    for seed, b in enumerate(found):
        with attempt(backend):
            assert same(run_stepper(backend, seed, threads), b)


@needs_torch
@pytest.mark.parametrize("backend", WAYS)
def test_two_torch_optimizers_in_two_threads(backend: str) -> None:
    found = together(*(lambda seed=seed: run_torch(WAYS[backend], seed) for seed in (0, 1)))
    for seed, b in enumerate(found):
        with attempt(f"torch {backend}"):
            assert same(run_torch(WAYS[backend], seed), b)


@needs_torch
def test_every_host_at_once() -> None:
    runs: dict[str, Callable[[], Any]] = {
        "NumPy": lambda: run_core(np.asarray, ACProp(**HYPER), 0),
        "torch fused": lambda: run_torch({"fused": True}, 1),
        "Numba": lambda: run_stepper("numba", 2),
        "tiles": lambda: run_stepper("tiles", 3),
        "JAX": lambda: run_core(jnp.asarray, ACProp(**HYPER), 4),
    }
    alone = [run() for run in runs.values()]
    for backend, a, b in zip(runs, alone, together(*runs.values()), strict=True):
        with attempt(backend):
            assert same(a, b)


# Other processes: this one has compiled already, and has threads of JAX and torch, beside which no fork is safe

OF_CORE = """
from acprop_core import ACProp
class Run:
    def __init__(self):
        self.optimizer = ACProp(0.1)
        self.x, self.g = np.ones(100), np.linspace(-1.0, 1.0, 100)
        self.state = self.optimizer.init(self.x)
    def step(self):
        updates, self.state = self.optimizer.update(self.g, self.state, self.x)
        self.x = self.optimizer.apply(self.x, updates)
    def everything(self):
        return self.x, *self.state
"""
OF_STEPPER = """
from acprop_stepper import Stepper
class Run:
    def __init__(self):
        self.x, self.g = np.ones(100_000), np.linspace(-1.0, 1.0, 100_000)
        self.stepper = Stepper(self.x, 0.1, **{options})
    def step(self):
        self.stepper.step(self.g)
    def everything(self):
        return self.x, *self.stepper.state
"""
OF_TORCH = """
import torch
from acprop_torch import ACProp
class Run:
    def __init__(self):
        self.x = torch.ones(100_000, requires_grad=True)
        self.x.grad = torch.linspace(-1.0, 1.0, 100_000)
        self.optimizer = ACProp([self.x], lr=0.1, **{options})
    def step(self):
        self.optimizer.step()
    def everything(self):
        return self.x.detach(), *self.optimizer.state[self.x].values()
"""
BITS = """
import os, sys, threading
import numpy as np
def bits(run):
    return b"".join(np.asarray(x).tobytes() for x in run.everything())
"""
FIRST_USE = """
barrier, found = threading.Barrier(2), []
def begin():
    barrier.wait()
    run = Run()
    run.step()
    run.step()
    found.append(bits(run))
sys.setswitchinterval(1e-4)
threads = [threading.Thread(target=begin) for _ in range(2)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
begin = Run()
begin.step()
begin.step()
assert found == [bits(begin)] * 2, len(found)
"""
FORK = """
run = Run()
run.step()
here, there = os.pipe()
child = os.fork()
run.step()  # both go on
if not child:
    import hashlib
    os.write(there, hashlib.sha256(bits(run)).digest())
    os._exit(0)
import hashlib
assert os.waitpid(child, 0)[1] == 0
assert os.read(here, 32) == hashlib.sha256(bits(run)).digest()
run.step()  # and the child's end has taken nothing along
"""
NUMPY = {
    "NumPy": OF_CORE,
    **{
        f"stepper {engine}, {threads} threads": OF_STEPPER.format(options={"engine": engine, "threads": threads})
        for engine in ENGINES
        for threads in (1, 2)
    },
}
TORCH = {f"torch {way}": OF_TORCH.format(options=flags) for way, flags in WAYS.items()}


def elsewhere(*codes: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", "\n".join([BITS, *codes])], timeout=300, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("backend", ["stepper numba, 1 threads", "torch fused"])
def test_two_threads_compile_at_once(backend: str) -> None:
    """What is imported and compiled at the first step is so by two threads, in a process where it is the first."""
    if "torch" in backend and torch is None:
        pytest.skip("needs torch")
    elsewhere({**NUMPY, **TORCH}[backend], FIRST_USE)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("backends", [NUMPY, pytest.param(TORCH, marks=needs_torch)], ids=["NumPy", "torch"])
def test_fork_after_use(backends: dict[str, str]) -> None:
    elsewhere(*(code + FORK for code in backends.values()))
    for backend in backends:
        with attempt(backend):  # each was, or the process would have failed
            pass


# Pickles and copies


def continued(what: tuple[Any, ...]) -> Any:
    """Take one more step, in whatever process this is, and return all that there is then."""
    kind, *parts = what
    if kind == "core":
        optimizer, x, state, g = parts
        updates, state = optimizer.update(g, state, x)
        return optimizer.apply(x, updates), state
    if kind == "optax":
        x, state, g = parts
        updates, state = acprop_optax.acprop(**HYPER).update(g, state, x)
        return optax.apply_updates(x, updates), state
    if kind == "stepper":
        x, stepper, g = parts
        stepper.step(g)
        return x, stepper.state
    x, optimizer, g = parts
    x.grad = g
    optimizer.step()
    return x.detach(), optimizer.state_dict()["state"]


def continued_from(pickled: bytes) -> Any:
    return continued(pickle.loads(pickled))


def in_the_middle(backend: str) -> tuple[tuple[Any, ...], Any]:
    """Return what is to be sent to another process, and what must come of it there."""
    x, g = np.linspace(-1.0, 1.0, 50), np.linspace(2.0, 3.0, 50)
    if backend == "stepper":
        stepper = Stepper(x, schedule, weight_decay=0.1, clip_exponent=0.25)
        stepper.step(g)
        what: tuple[Any, ...] = ("stepper", x, stepper, g)
    elif backend == "torch":
        p = torch.from_numpy(x).requires_grad_()
        p.grad = torch.from_numpy(g)
        optimizer = acprop_torch.ACProp([p], lr=0.1, clip_exponent=0.25)
        optimizer.step()
        what = ("torch", p, optimizer, torch.from_numpy(g))
    elif backend == "optax":
        a = jnp.asarray(x)
        _, state = acprop_optax.acprop(**HYPER).update(jnp.asarray(g), acprop_optax.acprop(**HYPER).init(a), a)
        what = ("optax", a, state, jnp.asarray(g))
    else:
        like = {"NumPy": np.asarray, "JAX": jnp.asarray}.get(backend) or torch.from_numpy
        core = ACProp(schedule, weight_decay=0.1, clip_exponent=0.25)
        _, moments = core.update(like(g), core.init(like(x)), like(x))
        what = ("core", core, like(x), moments, like(g))
    return what, continued(copy.deepcopy(what))


@needs_torch
def test_a_run_goes_on_in_another_process() -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        for backend in ("NumPy", "JAX", "torch core", "optax", "stepper", "torch"):
            with attempt(backend):
                what, expected = in_the_middle(backend)
                # as bytes: multiprocessing would have torch send its tensors as memory that both processes write to
                assert same(pool.submit(continued_from, pickle.dumps(what)).result(timeout=200), expected)
                assert same(continued(what), expected)  # the original was left as it was


def test_what_cannot_be_pickled_is_said_to_be_so() -> None:
    """A schedule that is a lambda goes to no other process; its name is in the error."""
    for what in (ACProp(lambda count: 0.1), Stepper(np.ones(2), lambda count: 0.1)):
        with attempt(type(what).__name__), pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
            pickle.dumps(what)


def test_a_state_is_a_plain_tuple_to_pickle() -> None:
    state = ACProp().init({"a": np.ones(2), "b": None})
    again = pickle.loads(pickle.dumps(state))
    assert isinstance(again, State)
    assert same(state, again)
    assert again.mu["b"] is None
