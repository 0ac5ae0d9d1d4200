"""The stepper: parameters of any memory layout are stepped in place, tile by tile, and bad input changes nothing."""

from typing import Any

import numpy as np
import pytest

import acprop_stepper
from acprop_core import ACProp
from acprop_stepper import Stepper

HYPER = {"learning_rate": 0.1, "weight_decay": 0.1, "clip_exponent": 0.25}


def functional(params: Any, grads: list[Any]) -> Any:
    optimizer = ACProp(**HYPER)
    state = optimizer.init(params)
    for g in grads:
        updates, state = optimizer.update(g, state, params)
        params = optimizer.apply(params, updates)
    return params, state


LAYOUTS = {
    "contiguous": lambda x: x.copy(),
    "fortran": lambda x: np.asfortranarray(x),
    "transposed": lambda x: np.ascontiguousarray(x.T).T,
    "strided": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    "reversed": lambda x: x[::-1].copy()[::-1],
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tile", [7, 32768])
def test_every_layout_gives_the_bits_of_the_functional_core(
    layout: str, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acprop_stepper, "_TILE", tile)
    rng = np.random.default_rng(0)
    start, grads = rng.normal(size=(5, 9)), list(rng.normal(size=(4, 5, 9)))
    expected, state = functional(start, grads)
    x = LAYOUTS[layout](start)
    stepper = Stepper(x, **HYPER)
    for g in grads:
        stepper.step(LAYOUTS[layout](g))
    np.testing.assert_array_equal(x, expected)
    np.testing.assert_array_equal(stepper.state.mu, state.mu)
    np.testing.assert_array_equal(stepper.state.nu, state.nu)
    assert stepper.state.count == 4


def test_parameters_stay_the_callers_arrays() -> None:
    params = {"a": np.ones(3), "b": [np.ones(2), None]}
    arrays = params["a"], params["b"][0]
    stepper = Stepper(params, learning_rate=0.5)
    stepper.step({"a": np.ones(3), "b": [None, None]})
    assert params["a"] is arrays[0]
    assert params["b"][0] is arrays[1]
    assert params["a"].tolist() == [0.5] * 3
    assert params["b"][0].tolist() == [1.0, 1.0]


def test_gradients_may_be_read_only() -> None:
    g = np.ones(3)
    g.flags.writeable = False
    Stepper(np.ones(3)).step(g)


@pytest.mark.parametrize("bad", ["read-only", "scalar"])
def test_parameters_must_be_writeable(bad: str) -> None:
    x = np.ones(3)
    x.flags.writeable = False
    with pytest.raises(ValueError, match=r"parameter 'w' is read-only or not a NumPy array; .* writeable copy"):
        Stepper({"w": x if bad == "read-only" else np.float64(1.0)})


def test_bad_gradients_change_nothing() -> None:
    params = {"a": np.ones(3), "b": np.ones(2)}
    stepper = Stepper(params, learning_rate=0.5)
    for grads in ({"a": np.ones(3), "b": np.ones(3)}, {"a": np.ones(3)}, {"a": np.ones(3), "b": np.ones(2, int)}):
        with pytest.raises((TypeError, ValueError), match="'b'"):
            stepper.step(grads)
        assert stepper.state.count == 0
        assert params["a"].tolist() == [1.0] * 3
        assert not stepper.state.mu["a"].any()


def test_the_equivalent_functional_optimizer() -> None:
    assert Stepper(np.ones(1), **HYPER).functional == ACProp(**HYPER)
