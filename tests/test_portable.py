"""Every host of ACProp continues from every other, and refuses what does not fit it."""

import pytest

pytest.importorskip("torch")

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

import acprop_optax
import acprop_stepper
import acprop_torch
from acprop_core import ACProp, State, load, save
from agreement import violations
from cases import Case
from hosts import Functional, Host, Optax, Stepper, TorchOptimizer, from_torch
from test_checkpoint import HYPER, assert_same_bits, schedule, state_of, without

# every host continues from every other


HOSTS: list[type[Host]] = [Functional, Stepper, Optax, TorchOptimizer]
_LEAVES = {"layers.0.weight": ("float32", (2, 3)), "layers.0.bias": ("float32", (3,)), "scale": ("float32", ())}
PAIR_CASES = [
    Case("default", {"learning_rate": 1e-3}, _LEAVES, steps=100),
    Case("empty", {"learning_rate": 1e-3}, {"w": ("float32", (2, 3)), "e": ("float32", (0, 3))}, steps=100),
    Case(
        "mask-container",
        {
            "learning_rate": 1e-2,
            "b1": 0.8,
            "b2": 0.99,
            "eps": 1e-8,
            "eps_root": 1e-12,
            "weight_decay": 0.1,
            "mask": {"w": True, "b": False},
            "clip_exponent": 0.25,
            "centering": "previous",
        },
        {"w": ("float32", (2, 3)), "b": ("float32", (3,))},
        steps=100,
    ),
    Case("bfloat16", {"learning_rate": 1e-3, "clip_exponent": 0.25}, {"w": ("bfloat16", (2, 3))}, steps=100),
    Case("schedule", {"learning_rate": schedule}, {"w": ("float32", (2, 3))}, steps=100),
    Case("complex", {"learning_rate": 1e-3, "clip_exponent": 0.25}, {"w": ("complex64", (2, 3))}, steps=100),
]


def pairs() -> Iterator[Any]:
    for case in PAIR_CASES:
        for a in HOSTS:
            for b in HOSTS:
                # torch counts a complex parameter as two real ones
                if not (case.name == "complex" and TorchOptimizer in (a, b)):
                    yield pytest.param(case, a, b, id=f"{case}-{a.__name__}-{b.__name__}")


@pytest.mark.parametrize(("case", "first", "second"), list(pairs()))
def test_every_host_goes_on_from_every_other(case: Case, first: type[Host], second: type[Host], tmp_path: Path) -> None:
    params, grads = ({leaf: draw(leaf) for leaf in case.leaves} for draw in (case.params, case.grads))
    host: Any = first(case)
    steps = []
    for t in range(case.steps):
        if t == case.steps // 2:
            host.save(tmp_path / "a")
            before = host.state if isinstance(host, Functional) else None
            host = second(case)
            host.resume(tmp_path / "a")
            host.save(tmp_path / "b")
            first_state, second_state = (load(tmp_path / name, **host.callables())[1] for name in "ab")
            assert_same_bits(second_state, first_state)
            if before:
                assert_same_bits(first_state, before)
        host.put({leaf: x[t] for leaf, x in params.items()})
        host.step({leaf: x[t] for leaf, x in grads.items()})
        assert host.count == t + 1
        steps.append({leaf: record._replace(update=None) for leaf, record in host.read().items()})
    assert not violations(case, steps)


# arrays of other libraries


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_the_functional_core_saves_arrays_of_any_library(dtype: torch.dtype, tmp_path: Path) -> None:
    optimizer = ACProp(**HYPER)
    if dtype == torch.bfloat16:
        optimizer = dataclasses.replace(optimizer, moment_dtype="bfloat16")
    params = [torch.ones(2, 3, dtype=dtype)]
    _, state = optimizer.update([torch.full((2, 3), 0.3, dtype=dtype)], optimizer.init(params), params)
    save(tmp_path / "a", optimizer, state)
    _, got = load(tmp_path / "a")
    assert got.mu["0"].tobytes() == from_torch(state.mu[0]).tobytes()
    params = {"w": jnp.ones((2, 3))}
    _, state = optimizer.update({"w": jnp.full((2, 3), 0.3)}, ACProp().init(params), params)
    save(tmp_path / "a", optimizer, state)
    assert load(tmp_path / "a")[1].nu["w"].tobytes() == np.asarray(state.nu["w"]).tobytes()


# hyperparameters that differ


def steppers(**hyper: Any) -> tuple[acprop_stepper.Stepper, acprop_stepper.Stepper]:
    return (
        acprop_stepper.Stepper({"w": np.ones(3), "b": np.ones(2)}, **HYPER),
        acprop_stepper.Stepper({"w": np.ones(3), "b": np.ones(2)}, **{**HYPER, **hyper}),
    )


