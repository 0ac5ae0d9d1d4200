"""The functional core on MLX: the bits of NumPy, lazily, compiled, and saved."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason='mlx is not installed: pip install "mlx[cpu]"')

from acprop_core import ACProp, State, load, save
from hosts import from_mlx, to_mlx

STEPS = 1000
CORNERS = [(asynchronous, centering) for asynchronous in (True, False) for centering in ("current", "previous", "none")]


def gradients(dtype: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    scale = 10.0 ** rng.uniform(-3, 1, (STEPS, 67))
    return (rng.standard_normal((STEPS, 67)) * scale).astype(np.float32).astype(_dtype(dtype))


def _dtype(name: str) -> Any:
    import ml_dtypes

    return ml_dtypes.bfloat16 if name == "bfloat16" else np.dtype(name)


def run(optimizer: ACProp, grads: np.ndarray, enter: Any, evaluate: Any) -> list[Any]:
    params = {"w": enter(np.linspace(-1.0, 1.0, grads.shape[1]).astype(grads.dtype))}
    state = optimizer.init(params)
    for t, grad in enumerate(grads):
        updates, state = optimizer.update({"w": enter(grad)}, state, params)
        params = optimizer.apply(params, updates)
        evaluate(t, params, state)
    return [x["w"] for x in (params, *state[1:]) if x is not None and x["w"] is not None]


@pytest.mark.parametrize("compensate", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize(("asynchronous", "centering"), CORNERS)
def test_same_bits_as_numpy(dtype: str, compensate: bool, asynchronous: bool, centering: str) -> None:
    optimizer = ACProp(
        lambda count: 1e-2 / (1.0 + 0.01 * count),
        weight_decay=0.1,
        clip_exponent=0.25,
        asynchronous=asynchronous,
        centering=centering,
        compensate=compensate,
    )
    grads = gradients(dtype)
    expected = run(optimizer, grads, np.array, lambda *_: None)

    def evaluate(t: int, *arrays: Any) -> None:
        if t % 100 == 0:  # in between a hundred steps are lazy
            mx.eval(arrays)

    assert_same(map(from_mlx, run(optimizer, grads, to_mlx, evaluate)), expected)


def assert_same(ours: Iterable[np.ndarray], theirs: Iterable[np.ndarray]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_compiled_steps_have_the_same_bits(dtype: str) -> None:
    optimizer = ACProp(1e-2, weight_decay=0.1, clip_exponent=0.25)
    grads = list(map(to_mlx, gradients(dtype)))

    def step(param: Any, mu: Any, nu: Any, count: Any, grad: Any) -> Any:
        updates, state = optimizer.update(grad, State(count, mu, nu), param)
        return optimizer.apply(param, updates), state.mu, state.nu, state.count

    def trained(step: Any) -> Any:
        _, mu, nu, _ = optimizer.init(grads[0])
        carried = grads[0], mu, nu, mx.array(0)
        for grad in grads[:200]:
            carried = step(*carried, grad)
            mx.eval(carried)
        return map(from_mlx, carried)

    assert_same(trained(mx.compile(step)), trained(step))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_state_with_carries_is_saved_and_resumed(dtype: str, tmp_path: Path) -> None:
    optimizer = ACProp(1e-2, clip_exponent=0.25, compensate=True)
    grads = gradients(dtype)[:20]
    params = to_mlx(grads[0])

    def trained(params: Any, state: State, grads: np.ndarray) -> Any:
        for grad in map(to_mlx, grads):
            updates, state = optimizer.update(grad, state, params)
            params = optimizer.apply(params, updates)
        return params, state

    whole = trained(params, optimizer.init(params), grads)
    params, state = trained(params, optimizer.init(params), grads[:10])
    save(tmp_path / "state", optimizer, state)
    _, state = load(tmp_path / "state", params)
    resumed = trained(
        params, state._replace(**{k: to_mlx(getattr(state, k)) for k in ("mu", "nu", "carry")}), grads[10:]
    )
    (x, state), (y, other) = whole, resumed
    assert_same(map(from_mlx, (x, *state[1:])), map(from_mlx, (y, *other[1:])))


def test_arrays_of_numpy_are_refused_next_to_those_of_mlx() -> None:
    optimizer = ACProp()
    params = mx.zeros(2)
    with pytest.raises(TypeError, match="gradient is an array of numpy, parameter is an array of mlx.core"):
        optimizer.update(np.zeros(2), optimizer.init(params), params)
