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
import numpy as np
import pytest

import acprop_optax
import acprop_stepper
from acprop_core import ACProp, State
from cases import Case, inverse, prescribed
from hosts import BACKENDS, Host, Optax, Stepper, marks_of
from promises import attempt

pytestmark = [
    pytest.mark.promise("concurrency"),
    # JAX writes files of compiled programs in place: a thread that reads half of one compiles anew
    pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache entry:UserWarning"),
]

HYPER = {"learning_rate": 0.1, "weight_decay": 0.1, "clip_exponent": 0.25}
ENGINES = ("numba", "tiles")
SIZE = 3000


def drawn(seed: int, **hyper: Any) -> Case:
    """Return six steps, with gradients of this seed."""
    grads = np.random.default_rng(seed).normal(size=(6, SIZE)).astype(np.float32)
    return prescribed({**HYPER, **hyper}, {"w": grads})


def run(begin: Callable[[Case], Host], case: Case) -> Any:
    """Take the steps of a case from its first parameters, and return all that there is afterwards."""
    host = begin(case)
    host.advance({"w": case.grads("w")})
    return host.count, host.read()


def on(*names: str) -> Any:
    """Parametrize a test by these backends."""
    return pytest.mark.parametrize("backend", [pytest.param(name, marks=marks_of(BACKENDS[name])) for name in names])


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


def same(a: Any, b: Any) -> bool:
    leaves, others = jax.tree.leaves(a), jax.tree.leaves(b)
    pairs = zip(map(np.asarray, leaves), map(np.asarray, others), strict=True)
    return all(x.dtype == y.dtype and x.tobytes() == y.tobytes() for x, y in pairs)


# Threads


@on("numpy", "jax_eager", "torch")
@pytest.mark.parametrize("rate", [0.1, inverse], ids=["number", "schedule"])
def test_threads_share_one_functional_optimizer(backend: str, rate: Any) -> None:
    cases = [drawn(seed, learning_rate=rate) for seed in (0, 1, 2, 0)]
    begin = functools.partial(BACKENDS[backend].begin, optimizer=ACProp(**cases[0].hyper))
    alone = [run(begin, case) for case in cases]
    for a, b in zip(alone, together(*(functools.partial(run, begin, case) for case in cases)), strict=True):
        with attempt(backend):
            assert same(a, b)


def test_threads_share_one_transformation() -> None:
    cases = [drawn(seed, learning_rate=inverse) for seed in (0, 1, 2, 0)]
    transform = acprop_optax.acprop(**cases[0].hyper)
    for update in (transform.update, jax.jit(transform.update)):  # compiled by the first thread that calls it
        begin = functools.partial(Optax, transform=transform, update=update)
        found = together(*(functools.partial(run, begin, case) for case in cases))
        for case, b in zip(cases, found, strict=True):
            with attempt("optax"):
                assert same(run(begin, case), b)


@pytest.mark.parametrize("engine", ENGINES)
def test_threads_on_one_stepper_wait_for_each_other(engine: str) -> None:
    """Every state that is seen meanwhile is one between two steps."""
    size = 30_000  # so that a step takes a while, in which a state that is read too soon would be seen
    x, g = np.ones(size), np.linspace(-1.0, 1.0, size)
    serial = acprop_stepper.Stepper(x.copy(), **HYPER, engine=engine)
    expected = [serial.state]
    for _ in range(80):
        serial.step(g)
        expected.append(serial.state)
    stepper = acprop_stepper.Stepper(x, **HYPER, engine=engine)

    def steps() -> list[Any]:
        return [stepper.step(g).count for _ in range(20)]

    def looks() -> list[Any]:
        return [stepper.state for _ in range(40)]

    *counts, seen, _ = together(*[steps] * 4, looks, looks)
    with attempt(f"stepper_{engine}"):
        assert sorted(itertools.chain(*counts)) == list(range(1, 81))
        assert same((x, stepper.state), (serial.params, serial.state))
    for state in seen:
        with attempt(f"stepper_{engine}"):
            assert same(state, expected[state.count])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_state_is_loaded_between_two_steps(engine: str) -> None:
    g = np.linspace(-1.0, 1.0, SIZE)
    serial = acprop_stepper.Stepper(np.ones(SIZE), engine=engine)
    expected = [serial.state]
    for _ in range(40):
        serial.step(g)
        expected.append(serial.state)
    stepper = acprop_stepper.Stepper(np.ones(SIZE), engine=engine)

    def steps() -> None:
        for _ in range(20):
            stepper.step(g)

    def loads() -> None:
        for _ in range(20):
            stepper.load_state(expected[0])

    together(steps, steps, loads)
    with attempt(f"stepper_{engine}"):
        assert same(stepper.state, expected[stepper.state.count])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("threads", [1, 2])