def test_hyperparameters_that_differ_are_listed() -> None:
    a, b = steppers(learning_rate=0.2, b1=0.8, mask={"w": True, "b": False}, moment_dtype="float64")
    a.step({"w": np.ones(3), "b": np.ones(2)})
    with pytest.raises(ValueError, match="hyperparameters differ") as caught:
        acprop_stepper.import_state(b, *acprop_stepper.export_state(a))
    for part in (
        "learning_rate is 0.2 here and 0.1 in the saved state",
        "b1 is 0.8 here and 0.9 in the saved state",
        "moment_dtype is 'float64' here and None in the saved state",
        "mask of 'b' is False here and True in the saved state",
        "prefer='own' or prefer='saved'",
    ):
        assert part in str(caught.value)
    assert "for 'w'" not in str(caught.value)
    assert b.state.count == 0
    with pytest.raises(ValueError, match="prefer is 'theirs'"):
        acprop_stepper.import_state(b, *acprop_stepper.export_state(a), prefer="theirs")


def test_a_mask_matters_only_where_something_decays() -> None:
    a, b = steppers(mask={"w": True, "b": True})
    acprop_stepper.import_state(b, *acprop_stepper.export_state(a))
    c, d = (acprop_stepper.Stepper([np.ones(3)], mask=mask) for mask in (None, [False]))
    acprop_stepper.import_state(d, *acprop_stepper.export_state(c))


def test_what_to_import_must_be_a_pair() -> None:
    a, b = steppers()
    optimizer, state = acprop_stepper.export_state(a)
    with pytest.raises(TypeError, match="import_state got a State and a ACProp"):
        acprop_stepper.import_state(b, state, optimizer)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="are not dicts by name"):
        acprop_stepper.import_state(b, optimizer, State(0, [np.ones(3)], [np.ones(3)]))


# stepper


def test_a_stepper_takes_either_side() -> None:
    grads = {"w": np.array([1.0, -2.0, 0.5]), "b": np.ones(2)}
    for prefer in ("own", "saved"):
        a, b = steppers(learning_rate=0.2, mask={"w": True, "b": False}, centering="previous")
        a.step(grads)
        for name, x in a.params.items():
            b.params[name][...] = x
        params, lock = b.params, b._lock
        acprop_stepper.import_state(b, *acprop_stepper.export_state(a), prefer=prefer)
        assert b.params is params
        assert b._lock is lock
        assert b.functional.learning_rate == {"own": 0.2, "saved": 0.1}[prefer]
        a.step(grads)
        b.step(grads)
        same = all(np.array_equal(a.params[name], b.params[name]) for name in params)
        assert same == (prefer == "saved")


def test_a_stepper_of_nested_parameters(tmp_path: Path) -> None:
    def make(mask: Any) -> acprop_stepper.Stepper:
        params = {"layers": [{"weight": np.ones((2, 3))}, {"bias": np.ones(3, np.float32), "none": None}]}
        return acprop_stepper.Stepper(params, weight_decay=0.1, mask=mask, clip_norm=1.0)

    grads = {"layers": [{"weight": np.ones((2, 3))}, {"bias": np.ones(3, np.float32), "none": None}]}
    a = make({"layers": [True, False]})
    a.step(grads)
    save(tmp_path / "a", *acprop_stepper.export_state(a))
    b = make(True)
    acprop_stepper.import_state(b, *load(tmp_path / "a"), prefer="saved")
    assert b._clip_norm == 1.0
    jax.tree.map(np.copyto, b.params, a.params)
    for stepper in (a, b):
        stepper.step(grads)
    assert_same_bits(acprop_stepper.export_state(a)[1], acprop_stepper.export_state(b)[1])
    np.testing.assert_array_equal(a.params["layers"][0]["weight"], b.params["layers"][0]["weight"])
    np.testing.assert_array_equal(a.params["layers"][1]["bias"], b.params["layers"][1]["bias"])


# torch


def model_of(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)).to(dtype)


def torch_steps(model: torch.nn.Module, optimizer: Any, n: int = 3) -> None:
    for i in range(n):
        optimizer.zero_grad()
        model(
            torch.linspace(-1, 1 + i, 15, dtype=next(model.parameters()).dtype).reshape(5, 3)
        ).square().sum().backward()
        optimizer.step()


