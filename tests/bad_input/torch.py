"""Bad input of acprop_torch."""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import acprop_torch
from acprop_core import ACProp
from bad_input.core import PLACES, of
from bad_input.rows import (
    AN_ARRAY,
    CENTERING,
    CORE_ACPROP,
    COUNT,
    INTEGER,
    KINDS,
    MINUS_ONE,
    NUMBER_OR_NONE,
    OWN_ERROR,
    OWN_OR_SAVED,
    RANGE,
    SOME_KIND,
    SOME_NUMBER,
    TRUE_OR_FALSE,
    Bad,
    From,
    bad,
    boom,
    leaves,
    table,
)
from hosts import named, torch_version

FLAGS: dict[str, dict[str, bool]] = {
    "torch_optimizer": {},
    "torch_foreach": {"foreach": True},
    "torch_fused": {"fused": True},
}


def ones(size: int = 2) -> Any:
    return torch.ones(size, requires_grad=True)


class Torch:
    """The torch optimizer in the middle of a run: a group with parameter "a" and one with "b"."""

    def __init__(self, backend: str) -> None:
        start = {"a": torch.linspace(-1.0, 1.0, 4), "b": torch.linspace(2.0, 3.0, 6).reshape(2, 3)}
        self.model = torch.nn.ParameterDict(start)
        self.a, self.b = self.model["a"], self.model["b"]
        groups = [{"params": named([pair])} for pair in self.model.items()]
        self.optimizer = acprop_torch.ACProp(groups, lr=0.1, **FLAGS[backend])
        self.grads = torch.linspace(0.1, 0.4, 4), -torch.linspace(0.1, 0.6, 6).reshape(2, 3)
        self.data = self.a.data, self.b.data
        self.options = [dict(group) for group in self.optimizer.param_groups]
        self.mend()
        self.step()
        self.step()

    def step(self) -> None:
        self.optimizer.step()

    def mend(self) -> None:
        """Put back the objects that a row has exchanged; what has been written into them stays."""
        for p, grad, data in zip((self.a, self.b), self.grads, self.data, strict=True):
            p.data, p.grad = data, grad
        for group, options in zip(self.optimizer.param_groups, self.options, strict=True):
            group.update(options)

    def bits(self) -> Any:
        state = self.optimizer.state_dict()
        return leaves(self.data), leaves(self.grads), leaves(state["state"]), repr(state["param_groups"])

    def new(self, **options: Any) -> None:
        acprop_torch.ACProp([ones()], **options)

    def parameters(self, params: Any) -> None:
        acprop_torch.ACProp(params)

    def first_step(self, param: torch.Tensor, **options: Any) -> None:
        """Take a step with another optimizer."""
        param.grad = param.clone()
        acprop_torch.ACProp([param], **options).step()

    def add_group(self, group: Any) -> None:
        self.optimizer.add_param_group(group)

    def add_parameter(self, name: str, **options: Any) -> None:
        """Add a group with one more parameter and these options."""
        self.add_group({"params": named([(name, ones())]), **options})

    def group_option(self, **options: Any) -> None:
        """Take a step after someone, or a scheduler, has put these options into a group."""
        self.optimizer.param_groups[1].update(options)
        self.step()

    def grad(self, grad: Any) -> None:
        self.b.grad = grad
        self.step()

    def resized(self, shape: tuple[int, ...]) -> None:
        self.b.data = torch.ones(shape)
        self.step()

    def closure(self, closure: Any) -> None:
        self.optimizer.step(closure)

    def load(self, state_dict: Any) -> None:
        self.optimizer.load_state_dict(state_dict)

    def load_changed(self, change: Callable[[Any], Any]) -> None:
        """Load what the function makes of the own state_dict, or the state_dict that it changes in place."""
        state_dict = copy.deepcopy(self.optimizer.state_dict())
        changed = change(state_dict)
        self.load(changed if isinstance(changed, dict) else state_dict)

    def load_state(self, **state: Any) -> None:
        """Load the own state_dict with other entries for "b"."""
        state_dict = copy.deepcopy(self.optimizer.state_dict())
        state_dict["state"][1].update(state)
        self.load(state_dict)

    def load_group(self, **options: Any) -> None:
        """Load the own state_dict with other options for a group."""
        state_dict = copy.deepcopy(self.optimizer.state_dict())
        state_dict["param_groups"][1].update(options)
        self.load(state_dict)

    def export(self) -> Any:
        return acprop_torch.export_state(self.optimizer, self.model)

    def import_into(self, optimizer: Any) -> None:
        acprop_torch.import_state(optimizer, self.model, *self.export())

    def import_for(self, model: Any) -> None:
        acprop_torch.import_state(self.optimizer, model, *self.export())

    def import_swapped(self) -> None:
        acprop_torch.import_state(self.optimizer, self.model, *reversed(self.export()))

    def import_state(self, saved: Any = None, prefer: str | None = None, **replace: Any) -> None:
        """Import the own state with another count or moments, or under other hyperparameters."""
        own, state = self.export()
        acprop_torch.import_state(self.optimizer, self.model, saved or own, state._replace(**replace), prefer=prefer)

    def import_leaf(self, name: str, leaf: Any) -> None:
        """Import the own state with another first moment for one name."""
        self.import_state(mu={**self.export()[1].mu, name: leaf})

    def export_of(self, optimizer: Any) -> None:
        acprop_torch.export_state(optimizer, self.model)

    def export_with(self, hyperparameters: Any) -> None:
        acprop_torch.export_state(self.optimizer, self.model, hyperparameters)


