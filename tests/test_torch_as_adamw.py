"""What users of AdamW do, done with ACProp: AdamW itself is the yardstick of what is accepted."""

import pytest

pytest.importorskip("torch")

import copy
import io
import itertools
import os
import re
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import array_api_compat.torch
import numpy as np
import torch
from torch.optim import lr_scheduler

import acprop_core
from acprop_torch import ACProp, export_state, import_state
from hosts import (
    capturable_on_cpu,
    failing_torch_compile,
    forget_compiled_torch_step,
    interrupted_after_kernel,
    numba_not_found,
    numba_unusable,
    torch_operation,
    torch_threads,
)

BOTH = (ACProp, torch.optim.AdamW)


def parameter(size: int = 3, **options: Any) -> torch.Tensor:
    x = torch.ones(size, requires_grad=True, **options)
    x.grad = torch.ones_like(x)
    return x


# Positional arguments, and options spelt out


def test_positional_arguments_are_in_the_order_of_adamw() -> None:
    groups = [cls([parameter()], 0.01, (0.8, 0.95), 1e-6, 0.1).param_groups[0] for cls in BOTH]
    for name in ("lr", "betas", "eps", "weight_decay"):
        assert groups[0][name] == groups[1][name]
    assert groups[0]["eps_root"] == 1e-16
    with pytest.raises(TypeError, match="positional argument"):
        ACProp([parameter()], 0.01, (0.8, 0.95), 1e-6, 0.1, 1e-8)  # type: ignore[call-arg, misc]


def test_amsgrad_may_be_spelt_out_if_false() -> None:
    for cls in BOTH:
        cls([parameter()], amsgrad=False).step()
        cls([{"params": [parameter()], "amsgrad": False}]).step()
    with pytest.raises(ValueError, match="amsgrad is True, which is another algorithm than ACProp's; omit it"):
        ACProp([{"params": [parameter()], "amsgrad": True}])


# Rates that schedules leave below 0


def overshooting(optimizer: torch.optim.Optimizer) -> Any:
    return lr_scheduler.LambdaLR(optimizer, lambda t: 1.0 - t / 5)  # planned for five steps, and continued


def one_cycle(optimizer: torch.optim.Optimizer) -> Any:
    return lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=9, anneal_strategy="linear", three_phase=True)


def cosine(optimizer: torch.optim.Optimizer) -> Any:
    return lr_scheduler.CosineAnnealingLR(optimizer, T_max=3)


def below_zero(optimizer: torch.optim.Optimizer) -> Any:
    return lr_scheduler.CosineAnnealingLR(optimizer, T_max=5, eta_min=-1e-5)


def linear(start: float, total: int) -> Callable[[torch.optim.Optimizer], Any]:
    def make(optimizer: torch.optim.Optimizer) -> Any:
        return lr_scheduler.LinearLR(optimizer, start_factor=start, end_factor=0.0, total_iters=total)

    return make


LINEAR = [linear(start, total) for start, total in itertools.product((1.0, 1 / 3, 0.5), (3, 4, 5, 6, 7, 9, 11, 50))]
SCHEDULES = [*LINEAR, overshooting, one_cycle, cosine, below_zero]