def test_two_steppers_in_two_threads(engine: str, threads: int) -> None:
    begin = functools.partial(Stepper, engine=engine, threads=threads)
    cases = [drawn(seed) for seed in (0, 1)]
    for case, b in zip(cases, together(*(functools.partial(run, begin, case) for case in cases)), strict=True):
        with attempt(f"stepper_{engine}"):
            assert same(run(begin, case), b)


@on("torch_optimizer", "torch_foreach", "torch_fused")
def test_two_torch_optimizers_in_two_threads(backend: str) -> None:
    begin = BACKENDS[backend].begin
    cases = [drawn(seed) for seed in (0, 1)]
    for case, b in zip(cases, together(*(functools.partial(run, begin, case) for case in cases)), strict=True):
        with attempt(backend):
            assert same(run(begin, case), b)


def test_every_host_at_once() -> None:
    names = ("numpy", "torch_fused", "stepper_numba", "stepper_tiles", "jax_eager")
    backends = [BACKENDS[name] for name in names if not BACKENDS[name].cannot_run()]
    runs = [functools.partial(run, backend.begin, drawn(seed)) for seed, backend in enumerate(backends)]
    alone = [run_alone() for run_alone in runs]
    for backend, a, b in zip(backends, alone, together(*runs), strict=True):
        with attempt(backend):
            assert same(a, b)


# Other processes, because this one has compiled already, and a process with threads of JAX and torch must not fork

HERE = """
import functools, hashlib, os, sys, threading
import numpy as np
from cases import prescribed
from hosts import BACKENDS, Stepper

GRADS = np.linspace(-1.0, 1.0, 600_000)  # enough to wake another thread
CASE = prescribed({"learning_rate": 0.1, "weight_decay": 0.1}, {"w": GRADS[None]})

def step(host):
    host.step({"w": GRADS})

def bits(host):
    return b"".join(np.asarray(x).tobytes() for x in (host.count, *host.read()["w"]) if x is not None)
"""
FIRST_USE = """
barrier, found = threading.Barrier(2), []
def run():
    barrier.wait()
    host = begin(CASE)
    step(host)
    step(host)
    found.append(bits(host))
sys.setswitchinterval(1e-4)
threads = [threading.Thread(target=run) for _ in range(2)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
host = begin(CASE)
step(host)
step(host)
assert found == [bits(host)] * 2, len(found)
"""
FORK = """
host = begin(CASE)
step(host)
here, there = os.pipe()
child = os.fork()
step(host)  # in both processes
if not child:
    os.write(there, hashlib.sha256(bits(host)).digest())
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert os.read(here, 32) == hashlib.sha256(bits(host)).digest()
step(host)  # and the end of the child has taken nothing along
"""
# Ctrl-C arrives in the middle of the import; the next use finds Numba whole.
FIRST_INTERRUPTED = """
import importlib.abc, signal
from acprop_core import kernels
from acprop_stepper import Stepper

class Interrupt(importlib.abc.MetaPathFinder):
    def find_spec(self, name, *_):
        if name == "numba.core.typing":
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
try:
    Stepper(np.ones(2))
except KeyboardInterrupt:
    sys.meta_path.pop(0)
assert kernels.why_no_numba() is None
assert Stepper(np.ones(2), engine="numba").step(np.ones(2)).count == 1
"""
NUMPY = {
    "numpy": "begin = BACKENDS['numpy'].begin",
    **{
        f"stepper_{engine}, {threads} threads": f"begin = functools.partial(Stepper, {engine=}, {threads=})"
        for engine in ENGINES
        for threads in (1, 2)
    },
}
TORCH = {name: f"begin = BACKENDS[{name!r}].begin" for name in ("torch_optimizer", "torch_foreach", "torch_fused")}