FLOAT_OR_TENSOR = "use a number, or a tensor of one real number"
RATE = "Invalid beta parameter at index "
RETURNED = "pass the dict that state_dict() of ACProp returned"
AN_OPTIMIZER = "pass an acprop_torch.ACProp"
A_DTYPE = "use a torch.dtype or None"
A_MODULE = "pass a Module"
WHOLE_NUMBER = "load a whole number"
ONE_NUMBER = "load a number, or a floating-point tensor of one"
A_TENSOR = "load a floating-point tensor"
USABLE = "which ACProp cannot use; use one of torch.float16"
ONLY_TENSORS = "can only optimize Tensors"
ONLY_FLOATING = "`fused=True` requires all the params to be floating point Tensors"
DICTS = "list of dicts"
SHAPES = "a parameter, its gradient, exp_avg and exp_avg_var have the shapes {}, (2, 3), (2, 3), (2, 3); clear"
TORCH_NAMES = {
    "lr": "learning rate",
    "eps": "epsilon value",
    "eps_root": "eps_root value",
    "weight_decay": "weight_decay value",
}

# A row a line
# fmt: off

# The functional core
SPARSE = [
    ("sparse", torch.eye(2, 3).to_sparse(), TypeError, "is sparse (torch.sparse_coo); make it dense: to_dense()"),
]
ELSEWHERE = [
    ("on another device", torch.ones((2, 3), device="meta"), TypeError,
     "is on meta, its parameter on cpu; move one of them"),
]
TORCH_CORE: list[Bad] = [
    *(row for what in (*PLACES, "parameter") for row in table(f"{what}: ", "put", "leaf", SPARSE, of(what), what=what)),
    *(row for what in PLACES for row in table(f"{what}: ", "put", "leaf", ELSEWHERE, of(what), what=what)),
    bad("parameter: an 8-bit float", "put", {"what": "parameter", "leaf": torch.ones(2).to(torch.float8_e4m3fn)},
        TypeError, "parameter 'w' has dtype float8_e4m3fn", KINDS),
    *table("parameters: ", "init", "params", [
        ("a module", torch.nn.Linear(2, 2), TypeError, "parameter is a Linear", "not an array"),
        ("a generator of them", From(lambda w: torch.nn.Linear(2, 2).parameters()), TypeError,
         "parameter is a generator", "not an array"),
        ("of NumPy and torch", {"a": np.ones(2), "b": torch.ones(2)}, TypeError,
         "parameter 'b' is an array of torch, parameter 'a' is an array of numpy; convert one of them"),
    ]),
]