def two_groups(model: torch.nn.Module, **options: Any) -> acprop_torch.ACProp:
    weights = [p for p in model.parameters() if p.ndim == 2]
    biases = [p for p in model.parameters() if p.ndim < 2]
    return acprop_torch.ACProp(
        [{"params": weights}, {"params": biases, "weight_decay": 0.0}], weight_decay=0.1, **options
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}, {"moment_dtype": torch.float64}])
def test_torch_goes_on_to_the_bit(dtype: torch.dtype, options: Any, tmp_path: Path) -> None:
    a = model_of(dtype)
    optimizer = two_groups(a, **options)
    torch_steps(a, optimizer)
    save(tmp_path / "a", *acprop_torch.export_state(optimizer, a))
    b = model_of(dtype)
    b.load_state_dict(a.state_dict())
    other = two_groups(b, **options)
    torch_steps(b, other, 1)  # what was there is gone
    b.load_state_dict(a.state_dict())
    acprop_torch.import_state(other, b, *load(tmp_path / "a"))
    torch_steps(a, optimizer)
    torch_steps(b, other)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)
        for key in ("step", "exp_avg", "exp_avg_var"):
            assert torch.equal(optimizer.state[p][key], other.state[q][key])


def test_torch_exports_names_mask_and_copies() -> None:
    model = model_of()
    optimizer = two_groups(model, lr=torch.tensor(0.5), betas=(torch.tensor(0.5), torch.tensor(0.75)))
    torch_steps(model, optimizer)
    exported, state = acprop_torch.export_state(optimizer, model)
    assert exported == ACProp(
        0.5, 0.5, 0.75, weight_decay=0.1, mask={"0.weight": True, "0.bias": False, "2.weight": True, "2.bias": False}
    )
    assert list(state.mu) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    before = state.mu["0.weight"].copy()
    torch_steps(model, optimizer, 1)
    np.testing.assert_array_equal(state.mu["0.weight"], before)
    acprop_torch.import_state(optimizer, model, exported, state)
    torch_steps(model, optimizer, 1)
    np.testing.assert_array_equal(state.mu["0.weight"], before)


def test_torch_parameters_that_have_taken_no_step(tmp_path: Path) -> None:
    model = model_of()
    model[0].bias.requires_grad_(False)  # frozen, in the optimizer
    model[2].bias.requires_grad_(False)  # frozen, not in it
    optimizer = acprop_torch.ACProp([p for p in model.parameters() if p is not model[2].bias])
    torch_steps(model, optimizer)
    save(tmp_path / "a", *acprop_torch.export_state(optimizer, model))
    saved, state = load(tmp_path / "a")
    assert state.count == 3
    assert [name for name, x in state.mu.items() if x is None] == ["0.bias", "2.bias"]
    other = acprop_torch.ACProp(model.parameters())
    model.requires_grad_(True)
    torch_steps(model, other)
    acprop_torch.import_state(other, model, saved, state)
    assert not other.state.get(model[0].bias)
    torch_steps(model, other, 1)  # now the first of its own
    assert other.state[model[0].bias]["step"] == 1
    assert other.state[model[0].weight]["step"] == 4
    with pytest.raises(ValueError, match="'2.bias' has taken 1 steps, '2.weight' 4"):
        acprop_torch.export_state(other, model)
    # hosts with one count have zeros
    params = {name: p.detach().numpy() for name, p in model.named_parameters()}
    _, full = load(tmp_path / "a", params)
    assert not full.nu["0.bias"].any()
    stepper = acprop_stepper.Stepper({name: x.copy() for name, x in params.items()})
    acprop_stepper.import_state(stepper, saved, state)
    assert not stepper.state.nu["2.bias"].any()
    assert stepper.state.nu["2.weight"].all()


def test_torch_before_any_step() -> None:
    model = model_of()
    exported, state = acprop_torch.export_state(acprop_torch.ACProp(model.parameters()), model)
    assert state == State(0, dict.fromkeys(state.mu), dict.fromkeys(state.mu))
    optimizer = acprop_torch.ACProp(model.parameters())
    torch_steps(model, optimizer)
    acprop_torch.import_state(optimizer, model, exported, state)
    assert not optimizer.state


