"""Runs of torch's Adam and AdamW move to ACProp with their flags, to the core and the Stepper, and back."""

import pytest

pytest.importorskip("torch")

import copy
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import acprop_core
from acprop_core import State, load, save
from acprop_stepper import Stepper
from acprop_stepper import export_state as export_stepper
from acprop_stepper import import_state as import_stepper
from acprop_torch import ACProp, export_state, import_state
from hosts import named, torch_version
from test_checkpoint import assert_same_bits, without

Leaves = dict[str, np.ndarray]

HALF, ALL = 50, 100
FLAGS: dict[str, Any] = {"eps_root": 0.0, "asynchronous": False, "centering": "none"}
OPTIONS: dict[str, Any] = {"betas": (0.8, 0.99), "eps": 1e-8}
SHAPES = {"0.weight": (4, 3), "0.bias": (4,), "2.weight": (2, 4), "2.bias": (2,)}
# The same model in flax: other names, and a transposed weight
FLAX = {
    "0.weight": "params.Dense_0.kernel",
    "0.bias": "params.Dense_0.bias",
    "2.weight": "params.Dense_1.kernel",
    "2.bias": "params.Dense_1.bias",
}

HAS_NAMES = torch_version() >= (2, 6)
HAS_FORM = torch_version() >= (2, 7)
needs_form = pytest.mark.skipif(not HAS_FORM, reason="torch before 2.7: no decoupled_weight_decay in groups of Adam")


def recorded(shapes: dict[str, tuple[int, ...]] = SHAPES, dtype: Any = np.float64, steps: int = ALL) -> list[Leaves]:
    """Return the start, and as many gradients."""
    generator = np.random.default_rng(7)
    return [
        {name: generator.normal(size=shape).astype(dtype) for name, shape in shapes.items()} for _ in range(steps + 1)
    ]


def rate(count: Any) -> float:
    return 1e-2 / (1.0 + 0.1 * count)