@pytest.mark.parametrize("flags", [{}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("lr", [1e-3, torch.tensor(1e-3)], ids=["float", "tensor"])
def test_any_schedule_runs_that_runs_with_adamw(flags: dict[str, bool], lr: Any) -> None:
    if flags.get("foreach") and isinstance(lr, torch.Tensor):
        pytest.skip("refused, as by AdamW")
    negative = 0
    for make in SCHEDULES:
        rates = []
        for cls in BOTH:
            optimizer = cls([parameter()], lr=copy.deepcopy(lr), **flags)
            schedule = make(optimizer)
            rates.append([])
            for _ in range(55 if make in LINEAR else 9):
                optimizer.step()
                schedule.step()
                rates[-1].append(float(optimizer.param_groups[0]["lr"]))
        assert rates[0] == rates[1]
        negative += min(rates[0]) < 0.0
    assert negative > 4


@pytest.mark.parametrize("flags", [{}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_a_negative_value_at_a_step_has_the_effect_that_it_has_in_adamw(name: str, flags: dict[str, bool]) -> None:
    """The sign of the update turns. Without decay, the first step of both is minus the rate times the sign."""
    for cls in BOTH:
        x = parameter()
        optimizer = cls([x], **{"lr": 0.1, "weight_decay": 0.0, "eps": 1e-16}, **flags)
        optimizer.param_groups[0][name] = -0.5
        optimizer.step()
        torch.testing.assert_close(x.detach(), torch.full((3,), {"lr": 1.5, "weight_decay": 0.95}[name]))


def test_a_run_whose_rate_is_below_zero_is_saved_loaded_and_exported() -> None:
    model = torch.nn.ParameterDict({"a": torch.ones(3), "b": torch.ones(2)})

    def made() -> ACProp:
        groups = [{"params": [model["a"]]}, {"params": [model["b"]], "weight_decay": 0.0}]
        return ACProp(groups, lr=1e-3, weight_decay=0.1, clip_exponent=0.25)

    optimizer = made()
    for x in model.values():
        x.grad = torch.ones_like(x)
    optimizer.step()
    optimizer.param_groups[0].update(lr=-1.5e-20, weight_decay=-0.1)
    optimizer.param_groups[1].update(lr=-1.5e-20)
    optimizer.step()
    loaded, imported = made(), made()
    loaded.load_state_dict(optimizer.state_dict())
    hyper, state = export_state(optimizer, model)
    assert (hyper.learning_rate, hyper.weight_decay, hyper.mask) == (-1.5e-20, -0.1, {"a": True, "b": False})
    import_state(imported, model, hyper, state, prefer="saved")
    for resumed in (loaded, imported):
        resumed.step()
        assert [group["lr"] for group in resumed.param_groups] == [-1.5e-20] * 2
        assert [group["weight_decay"] for group in resumed.param_groups] == [-0.1, 0.0]


# Numbers of other libraries


def numbers(value: float) -> Iterator[Any]:
    for kind in (np.float16, np.float32, np.float64, np.longdouble):
        yield kind(value)
        yield np.array(value, kind)
    yield torch.tensor(value, dtype=torch.float64)
    if ml_dtypes := pytest.importorskip("ml_dtypes"):
        yield ml_dtypes.bfloat16(value)
        yield np.array(value, ml_dtypes.bfloat16)


class ListConfig(Sequence[float]):
    """A sequence that is not a list, as Hydra's."""

    def __init__(self, *values: float) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, i: Any) -> Any:
        return self.values[i]


PAIRS = [
    [0.5, 0.75],
    np.array([0.5, 0.75]),
    np.array([0.5, 0.75], np.float32),
    torch.tensor([0.5, 0.75]),
    ListConfig(0.5, 0.75),
    (np.float32(0.5), np.array(0.75)),
]
FLAGS = [{"foreach": False}, {"foreach": True}, {"fused": True}]


def trained(flags: dict[str, bool], made: dict[str, Any], later: dict[str, Any]) -> torch.Tensor:
    """Return a parameter after three steps, with some options from the start and some after the first step."""
    x = parameter()
    optimizer = ACProp([x], **{"lr": 0.5, "clip_exponent": 0.25, **made}, **flags)
    for i in range(3):
        x.grad = torch.linspace(-1.0, 1.0 + i, 3)
        optimizer.step()
        optimizer.param_groups[0].update(later)
    return x.detach()


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("name", ["lr", "eps", "eps_root", "weight_decay", "clip_exponent"])
def test_a_number_of_any_library_means_what_a_float_means(name: str, flags: dict[str, bool]) -> None:
    for value in numbers(0.25):
        if isinstance(value, torch.Tensor) and (name == "clip_exponent" or flags.get("foreach")):
            continue  # refused, the second as by AdamW
        assert torch.equal(trained(flags, {name: value}, {}), trained(flags, {name: 0.25}, {})), repr(value)
        assert torch.equal(trained(flags, {}, {name: value}), trained(flags, {}, {name: 0.25})), repr(value)


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: type(pair).__name__)
def test_any_sequence_of_two_is_a_pair_of_betas(pair: Any, flags: dict[str, bool]) -> None:
    if isinstance(pair, torch.Tensor) and flags.get("foreach"):
        pytest.skip("refused, as by AdamW")
    expected = trained(flags, {"betas": (0.5, 0.75)}, {})
    torch.testing.assert_close(trained(flags, {"betas": pair}, {}), expected)
    torch.testing.assert_close(trained(flags, {}, {"betas": pair}), trained(flags, {}, {"betas": (0.5, 0.75)}))
    optimizer = ACProp([parameter()], betas=pair)
    optimizer.add_param_group({"params": [parameter()], "betas": pair})
    for group in optimizer.param_groups:
        assert type(group["betas"]) is tuple
        assert group["betas"] == (0.5, 0.75)


def test_numbers_of_numpy_do_not_hinder_loading() -> None:
    options = {"lr": np.float64(0.5), "betas": np.array([0.5, 0.75]), "weight_decay": np.float32(0.25)}
    optimizer = ACProp([parameter()], **options)
    optimizer.add_param_group({"params": [parameter()], **options})
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, weights_only=True))


