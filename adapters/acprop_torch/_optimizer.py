"""The optimizer: options, state, the choice of a way to step, and what is saved."""

import functools
import math
from collections.abc import Callable, Iterator
from numbers import Real
from typing import Any

import torch
from torch import Tensor

# torch's own helpers of optimizers, so that what AdamW refuses, finds or chooses is refused, found or chosen here
from torch.optim.optimizer import (
    ParamsT,
    _default_to_fused_or_foreach,
    _device_dtype_check_for_fused,
    _get_capturable_supported_devices,
    _get_scalar_dtype,
    _to_scalar,
    _use_grad_for_differentiable,
)

import acprop_core
from acprop_torch._fused import fused_step as _fused_acprop
from acprop_torch._steps import PLAIN, Options, Row, check_shapes, transposed
from acprop_torch._steps import multi_tensor as _multi_tensor_acprop
from acprop_torch._steps import single_tensor as _single_tensor_acprop

_MOMENTS = ("exp_avg", "exp_avg_var")
_FLAGS = ("decoupled_weight_decay", "maximize", "foreach", "capturable", "differentiable", "fused")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)


class ACProp(torch.optim.Optimizer):
    """ACProp (Zhuang et al. 2021, arXiv:2110.05454); the equations stand at `acprop_core.ACProp`.

    Parameters
    ----------
    params : iterable of tensors, of (name, tensor) pairs, or of dicts that define parameter groups
        Floating-point parameters. As everywhere in torch.optim, a complex one counts as two real ones.
    lr : float or 1-element tensor
        Learning rate, at least 0.
    betas : tuple of two floats or of two 1-element tensors
        Decay rates b1, b2 of the two moments, in [0, 1).
    eps, eps_root : float
        Added to the root of the second moment, and to the second moment at every step; at least 0.
    weight_decay : float
        Decoupled weight decay, multiplied by `lr`; at least 0. A 0-d tensor if derivatives by it are wanted.
    decoupled_weight_decay : bool
        If False, weight_decay times the parameter is added to the gradient instead, the L2 form.
    maximize : bool
        Climb instead of descending. The moments stay those of the gradient as it is.
    foreach : bool, optional
        Run on lists of tensors. By default so where all are on an accelerator, as in torch.optim.AdamW.
    capturable : bool
        Read no number on the host, so that a CUDA graph can capture the step; for accelerators only.
    differentiable : bool
        Let autograd follow the step.
    fused : bool, optional
        Run the rule compiled, in one pass over the memory: by Numba on a CPU if it is installed, or by torch.compile.
    clip_exponent : float, optional
        Weight decay aside, no element moves by more than ``lr * t**clip_exponent`` at step t; None for no clip. 0.25 is
        recommended.
    centering : {"current", "previous"}
        Centre the second moment on m_t as the paper does, or on m_{t-1} as the code of ``optax.contrib.acprop``.
    moment_dtype : torch.dtype, optional
        Dtype of the moments; by default the parameter's, and float32 for 16-bit parameters.
    compensate : bool
        Keep what rounding takes from 16-bit parameters ("carry" in the state, of their dtype), and give it back as soon
        as it is enough to change them.

    Raises
    ------
    ValueError
        If an option is out of its range or not finite, or does not go with another.
    TypeError
        If an option is of a wrong type.
    RuntimeError
        If `fused` is asked for together with `foreach` or `differentiable`.

    Notes
    -----
    Zhuang et al. 2021, arXiv:2110.05454, algorithm 2; the clip is ours. As of the optimizers of torch, one belongs to
    one thread at a time; several may step in several threads.

    Examples
    --------
    >>> model = torch.nn.Linear(3, 2)
    >>> optimizer = ACProp(model.parameters(), lr=1e-3, clip_exponent=0.25)
    >>> model(torch.ones(5, 3)).square().sum().backward()
    >>> optimizer.step()
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-16,
        eps_root: float = 1e-16,
        weight_decay: float | Tensor = 0.0,
        *,
        decoupled_weight_decay: bool = True,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        clip_exponent: float | None = None,
        centering: str = "current",
        moment_dtype: torch.dtype | None = None,
        compensate: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "eps_root": eps_root,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "clip_exponent": clip_exponent,
            "centering": centering,
            "moment_dtype": moment_dtype,
            "compensate": compensate,
        }
        self._known_memory: dict[int, dict[str, Any]] = {}  # of each group, what a fused step leaves for the next
        _check(defaults)
        defaults["betas"] = tuple(map(_to_scalar, betas))
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._known_memory = {}
        for group in self.param_groups:
            for name, value in self.defaults.items():  # options that came after the state was saved
                group.setdefault(name, value)
            for p in group["params"]:
                if (own := self.state.get(p)) and not torch.is_tensor(own["step"]):
                    own["step"] = _step_count(group, p, float(own["step"]))
        self._note_who_unscales()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, whose options default to those of the constructor.

        Parameters
        ----------
        param_group : dict
            "params", and the options in which the group differs.

        Raises
        ------
        ValueError, TypeError
            If an option is out of its range or of a wrong type.

        Examples
        --------
        >>> body, head = torch.nn.Linear(3, 3), torch.nn.Linear(3, 1)
        >>> optimizer = ACProp(body.parameters(), lr=1e-3, clip_exponent=0.25)
        >>> optimizer.add_param_group({"params": head.parameters(), "lr": 1e-2})
        >>> [group["lr"] for group in optimizer.param_groups]
        [0.001, 0.01]
        """
        if isinstance(param_group, dict):  # or else the base class refuses it
            _check({**self.defaults, **param_group})
        super().add_param_group(param_group)
        self._note_who_unscales()

    def _note_who_unscales(self) -> None:
        # GradScaler asks for this; if so, it leaves it to `step` to unscale, and to skip where it found an infinity
        self._step_supports_amp_scaling = all(group["fused"] for group in self.param_groups)

    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient, in place.

        Parameters
        ----------
        closure : callable, optional
            Reevaluates the model and returns the loss.

        Returns
        -------
        tensor or None
            What the closure returned.

        Raises
        ------
        RuntimeError
            If a gradient is sparse, `fused` cannot take a parameter, a parameter is an expanded tensor, or has another
            shape than its gradient or moments; nothing has changed then.
        ValueError, TypeError
            If an option has been given a value that the constructor would refuse, or a parameter has a dtype that no
            update can be in; nothing has changed then.

        Examples
        --------
        >>> w = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> optimizer = ACProp([w], lr=1e-3, clip_exponent=0.25)
        >>> w.grad = torch.tensor([0.5, -2.0])
        >>> optimizer.step()
        >>> w.detach()
        tensor([0.9995, 1.0010])
        """
        self._accelerator_graph_capture_health_check()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        ready = []
        for group in self.param_groups:  # whatever can be refused is refused before anything is written
            params: list[Tensor] = []
            grads: list[Tensor] = []
            exp_avgs: list[Tensor] = []
            exp_avg_vars: list[Tensor] = []
            carries: list[Tensor | None] = []
            steps: list[Tensor] = []
            has_complex = self._init_group(group, params, grads, exp_avgs, exp_avg_vars, carries, steps)
            if params:
                lists = _lists(Row(params, grads, exp_avgs, exp_avg_vars, carries), has_complex)
                ready.append((group, lists, steps))
        if not torch.compiler.is_compiling():
            for group, lists, _ in ready:
                if not group["fused"] or len(ready) > 1:  # alone, the fused step asks before it begins
                    check_shapes(lists)
        for group, lists, steps in ready:
            self._step_group(group, lists, steps)
        return loss

    def _init_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_vars: list[Tensor],
        carries: list[Tensor | None],
        steps: list[Tensor],
    ) -> bool:
        """Fill the lists, as Dynamo expects of a method of this name, which it runs instead of tracing it.

        State is made where there is none. Returns whether a parameter is complex.
        """
        _check(group, step=True)
        has_complex = False
        compensates = group["compensate"]
        for p in group["params"]:
            grad = p.grad
            if grad is None:
                continue
            if grad.layout is not torch.strided:
                raise RuntimeError("ACProp does not support sparse gradients, please consider SparseAdam instead")
            state = self.state[p]
            if not state:
                if p.dtype not in _DTYPES:
                    raise TypeError(
                        f"{_called(group, p)} has dtype {p.dtype}, which ACProp cannot use; give it one of "
                        f"{', '.join(map(str, _DTYPES))}, or no gradient"
                    )
                if p.numel() and any(n > 1 and stride == 0 for n, stride in zip(p.shape, p.stride(), strict=True)):
                    raise RuntimeError(
                        f"{_called(group, p)} is expanded: several of its elements are one number in memory; give the "
                        "optimizer the tensor that it was expanded from, or a clone"
                    )
                if group["fused"]:
                    _device_dtype_check_for_fused(p)
                state["step"] = _step_count(group, p, 0.0)
                for key in _MOMENTS:
                    state[key] = torch.zeros_like(p, dtype=_dtype_of_moments(group, p))
            carry = state.get("carry")
            # not as wanted at first, and where someone changed option or dtype
            if compensates or carry is not None:
                if not _is_compensated(group, p):
                    carry = None
                    state.pop("carry", None)
                elif carry is None:
                    carry = state["carry"] = torch.zeros_like(p)
                elif carry.dtype != p.dtype:
                    carry = state["carry"] = carry.to(p.dtype)
            if group["differentiable"] and state["step"].requires_grad:
                raise RuntimeError("`requires_grad` is not supported for `step` in differentiable mode")
            has_complex |= p.is_complex()
            params.append(p)
            grads.append(grad)
            exp_avgs.append(state["exp_avg"])
            exp_avg_vars.append(state["exp_avg_var"])
            carries.append(carry)
            steps.append(state["step"])
        return has_complex

    def _step_group(self, group: dict[str, Any], lists: Row, steps: list[Tensor]) -> None:
        compiling = torch.compiler.is_compiling()
        traced = compiling or (group["capturable"] and not group["fused"]) or group["differentiable"]
        if group["capturable"] and traced and not compiling:
            supported = _get_capturable_supported_devices()
            if not all(
                p.device.type == step.device.type and step.device.type in supported
                for p, step in zip(lists.param, steps, strict=True)
            ):
                raise AssertionError(
                    f"If capturable=True, params and state_steps must be on supported devices: {supported}."
                )
        own = _options_of(group, traced)
        foreach = group["foreach"]
        if foreach is None and group["fused"] is None:
            _, foreach = _default_to_fused_or_foreach(lists.param, group["differentiable"])
            foreach = foreach and (group["capturable"] or not isinstance(group["lr"], Tensor))
        grad_scale, found_inf = (getattr(self, name, None) for name in ("grad_scale", "found_inf"))
        if group["fused"]:
            known = {} if compiling else self._known_memory.setdefault(id(group), {})
            _fused_acprop(lists, steps, own, grad_scale, found_inf, known)
            return
        if grad_scale is not None or found_inf is not None:
            raise AssertionError("Expected grad_scale and found_inf to be None: only fused steps unscale gradients")
        if foreach:
            if group["differentiable"]:
                raise AssertionError("_foreach ops don't support autograd")
            _multi_tensor_acprop(lists, steps, own, traced)
        else:
            _single_tensor_acprop(lists, steps, own, traced, group["differentiable"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a copy of what `state_dict` returned; moments get the dtype that this optimizer gives them.

        Also continues a run of the authors' own optimizer (state "step", "exp_avg" and "exp_avg_var"), with
        ``eps_root = eps`` as their code has it. Of `decoupled_weight_decay` their file says nothing: it and what else
        it lacks stay as this optimizer was made.

        Parameters
        ----------
        state_dict : dict
            From `state_dict` of an optimizer of this class or of the authors', with as many parameters.

        Raises
        ------
        ValueError
            If it is of another optimizer, is of a run of the authors' with ``amsgrad`` or ``rectify``, its parameter
            groups differ in size, or something in it is out of range; nothing has changed then.
        TypeError
            If something in it is of a wrong type; nothing has changed then.

        Examples
        --------
        >>> w = torch.ones(2, requires_grad=True)
        >>> optimizer = ACProp([w], lr=1e-3, clip_exponent=0.25)
        >>> w.grad = torch.ones(2)
        >>> optimizer.step()
        >>> resumed = ACProp([w], lr=1e-3, clip_exponent=0.25)
        >>> resumed.load_state_dict(optimizer.state_dict())
        >>> resumed.state[w]["step"]
        tensor(1.)
        """
        if not isinstance(state_dict, dict):
            raise TypeError(
                f"the state_dict is a {type(state_dict).__name__}; give what state_dict() of ACProp returned"
            )
        saved: dict[str, Any] = {}

        def owners() -> Iterator[tuple[Any, dict[str, Any], Tensor]]:
            keys = (key for group in saved["param_groups"] for key in group["params"])
            return ((next(keys, None), group, p) for group in self.param_groups for p in group["params"])

        def check(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            saved.update(_translated(state_dict, self.param_groups))
            for group in saved["param_groups"]:
                options = {**self.defaults, **group}
                _check(options, step=True)
                _check_flags(options)
            keys = {key for group in saved["param_groups"] for key in group["params"]}
            if strays := [key for key in saved["state"] if isinstance(key, int) and key not in keys]:
                raise ValueError(
                    f"the state_dict has the state of parameter {strays[0]}, which none of its parameter groups has; "
                    "load what state_dict() of ACProp returned"
                )
            for key, _, p in owners():
                if own := saved["state"].get(key):
                    _check_state(key, own, p)
            return saved

        def restore(optimizer: torch.optim.Optimizer) -> None:
            # The base class casts moments to their parameter's dtype, which would round those of 16-bit parameters.
            for key, group, p in owners():
                for name in _MOMENTS if saved["state"].get(key) else ():
                    moment = saved["state"][key][name]
                    self.state[p][name] = moment.to(p.device, _dtype_of_moments(group, p), copy=True)
                for name in {"step", "carry"} & self.state.get(p, {}).keys():  # which the base class may share with it
                    self.state[p][name] = self.state[p][name].clone()

        # between the hooks that others have registered
        hooks = [
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()


def _check(options: dict[str, Any], step: bool = False) -> None:
    """Refuse options out of range; at a step without reading tensors, which may be on an accelerator."""
    if options["fused"] and options["differentiable"]:
        raise RuntimeError("`fused` does not support `differentiable`")
    if options["fused"] and options["foreach"]:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
    if not step:
        _check_flags(options)
    lr, betas = options["lr"], options["betas"]
    if not (isinstance(betas, tuple | list) and len(betas) == 2):
        raise ValueError(f"Invalid betas: {betas!r}; give two decay rates, such as (0.9, 0.999)")
    uncaptured_lists = options["foreach"] and not options["capturable"]
    if uncaptured_lists and isinstance(lr, Tensor):
        raise ValueError("lr as a Tensor is not supported for capturable=False and foreach=True")
    numbers: list[tuple[str, str, Any, float]] = [
        ("lr", "learning rate", lr, math.inf),
        ("eps", "epsilon value", options["eps"], math.inf),
        ("eps_root", "eps_root value", options["eps_root"], math.inf),
        ("betas[0]", "beta parameter at index 0", betas[0], 1.0),
        ("betas[1]", "beta parameter at index 1", betas[1], 1.0),
        ("weight_decay", "weight_decay value", options["weight_decay"], math.inf),
    ]
    for name, what, x, below in numbers:
        if isinstance(x, Tensor):
            if x.numel() != 1:
                raise ValueError(f"Tensor {name} must be 1-element")
            if x.is_complex() or x.dtype is torch.bool or x.is_meta:
                raise TypeError(f"Invalid {what}: {x}; give a number, or a tensor of a real one, for {name}")
            value = 0.0 if step else x.item()
        elif _is_number(x):
            try:
                value = float(x)
            except OverflowError:
                value = math.inf
        else:
            raise TypeError(f"Invalid {what}: {x!r}; give a number for {name}")
        if not 0.0 <= value < below:
            upper = "finite" if below == math.inf else f"below {below:g}"
            raise ValueError(f"Invalid {what}: {x}; give a number that is at least 0 and {upper}")
    if not step:  # afterwards schedulers may have replaced one of the two
        if isinstance(betas[0], Tensor) != isinstance(betas[1], Tensor):
            raise ValueError("betas must be either both floats or both Tensors")
        if uncaptured_lists and isinstance(betas[0], Tensor):
            raise ValueError("betas[0] as a Tensor is not supported for capturable=False and foreach=True")
    if not isinstance(options["moment_dtype"], torch.dtype | None):
        raise TypeError(f"moment_dtype is {options['moment_dtype']!r}; give a torch.dtype or None")
    if not (options["clip_exponent"] is None or _is_number(options["clip_exponent"])):
        raise TypeError(f"clip_exponent is {options['clip_exponent']!r}; give a number or None")
    if not isinstance(options["centering"], str):
        raise ValueError(f"centering is {options['centering']!r}; give 'current' or 'previous'")
    _check_rule(*(options[name] for name in ("clip_exponent", "centering", "moment_dtype", "compensate")))


def _is_number(x: Any) -> bool:
    return isinstance(x, Real) and not isinstance(x, bool)


def _check_flags(options: dict[str, Any]) -> None:
    for name in _FLAGS:
        if not isinstance(options[name], bool | None):  # "no" would be taken for yes
            raise TypeError(f"{name} is {options[name]!r}; give True or False")


def _check_state(key: Any, own: Any, p: Tensor) -> None:
    """Refuse the saved state of a parameter if no step of it could be taken."""
    for name in (*_MOMENTS, *(["carry"] if "carry" in own else [])):
        x = own[name]
        if not isinstance(x, Tensor) or not (x.is_floating_point() or (x.is_complex() and p.is_complex())):
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name} of parameter {key} is a {kind}; load a floating-point tensor")
        if x.shape != p.shape:
            raise ValueError(
                f"{name} of parameter {key} has shape {tuple(x.shape)}, the parameter {tuple(p.shape)}; load the state "
                "of this model"
            )
        if x.layout is not torch.strided or (x.is_meta and not p.is_meta):
            raise ValueError(
                f"{name} of parameter {key} is {'sparse' if not x.is_meta else 'without values'}; load a dense tensor"
            )
    if "carry" in own and p.dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(
            f"parameter {key} has a carry in the state, but is {p.dtype} here; add it to the parameter, which can hold "
            "it, and take it out of the state"
        )
    step = own["step"]
    if isinstance(step, Tensor) and step.numel() == 1 and step.is_floating_point() and (p.is_meta or not step.is_meta):
        step = 0.0 if step.is_meta else step.item()
    if not _is_number(step):
        raise TypeError(f"step of parameter {key} is {step!r}; load a number, or a floating-point tensor of one")
    if not (float(step) >= 0.0 and float(step).is_integer()):
        raise ValueError(f"step of parameter {key} is {step!r}; load a whole number that is at least 0")


def _called(group: dict[str, Any], p: Tensor) -> str:
    i = next(i for i, x in enumerate(group["params"]) if x is p)
    return f"parameter {group['param_names'][i]!r}" if "param_names" in group else f"parameter {i} of its group"


@functools.lru_cache(typed=True)
def _check_rule(clip_exponent: Any, centering: Any, moment_dtype: Any, compensate: Any) -> None:
    acprop_core.ACProp(
        clip_exponent=clip_exponent, centering=centering, moment_dtype=moment_dtype, compensate=compensate
    )


def _options_of(group: dict[str, Any], traced: bool) -> Options:
    def number(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return float(x)
        # where it is at hand it is read; on an accelerator that would wait for all that is under way
        return x.item() if x.is_cpu and not traced else _to_scalar(x)

    b1, b2 = group["betas"]
    return Options(
        learning_rate=number(group["lr"]),
        b1=number(b1),
        b2=number(b2),
        eps=number(group["eps"]),
        eps_root=number(group["eps_root"]),
        weight_decay=number(group["weight_decay"]),
        clip_exponent=group["clip_exponent"],
        centering=group["centering"],
        decoupled=group["decoupled_weight_decay"],
        maximize=group["maximize"],
        compensate=group["compensate"],
    )


def _lists(lists: Row, has_complex: bool) -> Row:
    """Return what the rule works on: of sharded tensors the local shard, and complex tensors as real ones."""
    if has_complex:
        # a gradient may be conjugated lazily; a parameter may not, its memory is what counts
        resolved = lists._replace(grad=[grad.resolve_conj() for grad in lists.grad])
        real = [[torch.view_as_real(x) if x.is_complex() else x for x in column] for column in resolved[:4]]
        lists = Row._make((*real, lists.carry))
    if PLAIN.issuperset(map(type, lists.param)):
        return lists
    return transposed([_local(row) for row in map(Row, *lists)])


def _local(row: Row) -> Row:
    if not hasattr(row.param, "to_local"):
        return row
    if row.grad.placements != row.param.placements:
        row = row._replace(grad=row.grad.redistribute(placements=row.param.placements))
    return row.map(lambda x: x.to_local())


def _step_count(group: dict[str, Any], p: Tensor, value: float) -> Tensor:
    on_device = group["capturable"] or group["fused"]
    dtype = _get_scalar_dtype(is_fused=group["fused"])
    return torch.tensor(value, dtype=dtype, device=p.device if on_device else "cpu")


def _dtype_of_moments(group: dict[str, Any], p: Tensor) -> torch.dtype:
    dtype = group["moment_dtype"] or (torch.float32 if p.dtype in (torch.float16, torch.bfloat16) else p.dtype)
    return dtype.to_complex() if p.is_complex() else dtype


def _is_compensated(group: dict[str, Any], p: Tensor) -> bool:
    return group["compensate"] and p.dtype in (torch.float16, torch.bfloat16)


def _translated(state_dict: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a state_dict as one of this class, the authors' made so; refuse those of other optimizers."""
    saved, states = state_dict.get("param_groups"), state_dict.get("state")
    if not isinstance(states, dict) or not isinstance(saved, list) or not all(isinstance(x, dict) for x in saved):
        raise ValueError(
            "the state_dict lacks a dict 'state' or a list of dicts 'param_groups'; give what state_dict() of ACProp "
            "returned, not that of a model"
        )
    for key in (key for group in saved for key in group.get("params", ())):
        if not isinstance(states.get(key, {}), dict):
            raise TypeError(f"the state of parameter {key} is a {type(states[key]).__name__}; load a dict")
    states = {key: state for key, state in states.items() if isinstance(state, dict) and state}
    theirs = [not {"eps_root", "maximize"} & set(group) for group in saved]
    parts = [
        (f"parameter group {i}", group, ("lr", "betas", "eps", "weight_decay", *(() if old else ("eps_root",))))
        for i, (group, old) in enumerate(zip(saved, theirs, strict=True))
    ]
    parts += [(f"the state of parameter {key}", state, ("step", *_MOMENTS)) for key, state in states.items()]
    for name, part, wanted in parts:
        if missing := [key for key in wanted if key not in part]:
            raise ValueError(
                f"{name} lacks {', '.join(map(repr, missing))}: it is that of another optimizer; "
                "load one that ACProp saved"
            )
    if not any(theirs) or len(saved) != len(groups):  # the base class says so if the groups do not fit
        return state_dict
    return {
        **state_dict,
        "param_groups": [_group_of_authors(i, *pair) for i, pair in enumerate(zip(saved, groups, strict=True))],
        "state": {
            **state_dict["state"],
            # their code adds eps to the second moment when it is used, not when it is made
            **{
                key: {**states[key], "exp_avg_var": states[key]["exp_avg_var"] + group["eps"]}
                for group in saved
                for key in group["params"]
                if key in states
            },
        },
    }


def _group_of_authors(i: int, saved: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
    rectified = saved.get("rectify") or any(x is not None for row in saved.get("buffer", ()) for x in row)
    for option, used in (("amsgrad", saved.get("amsgrad")), ("rectify", rectified)):
        if used:
            raise ValueError(
                f"parameter group {i} comes from a run with {option}=True, which is another algorithm than ACProp's; "
                "finish that run with the optimizer that began it, or start anew"
            )
    kept = {key: value for key, value in saved.items() if key not in ("amsgrad", "rectify", "buffer")}
    return {**{key: value for key, value in group.items() if key != "params"}, **kept, "eps_root": saved["eps"]}