class Torch:
    """A run of an optimizer of torch; weights decay, biases do not."""

    flax = False

    def __init__(self, make: Callable[..., Any], decay: float, start: Leaves) -> None:
        self.model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)).double()
        self.named = dict(self.model.named_parameters())
        self.put(start)
        groups = [
            {"params": named([(n, p) for n, p in self.named.items() if (p.ndim == 2) == decays]), "weight_decay": x}
            for decays, x in ((True, decay), (False, 0.0))
        ]
        self.optimizer = make(groups, lr=rate(0), **OPTIONS)
        self.set_rate(0)

    def set_rate(self, count: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate(count)

    def put(self, params: Leaves) -> None:
        with torch.no_grad():
            for name, x in params.items():
                self.named[name].copy_(torch.from_numpy(x.copy()))

    def params(self) -> Leaves:
        return {name: p.detach().numpy().copy() for name, p in self.named.items()}

    def step(self, count: int, grads: Leaves) -> None:
        self.set_rate(count)
        for name, x in grads.items():
            self.named[name].grad = torch.from_numpy(x.copy())
        self.optimizer.step()

    def save(self, path: Path) -> None:
        save(path, *export_state(self.optimizer, self.model))

    def resume(self, path: Path, count: int, **names: Any) -> None:
        self.set_rate(count)
        import_state(self.optimizer, self.model, *load(path, learning_rate=rate(count), **names))


def nested(leaves: Leaves) -> Any:
    """Return leaves by torch's names as flax has them."""
    flax: dict[str, Leaves] = {}
    for name, x in leaves.items():
        _, layer, kind = FLAX[name].split(".")
        flax.setdefault(layer, {})[kind] = np.array(x.T if np.ndim(x) == 2 else x)
    return {"params": flax}


def plain(tree: Any) -> Leaves:
    found = {name: functools.reduce(lambda x, key: x[key], FLAX[name].split("."), tree) for name in FLAX}
    return {name: np.array(x.T if x.ndim == 2 else x) for name, x in found.items()}


def core_of(decay: float) -> acprop_core.ACProp:
    mask = {"params": {layer: {"kernel": True, "bias": False} for layer in ("Dense_0", "Dense_1")}}
    return acprop_core.ACProp(rate, *OPTIONS["betas"], OPTIONS["eps"], weight_decay=decay, mask=mask, **FLAGS)


class Core:
    """A run of the functional core on NumPy, with the names and the layout of flax."""

    flax = True

    def __init__(self, decay: float, start: Leaves) -> None:
        self.optimizer, self.tree = core_of(decay), nested(start)
        self.state = self.optimizer.init(self.tree)

    def put(self, params: Leaves) -> None:
        self.tree = nested(params)

    def params(self) -> Leaves:
        return plain(self.tree)

    def step(self, count: int, grads: Leaves) -> None:
        assert self.state.count == count
        updates, self.state = self.optimizer.update(nested(grads), self.state, self.tree)
        self.tree = self.optimizer.apply(self.tree, updates)

    def save(self, path: Path) -> None:
        save(path, self.optimizer, self.state)

    def resume(self, path: Path, count: int, **names: Any) -> None:
        # with the hyperparameters of the file, as a program does that has none of its own
        self.optimizer, self.state = load(path, self.tree, learning_rate=rate, **names)


class Stepping(Core):
    """The same of the Stepper."""

    def __init__(self, decay: float, start: Leaves) -> None:
        hyper = core_of(decay)
        names = ("learning_rate", "b1", "b2", "eps", "weight_decay", "mask", *FLAGS)
        self.tree = nested(start)
        self.stepper = Stepper(self.tree, **{name: getattr(hyper, name) for name in names})

    def put(self, params: Leaves) -> None:
        for layer, leaves in nested(params)["params"].items():
            for name, x in leaves.items():
                self.tree["params"][layer][name][...] = x

    def step(self, count: int, grads: Leaves) -> None:
        assert self.stepper.state.count == count
        self.stepper.step(nested(grads))

    def save(self, path: Path) -> None:
        save(path, *export_stepper(self.stepper))

    def resume(self, path: Path, count: int, **names: Any) -> None:
        import_stepper(self.stepper, *load(path, learning_rate=rate, **names))


WAYS: dict[str, dict[str, bool]] = {
    "for-loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
DECOUPLED = functools.partial(torch.optim.Adam, decoupled_weight_decay=True)
RUNS: dict[str, Callable[[float, Leaves], Any]] = {
    **{
        f"AdamW {way}": functools.partial(Torch, functools.partial(torch.optim.AdamW, **flags))
        for way, flags in WAYS.items()
    },
    **({"Adam": functools.partial(Torch, DECOUPLED)} if HAS_FORM else {}),
    "ACProp": functools.partial(Torch, functools.partial(ACProp, **FLAGS)),
    "core": Core,
    "Stepper": Stepping,
}


@functools.cache
def uninterrupted(name: str, decay: float) -> Leaves:
    start, *grads = recorded()
    run = RUNS[name](decay, start)
    for count, now in enumerate(grads):
        run.step(count, now)
    return run.params()


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("second", RUNS)
@pytest.mark.parametrize("first", RUNS)
def test_every_run_goes_on_from_every_other(first: str, second: str, decay: float, tmp_path: Path) -> None:
    start, *grads = recorded()
    run = RUNS[first](decay, start)
    for count in range(HALF):
        run.step(count, grads[count])
    run.save(tmp_path / "a")
    other = RUNS[second](decay, recorded()[-1])
    other.put(run.params())
    bridge = {}
    if run.flax != other.flax:
        pairs = FLAX.items() if other.flax else {flax: name for name, flax in FLAX.items()}.items()
        bridge = {"rename": dict(pairs), "transform": lambda name, x: x.T if x.ndim == 2 else x}
    other.resume(tmp_path / "a", HALF, **bridge)
    for count in range(HALF, ALL):
        other.step(count, grads[count])
    expected, found = uninterrupted(second, decay), other.params()
    for name in SHAPES:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-12, atol=0.0)
        assert not np.allclose(found[name], start[name], rtol=1e-2)


# What torch's own state is


def step_of(optimizer: Any, params: list[torch.Tensor], count: int, n: int = 1) -> None:
    for i in range(count, count + n):
        generator = torch.Generator().manual_seed(i)
        for p in params:
            p.grad = torch.randn(p.shape, dtype=p.dtype, generator=generator).contiguous(
                memory_format=torch.channels_last if p.ndim == 4 else torch.contiguous_format
            )
        optimizer.step()


def starts(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes: tuple[tuple[int, ...], ...] = ((2, 3, 3, 3), (5, 2), (7,), (), (0, 3))
    xs = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    xs[0] = xs[0].contiguous(memory_format=torch.channels_last)
    return [x.requires_grad_() for x in xs]


def kept(optimizer: torch.optim.Optimizer) -> Any:
    """Return everything about the state of an optimizer: keys in their order, values, and how torch keeps them."""
    return [
        [(key, x.dtype, x.device, x.shape, x.stride(), x.requires_grad, x.tolist()) for key, x in own.items()]
        for group in optimizer.param_groups
        for p in group["params"]
        for own in [optimizer.state[p]]
    ]


@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64])
@pytest.mark.parametrize("way", [*WAYS, "tensor lr", "differentiable"])
def test_a_run_of_adam_goes_on_to_the_bit(cls: Any, dtype: torch.dtype, way: str, tmp_path: Path) -> None:
    flags: dict[str, Any] = {
        **WAYS,
        "tensor lr": {"lr": torch.tensor(1e-3)},
        "differentiable": {"differentiable": True},
    }
    if way == "fused" and dtype.is_complex:
        pytest.skip("fused steps take no complex parameters, torch's included")
    params, others = starts(dtype), starts(dtype)
    if way == "differentiable":
        params, others = ([x.detach().clone() for x in xs] for xs in (params, others))
    optimizer, other = (cls(xs, **flags[way]) for xs in (params, others))
    step_of(optimizer, params, 0, 3)
    step_of(other, others, 10, 2)  # is forgotten
    for a, b in zip(params, others, strict=True):
        b.data.copy_(a.data)
    model, model_there = ({str(i): x for i, x in enumerate(xs)} for xs in (params, others))
    exported = export_state(optimizer, model)
    narrow = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
    assert exported[0].moment_dtype == narrow.get(dtype)
    if HAS_FORM:  # otherwise a state_dict does not say whose it is
        assert_same_bits(exported[1], export_state(optimizer.state_dict(), model)[1])
    save(tmp_path / "a", *exported)
    import_state(other, model_there, *load(tmp_path / "a"))
    assert kept(other) == kept(optimizer)
    step_of(optimizer, params, 3, 2)
    step_of(other, others, 3, 2)
    assert kept(other) == kept(optimizer)
    for a, b in zip(params, others, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
@pytest.mark.parametrize("flags", [{}, {"capturable": True}, {"fused": True}])
def test_the_step_count_is_kept_as_torch_keeps_it(flags: Any, default: torch.dtype) -> None:
    """On the device of the parameter only if capturable or fused; here that device is the one without content."""
    p = torch.nn.Parameter(torch.ones(2, device="meta"))
    torch.set_default_dtype(default)
    try:
        optimizer = torch.optim.AdamW([p], foreach=False if not flags.get("fused") else None, **flags)
        zeros = {"w": np.zeros(2, np.float32)}
        import_state(optimizer, {"w": p}, export_state(optimizer, {"w": p})[0], State(7, zeros, zeros))
    finally:
        torch.set_default_dtype(torch.float32)
    step = optimizer.state[p]["step"]
    assert step.device.type == ("meta" if flags else "cpu")
    assert step.dtype == (torch.float32 if flags.get("fused") else default)
    assert step.shape == ()
    assert flags or step == 7


# The state_dict of Adam in ACProp


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (torch.optim.AdamW, {"weight_decay": 0.1}),
        (torch.optim.Adam, {}),
        (torch.optim.Adam, {"weight_decay": 0.1}),  # the L2 form
        pytest.param(torch.optim.Adam, {"weight_decay": 0.1, "decoupled_weight_decay": True}, marks=needs_form),
        (torch.optim.AdamW, {"weight_decay": 0.1, "maximize": True}),
        (torch.optim.Adam, {"weight_decay": 0.1, "maximize": True}),
    ],
)
def test_acprop_loads_a_state_dict_of_adam(cls: Any, options: dict[str, Any], way: str, dtype: torch.dtype) -> None:
    if way == "fused" and dtype.is_complex:
        pytest.skip("fused steps take no complex parameters, torch's included")
    params, others, late = starts(dtype), starts(dtype), torch.ones(2, dtype=dtype, requires_grad=True)
    optimizer = cls(
        [{"params": params[:2], "lr": 0.01}, {"params": [*params[2:], late]}], **OPTIONS, **options, **WAYS[way]
    )
    # before torch 2.7 a state_dict does not say which form of the decay it is of
    form = {} if HAS_FORM else {"decoupled_weight_decay": cls is torch.optim.AdamW}
    groups = [{"params": others[:2]}, {"params": [*others[2:], late]}]
    other = ACProp(groups, asynchronous=False, centering="none", **form)
    step_of(optimizer, params, 0, HALF)
    saved = optimizer.state_dict()
    before = repr(saved)
    other.load_state_dict(saved)
    assert repr(saved) == before
    for a, b in zip(params, others, strict=True):
        b.data.copy_(a.data)
    for mine, theirs in zip(other.param_groups, optimizer.param_groups, strict=True):
        assert mine["eps_root"] == 0.0
        assert "amsgrad" not in mine
        for key in ("lr", "betas", "eps", "weight_decay", "decoupled_weight_decay", "maximize", "foreach", "fused"):
            if key in theirs or HAS_FORM:
                assert mine[key] == theirs[key]
    assert late not in other.state
    step_of(optimizer, params, HALF, HALF)
    step_of(other, others, HALF, HALF)
    for a, b in zip(params, others, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-15)
        assert {*other.state[b]} == {"step", "exp_avg", "exp_avg_var"}
        assert other.state[b]["step"] == ALL


