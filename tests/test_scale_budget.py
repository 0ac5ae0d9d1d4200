"""The page docs/scale.md: its tables are what its script prints, and the sizes in them those of the real states."""

import dataclasses
import importlib.util
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import acprop_core
import acprop_optax
import acprop_stepper

DOCS = Path(__file__).parents[1] / "docs"
SCRIPT = DOCS / "examples" / "scale_budget.py"
SIZE = 100_000

_spec = importlib.util.spec_from_file_location("scale_budget", SCRIPT)
assert _spec
assert _spec.loader
budget = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(budget)

STATE = {c.name: c.state for c in budget.CONFIGURATIONS}
FLOAT32, BFLOAT16, COMPENSATED, ADAMW, ADAMW_BFLOAT16 = STATE


def test_the_tables_are_what_the_script_prints() -> None:
    printed = subprocess.run([sys.executable, SCRIPT], check=True, capture_output=True, text=True).stdout
    tables = printed.strip().split("\n\n**")
    assert len(tables) == 5
    page = (DOCS / "scale.md").read_text()
    for text in tables:
        assert text.removeprefix("**") in page
    assert page.count("|---") == printed.count("|---") + 3  # and the table of what is measured
    for value in (budget.MEMORY / 1e9, budget.BANDWIDTH / 1e12, budget.PEAK / 1e12, budget.NETWORK / 1e9):
        assert f"{value:g}" in page
    for value in (budget.ACHIEVED, budget.UTILISATION, budget.LAUNCH * 1e6, f"{budget.TOKENS:,}"):
        assert str(value).removesuffix(".0") in page


def numpy_bytes(dtype: str) -> float:
    state = acprop_core.ACProp().init(np.ones(SIZE, dtype))
    return state.mu.nbytes + state.nu.nbytes


def jax_core_bytes(dtype: str) -> float:
    state = acprop_core.ACProp().init(jnp.ones(SIZE, dtype))
    return state.mu.nbytes + state.nu.nbytes


def optax_bytes(dtype: str, transform: Any = acprop_optax.acprop) -> float:
    return sum(x.nbytes for x in jax.tree.leaves(transform(1e-3).init(jnp.ones(SIZE, dtype))) if x.ndim)


def adamw_bytes(dtype: str) -> float:
    return optax_bytes(dtype, optax.adamw)


def stepper_bytes(dtype: str) -> float:
    state = acprop_stepper.Stepper({"w": np.ones(SIZE, dtype)}, engine="tiles").state
    return state.mu["w"].nbytes + state.nu["w"].nbytes


def torch_bytes(dtype: str, name: str = "") -> float:
    torch = pytest.importorskip("torch")
    import acprop_torch

    param = torch.ones(SIZE, dtype=getattr(torch, dtype), requires_grad=True)
    param.grad = torch.ones_like(param)
    optimizer = (acprop_torch.ACProp if not name else getattr(torch.optim, name))([param], lr=1e-3)
    optimizer.step()
    return sum(x.nbytes for x in optimizer.state[param].values() if torch.is_tensor(x) and x.ndim)


def torch_adamw_bytes(dtype: str) -> float:
    return torch_bytes(dtype, "AdamW")


@pytest.mark.parametrize(
    ("count", "dtype", "name"),
    [
        (numpy_bytes, "float32", FLOAT32),
        (jax_core_bytes, "float32", FLOAT32),
        (jax_core_bytes, "bfloat16", BFLOAT16),
        (optax_bytes, "float32", FLOAT32),
        (optax_bytes, "bfloat16", BFLOAT16),
        (stepper_bytes, "float32", FLOAT32),
        (torch_bytes, "float32", FLOAT32),
        (torch_bytes, "bfloat16", BFLOAT16),
        (adamw_bytes, "float32", ADAMW),
        (adamw_bytes, "bfloat16", ADAMW_BFLOAT16),
        (torch_adamw_bytes, "float32", ADAMW),
        (torch_adamw_bytes, "bfloat16", ADAMW_BFLOAT16),
    ],
)
def test_a_state_has_the_size_in_the_tables(count: Callable[[str], float], dtype: str, name: str) -> None:
    assert count(dtype) / SIZE == STATE[name]


@pytest.mark.skipif(
    "compensate" not in {field.name for field in dataclasses.fields(acprop_core.ACProp)},
    reason="this version has no compensate",
)
def test_a_compensated_state_has_the_size_in_the_tables() -> None:
    optimizer = acprop_core.ACProp(**{"compensate": True})
    leaves = jax.tree.leaves(tuple(optimizer.init(jnp.ones(SIZE, "bfloat16"))))
    assert sum(x.nbytes for x in leaves if getattr(x, "ndim", 0)) / SIZE == STATE[COMPENSATED]


@pytest.mark.parametrize(
    ("name", "transform", "dtype"),
    [
        ("`acprop_optax.acprop`, compiled, float32", acprop_optax.acprop(1e-3, clip_exponent=0.25), "float32"),
        ("`acprop_optax.acprop`, compiled, bfloat16", acprop_optax.acprop(1e-3, clip_exponent=0.25), "bfloat16"),
        ("`optax.adamw`, compiled, float32", optax.adamw(1e-3), "float32"),
        ("`optax.adamw`, compiled, bfloat16", optax.adamw(1e-3), "bfloat16"),
    ],
)
@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="the page has the figures of the JAX that the suite pins")
def test_what_xla_counts_is_in_the_page(name: str, transform: optax.GradientTransformation, dtype: str) -> None:
    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = transform.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = jnp.ones(SIZE, dtype)
    program = jax.jit(step, donate_argnums=(0, 1)).lower(params, transform.init(params), params).compile()
    temporary = program.memory_analysis().temp_size_in_bytes
    moved = program.cost_analysis()["bytes accessed"]
    row = f"| {name} | {round(temporary / SIZE)} | {round(moved / SIZE)} |"
    assert row in (DOCS / "scale.md").read_text()


def test_what_numpy_needs_beside_the_arrays_is_in_the_page() -> None:
    page = (DOCS / "scale.md").read_text()
    params, grads = {"w": np.ones(SIZE, "float32")}, {"w": np.ones(SIZE, "float32")}
    optimizer = acprop_core.ACProp(clip_exponent=0.25)
    state = optimizer.init(params)
    tracemalloc.start()
    try:
        new = optimizer.update(grads, state, params)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert new[1].count == 1
    assert round(kept / SIZE) == 12  # the new moments and the update
    assert f"| functional core, NumPy, float32, one array | {round(peak / SIZE)} |" in page