def test_torch_complex_parameters_count_as_two_real_ones(tmp_path: Path) -> None:
    start = np.array([1 + 2j, 3 - 1j], np.complex64)
    grads = [np.array([0.3 - 1j, 2 + 0.5j], np.complex64) * (i + 1) for i in range(6)]
    p = torch.nn.Parameter(torch.from_numpy(start.copy()))
    optimizer = acprop_torch.ACProp([p], **{"lr": 0.1, "weight_decay": 0.1, "clip_exponent": 0.25})
    for g in grads[:3]:
        p.grad = torch.from_numpy(g)
        optimizer.step()
    save(tmp_path / "a", *acprop_torch.export_state(optimizer, {"w": p}))
    real = {"w": torch.view_as_real(p.detach()).numpy().copy()}
    core, state = load(tmp_path / "a", real)
    assert state.mu["w"].shape == (2, 2)
    other = acprop_torch.ACProp([p], lr=0.1, weight_decay=0.1, clip_exponent=0.25)
    acprop_torch.import_state(other, {"w": p}, *load(tmp_path / "a"))
    for g in grads[3:]:
        p.grad = torch.from_numpy(g)
        other.step()
        updates, state = core.update({"w": np.stack([g.real, g.imag], axis=-1)}, state, real)
        real = core.apply(real, updates)
    np.testing.assert_allclose(torch.view_as_real(p.detach()).numpy(), real["w"], rtol=5e-7)
    with pytest.raises(ValueError, match=r"first moment of 'w' has shape \(2,\), here it is \(2, 2\)"):
        acprop_torch.import_state(other, {"w": p}, core, state_of({"w": start}))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([{"maximize": True}], "parameter group 0 has maximize=True"),
        ([{"weight_decay": 0.1, "decoupled_weight_decay": False}], "the L2 form"),
        ([{"lr": 0.1}, {"lr": 0.2}], "parameter groups 0 and 1 have learning_rate 0.1 and 0.2"),
        ([{"weight_decay": 0.1}, {"weight_decay": 0.2}, {}], "parameter groups have weight_decay 0.1, 0.2, 0.0"),
    ],
)
def test_torch_options_that_the_core_lacks(groups: list[dict[str, Any]], message: str) -> None:
    params = {str(i): torch.nn.Parameter(torch.ones(2)) for i in range(len(groups))}
    optimizer = acprop_torch.ACProp([{"params": [p], **g} for p, g in zip(params.values(), groups, strict=True)])
    for p in params.values():
        p.grad = torch.ones(2)
    optimizer.step()
    with pytest.raises(ValueError, match=message):
        acprop_torch.export_state(optimizer, params)
    exported, state = acprop_torch.export_state(optimizer, params, ACProp(0.3))
    assert exported == ACProp(0.3)
    with pytest.raises(ValueError, match=message):
        acprop_torch.import_state(optimizer, params, exported, state)
    before = [{**group} for group in optimizer.param_groups]
    acprop_torch.import_state(optimizer, params, exported, state, prefer="own")
    assert [{**group} for group in optimizer.param_groups] == before
    acprop_torch.import_state(optimizer, params, exported, state, prefer="saved")
    assert acprop_torch.export_state(optimizer, params)[0] == exported


def test_torch_takes_the_saved_hyperparameters() -> None:
    model = model_of()
    a = two_groups(model, lr=0.2, betas=(0.8, 0.9), eps=1e-8, eps_root=1e-9, clip_exponent=0.5, centering="previous")
    torch_steps(model, a)
    exported, state = acprop_torch.export_state(a, model)
    rate = torch.tensor(0.1)
    b = two_groups(model, lr=rate)
    with pytest.raises(ValueError, match="hyperparameters differ: learning_rate is 0.1"):
        acprop_torch.import_state(b, model, exported, state)
    assert not b.state
    acprop_torch.import_state(b, model, exported, state, prefer="saved")
    assert b.param_groups[0]["lr"] is rate
    assert rate == 0.2
    for mine, theirs in zip(a.param_groups, b.param_groups, strict=True):
        assert without(mine, "params", "lr") == without(theirs, "params", "lr")
    one = acprop_torch.ACProp(model.parameters())
    with pytest.raises(ValueError, match="some parameters of group 0 decay in the saved state and some do not"):
        acprop_torch.import_state(one, model, exported, state, prefer="saved")
    with pytest.raises(ValueError, match="the saved learning_rate is a callable"):
        acprop_torch.import_state(
            b, model, dataclasses.replace(exported, learning_rate=schedule), state, prefer="saved"
        )