def test_acprop_keeps_the_options_that_adam_lacks_and_widens_its_moments() -> None:
    p = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    adam = torch.optim.AdamW([p])
    step_of(adam, [p], 0)
    for wanted in (None, torch.float64, torch.bfloat16):
        other = ACProp([p], clip_exponent=0.25, compensate=True, moment_dtype=wanted, **FLAGS)
        other.load_state_dict(adam.state_dict())
        assert (other.param_groups[0]["clip_exponent"], other.param_groups[0]["compensate"]) == (0.25, True)
        for mine, theirs in (("exp_avg", "exp_avg"), ("exp_avg_var", "exp_avg_sq")):
            assert other.state[p][mine].dtype == (wanted or torch.float32)
            assert torch.equal(other.state[p][mine], adam.state[p][theirs].to(wanted or torch.float32))


def test_state_dicts_of_older_versions_lack_the_form_of_the_decay() -> None:
    p = torch.ones(3, requires_grad=True)
    saved = torch.optim.Adam([p], weight_decay=0.1).state_dict()
    saved["param_groups"][0].pop("decoupled_weight_decay", None)
    for decoupled in (True, False):
        other = ACProp([p], decoupled_weight_decay=decoupled, **FLAGS)
        other.load_state_dict(saved)
        assert other.param_groups[0]["decoupled_weight_decay"] is decoupled


