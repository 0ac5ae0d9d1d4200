"""The functional core on dask.array, in two worker processes: more state than one may hold, and a worker killed."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from acprop_core import ACProp, State, load, save

dask = pytest.importorskip("dask")
distributed = pytest.importorskip("distributed")
da = pytest.importorskip("dask.array")

MIB = 2**20
LIMIT = 590 * MIB
OPTIMIZER = ACProp(1e-2, weight_decay=0.1, clip_exponent=0.25)


@contextlib.contextmanager
def two_workers(folder: Path) -> Iterator[Any]:
    """Start two workers of one thread each, and stop them."""
    with (
        distributed.LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            memory_limit=LIMIT,
            dashboard_address=":0",
            host="127.0.0.1",
            local_directory=folder,
        ) as cluster,
        distributed.Client(cluster, timeout=60) as client,
    ):
        yield client


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Any]:
    """Two workers that are killed at their limit: nothing is spilled, nothing waits."""
    limits = {f"distributed.worker.memory.{action}": False for action in ("target", "spill", "pause")}
    with (
        dask.config.set({**limits, "distributed.worker.memory.terminate": 0.95}),
        two_workers(tmp_path) as client,
    ):
        yield client


def gradient(x: Any) -> Any:
    return x * x - 3.25  # of x^3 / 3 - 3.25 x: no sum over chunks, and not the same for any two values


def step(params: Any, state: State) -> tuple[Any, State]:
    updates, state = OPTIMIZER.update({"w": gradient(params["w"])}, state, params)
    return OPTIMIZER.apply(params, updates), state


def tasks(params: Any, state: State) -> int:
    return sum(len(dict(x["w"].__dask_graph__())) for x in (params, state.mu, state.nu))


def train(params: Any, state: State, steps: int) -> tuple[Any, State]:
    for _ in range(steps):
        params, state = dask.persist(*step(params, state))
    distributed.wait((params, state), timeout=120)
    return params, state


def in_numpy(x: Any, steps: int) -> tuple[Any, State]:
    params = {"w": x}
    state = OPTIMIZER.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def assert_same_bits(a: tuple[Any, State], b: tuple[Any, State]) -> None:
    assert a[1].count == b[1].count
    for x, y in ((a[0], b[0]), (a[1].mu, b[1].mu), (a[1].nu, b[1].nu)):
        assert x["w"].dtype == y["w"].dtype
        assert np.asarray(x["w"]).tobytes() == np.asarray(y["w"]).tobytes()


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_an_update_is_elementwise_chunk_by_chunk(dtype: str) -> None:
    def graph(chunks: int) -> list[Any]:
        params = {"w": da.ones(1000 * chunks, chunks=1000, dtype=dtype)}
        state = OPTIMIZER.init(params)
        new, after = step(params, State(da.asarray(np.int64(0)), *state[1:]))
        return [x["w"] for x in (new, after.mu, after.nu)]

    for x in graph(4):
        assert x.chunks == ((1000,) * 4,)
        names = {str(layer) for layer in x.__dask_graph__().layers}
        assert not [name for name in names if "rechunk" in name or "broadcast" in name]
    sizes = [sum(len(dict(x.__dask_graph__())) for x in graph(chunks)) for chunks in (2, 4, 6)]
    assert sizes[2] - sizes[1] == sizes[1] - sizes[0]


@pytest.mark.slow
def test_more_state_than_one_worker_may_hold(client: Any) -> None:
    size, chunk, steps = 200 * MIB // 4, MIB, 3
    started = client.run(os.getpid)
    index = da.arange(size, chunks=chunk, dtype="int32") % 7
    params = {"w": index.astype("float32")}
    carry = dask.persist(params, OPTIMIZER.init(params))
    sizes = []
    for _ in range(steps):
        carry = step(*carry)
        sizes.append(tasks(*carry))
        carry = dask.persist(*carry)
        distributed.wait(carry, timeout=120)
    assert sum(x["w"].nbytes for x in (carry[0], carry[1].mu, carry[1].nu)) > LIMIT
    assert client.run(os.getpid) == started  # a worker at its limit would have been killed and replaced
    held = client.run(lambda dask_worker: type(dask_worker.data).__name__)
    assert set(held.values()) == {"dict"}  # a worker that could spill has a SpillBuffer
    # before the first step both moments are the same zeros, which Dask keeps once
    assert sizes[0] < sizes[1] == sizes[2]

    (params, state), expected = carry, in_numpy(np.arange(7, dtype="float32"), steps)
    for x, y in ((params, expected[0]), (state.mu, expected[1].mu), (state.nu, expected[1].nu)):
        wrong = x["w"].view("uint32") != index.map_blocks(_taken, y["w"].view("uint32"), dtype="uint32")
        assert not wrong.any().compute()


@pytest.mark.slow
def test_parameters_larger_than_the_memory_of_a_worker(tmp_path: Path) -> None:
    """The state is three times the parameters, more than two such workers hold: the rest goes to their disks."""
    size, chunk, steps = LIMIT // 4 + 2**21, 2**21, 2
    with two_workers(tmp_path) as client:
        started = client.run(os.getpid)
        params = {"w": da.full(size, 1.5, chunks=chunk, dtype="float32")}
        assert params["w"].nbytes > LIMIT
        carry = dask.persist(params, OPTIMIZER.init(params))
        for _ in range(steps):
            carry = dask.persist(*step(*carry))
            distributed.wait(carry, timeout=240)
        assert client.run(os.getpid) == started
        params, state = in_numpy(np.full(1, 1.5, "float32"), steps)
        for x, y in ((carry[0], params), (carry[1].mu, state.mu), (carry[1].nu, state.nu)):
            assert not (x["w"].view("uint32") != y["w"].view("uint32")[0]).any().compute()


def _taken(index: Any, values: Any) -> Any:
    return values[index]


def test_after_a_killed_worker_the_run_goes_on_to_the_same_bits(client: Any) -> None:
    start = np.linspace(-3.0, 3.0, 8_000, dtype="float32")
    params = {"w": da.from_array(start, chunks=1000)}
    carry = train(params, OPTIMIZER.init(params), 4)
    worker = min(client.run(os.getpid).values())
    os.kill(worker, signal.SIGKILL)
    carry = train(*carry, 4)  # what the worker held is computed again, from the first step on
    assert worker not in client.run(os.getpid).values()
    assert_same_bits(carry, in_numpy(start, 8))


def test_a_run_resumes_from_its_checkpoint(client: Any, tmp_path: Path) -> None:
    start = np.linspace(-3.0, 3.0, 8_000, dtype="float32")
    params = {"w": da.from_array(start, chunks=1000)}
    params, state = train(params, OPTIMIZER.init(params), 4)
    save(tmp_path / "state.safetensors", OPTIMIZER, state)
    np.save(tmp_path / "w.npy", params["w"].compute())
    params, state = train(params, state, 4)
    since_the_start = client.run_on_scheduler(_known)
    del params, state
    carry = train(*resumed(tmp_path), 4)
    assert client.run_on_scheduler(_known) < since_the_start  # it remembers only what was done since the checkpoint
    assert_same_bits(carry, in_numpy(start, 8))


def resumed(folder: Path) -> tuple[Any, State]:
    params = {"w": np.load(folder / "w.npy")}
    optimizer, state = load(folder / "state.safetensors", params)
    assert optimizer == OPTIMIZER
    params, mu, nu = ({"w": da.from_array(x["w"], chunks=1000)} for x in (params, state.mu, state.nu))
    return params, State(state.count, mu, nu)


def _known(dask_scheduler: Any) -> int:
    return len(dask_scheduler.tasks)


@pytest.mark.slow
def test_the_example_resumes_to_the_same_bits() -> None:
    pytest.importorskip("sklearn")
    script = Path(__file__).parents[1] / "docs" / "examples" / "scale_dask.py"
    run = [sys.executable, script, "--steps", "10", "--features", "64"]
    result = subprocess.run(run, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "last checkpoint: step 5" in result.stdout
    assert "The two runs end with the same bits." in result.stdout