def test_torch_refuses_what_does_not_fit_and_changes_nothing() -> None:
    model = model_of()
    optimizer = acprop_torch.ACProp(model.parameters())
    torch_steps(model, optimizer)
    exported, state = acprop_torch.export_state(optimizer, model)
    before = {p: {key: x.clone() for key, x in own.items()} for p, own in optimizer.state.items()}
    w = "0.weight"
    wrong: list[tuple[State, type[Exception], str]] = [
        (state._replace(mu=without(state.mu, w), nu=without(state.nu, w)), ValueError, "lacks '0.weight'"),
        (state._replace(mu=state.mu | {"x": state.mu[w]}, nu=state.nu | {"x": state.mu[w]}), ValueError, "has 'x'"),
        (state._replace(mu=state.mu | {w: state.mu[w].T}), ValueError, "first moment of '0.weight' has shape (3, 4)"),
        (state._replace(nu=state.nu | {w: state.nu[w].astype(float)}), TypeError, "has dtype float64, here"),
        (state._replace(nu=state.nu | {w: None}), ValueError, "one moment of '0.weight' is None"),
        (state._replace(count=-3), ValueError, "-3"),
    ]
    for new, error, message in wrong:
        with pytest.raises(error) as caught:
            acprop_torch.import_state(optimizer, model, exported, new)
        assert message in str(caught.value)
        for p, own in before.items():
            assert all(torch.equal(x, optimizer.state[p][key]) for key, x in own.items())
    with pytest.raises(
        ValueError, match=r"parameter group 0 has a parameter of shape \(4, 3\) that the model does not have"
    ):
        acprop_torch.export_state(optimizer, model[2])
    with pytest.raises(TypeError, match="the optimizer is a SGD"):
        acprop_torch.export_state(torch.optim.SGD(model.parameters()), model)  # type: ignore[arg-type]


def test_torch_keeps_memory_formats() -> None:
    conv = torch.nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
    optimizer = acprop_torch.ACProp(conv.parameters())
    conv(torch.ones(1, 2, 5, 5)).sum().backward()
    optimizer.step()
    exported = acprop_torch.export_state(optimizer, conv)
    expected = optimizer.state[conv.weight]["exp_avg"].clone()
    acprop_torch.import_state(optimizer, conv, *exported)
    got = optimizer.state[conv.weight]["exp_avg"]
    assert torch.equal(got, expected)
    assert got.is_contiguous(memory_format=torch.channels_last)


# optax


WRAPPED: dict[str, Callable[[], Any]] = {
    "plain": lambda: acprop_optax.acprop(**HYPER),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1e3), acprop_optax.acprop(**HYPER), optax.scale(1.0)),
    "multi-steps": lambda: optax.MultiSteps(acprop_optax.acprop(**HYPER), 2),
    "inject": lambda: optax.inject_hyperparams(acprop_optax.acprop)(**HYPER),
    "all": lambda: optax.chain(
        optax.MultiSteps(optax.inject_hyperparams(acprop_optax.acprop)(**HYPER), 2), optax.identity()
    ),
    "parts": lambda: optax.chain(
        acprop_optax.scale_by_acprop(clip_exponent=0.25),
        optax.add_decayed_weights(0.1),
        optax.scale_by_learning_rate(0.1),
    ),
    "finite": lambda: optax.apply_if_finite(acprop_optax.acprop(**HYPER), 3),
}


