"""The stepper: every layout and engine, no step half applied after an interruption, options."""

import copy
import gc
import importlib.abc
import itertools
import math
import pickle
import signal
import sys
import threading
import time
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from acprop_core import ACProp, State, kernels, rule
from acprop_core.adapt import Step, with_values
from acprop_core.kernels import cpu, disk
from acprop_core.kernels.calls import program_of
from acprop_stepper import Stepper, StepRecord, _tiles, _work, export_state, import_state
from acprop_stepper._buffers import Tile
from acprop_stepper._overlap import addresses, first_overlap
from hosts import stepper_tiles

HYPER = {"learning_rate": 0.1, "weight_decay": 0.1, "clip_exponent": 0.25}
ENGINES = ["tiles", "numba"]


def readonly(x: np.ndarray) -> np.ndarray:
    x.flags.writeable = False
    return x


def functional(params: Any, grads: list[Any], **hyper: Any) -> Any:
    optimizer = ACProp(**{**HYPER, **hyper})
    state = optimizer.init(params)
    for g in grads:
        updates, state = optimizer.update(g, state, params)
        params = optimizer.apply(params, updates)
    return params, state


def assert_same(stepper: Stepper, expected: tuple[Any, State]) -> None:
    params, state = expected
    got = stepper.state
    assert got.count == state.count
    pairs = [(stepper.params, params), (got.mu, state.mu), (got.nu, state.nu), (got.carry, state.carry)]
    for a, b in pairs:
        for x, y in zip(a.values(), b.values(), strict=True) if isinstance(a, dict) else [(a, b)]:
            np.testing.assert_array_equal(x, y)


# layouts, dtypes, engines