# Names, parameters without a state, hyperparameters


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))


def trained(model: Any, optimizer: Any, n: int = 3) -> Any:
    step_of(optimizer, [p for p in model.parameters() if p.requires_grad], 0, n)
    return optimizer


def distributed(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    return get_optimizer_state_dict(model, optimizer)


@pytest.mark.parametrize(
    "cls",
    [
        pytest.param(DECOUPLED, marks=needs_form),
        pytest.param(torch.optim.AdamW, marks=needs_form),
        functools.partial(ACProp, **FLAGS),
        ACProp,
    ],
)
def test_a_state_dict_is_exported_as_its_optimizer(cls: Any) -> None:
    model = network()
    model[0].bias.requires_grad_(False)  # takes no step
    named = list(model.named_parameters())
    two = [{"params": named[::-2]}, {"params": named[:-1][::-2], "weight_decay": 0.5}]
    # without names only the model's own order can be known
    for groups in (model.parameters(), *((named, named[::-1], named[1:], two) if HAS_NAMES else ())):
        optimizer = trained(model, cls(groups, lr=torch.tensor(0.25), weight_decay=0.0))
        exported = export_state(optimizer, model)
        assert exported[1].mu["0.bias"] is None
        assert exported[0].learning_rate == 0.25
        for state_dict in (optimizer.state_dict(), distributed(optimizer, model)):
            saved, state = export_state(state_dict, model)
            assert saved == exported[0]
            assert list(state.mu) == list(exported[1].mu)
            assert_same_bits(state, exported[1])
    # for the model without content too, of which only names and shapes are read
    assert_same_bits(export_state(optimizer.state_dict(), copy.deepcopy(model).to("meta"))[1], exported[1])


def test_the_groups_of_adam_become_a_mask() -> None:
    model = network()
    weights, biases = ([p for p in model.parameters() if p.ndim == n] for n in (2, 1))
    groups = [{"params": weights}, {"params": biases, "weight_decay": 0.0}]
    optimizer = trained(model, torch.optim.AdamW(groups, lr=0.5, betas=(torch.tensor(0.5), torch.tensor(0.75))))
    saved, state = export_state(optimizer, model)
    mask = {name: name.endswith("weight") for name in SHAPES}
    assert saved == acprop_core.ACProp(0.5, 0.5, 0.75, 1e-8, weight_decay=0.01, mask=mask, **FLAGS)
    other = torch.optim.Adam([{"params": weights}, {"params": biases}], weight_decay=0.3)
    if not HAS_FORM:
        with pytest.raises(ValueError, match="weight_decay=0.01 of the saved state is decoupled, which Adam of torch"):
            import_state(other, model, saved, state, prefer="saved")
        return
    import_state(other, model, saved, state, prefer="saved")
    assert export_state(other, model)[0] == saved
    assert [group["decoupled_weight_decay"] for group in other.param_groups] == [True, True]
    assert {*other.param_groups[0]} == {*torch.optim.Adam([weights[0]]).param_groups[0]}  # no option of ours


def test_a_decoupled_decay_does_not_become_one_of_the_l2_form() -> None:
    """As before torch 2.7, where Adam had no option of this name."""
    model = network()
    saved, state = export_state(trained(model, torch.optim.AdamW(model.parameters())), model)
    other = torch.optim.Adam(model.parameters())
    other.param_groups[0].pop("decoupled_weight_decay", None)
    with pytest.raises(ValueError, match="weight_decay=0.01 of the saved state is decoupled, which Adam of torch"):
        import_state(other, model, saved, state, prefer="saved")
    assert other.param_groups[0]["weight_decay"] == 0.0
    assert not other.state


def test_own_hyperparameters_can_be_preferred() -> None:
    model = network()
    saved, state = export_state(trained(model, ACProp(model.parameters(), clip_exponent=0.25)), model)
    other = torch.optim.AdamW(model.parameters())
    before = repr(other.param_groups)
    import_state(other, model, saved, state, prefer="own")
    assert repr(other.param_groups) == before
    np.testing.assert_array_equal(other.state[model[0].bias]["exp_avg_sq"], state.nu["0.bias"])
    wide = acprop_core.ACProp(1e-3, eps=1e-8, weight_decay=0.01, moment_dtype="float32", **FLAGS)
    import_state(other, model, wide, state, prefer="saved")  # which is the dtype that its moments have


def test_moments_of_16_bits_among_wider_ones() -> None:
    """One moment_dtype cannot say it, the arrays do."""
    model = {"w": torch.ones(3, requires_grad=True), "h": torch.ones(3, dtype=torch.bfloat16, requires_grad=True)}
    optimizer = torch.optim.AdamW(model.values())
    step_of(optimizer, list(model.values()), 0)
    saved, state = export_state(optimizer, model)
    assert saved.moment_dtype is None
    assert [str(x.dtype) for x in state.nu.values()] == ["float32", "bfloat16"]
    again = torch.optim.AdamW(model.values())
    import_state(again, model, saved, state)
    assert kept(again) == kept(optimizer)
    options = {"eps": 1e-8, "weight_decay": 0.01, **FLAGS}
    ours = ACProp(model.values(), **options)
    with pytest.raises(TypeError, match="first moment of 'h' has dtype bfloat16, here it is float32; set moment_dtype"):
        import_state(ours, model, saved, state)
    wide = State(state.count, *({name: x.astype("f4") for name, x in tree.items()} for tree in state[1:3]))
    import_state(ours, model, saved, wide)
    assert ours.state[model["h"]]["exp_avg"].dtype == torch.float32
    with pytest.raises(TypeError, match="first moment of 'h' has dtype float32, here it is bfloat16"):
        import_state(again, model, saved, wide)


# Refusals


class World:
    """A run of AdamW, and one of ACProp, in their middle."""

    def __init__(self) -> None:
        self.model = network()
        self.adamw = trained(self.model, torch.optim.AdamW(named(self.model.named_parameters()), weight_decay=0.1))
        self.acprop = trained(self.model, ACProp(self.model.parameters(), **FLAGS))
        self.saved, self.state = export_state(self.adamw, self.model)

    def bits(self) -> Any:
        groups = [[without(group, "params") for group in x.param_groups] for x in (self.adamw, self.acprop)]
        return kept(self.adamw), kept(self.acprop), repr(groups)

    def group(self, **options: Any) -> None:
        self.adamw.param_groups[0].update(options)

    def export(self, optimizer: Any, model: Any = None) -> Any:
        return export_state(optimizer, model or self.model)

    def made(self, cls: Any = torch.optim.AdamW, **options: Any) -> Any:
        return trained(self.model, cls(self.model.parameters(), **options))

    def grouped(self, *options: dict[str, Any]) -> Any:
        """Return AdamW with a group for each of these options, without names."""
        params = list(self.model.parameters())
        parts = [params[i :: len(options)] for i in range(len(options))]
        groups = [{"params": part, **x} for part, x in zip(parts, options, strict=True)]
        return trained(self.model, torch.optim.AdamW(groups))

    def changed(self, change: Callable[[Any], Any]) -> Any:
        """Return the state_dict of AdamW, changed."""
        state_dict = copy.deepcopy(self.adamw.state_dict())
        change(state_dict)
        return state_dict

    def into_adamw(self, prefer: str | None = None, optimizer: Any = None, **options: Any) -> None:
        values = {"learning_rate": 1e-3, "eps": 1e-8, "weight_decay": 0.1, **FLAGS, **options}
        state = self.state
        if options.get("compensate"):
            state = state._replace(carry=dict.fromkeys(state.mu))
        import_state(optimizer or self.adamw, self.model, acprop_core.ACProp(**values), state, prefer=prefer)

    def load(self, state_dict: Any) -> None:
        self.acprop.load_state_dict(state_dict)


def late(world: World) -> Any:
    world.model.zero_grad()
    world.model[0].bias.requires_grad_(False)
    optimizer = world.made()
    world.model[0].bias.requires_grad_(True)
    step_of(optimizer, list(world.model.parameters()), 3)
    return optimizer


def unnamed(world: World, *, params: Any = None, **options: Any) -> dict[str, Any]:
    return trained(world.model, torch.optim.AdamW(params or world.model.parameters(), **options)).state_dict()


AMSGRAD = "of Adam has amsgrad=True: its steps divide by the largest second moment so far (max_exp_avg_sq)"
MAXIMIZE = "parameter group 0 of Adam has maximize=True: its first moment is the mean of the negated gradients, which"
L2 = "parameter group 0 has weight_decay=0.2 with decoupled_weight_decay=False, the L2 form"
NO_NAMES = "pass the optimizer itself, or make it with named_parameters()"
CANNOT = "torch.optim.Adam and AdamW cannot have "
INTO = "as the saved state has; import it into an acprop_torch.ACProp with these options, or use prefer='own'"
TO_LOAD = "load it into an optimizer of its class, and pass that"

# A row a line
# fmt: off
Bad = tuple[str, Callable[[World], Any], type[Exception], tuple[str, ...]]
EXPORTS: list[Bad] = [
    ("amsgrad", lambda w: w.export(w.made(amsgrad=True)), ValueError, ("parameter group 0", AMSGRAD)),
    ("amsgrad in a state_dict", lambda w: w.export(w.made(amsgrad=True).state_dict()), ValueError, (AMSGRAD,)),
    ("amsgrad of a group", lambda w: w.export(w.grouped({}, {"amsgrad": True})), ValueError,
     ("parameter group 1 of Adam has amsgrad=True",)),
    ("maximize", lambda w: w.export(w.made(maximize=True)), ValueError, (MAXIMIZE,)),
    ("maximize in a state_dict", lambda w: w.export(w.made(maximize=True).state_dict()), ValueError, (MAXIMIZE,)),
    ("ACProp with maximize", lambda w: w.export(w.made(ACProp, maximize=True).state_dict()), ValueError,
     ("parameter group 0 has maximize=True, which the other hosts do not have",)),
    ("L2", lambda w: w.export(w.made(torch.optim.Adam, weight_decay=0.2)), ValueError, (L2,)),
    ("L2 in a state_dict", lambda w: w.export(w.made(torch.optim.Adam, weight_decay=0.2).state_dict()), ValueError,
     (L2,)),
    ("rates", lambda w: w.export(w.grouped({"lr": 0.1}, {"lr": 0.2})), ValueError,
     ("parameter groups 0 and 1 have learning_rate 0.1 and 0.2",)),
    ("eps", lambda w: w.export(w.grouped({"eps": 0.1}, {"eps": 0.2})), ValueError, ("have eps 0.1 and 0.2",)),
    ("betas", lambda w: w.export(w.grouped({}, {"betas": (0.5, 0.6)})), ValueError,
     ("parameter groups 0 and 1 have b1 0.9 and 0.5, b2 0.999 and 0.6",)),
    ("decays", lambda w: w.export(w.grouped({"weight_decay": 0.1}, {"weight_decay": 0.2})), ValueError,
     ("parameter groups have weight_decay 0.1, 0.2",)),
    ("counts", lambda w: w.export(late(w)), ValueError, ("'0.bias' has taken 1 steps, '2.bias' 4",)),
    ("counts in a state_dict", lambda w: w.export(late(w).state_dict()), ValueError, ("'0.bias' has taken 1 steps",)),
    ("another model", lambda w: w.export(w.adamw, w.model[2]), ValueError,
     ("parameter group 0 has a parameter of shape (4, 3) that the model does not have",)),
    ("another optimizer", lambda w: w.export(w.made(torch.optim.NAdam)), TypeError,
     ("the optimizer is a NAdam; pass an acprop_torch.ACProp, a torch.optim.Adam or AdamW. If it wraps one",)),
    ("another's state_dict", lambda w: w.export(w.made(torch.optim.RAdam).state_dict()), ValueError,
     ("parameter group 0 lacks 'eps_root': it belongs to another optimizer",)),
    ("a model's state_dict", lambda w: w.export(w.model.state_dict()), ValueError, ("lacks a dict 'state' or a list",)),
    ("no model", lambda w: w.export(w.adamw.state_dict(), [1]), TypeError, ("the model is a list; pass a Module",)),
    ("two groups without names", lambda w: w.export(w.grouped({}, {"weight_decay": 0.0}).state_dict()), ValueError,
     ("the state_dict has no names, and groups of 2, 2 parameters, where the model has 4 in one order", NO_NAMES)),
    ("fewer without names", lambda w: w.export(unnamed(w, params=w.model[2].parameters())), ValueError,
     ("groups of 2 parameters, where the model has 4", NO_NAMES)),
    ("no groups", lambda w: w.export({"state": {}, "param_groups": []}), ValueError,
     ("groups of no parameters", NO_NAMES)),
    ("in another order", lambda w: w.export(unnamed(w, params=[*w.model.parameters()][::-1])), ValueError,
     ("exp_avg of parameter 0 has shape (2,), the parameter (4, 3); load the state of this model",)),
    ("names of another model", lambda w: w.export(w.adamw.state_dict(), w.model[2]), ValueError,
     ("parameter group 0 of the state_dict has '0.weight', which the model does not have; pass the model",)),
    ("a name twice", lambda w: w.export(w.changed(lambda s: s["param_groups"][0].update(param_names=["0.weight"] * 4))),
     ValueError, ("two arrays are called '0.weight'",)),
    ("no form of decay", lambda w: w.export(w.changed(lambda s: s["param_groups"][0].pop("decoupled_weight_decay", 0))),
     ValueError, ("parameter group 0 of the state_dict lacks 'decoupled_weight_decay'", TO_LOAD)),
    ("the authors'", lambda w: w.export({"state": {}, "param_groups": [
        {"params": [0], "lr": 0.1, "betas": (0.9, 0.9), "eps": 1e-8, "weight_decay": 0}]}), ValueError,
     ("parameter group 0 of the state_dict lacks 'maximize'", TO_LOAD)),
    ("a rate", lambda w: w.export(w.changed(lambda s: s["param_groups"][0].update(lr="x"))), TypeError,
     ("Invalid learning rate: 'x'; use a number for lr of parameter group 0",)),
    ("a step", lambda w: w.export(w.changed(lambda s: s["state"][1].update(step=2.5))), ValueError,
     ("step of parameter 1 is 2.5; load a whole number",)),
    ("a moment", lambda w: w.export(w.changed(lambda s: s["state"][1].update(exp_avg=None))), TypeError,
     ("exp_avg of parameter 1 is a NoneType; load a floating-point tensor",)),
    ("no second moment", lambda w: w.export(w.changed(lambda s: s["state"][1].pop("exp_avg_sq"))), ValueError,
     ("the state of parameter 1 lacks 'exp_avg_sq': it belongs to another optimizer",)),
    ("hyperparameters", lambda w: export_state(w.adamw, w.model, "x"), TypeError, ("the hyperparameters are a str",)),
]
IMPORTS: list[Bad] = [
    *((f"{name}, prefer={prefer}", lambda w, x={name: x}, prefer=prefer: w.into_adamw(prefer, **x), ValueError,
       (f"{CANNOT}{name}={x!r}, {INTO}",))
      for prefer in (None, "saved")
      for name, x in {"eps_root": 1e-16, "clip_exponent": 0.25, "compensate": True, "asynchronous": True,
                      "centering": "previous"}.items()),
    *((f"{name}: {x}", lambda w, x={name: x}: w.into_adamw(**x), ValueError,
       (f"hyperparameters differ: {name} is {own} here and {x} in the saved state",))
      for name, x, own in (("learning_rate", 0.5, 0.001), ("b1", 0.5, 0.9), ("b2", 0.5, 0.999), ("eps", 1e-6, 1e-08),
                           ("weight_decay", 0.2, 0.1))),
    ("mask", lambda w: w.into_adamw(mask={name: name != "0.bias" for name in SHAPES}), ValueError,
     ("mask of '0.bias' is True here and False in the saved state",)),
    ("moment_dtype", lambda w: w.into_adamw(moment_dtype="bfloat16"), ValueError,
     ("moment_dtype is None here and 'bfloat16' in the saved state",)),
    ("a mask within a group", lambda w: w.into_adamw("saved", mask={name: name != "0.bias" for name in SHAPES}),
     ValueError, ("some parameters of group 0 decay in the saved state and some do not",)),
    ("a schedule", lambda w: w.into_adamw("saved", learning_rate=rate), ValueError,
     ("the saved learning_rate is a callable, which a torch optimizer cannot have",)),
    ("prefer", lambda w: w.into_adamw("theirs"), ValueError, ("prefer is 'theirs'; use 'own' or 'saved'",)),
    *((f"amsgrad, prefer={prefer}", lambda w, prefer=prefer: w.into_adamw(prefer, w.made(amsgrad=True)), ValueError,
       ("parameter group 0", AMSGRAD, "use an optimizer without amsgrad")) for prefer in (None, "own", "saved")),
    ("maximize", lambda w: w.into_adamw("own", w.made(maximize=True)), ValueError, (MAXIMIZE,)),
    ("L2", lambda w: w.into_adamw(None, w.made(torch.optim.Adam, weight_decay=0.2)), ValueError, (L2, "prefer='own'")),
    ("no moment", lambda w: import_state(w.adamw, w.model, w.saved, w.state._replace(mu={}, nu={})), ValueError,
     ("the saved state lacks '0.weight'",)),
    ("dtype", lambda w: import_state(w.adamw, w.model, w.saved, w.state._replace(
        nu={name: x.astype(float) for name, x in w.state.nu.items()})), TypeError,
     ("second moment of '0.weight' has dtype float64, here it is float32",)),
    ("a state_dict", lambda w: import_state(w.adamw.state_dict(), w.model, w.saved, w.state), TypeError,
     ("the optimizer is a dict; pass an acprop_torch.ACProp",)),
]
LOADS: list[Bad] = [
    ("amsgrad", lambda w: w.load(unnamed(w, amsgrad=True)), ValueError,
     ("parameter group 0 comes from a run with amsgrad=True, which is another algorithm",)),
    *((str(flags), lambda w, flags=flags: ACProp(w.model.parameters(), **flags).load_state_dict(w.adamw.state_dict()),
       ValueError, (f"group 0 is of torch.optim.Adam or AdamW, whose moments mean something else with {words}",
                    "make this optimizer with asynchronous=False and centering='none', or start anew"))
      for flags, words in (({}, "asynchronous=True and centering='current', as here"),
                           ({"centering": "none"}, "asynchronous=True, as here"),
                           ({"asynchronous": False, "centering": "previous"}, "centering='previous', as here"))),
    ("groups", lambda w: w.load(w.grouped({}, {}).state_dict()), ValueError, ("different number of parameter groups",)),
    ("another optimizer", lambda w: w.load(w.made(torch.optim.NAdam).state_dict()), ValueError,
     ("parameter group 0 lacks 'eps_root': it belongs to another optimizer",)),
    ("no second moment", lambda w: w.load(w.changed(lambda s: s["state"][1].pop("exp_avg_sq"))), ValueError,
     ("the state of parameter 1 lacks 'exp_avg_sq'",)),
    ("a shape", lambda w: w.load(w.changed(lambda s: s["state"][1].update(exp_avg_sq=torch.ones(1)))), ValueError,
     ("exp_avg_var of parameter 1 has shape (1,), the parameter (4,)",)),
    ("a step", lambda w: w.load(w.changed(lambda s: s["state"][1].update(step="x"))), TypeError,
     ("step of parameter 1 is 'x'; load a number",)),
    ("a rate", lambda w: w.load(w.changed(lambda s: s["param_groups"][0].update(lr=float("nan")))), ValueError,
     ("Invalid learning rate: nan",)),
]
# fmt: on


def rows() -> Iterator[Any]:
    for prefix, table in (("export", EXPORTS), ("import", IMPORTS), ("load", LOADS)):
        for name, act, error, words in table:
            yield pytest.param(act, error, words, id=f"{prefix}: {name}")


@pytest.mark.parametrize(("act", "error", "words"), list(rows()))
def test_refusals_change_nothing(act: Callable[[World], Any], error: type[Exception], words: tuple[str, ...]) -> None:
    world = World()
    before = world.bits()
    with pytest.raises((TypeError, ValueError)) as caught:
        act(world)
    assert world.bits() == before
    missing = [word for word in words if word not in str(caught.value)]
    if missing and not HAS_FORM and "lacks 'decoupled_weight_decay'" in str(caught.value):
        pytest.skip("torch before 2.7: state_dicts of Adam lack the form of the decay, which is refused first")
    assert (type(caught.value), missing) == (error, []), str(caught.value)


def test_an_incomplete_state_is_refused() -> None:
    world = World()
    del world.adamw.state[world.model[0].bias]["exp_avg_sq"]
    with pytest.raises(ValueError, match="the state of parameter '0.bias' lacks 'exp_avg_sq'"):
        export_state(world.adamw, world.model)