def optax_steps(transform: Any, params: Any, state: Any, n: int) -> tuple[Any, Any]:
    update = jax.jit(transform.update)
    for i in range(n):
        grads = jax.tree.map(lambda x, i=i: (x + 0.5) * (i % 4 - 1.5), params)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_optax_anywhere(wrapped: str, tmp_path: Path) -> None:
    transform = WRAPPED[wrapped]()
    start = {"layers": [{"kernel": jnp.arange(6.0).reshape(2, 3)}, {"bias": jnp.ones(3)}]}
    params, state = optax_steps(transform, start, transform.init(start), 6)
    optimizer, portable = exported = acprop_optax.export_state(state, ACProp(**HYPER))
    assert optimizer == ACProp(**HYPER)
    assert list(portable.mu) == ["layers.0.kernel", "layers.1.bias"]
    assert portable.count == (3 if wrapped in ("multi-steps", "all") else 6)
    save(tmp_path / "a", *exported)
    fresh = transform.init(params)
    again = acprop_optax.import_state(fresh, ACProp(**HYPER), *load(tmp_path / "a"))
    assert jax.tree.structure(again) == jax.tree.structure(state)
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), again) == jax.tree.map(
        lambda x: (x.shape, x.dtype, x.weak_type), fresh
    )
    for a, b in zip(
        jax.tree.leaves(optax_steps(transform, params, state, 4)),
        jax.tree.leaves(optax_steps(transform, params, again, 4)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    assert all(not x.any() for x in jax.tree.leaves(fresh[0]) if wrapped == "plain")


def test_optax_schedules_go_along() -> None:
    params = {"w": jnp.ones(3)}
    for transform, optimizer in (
        (acprop_optax.acprop(schedule), ACProp(schedule)),
        (optax.inject_hyperparams(acprop_optax.acprop)(schedule), ACProp(schedule)),
        (optax.chain(acprop_optax.scale_by_acprop(), optax.scale_by_learning_rate(schedule)), ACProp(schedule)),
    ):
        end, state = optax_steps(transform, params, transform.init(params), 5)
        saved = acprop_optax.export_state(state, optimizer)
        assert saved[0].learning_rate is schedule
        again = acprop_optax.import_state(transform.init(params), optimizer, *saved)
        for x, y in zip(
            jax.tree.leaves(optax_steps(transform, end, state, 3)),
            jax.tree.leaves(optax_steps(transform, end, again, 3)),
            strict=True,
        ):
            np.testing.assert_array_equal(x, y)
        broken = jax.tree.map(
            lambda x: x._replace(count=x.count + 1) if isinstance(x, optax.ScaleByBeliefState) else x,
            state,
            is_leaf=lambda x: isinstance(x, optax.ScaleByBeliefState),
        )
        with pytest.raises(ValueError, match="has counted 5 updates, ACProp 6"):
            acprop_optax.export_state(broken, optimizer)


def test_optax_numbers_that_are_injected() -> None:
    params = {"w": jnp.ones(3)}
    transform = optax.inject_hyperparams(acprop_optax.acprop)(**HYPER)
    state = transform.init(params)
    state.hyperparams["learning_rate"] = jnp.asarray(0.5)
    saved = acprop_optax.export_state(state, ACProp(**HYPER))
    assert saved[0] == dataclasses.replace(ACProp(**HYPER), learning_rate=0.5)
    fresh = transform.init(params)
    with pytest.raises(ValueError, match="learning_rate is 0.1 here and 0.5 in the saved state"):
        acprop_optax.import_state(fresh, ACProp(**HYPER), *saved)
    assert acprop_optax.import_state(fresh, ACProp(**HYPER), *saved, prefer="own").hyperparams["learning_rate"] == 0.1
    taken = acprop_optax.import_state(fresh, ACProp(**HYPER), *saved, prefer="saved")
    assert taken.hyperparams["learning_rate"] == 0.5
    assert taken.hyperparams["learning_rate"].dtype == fresh.hyperparams["learning_rate"].dtype
    whole = optax.inject_hyperparams(acprop_optax.acprop)(**HYPER | {"learning_rate": 0}).init(params)
    with pytest.raises(ValueError, match="learning_rate is 0.0 here and 0.5 in the saved state"):
        acprop_optax.import_state(whole, saved[0], *saved)  # an int32 there, of which 0.5 would be 0
    plain = acprop_optax.acprop(**HYPER).init(params)
    with pytest.raises(ValueError, match="learning_rate is 0.1 here and 0.5 .* make it from the saved ones"):
        acprop_optax.import_state(plain, ACProp(**HYPER), *saved, prefer="saved")


def test_optax_refuses_what_it_cannot_carry() -> None:
    params, optimizer = {"w": jnp.ones(3)}, ACProp(**HYPER)
    transform = acprop_optax.acprop(**HYPER)
    state = transform.init(params)
    saved = acprop_optax.export_state(state, optimizer)
    with pytest.raises(ValueError, match="holds 0 states with moments of ACProp"):
        acprop_optax.export_state(optax.sgd(0.1).init(params), optimizer)
    with pytest.raises(ValueError, match="holds 2 states with moments of ACProp"):
        acprop_optax.import_state((state, state), optimizer, *saved)
    many = optax.MultiSteps(transform, 3)
    _, half = optax_steps(many, params, many.init(params), 1)
    for call in (
        lambda: acprop_optax.export_state(half, optimizer),
        lambda: acprop_optax.import_state(half, optimizer, *saved),
    ):
        with pytest.raises(ValueError, match="accumulated the gradients of 1 mini-steps"):
            call()
    with pytest.raises(ValueError, match="lacks 'v'"):
        acprop_optax.import_state(transform.init({"v": jnp.ones(3)}), optimizer, *saved)
    wide = {"w": np.zeros(3)}
    with pytest.raises(TypeError, match="has dtype float64, here it is float32"):
        acprop_optax.import_state(state, optimizer, optimizer, State(3, wide, wide))
    with pytest.raises(TypeError, match="the hyperparameters are a tuple"):
        acprop_optax.export_state(state, (1,))  # type: ignore[arg-type]


BESIDE: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "apply_every": ("ApplyEvery", lambda t: optax.chain(t, optax.apply_every(2))),
    "ema": ("EmaState", lambda t: optax.chain(t, optax.ema(0.9))),
    "trace": ("TraceState", lambda t: optax.chain(optax.trace(0.9), t)),
    "schedule_free": ("ScheduleFreeState", lambda t: optax.contrib.schedule_free(t, 0.1)),
    "conditional": (
        "ConditionallyTransformState",
        lambda t: optax.conditionally_transform(t, lambda step, *_, **__: step > 1),
    ),
    "conditional mask": (
        "ConditionallyMaskState",
        lambda t: optax.transforms.conditionally_mask(t, lambda step, *_, **__: step > 1),
    ),
    "noise": ("AddNoiseState", lambda t: optax.chain(optax.add_noise(0.1, 0.5, 0), t)),
    "plateau": ("ReduceLROnPlateauState", lambda t: optax.chain(t, optax.contrib.reduce_on_plateau())),
    "rms": ("ScaleByRmsState", lambda t: optax.chain(t, optax.scale_by_rms())),
    "rms of other leaves": (
        "ScaleByRmsState",
        lambda t: optax.partition({"a": t, "b": optax.rmsprop(0.1)}, {"w": "a", "v": "b"}),
    ),
    "lookahead": ("LookaheadState", lambda t: optax.lookahead(t, 5, 0.5)),
    "mechanic": ("MechanicState", lambda t: optax.contrib.mechanize(t)),
    "in MultiSteps": ("EmaState", lambda t: optax.MultiSteps(optax.chain(t, optax.ema(0.9)), 2)),
    "in inject_hyperparams": (
        "EmaState",
        lambda t: optax.inject_hyperparams(lambda decay: optax.chain(t, optax.ema(decay)))(0.9),
    ),
    "one's own": (
        "ArrayImpl",
        lambda t: optax.chain(t, optax.GradientTransformation(lambda p: {"mine": jnp.ones(3)}, lambda u, s, p: (u, s))),
    ),
}


@pytest.mark.parametrize("name", BESIDE)
def test_optax_refuses_states_that_would_begin_again(name: str) -> None:
    kind, wrap = BESIDE[name]
    params, optimizer = {"w": jnp.ones(3), "v": jnp.ones(2)}, ACProp(**HYPER)
    plain = acprop_optax.acprop(**HYPER)
    saved = acprop_optax.export_state(plain.init(params), optimizer)
    init = wrap(plain).init
    state = init(optax.LookaheadParams.init_synced(params) if name == "lookahead" else params)
    for call in (
        lambda: acprop_optax.export_state(state, optimizer),
        lambda: acprop_optax.import_state(state, optimizer, *saved),
    ):
        with pytest.raises(ValueError, match=f"holds {kind}, which a portable state cannot hold"):
            call()


CARRIED: dict[str, Callable[[Any], Any]] = {
    "a schedule of the decay": lambda t: optax.chain(t, optax.add_decayed_weights(schedule)),
    "masked": lambda t: optax.chain(t, optax.add_decayed_weights(schedule, mask={"w": True})),
    "a schedule": lambda t: optax.chain(t, optax.scale_by_schedule(schedule)),
    "masked and partitioned": lambda t: optax.partition({"a": t, "b": optax.set_to_zero()}, {"w": "a"}),
    "named": lambda t: optax.named_chain(("clip", optax.clip_by_global_norm(1.0)), ("acprop", t)),
    "reports": lambda t: optax.chain(optax.zero_nans(), optax.apply_if_finite(t, 3), optax.keep_params_nonnegative()),
}


@pytest.mark.parametrize("name", CARRIED)
def test_optax_counts_beside_acprop_go_along(name: str) -> None:
    transform, params, optimizer = CARRIED[name](acprop_optax.acprop(**HYPER)), {"w": jnp.ones(3)}, ACProp(**HYPER)
    params, state = optax_steps(transform, params, transform.init(params), 5)
    saved = acprop_optax.export_state(state, optimizer)
    again = acprop_optax.import_state(transform.init(params), optimizer, *saved)
    for x, y in zip(
        jax.tree.leaves(optax_steps(transform, params, state, 3)),
        jax.tree.leaves(optax_steps(transform, params, again, 3)),
        strict=True,
    ):
        np.testing.assert_array_equal(x, y)


def test_optax_leaves_that_are_not_optimized_are_left_out() -> None:
    params, optimizer = {"w": jnp.ones(3), "i": jnp.arange(2), "key": jax.random.key(0)}, ACProp(**HYPER)
    transform = acprop_optax.acprop(**HYPER)
    _, state = transform.update({**dict.fromkeys(params), "w": jnp.ones(3)}, transform.init(params), params)
    saved = acprop_optax.export_state(state, optimizer)
    assert list(saved[1].mu) == ["w"]
    again = acprop_optax.import_state(transform.init(params), optimizer, *saved)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True))


