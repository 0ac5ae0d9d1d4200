"""The pages for those who come from another optimizer: their tables have the defaults of the installed versions."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("optax")

import ast
import inspect
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import torch

import acprop_optax
import acprop_stepper
import acprop_torch

DOCS = Path(__file__).parents[1] / "docs"
# As published in 2021, https://github.com/juntang-zhuang/ACProp-Optimizer; it is not on PyPI. `bias_correction` has no
# effect in it, so the page leaves it out.
AUTHORS = {
    "lr": 0.001,
    "betas": (0.9, 0.999),
    "eps": 1e-16,
    "weight_decay": 0,
    "amsgrad": False,
    "weight_decouple": True,
    "fixed_decay": False,
    "rectify": True,
    "degenerated_to_sgd": True,
    "momentum_update": False,
}
OURS_ALONE = {"foreach", "fused", "capturable", "differentiable", "maximize", "moment_dtype", "compensate"}


def defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the options of a function and their defaults; inspect's own mark where one is required."""
    options = inspect.signature(function).parameters.values()
    return {option.name: option.default for option in options if option.name != "params"}


def options_in(page: str) -> dict[str, list[str]]:
    """Return the cells of the table of options by name."""
    text = (DOCS / page).read_text().partition("\n## Options\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", text, flags=re.MULTILINE)
    return {name: cells.split(" | ") for name, cells in rows}


def told(cell: str) -> Any:
    """Return the default that a cell tells."""
    return inspect.Parameter.empty if cell == "required" else ast.literal_eval(cell.strip("`"))


@pytest.mark.parametrize(
    ("page", "columns"),
    [
        ("from-adamw.md", [defaults(torch.optim.AdamW), defaults(acprop_torch.ACProp)]),
        ("from-optax.md", [defaults(f) for f in (optax.adamw, optax.contrib.acprop, acprop_optax.acprop)]),
        (
            "from-authors-code.md",
            [AUTHORS, {k: v for k, v in defaults(acprop_torch.ACProp).items() if k not in OURS_ALONE}],
        ),
    ],
)
def test_the_tables_have_the_defaults_of_the_signatures(page: str, columns: list[dict[str, Any]]) -> None:
    table = options_in(page)
    assert set(table) == set().union(*columns)
    for i, column in enumerate(columns):
        found = {name: told(cells[i]) for name, cells in table.items() if cells[i] != "—"}
        assert found == column, page
        assert {name: type(x) for name, x in found.items()} == {name: type(x) for name, x in column.items()}


def test_the_order_of_positional_arguments_is_as_told() -> None:
    first = list(defaults(torch.optim.AdamW))[:4]
    assert list(defaults(acprop_torch.ACProp))[:4] == first == ["lr", "betas", "eps", "weight_decay"]
    assert [list(defaults(f))[5] for f in (optax.adamw, acprop_optax.acprop)] == ["mu_dtype", "weight_decay"]


def authors_step(x: torch.Tensor, state: dict[str, Any], group: dict[str, Any], g: torch.Tensor) -> None:
    """Take a step by the equations of the authors' code, with its `rectify=False` and decay in the gradient."""
    g = g + group["weight_decay"] * x
    b1, b2 = group["betas"]
    state["step"] += 1
    state["exp_avg"] = b1 * state["exp_avg"] + (1 - b1) * g
    variance = state["exp_avg_var"] + (group["eps"] if state["step"] > 1 else 0.0)
    if state["step"] == 1:
        x -= group["lr"] * g
    else:
        root = variance.sqrt() / math.sqrt(1 - b2 ** (state["step"] - 1))
        x -= group["lr"] * g / (root + group["eps"])
    state["exp_avg_var"] = b2 * variance + (1 - b2) * (g - state["exp_avg"]) ** 2


def test_the_same_run_in_optax_and_in_numpy() -> None:
    """As docs/from-authors-code.md says; the calls are the page's."""
    page = (DOCS / "from-authors-code.md").read_text().partition("## In another framework")[2].partition("\n## ")[0]
    calls = re.findall(r"`((?:optax\.chain|Stepper)\([^`]+)`", page)
    assert len(calls) == 2
    x, *grads = np.random.default_rng(0).standard_normal((31, 5))
    theirs, params, own = torch.tensor(x), x.copy(), x.copy()
    state = {"step": 0, "exp_avg": torch.zeros_like(theirs), "exp_avg_var": torch.zeros_like(theirs)}
    group = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 5e-4}
    transform = eval(calls[0], {"optax": optax, "acprop": acprop_optax.acprop})
    stepper = eval(calls[1], {"Stepper": acprop_stepper.Stepper, "params": params})
    with jax.enable_x64(True):
        inner = transform.init(own)
        for g in grads:
            authors_step(theirs, state, group, torch.tensor(g))
            updates, inner = transform.update(g, inner, own)
            own = optax.apply_updates(own, updates)
            stepper.step(g + 5e-4 * params)
    # the first step differs by the factor 1 + eps; the decay amounts to 1e-5
    np.testing.assert_allclose(params, theirs.numpy(), rtol=1e-9)
    np.testing.assert_allclose(np.asarray(own), theirs.numpy(), rtol=1e-9)


def test_a_run_goes_back_to_the_authors_code() -> None:
    """The snippet of the page makes a state that continues by their equations as ours does."""
    x = torch.ones(5, dtype=torch.float64, requires_grad=True)
    options = {"lr": 1e-2, "eps": 1e-8, "eps_root": 1e-8, "weight_decay": 0.1, "decoupled_weight_decay": False}
    optimizer = acprop_torch.ACProp([x], **options)
    grads = torch.randn(60, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for g in grads[:20]:
        x.grad = g.clone()
        optimizer.step()
    snippet = re.search(r"```python\n(saved = .*?)print", (DOCS / "from-authors-code.md").read_text(), re.DOTALL)
    assert snippet
    names = {"optimizer": optimizer, "eps": options["eps"]}
    exec(snippet[1], names)
    saved: Any = names["saved"]
    theirs, state, group = x.detach().clone(), dict(saved["state"][0]), saved["param_groups"][0]
    for g in grads[20:]:
        authors_step(theirs, state, group, g)
        x.grad = g.clone()
        optimizer.step()
    torch.testing.assert_close(theirs, x.detach(), rtol=1e-12, atol=1e-12)