# Options that the constructor, and a new group, refuse
NUMBERS = [
    ("negative", -1.0, ValueError, f"-1.0; {RANGE}"),
    ("NaN", math.nan, ValueError, f"nan; {RANGE}"),
    ("infinite", math.inf, ValueError, f"inf; {RANGE}"),
    ("beyond floats", 10**400, ValueError, RANGE),
    ("a string", "0.1", TypeError, f"'0.1'; {SOME_NUMBER} for"),
    ("None", None, TypeError, f"None; {SOME_NUMBER} for"),
    ("a bool", True, TypeError, f"True; {SOME_NUMBER} for"),
    ("complex", 1j, TypeError, f"1j; {SOME_NUMBER} for"),
    ("a list", [0.1], TypeError, f"[0.1]; {SOME_NUMBER} for"),
    ("an array of NumPy", np.asarray([0.1]), TypeError, f"{SOME_NUMBER} for"),
    ("a negative tensor", torch.tensor(-1.0), ValueError, f"-1.0; {RANGE}"),
    ("a tensor of NaN", torch.tensor(math.nan), ValueError, f"nan; {RANGE}"),
    ("a complex tensor", torch.tensor(1j), TypeError, FLOAT_OR_TENSOR),
    ("a bool tensor", torch.tensor(True), TypeError, FLOAT_OR_TENSOR),
    ("a tensor without value", torch.tensor(0.1, device="meta"), TypeError, f"{SOME_NUMBER}, or a tensor"),
]
SIZES = [("two elements", 2), ("no element", 0)]
PAIR = ("Invalid betas: ", "use two decay rates, such as (0.9, 0.999)")
BOTH_KINDS = "betas must be either both floats or both Tensors"
BETAS: list[tuple[Any, ...]] = [
    (None, ValueError, *PAIR),
    (0.9, ValueError, *PAIR),
    ("ab", ValueError, *PAIR),
    ({0.9: 0.99}, ValueError, *PAIR),
    ((0.9,), ValueError, *PAIR),
    ((0.9, 0.99, 0.999), ValueError, *PAIR),
    ((1.0, 0.9), ValueError, f"{RATE}0: 1.0", "below 1"),
    ((0.9, 1), ValueError, f"{RATE}1: 1;", "below 1"),
    ((0.9, -0.1), ValueError, f"{RATE}1: -0.1", "at least 0"),
    ((math.nan, 0.9), ValueError, f"{RATE}0: nan", "at least 0"),
    (("a", 0.9), TypeError, f"{RATE}0: 'a'", f"{SOME_NUMBER} for betas[0]"),
    ((0.9, None), TypeError, f"{RATE}1: None", f"{SOME_NUMBER} for betas[1]"),
    ((False, 0.9), TypeError, f"{RATE}0: False", f"{SOME_NUMBER} for betas[0]"),
]
NO_LISTS = "as a Tensor is not supported for capturable=False and foreach=True"
OTHERS = [
    ("maximize", 1, TypeError, f"maximize is 1; {TRUE_OR_FALSE}"),
    ("foreach", torch.tensor(True), TypeError, f"foreach is tensor(True); {TRUE_OR_FALSE}"),
    ("clip_exponent", -0.5, ValueError, f"clip_exponent is -0.5; {RANGE}"),
    ("clip_exponent", math.nan, ValueError, f"clip_exponent is nan; {RANGE}"),
    ("clip_exponent", "0.25", TypeError, f"clip_exponent is '0.25'; {NUMBER_OR_NONE}"),
    ("clip_exponent", [0.25], TypeError, f"clip_exponent is [0.25]; {NUMBER_OR_NONE}"),
    ("clip_exponent", torch.tensor(0.25), TypeError, NUMBER_OR_NONE),
    ("clip_exponent", True, TypeError, f"clip_exponent is True; {SOME_NUMBER}"),
    ("centering", "next", ValueError, f"centering is 'next'; {CENTERING}"),
    ("centering", None, ValueError, f"centering is None; {CENTERING}"),
    ("centering", ["current"], ValueError, f"centering is ['current']; {CENTERING}"),
    ("asynchronous", None, TypeError, f"asynchronous is None; {TRUE_OR_FALSE}"),
    ("asynchronous", [True], TypeError, f"asynchronous is [True]; {TRUE_OR_FALSE}"),
    ("compensate", [True], TypeError, f"compensate is [True]; {TRUE_OR_FALSE}"),
    ("moment_dtype", "float32", TypeError, f"moment_dtype is 'float32'; {A_DTYPE}"),
    ("moment_dtype", np.float32, TypeError, A_DTYPE),
    ("moment_dtype", torch.int32, ValueError, f"moment_dtype is torch.int32; {SOME_KIND}"),
    ("moment_dtype", torch.complex64, ValueError, f"moment_dtype is torch.complex64; {SOME_KIND}"),
    ("amsgrad", True, ValueError, "amsgrad is True, which is another algorithm than ACProp's; omit it, or use torch"),
    ("nesterov", True, TypeError, "unexpected keyword argument 'nesterov'"),
]
TORCH_OPTIONS: list[Bad] = [
    *(row for name, what in TORCH_NAMES.items()
      for row in table(f"{name}: ", "new", name, NUMBERS, f"Invalid {what}: ")),
    *(bad(f"{name}: a tensor of {kind}", "new", {name: torch.ones(size)}, ValueError,
          f"Tensor {name} must be 1-element") for name in TORCH_NAMES for kind, size in SIZES),
    *(bad(f"betas: {betas}", "new", {"betas": betas}, error, *words) for betas, error, *words in BETAS),
    *table("betas: ", "new", "betas", [
        ("a tensor of three", torch.tensor([0.9, 0.99, 0.9]), ValueError, *PAIR),
        ("a matrix", np.full((2, 2), 0.9), ValueError, *PAIR),
        ("a set", {0.9, 0.99}, ValueError, *PAIR),
        ("b1 a tensor", (torch.tensor(0.9), 0.99), ValueError, BOTH_KINDS),
        ("b2 a tensor", (0.9, torch.tensor(0.99)), ValueError, BOTH_KINDS),
        ("a tensor of two elements", (torch.tensor(0.9), torch.tensor([0.9, 0.9])), ValueError,
         "Tensor betas[1] must be 1-element"),
        ("a tensor of 1", (torch.tensor(1.0), torch.tensor(0.9)), ValueError, f"{RATE}0: 1.0", "below 1"),
    ]),
    *(bad(f"{name}: a string", "new", {name: "no"}, TypeError, f"{name} is 'no'; {TRUE_OR_FALSE}")
      for name in ("decoupled_weight_decay", "maximize", "foreach", "capturable", "differentiable", "fused")),
    *(bad(f"{name}: {words}", "new", {name: x}, error, words) for name, x, error, words in OTHERS),
    bad("fused and differentiable", "new", {"fused": True, "differentiable": True}, RuntimeError,
        "`fused` does not support `differentiable`"),
    bad("fused and foreach", "new", {"fused": True, "foreach": True}, RuntimeError,
        "`fused` and `foreach` cannot be `True` together"),
    bad("foreach: lr a tensor", "new", {"lr": torch.tensor(0.1), "foreach": True}, ValueError, f"lr {NO_LISTS}"),
    bad("foreach: betas tensors", "new", {"betas": (torch.tensor(0.9), torch.tensor(0.9)), "foreach": True},
        ValueError, f"betas[0] {NO_LISTS}"),
]