# Weight decay that changes


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_a_scheduler_may_write_weight_decay(flags: dict[str, bool]) -> None:
    """The synchronous and the asynchronous direction differ, their decay does not: with a gradient of 0 both decay."""
    for kind in (float, np.float32, torch.tensor):
        results = []
        for cls in BOTH:
            x = parameter()
            x.grad = torch.zeros_like(x)
            optimizer = cls([x], lr=0.5, weight_decay=0.0, **flags)
            for decay in (0.0, 0.25, 0.5, 0.0):
                optimizer.param_groups[0]["weight_decay"] = kind(decay)
                optimizer.step()
            results.append(x.detach())
        assert torch.equal(*results)
        assert results[0][0] == 0.875 * 0.75


# b1 = 0


def test_no_residual_is_warned_of_once() -> None:
    for betas in ((0, 0.99), (0.0, 0.9), (torch.tensor(0.0), torch.tensor(0.99))):
        groups = [{"params": [parameter()]}, {"params": [parameter()]}]
        with pytest.warns(UserWarning, match=r"betas\[0\] is 0 .* use clip_exponent=0.25, or") as caught:
            optimizer = ACProp(groups, betas=betas)
        assert len(caught) == 1
        assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match=r"betas\[0\] is 0") as caught:
        optimizer.add_param_group({"params": [parameter()], "betas": (0, 0.9)})
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            optimizer.step()
        optimizer.load_state_dict(copy.deepcopy(optimizer).state_dict())
        x = parameter()
        for remedy in ({"clip_exponent": 0.25}, {"centering": "previous"}):
            ACProp([x], betas=(0, 0.99), **remedy).step()


def test_a_run_without_residual_is_exported_without_a_warning() -> None:
    model = {"w": parameter()}
    with pytest.warns(UserWarning, match=r"betas\[0\] is 0"):
        optimizer = ACProp(model.values(), betas=(0.0, 0.99))
    optimizer.step()
    hyper, _ = export_state(optimizer, model)
    assert isinstance(hyper, acprop_core.ACProp)
    assert hyper.b1 == 0.0


# A step that fails or is interrupted before parameters change