LAYOUTS = {
    "contiguous": lambda x: x.copy(),
    "fortran": lambda x: np.asfortranarray(x),
    "transposed": lambda x: np.ascontiguousarray(x.T).T,
    "strided": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    "reversed": lambda x: x[::-1].copy()[::-1],
}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_gradient_may_be_a_numpy_scalar(engine: str) -> None:
    start, g = {"w": np.ones(3), "scale": np.array(2.0)}, {"w": np.full(3, 0.5), "scale": np.float64(0.25)}
    stepper = Stepper({name: x.copy() for name, x in start.items()}, **HYPER, engine=engine)
    for _ in range(2):
        stepper.step(g)
    assert_same(stepper, functional(start, [g, g]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("tile", [64, 2**17])
@pytest.mark.parametrize("engine", ENGINES)
def test_every_layout_gives_the_bits_of_the_functional_core(
    layout: str, grad_layout: str, tile: int, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stepper_tiles(monkeypatch, tile, tile // 8)
    rng = np.random.default_rng(0)
    start, grads = rng.normal(size=(5, 9)), list(rng.normal(size=(4, 5, 9)))
    stepper = Stepper(LAYOUTS[layout](start), **HYPER, engine=engine)
    for g in grads:
        stepper.step(LAYOUTS[grad_layout](g))
    assert_same(stepper, functional(start, grads))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64, np.complex64, np.complex128])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("tile", [64, 2**17])
def test_many_parameters_give_the_bits_of_the_functional_core(
    dtype: Any, engine: str, threads: int, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stepper_tiles(monkeypatch, tile, tile // 8)
    rng = np.random.default_rng(0)
    shapes = [(), (0,), (3,), (2, 5), (40,), (1, 1, 2), (7, 9)]

    def draw() -> dict[str, Any]:
        numbers = [rng.normal(size=(2, *shape)) for shape in shapes]
        if np.dtype(dtype).kind == "c":
            return {f"p{i}": np.asarray(x[0] + 1j * x[1]).astype(dtype) for i, x in enumerate(numbers)}
        return {f"p{i}": np.asarray(x[0]).astype(dtype) for i, x in enumerate(numbers)}

    start, grads = draw(), [draw() for _ in range(4)]
    grads[2]["p2"] = None  # a gradient that is missing once
    mask = {name: i % 2 == 0 for i, name in enumerate(start)}
    stepper = Stepper({name: x.copy() for name, x in start.items()}, **HYPER, mask=mask, engine=engine, threads=threads)
    for g in grads:
        stepper.step(g)
    assert_same(stepper, functional(start, grads, mask=mask))


@pytest.mark.parametrize("count", [0, 5])
@pytest.mark.parametrize(
    "hyper",
    [
        {},
        HYPER,
        {"b1": 0.1, "b2": 0.2, "eps_root": 0.0},
        {"centering": "previous", "clip_exponent": 0.5},
        {"asynchronous": False, "centering": "none", "clip_exponent": 0.5},
    ],
)
@pytest.mark.parametrize("grad_scale", [1.0, 0.3])
@pytest.mark.parametrize("decay", [False, True])
def test_a_program_is_the_rule(count: int, hyper: dict[str, Any], grad_scale: float, decay: bool) -> None:
    options = rule.Hyperparameters(**hyper)
    numbers = rule.cast(rule.numbers_of(options, count, np), np.float32, 2.0**-126, np)
    numbers = numbers._replace(grad_scale=grad_scale)
    flags = rule.flags_of(options)._replace(scaled=grad_scale != 1.0)
    flags = flags if decay else flags._replace(decay=rule.Decay.NONE)
    rng = np.random.default_rng(0)
    param, grad, mu, nu = inputs = [rng.uniform(0.1, 1.0, 50).astype(np.float32) for _ in range(4)]
    update, new_mu, new_nu, _ = rule.step(*inputs, None, numbers, flags, np)
    program = program_of(flags, numbers, lambda _, value: np.float32(value), _tiles.OPERATIONS)
    registers = [np.full(50, math.nan, np.float32) for _ in range(program.registers)]
    slots = [readonly(param), readonly(grad), mu, nu, *program.numbers, *registers]
    for x, y in zip((program.run(slots), mu, nu), (update, new_mu, new_nu), strict=True):
        np.testing.assert_array_equal(x, y)


def test_many_complex_scalars_give_the_bits_of_the_functional_core() -> None:
    rng = np.random.default_rng(0)

    def draw() -> dict[str, Any]:
        return {str(i): np.asarray(complex(*rng.normal(size=2))) for i in range(300)}

    start, grads = draw(), [draw() for _ in range(3)]
    stepper = Stepper({name: x.copy() for name, x in start.items()}, **HYPER)
    for g in grads:
        stepper.step(g)
    assert_same(stepper, functional(start, grads))


def test_a_program_is_as_short_as_the_rule() -> None:
    options = rule.Hyperparameters(clip_exponent=0.25)
    numbers = rule.cast(rule.numbers_of(options, 5, np), np.float32, 2.0**-126, np)
    program = program_of(rule.flags_of(options), numbers, lambda _, value: value, _tiles.OPERATIONS)
    names = [function.__name__ for function, _ in program.instructions]
    assert "positive" not in names  # no copies: the moments are made where they belong
    assert len(names) == 17
    assert program.registers == 2


def test_buffers_are_shared_by_dtype_and_decay() -> None:
    params = {"a": np.ones(3, np.float32), "b": np.ones(2), "c": np.ones(4, np.float32)}
    stepper = Stepper(params, weight_decay=0.1, mask={"a": True, "b": True, "c": True})
    assert [buffer.mu.size for buffer in stepper._buffers] == [7, 2]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_makes_nothing_parameter_sized(engine: str) -> None:
    import tracemalloc

    params, grads = np.ones(4_000_000, np.float32), np.ones(4_000_000, np.float32)
    Stepper(params.copy(), **HYPER, engine=engine).step(grads)  # imports and compiles
    stepper = Stepper(params, **HYPER, engine=engine)
    gc.collect()
    tracemalloc.start()
    stepper.step(grads)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**22


def test_parameters_stay_the_callers_arrays() -> None:
    params = {"a": np.ones(3), "b": [np.ones(2), None]}
    arrays = params["a"], params["b"][0]
    Stepper(params, learning_rate=0.5).step({"a": np.ones(3), "b": [None, None]})
    assert params["a"] is arrays[0]
    assert params["b"][0] is arrays[1]
    assert params["a"].tolist() == [0.5] * 3
    assert params["b"][0].tolist() == [1.0, 1.0]


# options


def test_the_record() -> None:
    stepper = Stepper(np.ones(2), lambda count: 1.0 / (count + 1), clip_norm=1.0)
    assert stepper.step(np.array([3.0, 4.0])) == StepRecord(1, 1.0, 5.0, skipped=False)
    assert stepper.step(np.array([0.0, 0.5])) == StepRecord(2, 0.5, 0.5, skipped=False)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex128, np.float16])
def test_clip_norm_scales_gradients_and_does_not_write_them(engine: str, dtype: Any) -> None:
    grads = {"a": np.array([3.0, 0.0], dtype), "b": np.array([4.0], dtype)}
    stepper = Stepper({"a": np.zeros(2, dtype), "b": np.zeros(1, dtype)}, 1.0, clip_norm=1.25, engine=engine)
    assert stepper.step(grads).grad_norm == 5.0
    np.testing.assert_array_equal(stepper.params["a"], np.array([-0.75, 0.0], dtype))
    np.testing.assert_array_equal(stepper.params["b"], np.array([-1.0], dtype))
    np.testing.assert_array_equal(grads["b"], np.array([4.0], dtype))


@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_the_norm_neither_overflows_nor_vanishes(scale: float) -> None:
    record = Stepper(np.zeros(2), clip_norm=1.0).step(np.array([3.0, 4.0]) * scale)
    assert record.grad_norm == pytest.approx(5.0 * scale, rel=1e-15)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_norm_beyond_all_floats_is_still_clipped(engine: str) -> None:
    x = np.zeros(16)
    record = Stepper(x, 1.0, clip_norm=2.0, engine=engine).step(np.full(16, -1.5e308))
    assert record == StepRecord(1, 1.0, math.inf, skipped=False)
    np.testing.assert_allclose(x, 0.5, rtol=1e-15)


def test_the_norm_of_what_is_not_finite() -> None:
    for bad in (math.nan, math.inf):
        record = Stepper([np.zeros(2), np.zeros(1)], clip_norm=1.0).step([np.array([1.0, bad]), np.ones(1)])
        np.testing.assert_equal(record.grad_norm, bad)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_a_stepper_is_copied_with_its_parameters(engine: str, how: str) -> None:
    rng = np.random.default_rng(0)
    start, grads = {"a": rng.normal(size=3)}, [{"a": g} for g in rng.normal(size=(3, 3))]
    params = {"a": start["a"].copy()}
    options = {"mask": {"a": True}, "clip_norm": 1e9, "nonfinite": "skip", "threads": 2, "moment_dtype": "float64"}
    stepper = Stepper(params, **HYPER, **options, engine=engine)
    stepper.step(grads[0])
    pair = (params, stepper)
    other_params, other = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert other.params is other_params
    assert other.functional == stepper.functional
    assert type(other._engines[0]) is type(stepper._engines[0])
    for g in grads[1:]:
        assert other.step(g).grad_norm is not None
    assert other.step({"a": np.full(3, math.nan)}).skipped
    assert_same(other, functional(start, grads, mask={"a": True}))
    assert_same(stepper, functional(start, grads[:1], mask={"a": True}))  # left as it was


def test_the_equivalent_functional_optimizer() -> None:
    assert Stepper(np.ones(1), **HYPER).functional == ACProp(**HYPER)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_can_be_taken_up_from_its_state(engine: str) -> None:
    rng = np.random.default_rng(0)
    start, grads = {"a": rng.normal(size=3)}, [{"a": g} for g in rng.normal(size=(6, 3))]
    first = Stepper({"a": start["a"].copy()}, **HYPER, engine=engine)
    for g in grads[:3]:
        first.step(g)
    state = first.state
    second = Stepper({"a": first.params["a"].copy()}, **HYPER, engine=engine)
    second.load_state(state)
    for g in grads[3:]:
        first.step(g)  # which must not show in the state taken
        second.step(g)
    assert state.count == 3
    assert_same(second, functional(start, grads))


# values of schedules


@pytest.mark.parametrize("engine", ENGINES)
def test_a_schedule_may_switch_decay_on_and_off(engine: str) -> None:
    """Without decay a step is another program, which reads no parameter."""
    hyper = {**HYPER, "weight_decay": [0.0, 0.5, 0.5, 0.0, 0.25].__getitem__}
    rng = np.random.default_rng(0)
    start = {str(shape): np.asarray(rng.normal(size=shape)) for shape in ((3,), (2, 4), ())}
    grads = [{name: np.asarray(rng.normal(size=x.shape)) for name, x in start.items()} for _ in range(5)]
    stepper = Stepper({name: x.copy() for name, x in start.items()}, **hyper, engine=engine)
    for g in grads:
        stepper.step(g)
    assert_same(stepper, functional(start, grads, **hyper))


@pytest.mark.parametrize("engine", ENGINES)
def test_schedules_may_go_below_zero(engine: str) -> None:
    def rate(count: int) -> float:
        return 3e-4 - 1e-4 * (count + 1)  # -5e-20 at the third step, as computed

    hyper = {"learning_rate": rate, "weight_decay": rate, "clip_exponent": 0.25}
    x = np.ones(3)
    grads = [np.array([1.0, -2.0, 0.5])] * 5
    expected = functional(x.copy(), grads, **hyper)
    stepper = Stepper(x, **hyper, engine=engine)
    records = [stepper.step(g) for g in grads]
    assert records[2].learning_rate < 0.0
    assert records[4].learning_rate == rate(4)
    assert_same(stepper, expected)


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay"])
@pytest.mark.parametrize("how", ["pickle", "import"])
def test_values_of_a_running_schedule_are_copied(name: str, how: str) -> None:
    x = np.ones(2)
    saved = with_values(ACProp(0.5, b1=0.8, weight_decay=0.1, mask={"": True}), **{name: -0.25})
    stepper = Stepper(x, mask=True)
    import_state(stepper, saved, State(3, {"": np.zeros(2)}, {"": np.ones(2)}), prefer="saved")
    if how == "pickle":
        stepper = pickle.loads(pickle.dumps(stepper))
    assert getattr(stepper.functional, name) == -0.25
    assert export_state(stepper)[0] == saved
    stepper.step(np.ones(2))


def test_a_stepper_warns_of_b1_zero_once() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        stepper = Stepper(np.ones(2), b1=0.0)
        for copied in (copy.deepcopy(stepper), pickle.loads(pickle.dumps(stepper))):
            copied.step(np.ones(2))
            import_state(copied, *export_state(stepper))
    assert [(warning.filename, "b1 is 0" in str(warning.message)) for warning in caught] == [(__file__, True)]


# bad input


@pytest.fixture
def ask_numba_anew() -> Iterator[None]:
    """Forget before and after the test whether Numba works."""
    for _ in range(2):
        kernels.why_no_numba.cache_clear()
        kernels.numba_works.cache_clear()
        if _ == 0:
            yield


@pytest.mark.usefixtures("ask_numba_anew")
def test_numba_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.raises(ModuleNotFoundError, match="engine is 'numba', which needs Numba: python -m pip install numba"):
        Stepper(np.ones(2), engine="numba")
    assert type(Stepper(np.ones(2))._engines[0]) is _tiles.Tiles


class BrokenNumba(types.ModuleType):
    """A Numba that can be imported, and whose compiler fails."""

    config = types.SimpleNamespace(DISABLE_JIT=0)

    def njit(self, *args: Any, **options: Any) -> Any:
        raise AttributeError("module 'numpy' has no attribute 'long'")


class RefusedNumba(importlib.abc.MetaPathFinder):
    """Have the import of Numba fail, as that of one too old for this NumPy does."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "numba":
            raise ImportError("Numba needs NumPy 2.2 or less. Got NumPy 2.4.")


@pytest.mark.usefixtures("ask_numba_anew")
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("import", "ImportError: Numba needs NumPy 2.2 or less"),
        ("compiler", "AttributeError: module 'numpy' has no attribute 'long'"),
        ("switch", "NUMBA_DISABLE_JIT is set"),
    ],
)
def test_numba_that_is_installed_and_does_not_work(fault: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault == "import":
        monkeypatch.delitem(sys.modules, "numba", raising=False)
        monkeypatch.setattr(sys, "meta_path", [RefusedNumba(), *sys.meta_path])
    elif fault == "compiler":
        monkeypatch.setitem(sys.modules, "numba", BrokenNumba("numba"))
        monkeypatch.setattr(disk, "numba", sys.modules["numba"])
    else:
        monkeypatch.setattr(pytest.importorskip("numba").config, "DISABLE_JIT", 1)
    x, expected = np.ones(2), functional(np.ones(2), [np.ones(2)] * 3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        steppers = [Stepper(x, **HYPER), Stepper(np.ones(2), **HYPER)]
        for _ in range(3):
            steppers[0].step(np.ones(2))
    assert [(warning.filename, warning.category) for warning in caught] == [(__file__, RuntimeWarning)]
    assert reason in str(caught[0].message)
    assert_same(steppers[0], expected)
    with pytest.raises(RuntimeError, match=f"engine is 'numba', but .*{reason}.*; repair it, or use engine='tiles'"):
        Stepper(np.ones(2), engine="numba")


# copies in other processes


def _step_in_a_worker(stepper: Stepper, grads: Any) -> Any:
    stepper.step(grads)
    return stepper.params, stepper.state


def _by_buffers(stepper: Stepper, _: Path) -> Stepper:
    buffers: list[Any] = []
    content = pickle.dumps(stepper, protocol=5, buffer_callback=buffers.append)
    assert buffers
    return pickle.loads(content, buffers=[bytes(buffer.raw()) for buffer in buffers])  # as in Ray


def _by_joblib(stepper: Stepper, folder: Path) -> Stepper:
    joblib = pytest.importorskip("joblib")
    joblib.dump(stepper, folder / "stepper")
    return joblib.load(folder / "stepper", mmap_mode="r")


@pytest.mark.parametrize("arrive", [_by_buffers, _by_joblib])
@pytest.mark.parametrize("engine", ENGINES)
def test_parameters_that_arrive_read_only_become_copies(arrive: Any, engine: str, tmp_path: Path) -> None:
    params = {"a": np.ones((300, 500)), "t": np.ones((4, 5), np.float32).T, "c": np.ones((2000, 100))[::2]}
    grads = {"a": np.ones((300, 500)), "t": np.ones((5, 4), np.float32), "c": np.ones((1000, 100))}
    stepper = Stepper(params, **HYPER, engine=engine)
    stepper.step(grads)
    other = arrive(stepper, tmp_path)
    for each in (stepper, other):
        each.step(grads)
    assert_same(other, (stepper.params, stepper.state))
    assert other.params["a"].flags.writeable
    assert type(other.params["a"]) is np.ndarray
    assert other.functional == stepper.functional


def test_a_stepper_reaches_a_worker_of_joblib() -> None:
    joblib = pytest.importorskip("joblib")
    params, grads = np.ones(400_000), np.full(400_000, 0.5)  # 3.2 MB, which joblib maps from 1 MB on
    stepper = Stepper(params, **HYPER, engine="tiles")
    with joblib.parallel_config("loky", n_jobs=2, inner_max_num_threads=1):
        (arrived, state), _ = joblib.Parallel()(joblib.delayed(_step_in_a_worker)(stepper, grads) for _ in range(2))
    assert params[0] == 1.0
    stepper.step(grads)
    np.testing.assert_array_equal(arrived, params)
    np.testing.assert_array_equal(state.mu, stepper.state.mu)


def test_interleaved_views_do_not_overlap() -> None:
    x = np.ones(6)
    Stepper({"even": x[::2], "odd": x[1::2]}, 0.5).step({"even": np.ones(3), "odd": np.zeros(3)})
    assert x.tolist() == [0.5, 1.0] * 3


def test_what_overlaps_itself() -> None:
    memory, rng = np.zeros(64), np.random.default_rng(0)
    found = []
    for _ in range(500):
        shape = rng.integers(1, 5, size=rng.integers(1, 4))
        strides = rng.integers(-4, 5, size=shape.size)
        x = np.lib.stride_tricks.as_strided(memory[31:], shape, 8 * strides)
        places = np.asarray(sum(np.ix_(*(s * np.arange(n) for s, n in zip(strides, shape, strict=True)))))
        found.append(np.unique(places).size < places.size)
        assert (first_overlap([("x", x, True)], np) is not None) == found[-1]
    assert 100 < sum(found) < 400
    assert first_overlap([("x", np.broadcast_to(1.0, 5), False)], np) is None  # what is only read may


def test_layouts_that_are_hard_to_judge_are_taken() -> None:
    x = np.ones((4, 5, 6, 7))
    for view in (x, x.T, x[::-1, ::2, 1:3], x.transpose(2, 0, 3, 1)[::3], x.reshape(-1)[::41]):
        Stepper(view)
    Stepper(np.lib.stride_tricks.as_strided(np.ones(10), (4, 2), (16, 24)))  # 0 2 4 6 and 3 5 7 9


def test_overlap_is_found_among_many() -> None:
    x = np.ones(100)
    views = [(str(i), x[3 * i : 3 * i + 3], True) for i in range(30)]
    assert first_overlap(views, np) is None
    assert first_overlap([*views, ("late", x[50:52], False)], np) == ("16", "late")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_gradient_that_owns_the_memory_of_a_parameter(engine: str) -> None:
    memory = np.ones(6)
    stepper = Stepper({"a": np.ones(2), "b": memory[:]}, engine=engine)
    with pytest.raises(ValueError, match="parameter 'b' and gradient of 'b' share memory|gradient of 'b' and param"):
        stepper.step({"a": np.ones(2), "b": memory})
    with pytest.raises(ValueError, match="gradient of 'b' has shape"):
        stepper.step({"a": np.ones(2), "b": np.ones((2, 3))})
    assert memory.tolist() == [1.0] * 6


def test_the_fast_check_knows_what_fits() -> None:
    memory = np.zeros(20)
    params = {"a": memory[6:12], "b": np.ones((2, 3)), "empty": memory[8:9][:0], "scalar": np.ones(())}
    matching = Stepper(params)._matching

    def fits(**grads: Any) -> bool:
        like = {name: np.zeros(x.size + 1)[: x.size].reshape(x.shape) for name, x in params.items()}
        leaves = list((like | grads).values())
        return matching._plain_addresses(leaves) is not None

    flat = np.zeros(6)
    for fitting in ({}, {"b": flat.reshape(2, 3)}, {"a": memory[:6]}, {"a": readonly(np.zeros(6))}):
        assert fits(**fitting)
    for other in (
        {"a": None},
        {"a": [0.0] * 6},
        {"a": np.zeros(6, np.float32)},
        {"a": np.zeros(6, ">f8")},
        {"a": np.zeros(7)},
        {"a": np.ma.zeros(6)},
        {"a": np.zeros(12)[::2]},
        {"a": np.frombuffer(bytes(49), np.float64, 6, offset=1)},
        {"a": memory[1:7]},
        {"a": memory[6:12]},
        {"b": np.zeros((3, 2))},
        {"b": np.zeros((2, 3, 1))},
        {"b": np.zeros((3, 2)).T},
        {"b": memory[4:10].reshape(2, 3)},
        {"b": memory[9:15].reshape(2, 3)},  # beyond where the empty one lies
    ):
        assert not fits(**other)
    assert matching._plain_addresses([]) is None


def test_addresses() -> None:
    x = np.zeros((4, 5))
    arrays = [x, x[1:], x[::2, 1:], x.T, np.zeros(()), np.zeros(0), readonly(np.zeros(3, np.float16))]
    assert addresses(arrays).tolist() == [x.ctypes.data for x in arrays]


def test_a_parameter_that_became_read_only_is_refused() -> None:
    memory = np.ones(4)
    x = memory[:2]
    stepper = Stepper([x])
    memory.flags.writeable = False
    stepper.step([np.ones(2)])  # by its own flag, a view is still writeable
    x.flags.writeable = False
    with pytest.raises(ValueError, match="parameter '0' is read-only"):
        stepper.step([np.ones(2)])


def resized(x: np.ndarray) -> None:
    x.resize(x.size + 1000, refcheck=False)


def shrunk(x: np.ndarray) -> None:
    x.resize(x.size - 1, refcheck=False)


def refilled(x: np.ndarray) -> None:
    x.__setstate__((1, x.shape, x.dtype, False, bytes(x.nbytes)))  # NumPy then has the array own other memory


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("change", [resized, shrunk, refilled])
@pytest.mark.parametrize("kept", ["contiguous", "None"])
def test_a_parameter_with_other_memory_is_refused(engine: str, change: Callable[..., None], kept: str) -> None:
    """Moments, tiles and addresses are for the memory that the stepper was made for."""
    memory = np.ones(60)  # which stays, so that other memory is elsewhere; what is resized must own its memory
    params = {"a": memory[:50] if change is refilled else np.ones(50), "b": np.ones(50)}
    grads = {"a": np.ones(50), "b": np.ones(50) if kept == "contiguous" else None}
    stepper = Stepper(params, engine=engine)
    stepper.step(grads)
    change(params["a"])
    before = params["a"].copy(), params["b"].copy()
    for g in (grads, {"a": np.ones(params["a"].shape), "b": None}):
        with pytest.raises(ValueError, match="parameter 'a' was resized, or has other memory"):
            stepper.step(g)
    np.testing.assert_array_equal(params["a"], before[0])
    np.testing.assert_array_equal(params["b"], before[1])
    assert stepper._count == 1


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_are_read_where_they_are_now(engine: str) -> None:
    """What is kept from step to step is for the same addresses only, and not for the same objects."""
    rng = np.random.default_rng(0)
    start = {"a": rng.normal(size=40), "b": rng.normal(size=7)}
    memory = rng.normal(size=(3, 40))
    moving = memory[0]
    sequence: list[Any] = [{"a": memory[i], "b": memory[2, i : i + 7]} for i in (0, 0, 1, 0, 1, 1)]
    sequence.insert(3, {"a": None, "b": memory[1, :7]})
    stepper = Stepper({name: x.copy() for name, x in start.items()}, **HYPER, engine=engine)
    for g in sequence:
        stepper.step(g)
    assert_same(stepper, functional(start, sequence))
    expected = functional(start, [*sequence, *({"a": g.copy(), "b": memory[0, :7]} for g in (memory[0], memory[1]))])
    grads = {"a": moving, "b": memory[0, :7]}
    stepper.step(grads)
    moving = memory[1].copy()
    grads["a"] = moving
    stepper.step(grads)
    assert_same(stepper, expected)
    with pytest.raises(ValueError, match="share memory"):
        stepper.step({"a": stepper.params["a"], "b": memory[0, :7]})


def test_gradients_may_be_read_only_and_shared() -> None:
    g = readonly(np.ones(3))
    params = [np.ones(3), np.ones(3)]
    Stepper(params, learning_rate=0.5).step([g, g])
    assert params[1].tolist() == [0.5] * 3


# what is not finite


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, "overflow"])
@pytest.mark.parametrize("where", [0, -1])
def test_what_is_not_finite_is_kept_out(engine: str, dtype: Any, bad: Any, where: int) -> None:
    if bad == "overflow":
        if dtype == np.float16:
            pytest.skip("squares of float16 numbers are finite in float32")
        bad = {np.float32: 1e20, np.float64: 1e200}[dtype]  # finite, but not its square
    params = {"a": np.ones(40_000, dtype), "b": np.ones(3, dtype)}
    good = {"a": np.ones(40_000, dtype), "b": np.ones(3, dtype)}
    poisoned = {"a": good["a"].copy(), "b": good["b"]}
    poisoned["a"][where] = bad
    skipping = Stepper(params, **HYPER, engine=engine, nonfinite="skip")
    skipping.step(good)
    before = {name: x.copy() for name, x in params.items()}, skipping.state
    assert skipping.step(poisoned) == StepRecord(1, 0.1, None, skipped=True)
    assert_same(skipping, before)
    assert skipping.step(good).count == 2

    raising = Stepper(params, **HYPER, engine=engine, nonfinite="raise")
    before = {name: x.copy() for name, x in params.items()}, raising.state
    with pytest.raises(FloatingPointError, match=r"'a'.*; nothing was changed"):
        raising.step(poisoned)
    assert_same(raising, before)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("dtype", "moment_dtype", "bad"), [("f4", "float16", 1e5), ("f8", "float32", 1e25)])
def test_moments_that_are_narrow_are_kept_finite(engine: str, dtype: str, moment_dtype: str, bad: float) -> None:
    stepper = Stepper(np.zeros(3, dtype), moment_dtype=moment_dtype, nonfinite="raise", engine=engine)
    with pytest.raises(FloatingPointError, match="infinite or NaN; nothing was changed"):
        stepper.step(np.full(3, bad, dtype))
    assert stepper.state.count == 0
    with np.errstate(all="raise"):
        Stepper(np.zeros(3, dtype), moment_dtype=moment_dtype, engine=engine).step(np.full(3, bad, dtype))


def test_large_but_harmless_gradients_pass() -> None:
    # beyond what is known to be safe, the step is computed before it is judged
    stepper = Stepper(np.ones(3, np.float32), 1e-30, nonfinite="raise", clip_exponent=0.25)
    assert not stepper.step(np.full(3, 1e19, np.float32)).skipped
    assert not stepper.step(np.full(3, 1.0, np.float32)).skipped


def test_allow_goes_on_as_the_rule_does() -> None:
    x = np.ones(2)
    assert Stepper(x).step(np.array([math.nan, 1.0])).count == 1
    assert math.isnan(x[0])
    assert x[1] == 0.999


# interruptions


class Interrupt(BaseException):
    """What a signal handler might raise."""


def stepper_and_outcomes(engine: str, threads: int) -> tuple[Stepper, Any, tuple[Any, State], tuple[Any, State]]:
    """Return a stepper of several tiles and runs, its gradients, and what it is before and after a step of them."""
    rng = np.random.default_rng(0)
    start = {f"p{i}": rng.normal(size=n) for i, n in enumerate((3, 50, 2, 17))}
    start["half"] = rng.normal(size=60).astype(np.float16)  # by the rule, because it needs casts
    grads = [{name: rng.normal(size=x.shape).astype(x.dtype) for name, x in start.items()} for _ in range(2)]
    options = {"compensate": True, "engine": engine, "threads": threads}
    stepper = Stepper({name: x.copy() for name, x in start.items()}, **HYPER, **options)
    stepper.step(grads[0])
    outcomes = [functional(start, some, compensate=True) for some in (grads[:1], grads)]
    return stepper, grads[1], *outcomes


def assert_one_of(stepper: Stepper, before: tuple[Any, State], after: tuple[Any, State]) -> bool:
    """Check that parameters and state are those before or those after; return whether after."""
    moved = not np.array_equal(stepper.params["p0"], before[0]["p0"])
    assert_same(stepper, after if moved else before)
    return moved


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("threads", [1, 2])
def test_an_exception_at_any_line_leaves_the_old_or_the_new(
    engine: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stepper_tiles(monkeypatch, 64, 8)
    ours = ("acprop_stepper", "acprop_core")
    outcomes = []
    for point in range(1, 100_000):
        stepper, grads, before, after = stepper_and_outcomes(engine, threads)
        lines = 0

        def trace(frame: Any, event: str, argument: Any, point: int = point) -> Any:
            nonlocal lines
            if not any(f"/{name}/" in frame.f_code.co_filename for name in ours):
                return None
            if event == "line":
                lines += 1
                if lines == point:
                    raise Interrupt
            return trace

        old = sys.gettrace()
        sys.settrace(trace)
        try:
            stepper.step(grads)
        except Interrupt:
            interrupted = True
        else:
            interrupted = False
        finally:
            sys.settrace(old)
        outcomes.append(assert_one_of(stepper, before, after))
        if not interrupted:
            break
    assert not interrupted
    assert not outcomes[0]
    assert outcomes[-1]
    assert outcomes == sorted(outcomes)  # once begun, it is always finished


def flaky(whole: Callable[..., Any], failures: range) -> Callable[..., Any]:
    """Return a function whose calls of these numbers fail, before they have done anything."""
    calls = itertools.count()

    def call(*arguments: Any) -> Any:
        if next(calls) in failures:
            raise MemoryError
        return whole(*arguments)

    return call


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("kind", "name"), [(Step, "__call__"), (Tile, "gather"), (_tiles._Bound, "calls")])
@pytest.mark.parametrize("first", range(6))
def test_a_failure_is_raised_and_made_good_by_the_next_look(
    threads: int, kind: type, name: str, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stepper_tiles(monkeypatch, 64)
    stepper, grads, _, after = stepper_and_outcomes("tiles", threads)
    with monkeypatch.context() as patch:
        patch.setattr(kind, name, flaky(getattr(kind, name), range(first, first + 1)))
        try:
            stepper.step(grads)
        except MemoryError:
            assert stepper._count == 1
    assert_same(stepper, after)


def test_a_failure_that_lasts_is_raised_at_every_look(monkeypatch: pytest.MonkeyPatch) -> None:
    stepper_tiles(monkeypatch, 64)
    stepper, grads, _, after = stepper_and_outcomes("tiles", 1)
    with monkeypatch.context() as patch:
        patch.setattr(Tile, "gather", flaky(Tile.gather, range(4, 1000)))
        for look in (lambda: stepper.step(grads), lambda: stepper.state, lambda: stepper.step(grads)):
            with pytest.raises(MemoryError):
                look()
    assert_same(stepper, after)
    assert stepper.step(grads).count == 3


@pytest.fixture
def no_garbage_collection() -> Iterator[None]:
    """Keep signals out of collection callbacks (JAX has one), where Python swallows what a handler raises."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_garbage_collection")
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX timers")
@pytest.mark.parametrize("engine", ENGINES)
def test_a_real_signal_leaves_the_old_or_the_new(engine: str) -> None:
    rng = np.random.default_rng(0)
    n = 400_000
    start, grads = {"a": rng.normal(size=n), "b": rng.normal(size=5)}, {"a": rng.normal(size=n), "b": np.ones(5)}
    before, after = functional(start, []), functional(start, [grads])
    warm = Stepper({name: x.copy() for name, x in start.items()}, **HYPER, engine=engine)
    durations = []
    for _ in range(5):
        begin = time.perf_counter()
        warm.step(grads)
        durations.append(time.perf_counter() - begin)
    duration = min(durations)

    def handler(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGALRM, handler)
    interrupted = finished = 0
    try:
        for i in range(60):
            stepper = Stepper({name: x.copy() for name, x in start.items()}, **HYPER, engine=engine)
            try:
                signal.setitimer(signal.ITIMER_REAL, max(1e-5, duration * 1.2 * i / 60))
                stepper.step(grads)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                interrupted += 1
            moved = not np.array_equal(stepper.params["b"], before[0]["b"])
            assert_same(stepper, after if moved else before)
            finished += moved
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert interrupted
    assert finished


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs POSIX signals")
@pytest.mark.parametrize("number", range(8))
def test_a_handler_that_looks_in_the_middle_sees_the_new_and_may_not_write(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The main thread waits meanwhile; a tile sends it a signal, and continues when the handler has begun."""
    stepper_tiles(monkeypatch, 64)
    stepper, grads, _before, after = stepper_and_outcomes("tiles", 1)
    main, calls, begun, seen = threading.get_ident(), itertools.count(), threading.Event(), []
    whole = Tile.gather

    def handler(number: int, frame: Any) -> None:
        if begun.is_set():
            return
        begun.set()
        seen.append(stepper.state)
        for write in (lambda: stepper.step(grads), lambda: stepper.load_state(seen[0])):
            with pytest.raises(RuntimeError, match="step or load_state was called from within one of them"):
                write()

    def sending(*arguments: Any) -> Any:
        if next(calls) == number:
            while not begun.wait(0.01):  # a signal just before the main thread begins to wait is seen when that ends
                signal.pthread_kill(main, signal.SIGUSR1)
        return whole(*arguments)

    old = signal.signal(signal.SIGUSR1, handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Tile, "gather", sending)
            stepper.step(grads)
    finally:
        signal.signal(signal.SIGUSR1, old)
    (state,) = seen
    assert state.count == after[1].count
    for name in stepper.params:
        np.testing.assert_array_equal(state.mu[name], after[1].mu[name])
        np.testing.assert_array_equal(state.nu[name], after[1].nu[name])
    assert_same(stepper, after)
    assert stepper.step(grads).count == after[1].count + 1


@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_lets_its_gradients_go(engine: str) -> None:
    grads = np.ones(3)
    stepper = Stepper(np.ones(3), engine=engine)
    stepper.step(grads)
    gone = weakref.ref(grads)
    del grads
    gc.collect()
    assert gone() is None


@pytest.mark.usefixtures("no_garbage_collection")
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX timers")
@pytest.mark.parametrize("engine", ENGINES)
def test_a_handler_that_saves_the_state_at_any_moment(engine: str) -> None:
    rng = np.random.default_rng(0)
    n = 300_000
    start, grads = {"a": rng.normal(size=n), "b": rng.normal(size=5)}, {"a": rng.normal(size=n), "b": np.ones(5)}
    after = functional(start, [grads])
    seen = []
    old = signal.signal(signal.SIGALRM, lambda number, frame: seen.append(stepper.state))
    try:
        for i in range(40):
            stepper = Stepper({name: x.copy() for name, x in start.items()}, **HYPER, engine=engine)
            signal.setitimer(signal.ITIMER_REAL, 1e-4 * (i + 1))
            stepper.step(grads)
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert_same(stepper, after)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert seen
    for state in seen:
        assert state.count in (0, 1)
        np.testing.assert_array_equal(state.mu["b"], after[1].mu["b"] if state.count else np.zeros(5))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_within_a_step_is_refused(engine: str) -> None:
    refused = []

    def schedule(count: int) -> float:
        if count == 1 and not refused:
            with pytest.raises(RuntimeError, match="step or load_state was called from within one"):
                stepper.step(np.ones(2))
            refused.append(True)
        return 0.5

    stepper = Stepper(np.ones(2), schedule, engine=engine)
    assert [stepper.step(np.ones(2)).count for _ in range(2)] == [1, 2]
    assert refused


@pytest.mark.parametrize("engine", ENGINES)
def test_threads_that_cannot_be_had(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stepper_tiles(monkeypatch, 64, 8)
    stepper, grads, _, after = stepper_and_outcomes(engine, 2)

    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_work, "_worker", _work._Worker())  # whose thread has yet to start
    monkeypatch.setattr(threading.Thread, "start", start)
    stepper.step(grads)
    assert_same(stepper, after)


@pytest.mark.parametrize("threads", [2, 5])
@pytest.mark.parametrize("sizes", [(1,), (0, 300, 0), (64, 64, 1, 63, 200), (5,) * 90, (129, 0, 64)])
def test_the_bits_do_not_depend_on_the_number_of_threads(
    threads: int, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("numba")
    stepper_tiles(monkeypatch, 64, 64)
    monkeypatch.setattr("acprop_stepper._stepper.cores", lambda: 8)
    rng = np.random.default_rng(0)
    start = {str(i): rng.normal(size=n) for i, n in enumerate(sizes)}
    grads = [{name: rng.normal(size=x.shape) for name, x in start.items()} for _ in range(20)]
    stepper = Stepper({name: x.copy() for name, x in start.items()}, **HYPER, engine="numba", threads=threads)
    for g in grads:
        stepper.step(g)
    assert_same(stepper, functional(start, grads))


@pytest.mark.parametrize("threads", [1, 2])
def test_only_what_the_compiled_step_cannot_take_is_left_to_tiles(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("numba")
    stepper_tiles(monkeypatch, 64, 64)
    monkeypatch.setattr("acprop_stepper._stepper.cores", lambda: 2)
    rng = np.random.default_rng(0)
    shapes = {"plain": (20, 30), "odd": (8, 9), "absent": (5,), "small": (), "empty": (0, 3), "last": (70,)}
    start = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    grads = [{name: rng.normal(size=shape) for name, shape in shapes.items()} for _ in range(20)]
    for g in grads[3:17]:
        g["odd"], g["absent"] = np.asfortranarray(g["odd"]), None
    stepper = Stepper({name: x.copy() for name, x in start.items()}, **HYPER, engine="numba", threads=threads)
    tiled: list[list[int]] = []
    run = _tiles.Tiles.tasks

    def tasks(self: Any, own: Any, now: Any) -> Any:
        tiled.append([leaf for leaf, g in zip(self.leaves, own, strict=True) if g is not None])
        return run(self, own, now)

    monkeypatch.setattr(_tiles.Tiles, "tasks", tasks)
    for g in grads:
        stepper.step(g)
    assert_same(stepper, functional(start, grads))
    assert tiled == [[list(shapes).index("odd")]] * 14


def test_a_thread_that_comes_late_touches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    from acprop_stepper import _numba

    stepper_tiles(monkeypatch, 64, 64)
    monkeypatch.setattr("acprop_stepper._stepper.cores", lambda: 2)
    jobs: list[Any] = []
    monkeypatch.setattr(_numba, "call_beside", lambda job, helpers: jobs.append(job))  # nobody comes
    x, grads = np.ones(500), [np.full(500, 0.5), np.full(500, -0.25)]
    stepper = Stepper(x, **HYPER, engine="numba", threads=2)
    for g in grads:
        stepper.step(g)
    assert len(jobs) == 2
    for job in jobs * 3:
        job()
    assert_same(stepper, functional(np.ones(500), grads))
    stepper.step(grads[0])
    assert_same(stepper, functional(np.ones(500), [*grads, grads[0]]))


def test_threads_that_last_hold_no_array(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads are made once, for any number of steps, and keep nothing of a stepper that is gone."""
    pytest.importorskip("numba")
    stepper_tiles(monkeypatch, 64, 64)
    monkeypatch.setattr("acprop_stepper._stepper.cores", lambda: 3)
    stepper = Stepper(np.ones(5000), engine="numba", threads=3)
    stepper.step(np.ones(5000))
    running = threading.active_count()
    for _ in range(50):
        stepper.step(np.ones(5000))
    assert threading.active_count() == running
    gone = weakref.ref(stepper._engines[0]._table)
    del stepper
    deadline = time.monotonic() + 20.0
    while gone() is not None and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert gone() is None


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("threads", [1, 2])
def test_memory_does_not_grow_with_the_number_of_steps(engine: str, threads: int) -> None:
    import tracemalloc

    stepper = Stepper([np.ones(300), np.ones(20, np.float32)], **HYPER, engine=engine, threads=threads)

    def steps(n: int) -> int:
        for _ in range(n):
            stepper.step([np.ones(300), np.ones(20, np.float32)])
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    steps(5)
    tracemalloc.start()
    try:
        before = steps(20)
        assert steps(200) < before + 20_000
    finally:
        tracemalloc.stop()


def test_one_program_serves_all_decays_and_scales() -> None:
    # a step that is the first to clip its gradients must not compile for seconds
    flags = rule.flags_of(rule.Hyperparameters(clip_exponent=0.25))
    first = cpu.kernel_of(flags, "float32", "float32")
    for change in ({"scaled": True}, {"decay": rule.Decay.DECOUPLED}, {"decay": rule.Decay.L2, "scaled": True}):
        assert cpu.kernel_of(flags._replace(**change), "float32", "float32") is first
    assert cpu.kernel_of(flags._replace(clipped=False), "float32", "float32") is not first


# threads, processes


def test_a_count_is_refused_from_which_a_stepper_cannot_go_on() -> None:
    params = {"w": np.ones(3)}
    stepper = Stepper(params, clip_exponent=0.25)
    stepper.load_state(stepper.state._replace(count=2**62 - 1))
    assert stepper.step({"w": np.ones(3)}).count == 2**62
    with pytest.raises(ValueError, match=r"is 4611686018427387904, too large for a stepper; pass one below 2\*\*62"):
        stepper.load_state(stepper.state)
    assert stepper.state.count == 2**62


def test_the_thread_of_all_steppers_survives_an_error_between_tasks() -> None:
    errors = [OSError("first"), OSError("second")]

    def count() -> None:
        if errors:
            raise errors.pop(0)

    work = _work.Work([], count)
    for text in ("first", "second"):
        with pytest.raises(OSError, match=text):
            work.finish()
    work.finish()
    assert work.finished


def test_a_stepper_is_shown_with_its_hyperparameters() -> None:
    stepper = Stepper({"a": np.ones((2, 3)), "b": [None, np.ones(())]}, 0.5, clip_exponent=0.25)
    stepper.step({"a": np.ones((2, 3)), "b": [None, np.ones(())]})
    assert repr(stepper) == f"Stepper(arrays=2, elements=7, count=1, {ACProp(0.5, clip_exponent=0.25)!r})"