# What cannot be parameters, or a new group of them
TORCH_PARAMETERS: list[Bad] = [
    *table("parameters: ", "parameters", "params", [
        ("a string", "x", TypeError, ONLY_TENSORS, "is str"),
        ("a tensor", ones(), TypeError, "should be an iterable of Tensors or dicts"),
        ("none", [], ValueError, "empty parameter list"),
        ("numbers", [1.0], TypeError, ONLY_TENSORS, "is float"),
        ("of NumPy", [np.ones(2)], TypeError, ONLY_TENSORS, "numpy.ndarray"),
        ("a None", [None], TypeError, ONLY_TENSORS, "NoneType"),
        ("a dict of them", {"w": ones()}, TypeError, ONLY_TENSORS, "is str"),
        ("no leaf", From(lambda w: [ones() * 2]), ValueError, "can't optimize a non-leaf Tensor"),
        ("a group's set", [{"params": {ones()}}], TypeError, "ordered collections"),
        ("a group whose lr is negative", From(lambda w: [{"params": [ones()], "lr": -1.0}]), ValueError,
         "Invalid learning rate: -1.0"),
    ]),
    *([] if torch_version() < (2, 6) else [bad("parameters: named and not", "parameters",
        {"params": [("a", ones()), ones()]}, ValueError, "names are missing")]),
    *table("parameters: ", "first_step", "param", [
        ("int", From(lambda w: torch.ones(2, dtype=torch.int32)), TypeError,
         "parameter 0 of its group has dtype torch.int32", USABLE),
        ("an 8-bit float", From(lambda w: torch.ones(2).to(torch.float8_e4m3fn)), TypeError,
         "parameter 0 of its group has dtype torch.float8_e4m3fn", USABLE),
    ]),
    bad("parameters: bool", "first_step",
        {"param": From(lambda w: torch.ones(2, dtype=torch.bool)), "foreach": True}, TypeError,
        "parameter 0 of its group has dtype torch.bool", USABLE),
    *table("parameters: ", "first_step", "param", [
        ("complex and fused", From(lambda w: torch.ones(2, dtype=torch.complex64)), RuntimeError, ONLY_FLOATING),
        ("without values and fused", From(lambda w: torch.ones(2, device="meta")), RuntimeError, ONLY_FLOATING),
    ], fused=True),
    bad("capturable on a CPU", "first_step", {"param": From(lambda w: torch.ones(2)), "capturable": True},
        AssertionError, "If capturable=True, params and state_steps must be on supported devices"),
    bad("foreach and differentiable", "first_step",
        {"param": From(lambda w: torch.ones(2)), "foreach": True, "differentiable": True}, AssertionError,
        "_foreach ops don't support autograd"),
    *table("group: ", "add_group", "group", [
        ("a list", [ones()], TypeError, "param_group must be a dict"),
        ("None", None, TypeError, "param_group must be a dict"),
        ("without parameters", From(lambda w: {}), KeyError, "params"),
        ("a parameter of another", From(lambda w: {"params": named([("a", w.a)])}), ValueError,
         "some parameters appear in more than one parameter group"),
    ]),
    *(bad(f"group: {kind}", "add_parameter", {"name": "c", name: x}, error, words) for kind, name, x, error, words in (
        ("lr a string", "lr", "x", TypeError, "Invalid learning rate: 'x'"),
        ("lr negative", "lr", -1.0, ValueError, "Invalid learning rate: -1.0"),
        ("weight_decay negative", "weight_decay", np.float32(-1.0), ValueError, "Invalid weight_decay value: -1.0"),
        ("amsgrad", "amsgrad", True, ValueError, "amsgrad is True, which is another algorithm"),
        ("maximize a string", "maximize", "no", TypeError, f"maximize is 'no'; {TRUE_OR_FALSE}"),
        ("betas out of range", "betas", (1.0, 0.9), ValueError, f"{RATE}0: 1.0"),
    )),
]