def elsewhere(*codes: str) -> None:
    """Run these lines in a process of their own."""
    result = subprocess.run(
        [sys.executable, "-c", "\n".join([HERE, *codes])],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=300,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("backend", ["stepper_numba, 1 threads", "torch_fused"])
def test_two_threads_compile_at_once(backend: str) -> None:
    """Two threads import and compile at once, in a process where nobody has before."""
    if backend in TORCH:
        pytest.importorskip("torch")
    elsewhere({**NUMPY, **TORCH}[backend], FIRST_USE)


def test_an_interrupt_while_numba_is_imported() -> None:
    pytest.importorskip("numba")
    elsewhere(FIRST_INTERRUPTED)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("backends", [NUMPY, TORCH], ids=["NumPy", "torch"])
def test_fork_after_use(backends: dict[str, str]) -> None:
    if backends is TORCH:
        pytest.importorskip("torch")
    elsewhere(*(begin + FORK for begin in backends.values()))
    for backend in backends:
        with attempt(backend):  # each was, or the process would have failed
            pass


FORK_WITHIN_A_STEP = """
import os, signal, threading
import numpy as np
from acprop_stepper import Stepper
from acprop_stepper._buffers import Tile
x = np.ones(300_000, np.float16)  # which needs casts, and so another thread
stepper, children, whole = Stepper(x, engine="tiles"), [], Tile.gather
once = [True]
def handler(number, frame):
    try:
        once.pop()  # not a question first: on a busy machine the next signal comes before its answer
    except IndexError:
        return
    children.append(os.fork())
def gather(*arguments):
    while not children:  # in the worker; the main thread waits for it, and runs the handler meanwhile
        signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)
        threading.Event().wait(0.01)
    return whole(*arguments)
signal.signal(signal.SIGUSR1, handler)
Tile.gather = gather
try:
    stepper.step(np.ones(300_000, np.float16))
except RuntimeError as error:
    os._exit(7 if "forked this process in the middle of a step" in str(error) else 8)
assert children[0] and os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 7
assert stepper.state.count == 1
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_within_a_step_is_refused_by_the_child() -> None:
    elsewhere(FORK_WITHIN_A_STEP)


# Pickles and copies


def continued(host: Host) -> Any:
    """Take one more step, in the process that this is, and return all that there is then."""
    host.step({"w": host.case.grads("w")[1]})
    return host.count, host.read()


def continued_from(pickled: bytes) -> Any:
    return continued(pickle.loads(pickled))


def test_a_run_goes_on_in_another_process() -> None:
    names = ("numpy", "jax_eager", "torch", "optax", "stepper_numba", "stepper_tiles", "torch_optimizer")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        for backend in (BACKENDS[name] for name in names if not BACKENDS[name].cannot_run()):
            with attempt(backend):
                host = backend.begin(drawn(0, learning_rate=inverse))
                host.step({"w": host.case.grads("w")[0]})
                expected = continued(copy.deepcopy(host))
                # as bytes: multiprocessing would have torch send its tensors as memory that both processes write to
                assert same(pool.submit(continued_from, pickle.dumps(host)).result(timeout=200), expected)
                assert same(continued(host), expected)  # the original was left as it was


def test_what_cannot_be_pickled_is_said_to_be_so() -> None:
    """A schedule that is a lambda goes to no other process; its name is in the error."""
    for what in (ACProp(lambda count: 0.1), acprop_stepper.Stepper(np.ones(2), lambda count: 0.1)):
        with attempt(type(what).__name__), pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
            pickle.dumps(what)


def test_a_state_is_a_plain_tuple_to_pickle() -> None:
    state = ACProp().init({"a": np.ones(2), "b": None})
    again = pickle.loads(pickle.dumps(state))
    assert isinstance(again, State)
    assert same(state, again)
    assert again.mu["b"] is None