@pytest.mark.parametrize("mask", [True, {"i": False, "key": False, "w": True}, {"i": 0, "key": 0, "w": np.array(1)}])
def test_optax_masks_of_leaves_that_are_not_optimized(mask: Any) -> None:
    params = {"w": jnp.ones(3), "i": jnp.arange(2), "key": jax.random.key(0)}
    state = acprop_optax.acprop(**HYPER, mask=mask).init(params)
    assert acprop_optax.export_state(state, ACProp(**HYPER, mask=mask))[0].mask == {"w": True}


def test_optax_refuses_a_state_after_updates_that_were_not_finite() -> None:
    params, optimizer = {"w": jnp.ones(3)}, ACProp(**HYPER)
    transform = optax.apply_if_finite(acprop_optax.acprop(**HYPER), 3)
    _, state = transform.update({"w": jnp.full(3, jnp.nan)}, transform.init(params), params)
    with pytest.raises(ValueError, match="apply_if_finite has skipped the last 1 updates"):
        acprop_optax.export_state(state, optimizer)


def test_optax_counts_stop_where_optax_stops() -> None:
    params = {"w": jnp.ones(3)}
    x = {"w": np.ones(3, np.float32)}
    transform = optax.MultiSteps(acprop_optax.acprop(schedule), 2)
    state = acprop_optax.import_state(transform.init(params), ACProp(schedule), ACProp(schedule), State(2**40, x, x))
    assert acprop_optax.export_state(state, ACProp(schedule))[1].count == 2**31 - 1
    assert state.gradient_step == 2**31 - 1