# What cannot be loaded or imported
STATE_DICTS = [
    ("None", 0, TypeError, "the state_dict is a int", RETURNED),
    ("a list", [], TypeError, "the state_dict is a list", RETURNED),
    ("an empty dict", {}, ValueError, "the state_dict lacks a dict 'state'", RETURNED),
    ("no groups", {"state": {}}, ValueError, f"or a {DICTS} 'param_groups'", RETURNED),
    ("a model's", {"fc.weight": torch.ones(2)}, ValueError, "lacks a dict 'state'", "not a model's"),
    ("AdamW's", From(lambda w: adamw().state_dict()), ValueError,
     "parameter group 0 is of torch.optim.Adam or AdamW, whose moments mean something else with asynchronous=True and "
     "centering='current', as here; make this optimizer with asynchronous=False and centering='none', or start anew"),
    ("AdamW's with amsgrad", From(lambda w: adamw(amsgrad=True).state_dict()), ValueError,
     "parameter group 0 comes from a run with amsgrad=True, which is another algorithm"),
    ("NAdam's", From(lambda w: torch.optim.NAdam([torch.ones(4)]).state_dict()), ValueError,
     "parameter group 0 lacks 'eps_root': it belongs to another optimizer; load one that ACProp saved"),
    ("RAdam's", From(lambda w: torch.optim.RAdam([torch.ones(4)]).state_dict()), ValueError,
     "parameter group 0 lacks 'eps_root': it belongs to another optimizer; load one that ACProp saved"),
]
CHANGED = [
    ("no state", lambda s: {"param_groups": s["param_groups"]}, ValueError, "lacks a dict 'state'", RETURNED),
    ("state a list", lambda s: {**s, "state": []}, ValueError, "lacks a dict 'state'", RETURNED),
    ("groups a string", lambda s: {**s, "param_groups": "ab"}, ValueError, f"{DICTS} 'param_groups'", RETURNED),
    ("a group without parameters", lambda s: s["param_groups"][1].pop("params"), ValueError,
     "parameter group 1 lacks 'params'"),
    ("a group of None", lambda s: {**s, "param_groups": [None]}, ValueError, DICTS, RETURNED),
    ("no group", lambda s: {**s, "state": {}, "param_groups": []}, ValueError, "different number of parameter groups"),
    ("a shorter group", lambda s: s["param_groups"][1].update(params=[]), ValueError,
     "parameter 1, which none of its parameter groups has"),
    ("of another number", lambda s: {**s, "state": {0: s["state"][0], 7: s["state"][1]}}, ValueError,
     "the state of parameter 7, which none"),
    ("a state of None", lambda s: s["state"].update({1: None}), TypeError,
     "the state of parameter 1 is a NoneType; load a dict"),
    ("a state of letters", lambda s: s["state"].update({1: "x"}), TypeError,
     "the state of parameter 1 is a str; load a dict"),
    ("no second moment", lambda s: s["state"][1].pop("exp_avg_var"), ValueError,
     "the state of parameter 1 lacks 'exp_avg_var'", "load one that ACProp saved"),
    ("no step", lambda s: s["state"][1].pop("step"), ValueError, "the state of parameter 1 lacks 'step'"),
]
MOMENTS = [
    ("None", None, TypeError, f"is a NoneType; {A_TENSOR}"),
    ("a list", [1.0], TypeError, f"is a list; {A_TENSOR}"),
    ("an array of NumPy", np.ones((2, 3), "f4"), TypeError, f"is a ndarray; {A_TENSOR}"),
    ("int", torch.ones(2, 3, dtype=torch.int32), TypeError, f"is a torch.int32; {A_TENSOR}"),
    ("bool", torch.ones(2, 3, dtype=torch.bool), TypeError, f"is a torch.bool; {A_TENSOR}"),
    ("complex", torch.ones(2, 3, dtype=torch.complex64), TypeError, "is a torch.complex64; load a"),
    ("transposed", torch.ones(3, 2), ValueError, "has shape (3, 2), the parameter (2, 3); load the state"),
    ("to be broadcast", torch.ones(1), ValueError, "has shape (1,), the parameter (2, 3); load the state"),
    ("sparse", torch.eye(2, 3).to_sparse(), ValueError, "is sparse; load a dense tensor"),
    ("without values", torch.ones(2, 3, device="meta"), ValueError, "is without values; load a dense"),
]
STEPS = [
    ("None", None, TypeError, "is None; load a number"),
    ("a string", "3", TypeError, "is '3'; load a number"),
    ("a bool", True, TypeError, "is True; load a number"),
    ("negative", torch.tensor(-1.0), ValueError, f"is -1.0; {WHOLE_NUMBER} that is at least 0"),
    ("NaN", torch.tensor(math.nan), ValueError, f"is nan; {WHOLE_NUMBER}"),
    ("infinite", torch.tensor(math.inf), ValueError, f"is inf; {WHOLE_NUMBER}"),
    ("no whole number", 2.5, ValueError, f"is 2.5; {WHOLE_NUMBER}"),
    ("of three elements", torch.ones(3), TypeError, ONE_NUMBER),
    ("complex", torch.tensor(1j), TypeError, ONE_NUMBER),
    ("an integer tensor", torch.tensor(3), TypeError, ONE_NUMBER),
    ("without value", torch.tensor(3.0, device="meta"), TypeError, "load a number, or a floating-point"),
]
# Options of a group, written there after it was made
SPOILT: list[tuple[str, Any, type[Exception], str]] = [
    ("lr", math.nan, ValueError, "Invalid learning rate: nan; use a finite number for lr of parameter group 1"),
    ("lr", -math.inf, ValueError, "Invalid learning rate: -inf; use a finite number for lr of parameter group 1"),
    ("lr", np.float32(math.nan), ValueError, "Invalid learning rate: nan"),
    ("lr", "x", TypeError, f"Invalid learning rate: 'x'; {SOME_NUMBER} for lr"),
    ("lr", None, TypeError, f"Invalid learning rate: None; {SOME_NUMBER} for lr"),
    ("lr", True, TypeError, f"Invalid learning rate: True; {SOME_NUMBER} for lr"),
    ("betas", None, ValueError, "Invalid betas: None; use two decay rates"),
    ("betas", (1.0, 0.9), ValueError, f"{RATE}0: 1.0"),
    ("eps", -1.0, ValueError, "Invalid epsilon value: -1.0"),
    ("weight_decay", math.inf, ValueError,
     "Invalid weight_decay value: inf; use a finite number for weight_decay of parameter group 1"),
    ("weight_decay", torch.tensor(math.nan), ValueError, "Invalid weight_decay value: nan"),
    ("clip_exponent", "x", TypeError, f"clip_exponent is 'x'; {NUMBER_OR_NONE}"),
    ("clip_exponent", [0.25], TypeError, f"clip_exponent is [0.25]; {NUMBER_OR_NONE}"),
    ("clip_exponent", -1.0, ValueError, "clip_exponent is -1.0"),
    ("centering", "next", ValueError, f"centering is 'next'; {CENTERING}"),
    ("asynchronous", "no", TypeError, f"asynchronous is 'no'; {TRUE_OR_FALSE}"),
    ("moment_dtype", "float32", TypeError, f"moment_dtype is 'float32'; {A_DTYPE}"),
]
FIRST = "first moment of 'b'"