def everything(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [x.detach().clone() for p in params for x in (p, *optimizer.state[p].values())]


def in_two_groups(begun: bool, **flags: Any) -> ACProp:
    """Return an optimizer of float32 and float64 parameters, which may have taken a step."""
    groups = [{"params": [parameter(3), parameter(70_000)]}, {"params": [parameter(4, dtype=torch.float64)]}]
    optimizer = ACProp(groups, lr=0.5, clip_exponent=0.25, foreach=False)
    if begun:
        optimizer.step()
    for group in optimizer.param_groups:
        group.update({"foreach": None, "fused": None, **flags})
    return optimizer


def assert_nothing_changes(optimizer: ACProp, error: type[BaseException], match: str, begun: bool) -> None:
    before = everything(optimizer)
    with pytest.raises(error, match=match):
        optimizer.step()
    after = everything(optimizer)
    if begun:
        assert all(map(torch.equal, before, after))
    params = [p for group in optimizer.param_groups for p in group["params"]]
    assert all((p == 1.0).all() or begun for p in params)
    assert {optimizer.state[p]["step"].item() for p in params if optimizer.state[p]} <= {float(begun)}


begun = pytest.mark.parametrize("begun", [False, True])


@begun
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("what", [RuntimeError, KeyboardInterrupt])
def test_a_compiler_that_fails_changes_nothing_in_any_group(
    begun: bool, dtype: torch.dtype, what: type[BaseException]
) -> None:
    forget_compiled_torch_step()
    optimizer = in_two_groups(begun, fused=True)
    try:
        with numba_not_found(), failing_torch_compile(what, dtype):
            match = "no working compiler"
            if what is RuntimeError:
                match = (
                    r"fused=True finds no compiler: Numba cannot be used \(.*\), and torch.compile raises RuntimeError "
                    r"\(no working compiler\); install one, or use fused=False"
                )
            assert_nothing_changes(optimizer, what, match, begun)
    finally:
        forget_compiled_torch_step()
    for group in optimizer.param_groups:
        group["fused"] = False
    twin = in_two_groups(begun)
    for x in (optimizer, twin):
        x.step()
    assert all(map(torch.equal, everything(optimizer), everything(twin)))


@begun
def test_threads_that_cannot_start_are_left_out(begun: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    from acprop_core.kernels import helpers, openmp

    optimizer, twin = in_two_groups(begun, fused=True), in_two_groups(begun, fused=True)
    twin.step()
    torch_threads(monkeypatch, 3, least=5)
    monkeypatch.setattr(openmp, "region", lambda: 0)  # whose threads are torch's own
    refused = []

    def refuse(thread: threading.Thread) -> None:
        refused.append(thread)
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(helpers, "_threads", [])
    monkeypatch.setattr(threading.Thread, "start", refuse)
    optimizer.step()
    assert refused
    assert all(map(torch.equal, everything(optimizer), everything(twin)))


@begun
@pytest.mark.parametrize("flags", [{"foreach": False}, {"foreach": True}, {"capturable": True}], ids=str)
@pytest.mark.parametrize("what", [RuntimeError, KeyboardInterrupt])
def test_a_failure_of_the_first_operation_changes_nothing(
    begun: bool, flags: dict[str, bool], what: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise what("no memory")

    with capturable_on_cpu():
        optimizer = in_two_groups(begun, **flags)
        monkeypatch.setattr(array_api_compat.torch, "sqrt", fail)
        torch_operation(monkeypatch, "sqrt", fail)
        assert_nothing_changes(optimizer, what, "no memory", begun)


def test_an_interrupt_after_the_kernel_finds_the_step_counted() -> None:
    pytest.importorskip("numba")
    optimizer = ACProp([x := parameter()], lr=0.5, fused=True)
    with interrupted_after_kernel(), pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert optimizer.state[x]["step"] == 1
    assert torch.equal(x.detach(), torch.full((3,), 0.5))


# Numba that is installed and cannot be used


def test_unusable_numba_is_warned_of_once_and_replaced_by_torch_compile() -> None:
    x, y = parameter(), parameter()
    optimizer = ACProp([x], lr=0.5, fused=True)
    with numba_unusable():
        with pytest.warns(
            RuntimeWarning, match="because Numba cannot be used: ImportError: Numba needs NumPy 1"
        ) as caught:
            optimizer.step()
        assert sum(warning.category is RuntimeWarning for warning in caught) == 1
        optimizer.step()
        ACProp([y], lr=0.5, fused=True).step()
    assert optimizer.state[x]["step"] == 2
    assert torch.equal(y.detach(), torch.full((3,), 0.5))


@pytest.mark.slow
@pytest.mark.parametrize("compiler", [None, "/nonexistent"])
def test_a_process_whose_numba_is_switched_off(compiler: str | None) -> None:
    program = """
import warnings, torch
from acprop_torch import ACProp
x = torch.ones(3, requires_grad=True)
x.grad = torch.ones(3)
optimizer = ACProp([x], lr=0.5, fused=True)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    try:
        optimizer.step()
        optimizer.step()
    except RuntimeError as error:
        print(error)
print(*[w.message for w in caught if w.category is RuntimeWarning], sep="\\n")
print(x.tolist(), optimizer.state[x]["step"].item())
"""
    pytest.importorskip("numba")
    with tempfile.TemporaryDirectory() as cache:  # no program of another run
        env = {**os.environ, "NUMBA_DISABLE_JIT": "1", "TORCHINDUCTOR_CACHE_DIR": cache}
        env |= {"CXX": compiler, "CC": compiler} if compiler else {}
        done = subprocess.run([sys.executable, "-c", program], env=env, check=True, capture_output=True, text=True)
    *said, last = done.stdout.splitlines()
    assert sum("fused=True compiles by torch.compile, because Numba cannot be used: " in line for line in said) == 1
    assert "NUMBA_DISABLE_JIT" in done.stdout
    if compiler:
        assert "fused=True finds no compiler: Numba cannot be used (" in said[0]
        assert last == "[1.0, 1.0, 1.0] 0.0"
    else:
        assert len(said) == 1
        assert last.endswith("2.0")


# States that were edited by hand, and tensors that cannot be stepped

EDITS: dict[str, tuple[Any, type[Exception], str]] = {
    "a list": ([0.0] * 4, TypeError, "is a list; load a floating-point tensor"),
    "None": (None, TypeError, "is a NoneType; load a floating-point tensor"),
    "integers": (torch.zeros(4, dtype=torch.int32), TypeError, "is a torch.int32; load a floating-point tensor"),
    "bools": (torch.zeros(4, dtype=torch.bool), TypeError, "is a torch.bool; load a floating-point tensor"),
    "complex": (torch.zeros(4, dtype=torch.complex64), TypeError, "is a torch.complex64; load a floating-point tensor"),
    "sparse": (torch.zeros(4).to_sparse(), ValueError, "is sparse; load a dense tensor"),
    "without values": (torch.zeros(4, device="meta"), ValueError, "is without values; load a dense tensor"),
    "expanded": (torch.zeros(1).expand(4), RuntimeError, "is expanded: several of its elements are one number"),
    "another shape": (torch.zeros(5), RuntimeError, r"have the shapes .*\(5,\)"),
    "no axis": (torch.zeros(()), RuntimeError, r"have the shapes .*\(\)"),
}


@pytest.mark.parametrize("flags", [{}, {"foreach": True}, {"fused": True}, {"capturable": True}], ids=str)
@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_var"])
@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_state_is_refused_before_any_group_has_stepped(edit: str, key: str, flags: dict[str, bool]) -> None:
    value, error, match = EDITS[edit]
    with capturable_on_cpu():
        optimizer = in_two_groups(begun=True, **flags)
        optimizer.step()
        before = everything(optimizer)
        p = optimizer.param_groups[1]["params"][0]
        good = optimizer.state[p][key]
        for _ in range(2):
            optimizer.state[p][key] = value
            with pytest.raises(error, match=match):
                optimizer.step()
            optimizer.state[p][key] = good
            assert all(map(torch.equal, before, everything(optimizer)))


@pytest.mark.parametrize("flags", [{}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_var", "step"])
def test_a_state_that_lacks_a_part_is_refused(key: str, flags: dict[str, bool]) -> None:
    optimizer = in_two_groups(begun=True, **flags)
    del optimizer.state[optimizer.param_groups[1]["params"][0]][key]
    before = everything(optimizer)
    with pytest.raises(ValueError, match=f"the state of parameter 0 of its group lacks '{key}'; clear"):
        optimizer.step()
    assert all(map(torch.equal, before, everything(optimizer)))


@pytest.mark.parametrize("flags", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_a_carry_that_is_a_list_is_refused(flags: dict[str, bool]) -> None:
    x = parameter(dtype=torch.bfloat16)
    optimizer = ACProp([x], compensate=True, **flags)
    optimizer.step()
    optimizer.state[x]["carry"] = [0.0] * 3
    with pytest.raises(TypeError, match="carry of parameter 0 of its group is a list; load a floating-point tensor"):
        optimizer.step()


@pytest.mark.parametrize("flags", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_a_parameter_that_is_expanded_later_is_refused_as_by_adamw(flags: dict[str, bool]) -> None:
    for cls in BOTH if not flags.get("fused") else (ACProp,):  # AdamW's fused step writes past its end
        first, x = parameter(), parameter()
        optimizer = cls([{"params": [first]}, {"params": [x]}], lr=0.5, foreach=False)
        optimizer.step()
        for group in optimizer.param_groups:
            group.update({"foreach": None, **flags})
        x.data = torch.ones(1).expand(3)
        before = first.detach().clone()
        with pytest.raises(RuntimeError, match="is expanded" if cls is ACProp else "more than one element|overlap"):
            optimizer.step()
        assert cls is not ACProp or torch.equal(first, before)


@pytest.mark.parametrize("flags", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_jagged_tensors_are_called_by_their_name(flags: dict[str, bool]) -> None:
    offsets = torch.tensor([0, 2, 5])
    x, g = (torch.nested.nested_tensor_from_jagged(torch.ones(5), offsets) for _ in range(2))
    x.requires_grad_()
    x.grad = g
    with pytest.raises(RuntimeError, match="parameter 0 of its group is a nested tensor"):
        ACProp([x], **flags).step()
    with pytest.raises(NotImplementedError):
        torch.optim.AdamW([x], **flags).step()


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
def test_complex_numbers_of_16_bits_are_refused_by_name() -> None:
    x = torch.ones(2).to(torch.complex32)
    x.grad = torch.ones(2).to(torch.complex32)
    with pytest.raises(TypeError, match=r"has dtype torch.complex32, which ACProp cannot use; use one of"):
        ACProp([x]).step()


# Parameters that grow


@pytest.mark.parametrize("flags", [{}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("clip", [None, 0.25])
def test_the_recipe_for_a_parameter_that_grows(clip: float | None, flags: dict[str, bool]) -> None:
    """Without the clip, moments of zeros explode at a count above 0."""
    page = (Path(__file__).parents[1] / "docs" / "torch.md").read_text()
    (recipe,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "torch.cat" in block)
    x = parameter()
    optimizer = ACProp([{"params": [x]}], lr=1e-3, clip_exponent=clip, **flags)
    for i in range(10):
        x.grad = torch.linspace(-1.0, 1.0 + i, 3)
        optimizer.step()
    moments = optimizer.state[x]["exp_avg"].clone()
    names = {"optimizer": optimizer, "old": x, "rows": torch.ones(2)}
    exec("new = " + recipe.split("\nnew = ")[-1], {"torch": torch, **names})
    (grown,) = optimizer.param_groups[0]["params"]
    assert grown.shape == (5,)
    assert torch.equal(optimizer.state[grown]["exp_avg"], torch.cat([moments, torch.zeros(2)]))
    assert optimizer.state[grown]["step"] == 10
    grown.grad = torch.ones(5)
    optimizer.step()
    moved = (grown.detach()[3:] - 1.0).abs().max()
    assert moved > 1e4 if clip is None else moved <= 1e-3 * 11**0.25 * 1.0001