def test_names_of_flax_and_equinox() -> None:
    import equinox
    import flax.linen
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self) -> None:
            self.layers = nnx.List([nnx.Linear(3, 2, rngs=nnx.Rngs(0))])

    def names(params: Any, mask: Any = None, **options: Any) -> list[str]:
        transform = acprop_optax.acprop(**HYPER, mask=mask, **options)
        optimizer = ACProp(**HYPER, mask=mask, **options)
        grads = jax.tree.map(jnp.ones_like, params)
        _, state = transform.update(grads, transform.init(params), params)
        saved = acprop_optax.export_state(state, optimizer)
        again = acprop_optax.import_state(transform.init(params), optimizer, *saved)
        assert jax.tree.structure(again) == jax.tree.structure(state)
        jax.tree.map(np.testing.assert_array_equal, again, state)
        if mask is not None:
            assert set(saved[0].mask.values()) == {True, False}
            assert list(saved[0].mask) == list(saved[1].mu)
        return list(saved[1].mu)

    linen = flax.linen.Dense(2).init(jax.random.key(0), jnp.ones(3))
    assert sorted(names(linen)) == sorted(names(linen, {"params": {"kernel": True, "bias": False}}))
    assert sorted(names(linen)) == ["params.bias", "params.kernel"]
    mlp = equinox.filter(equinox.nn.MLP(2, 2, 3, 1, key=jax.random.key(0)), equinox.is_array)
    expected = ["layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias"]
    assert names(mlp) == expected
    assert names([mlp, mlp], [True, False]) == [f"{i}.{name}" for i in range(2) for name in expected]
    state = nnx.state(Net(), nnx.Param)
    assert sorted(names(state)) == ["layers.0.bias", "layers.0.kernel"]
    state["layers"][0]["kernel"] = state["layers"][0]["kernel"].replace(jnp.ones((3, 2), jnp.bfloat16))
    assert sorted(names(state, compensate=True)) == [
        "layers.0.bias",
        "layers.0.kernel",
    ]  # one carry is None


def test_from_torch_to_flax(tmp_path: Path) -> None:
    import flax.linen

    net = torch.nn.Linear(3, 2)
    optimizer = acprop_torch.ACProp(net.parameters(), lr=0.1, clip_exponent=0.25)
    dense = flax.linen.Dense(2)
    hyper = ACProp(0.1, clip_exponent=0.25)
    transform = acprop_optax.acprop(0.1, clip_exponent=0.25)
    params = {"params": {"kernel": jnp.asarray(net.weight.detach().numpy().T), "bias": jnp.asarray(net.bias.detach())}}
    state = transform.init(params)
    x = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)

    def torch_step() -> None:
        optimizer.zero_grad()
        net(torch.from_numpy(x)).square().sum().backward()
        optimizer.step()

    for _ in range(5):
        torch_step()
    save(tmp_path / "a", *acprop_torch.export_state(optimizer, net))
    params = {"params": {"kernel": jnp.array(net.weight.detach().numpy().T), "bias": jnp.array(net.bias.detach())}}
    loaded = load(
        tmp_path / "a",
        rename={"weight": "params.kernel", "bias": "params.bias"},
        transform={"params.kernel": np.transpose},
    )
    state = acprop_optax.import_state(state, hyper, *loaded)
    for _ in range(5):
        torch_step()
        grads = jax.grad(lambda p: (dense.apply(p, x) ** 2).sum())(params)
        updates, state = transform.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["params"]["kernel"], net.weight.detach().numpy().T, rtol=1e-5)