def adamw(**options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([{"params": [torch.ones(4)]}, {"params": [torch.ones(6)]}], **options)


TORCH_STATES: list[Bad] = [
    *table("load_state_dict: ", "load", "state_dict", STATE_DICTS),
    *table("load_state_dict: ", "load_changed", "change", CHANGED),
    *(row for moment in ("exp_avg", "exp_avg_var")
      for row in table(f"load_state_dict: {moment} ", "load_state", moment, MOMENTS, f"{moment} of parameter 1 ")),
    *table("load_state_dict: step ", "load_state", "step", STEPS, "step of parameter 1 "),
    *(bad(f"load_state_dict: {name} {x!r}", "load_group", {name: x}, error, words) for name, x, error, words in SPOILT),
    bad("load_state_dict: fused and foreach", "load_group", {"fused": True, "foreach": True}, RuntimeError,
        "cannot be `True` together"),
    bad("load_state_dict: maximize a string", "load_group", {"maximize": "no"}, TypeError,
        f"maximize is 'no'; {TRUE_OR_FALSE}"),
    *table("import_state: ", "import_into", "optimizer", [
        ("into no optimizer", None, TypeError, f"the optimizer is a NoneType; {AN_OPTIMIZER}"),
        ("into SGD", From(lambda w: torch.optim.SGD(w.model.parameters())), TypeError,
         f"the optimizer is a SGD; {AN_OPTIMIZER}"),
        ("into a state_dict", From(lambda w: w.optimizer.state_dict()), TypeError,
         f"the optimizer is a dict; {AN_OPTIMIZER}"),
        ("into AdamW", From(lambda w: torch.optim.AdamW(w.model.parameters())), ValueError,
         "AdamW cannot have asynchronous=True, centering='current', eps_root=1e-16, as the saved state has; import it "
         "into an acprop_torch.ACProp with these options, or use prefer='own'"),
        ("into Adam with amsgrad", From(lambda w: torch.optim.Adam(w.model.parameters(), amsgrad=True)), ValueError,
         "parameter group 0 of Adam has amsgrad=True", "use an optimizer without amsgrad"),
    ]),
    *table("import_state: ", "import_for", "model", [
        ("model a list", From(lambda w: [w.a, w.b]), TypeError,
         f"the model is a list; {A_MODULE}, or a mapping of names to parameters"),
        ("model None", None, TypeError, f"the model is a NoneType; {A_MODULE}"),
        ("another model", From(lambda w: {"a": w.a}), ValueError,
         "parameter group 1 has a parameter of shape (2, 3) that the model does not have; pass the model"),
    ]),
    bad("import_state: swapped", "import_swapped", {}, TypeError, "import_state got a State and a ACProp"),
    bad("import_state: prefer", "import_state", {"prefer": "mine"}, ValueError, f"prefer is 'mine'; {OWN_OR_SAVED}"),
    bad("import_state: other hyperparameters", "import_state", {"saved": ACProp(0.5)}, ValueError,
        "hyperparameters differ: learning_rate is 0.1 here and 0.5 in the saved state",
        "prefer='own' or prefer='saved'"),
    bad("import_state: a schedule", "import_state", {"saved": ACProp(boom), "prefer": "saved"}, ValueError,
        "the saved learning_rate is a callable, which a torch optimizer cannot have", "prefer='own'"),
    bad("import_state: a negative count", "import_state", {"count": -1}, ValueError,
        COUNT, MINUS_ONE),
    bad("import_state: a count of 1.0", "import_state", {"count": 1.0}, TypeError, COUNT, f"is 1.0; {INTEGER}"),
    bad("import_state: moments None", "import_state", {"mu": None}, TypeError,
        "the saved moments are not dicts by name"),
    bad("import_state: missing names", "import_state", {"mu": {}, "nu": {}}, ValueError,
        "the saved state lacks 'a', 'b'", "use load(path, rename=...)"),
    *table("import_state: ", "import_leaf", "leaf", [
        ("a string", "x", TypeError, f"{FIRST} is a str ('x'); {AN_ARRAY}"),
        ("a list", [1.0], TypeError, f"{FIRST} is a list ([1.0]); {AN_ARRAY}"),
        ("objects", np.ones((2, 3), object), TypeError, f"{FIRST} has dtype object, here it is float32"),
        ("float64", np.ones((2, 3)), TypeError, f"{FIRST} has dtype float64, here it is float32"),
        ("a shape", np.ones(3, "f4"), ValueError, f"{FIRST} has shape (3,), here it is (2, 3); use load("),
    ], name="b"),
    bad("import_state: a surplus name", "import_leaf", {"name": "c", "leaf": np.ones(3, "f4")}, ValueError,
        "the saved state has 'c', but there is no such parameter here; use load(path, rename=...)"),
    bad("export_state: of no optimizer", "export_of", {"optimizer": None}, TypeError,
        f"the optimizer is a NoneType; {AN_OPTIMIZER}"),
    bad("export_state: hyperparameters a string", "export_with", {"hyperparameters": "x"}, TypeError,
        f"the hyperparameters are a str; {CORE_ACPROP}"),
]

# What a step refuses, on each way to step
TORCH_STEPS: list[Bad] = [
    *(bad(f"step: {name} {x!r}", "group_option", {name: x}, error, words) for name, x, error, words in SPOILT),
    bad("gradient: sparse", "grad", {"grad": torch.eye(2, 3).to_sparse()}, RuntimeError,
        "ACProp does not support sparse gradients, please consider SparseAdam"),
    *(bad(f"parameter: data of shape {shape}", "resized", {"shape": shape}, RuntimeError,
          SHAPES.format(shape), "load the state") for shape in ((3,), (4, 2, 3), (1, 3))),
    bad("closure: a string", "closure", {"closure": "x"}, TypeError, "not callable"),
    bad("closure: raises", "closure", {"closure": boom}, KeyError, OWN_ERROR),
    *table("set by torch: gradient ", "grad", "grad", [
        ("of another shape", torch.ones(3, 2), RuntimeError,
         "a gradient of size '[3, 2]' to a tensor of size '[2, 3]'"),
        ("on another device", torch.ones((2, 3), device="meta"), RuntimeError, "device type 'meta'"),
        ("a string", "x", TypeError, "to be a Tensor or None"),
    ]),
]
