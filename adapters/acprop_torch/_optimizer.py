"""The optimizer: its public methods, the preparation of a step, and the choice of a way to step."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from acprop_core.adapt import Row
from acprop_torch import _private as private
from acprop_torch import _state_dict as states
from acprop_torch import _ways
from acprop_torch._kept import Kept
from acprop_torch._options import (
    called,
    check_options,
    check_ways,
    hyperparameters_of,
    lacks_residual,
    plain_options,
    warn_of_no_residual,
)
from acprop_torch._rows import Batch, check_shapes, local_columns, note_sharded


class ACProp(torch.optim.Optimizer):
    """ACProp (Zhuang et al. 2021, arXiv:2110.05454); the equations are in `acprop_core.ACProp`.

    Parameters
    ----------
    params : iterable of tensors, of (name, tensor) pairs, or of dicts that define parameter groups
        Floating-point parameters. As everywhere in torch.optim, a complex one counts as two real ones.
    lr : float or 1-element tensor
        Learning rate, at least 0. At a step it may be any finite number, because some schedules end a little below 0.
    betas : two floats, or two 1-element tensors
        Decay rates b1, b2 of the two moments, in [0, 1).
    eps : float
        Added to the root of the second moment; at least 0.
    weight_decay : float
        Decoupled weight decay, multiplied by `lr`; at least 0, and as `lr` at a step. A 0-d tensor if derivatives by it
        are wanted.
    amsgrad : bool
        Must be False. It is here for programs that set all options of AdamW.
    eps_root : float
        Added to the second moment at every step; at least 0.
    decoupled_weight_decay : bool
        If False, weight_decay times the parameter is added to the gradient instead, the L2 form.
    maximize : bool
        Climb instead of descending. The moments are the same as without it.
    foreach : bool, optional
        Run on lists of tensors. By default if all are on an accelerator, as in torch.optim.AdamW; on a CPU the default
        is the compiled step where Numba works, and otherwise the rule tile after tile.
    capturable : bool
        Read no number on the host, so that a CUDA graph can capture the step; for accelerators only.
    differentiable : bool
        Let autograd follow the step.
    fused : bool, optional
        Run the rule compiled, in one pass over the memory: by Numba if it is installed (on CUDA devices numba-cuda, in
        one launch for all parameters), or by torch.compile.
    clip_exponent : float, optional
        Weight decay aside, no element moves by more than ``lr * t**clip_exponent`` at step t; None for no clip. 0.25 is
        recommended. It does not clip gradients: call ``torch.nn.utils.clip_grad_norm_`` for that.
    centering : {"current", "previous", "none"}
        What the second moment is centred on: ``m_t`` as in the paper, ``m_{t-1}`` as in optax, or nothing, as in Adam.
    asynchronous : bool
        False makes synchronous steps, as those of Adam and AdaBelief; `acprop_core.ACProp` says what the two make.
    moment_dtype : torch.dtype, optional
        Dtype of the moments; by default the parameter's, and float32 for 16-bit parameters.
    compensate : bool
        Keep the amount that 16-bit parameters lose to rounding ("carry" in the state, of their dtype), and add it to
        them as soon as it is large enough.

    Raises
    ------
    ValueError, TypeError
        If an option is out of its range, not finite or of a wrong type, or conflicts with another.
    RuntimeError
        If `fused` is asked for together with `foreach` or `differentiable`.

    Warns
    -----
    UserWarning
        If b1 is 0 with ``centering="current"`` and no clip, where steps explode.

    Notes
    -----
    Zhuang et al. 2021, arXiv:2110.05454, algorithm 2; the clip is ours. As with all optimizers of torch, use one in
    one thread at a time; several may step in several threads.

    Examples
    --------
    >>> model = torch.nn.Linear(3, 2)
    >>> optimizer = ACProp(model.parameters(), lr=1e-3, clip_exponent=0.25)
    >>> model(torch.ones(5, 3)).square().sum().backward()
    >>> optimizer.step()
    """

    @private.untraced  # torch 2.11 loses an optimizer whose constructor is not traced as a whole
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: Sequence[float] | tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-16,
        weight_decay: float | Tensor = 0.0,
        *,
        amsgrad: bool = False,
        eps_root: float = 1e-16,
        decoupled_weight_decay: bool = True,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        clip_exponent: float | None = None,
        centering: str = "current",
        asynchronous: bool = True,
        moment_dtype: torch.dtype | None = None,
        compensate: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "eps_root": eps_root,
            "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "clip_exponent": clip_exponent,
            "centering": centering,
            "asynchronous": asynchronous,
            "moment_dtype": moment_dtype,
            "compensate": compensate,
        }
        check_options({**defaults, "amsgrad": amsgrad})
        super().__init__(params, {**defaults, **plain_options(defaults)})
        if any(map(lacks_residual, self.param_groups)):
            warn_of_no_residual()
        self._kept: Kept | None = None  # the last step, if it was compiled for all parameters

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._kept = None
        for group in self.param_groups:
            for name, value in self.defaults.items():  # options that are newer than the saved state
                group.setdefault(name, value)
            for p in group["params"]:
                if (own := self.state.get(p)) and not torch.is_tensor(own["step"]):
                    own["step"] = states.step_count(group, p, float(own["step"]))
        self._say_who_unscales()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, whose options default to the constructor's.

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
            check_options({**self.defaults, **param_group})
            param_group.update(plain_options(param_group))
        super().add_param_group(param_group)
        if hasattr(self, "_kept") and lacks_residual(param_group):  # the constructor warns once for all groups
            warn_of_no_residual()
        self._say_who_unscales()

    def _say_who_unscales(self) -> None:
        # GradScaler reads this. If true, it lets `step` unscale, and skip where GradScaler has found an infinity.
        self._step_supports_amp_scaling = all(group["fused"] for group in self.param_groups)

    @private.use_grad_for_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient, in place.

        Parameters
        ----------
        closure : callable, optional
            Reevaluates the model and returns the loss.

        Returns
        -------
        tensor or None
            The loss that the closure returned.

        Raises
        ------
        RuntimeError
            If a gradient is sparse, `fused` cannot take a parameter, a parameter is an expanded tensor, has another
            shape than its gradient or moments, or less memory than its shape needs; nothing has changed then.
        ValueError, TypeError
            If an option has a value that the constructor would refuse, a parameter has a dtype that no
            update can be in, or a step count is not a floating-point tensor of one whole number; nothing has changed
            then.
        AssertionError
            If the way to step cannot be taken: `capturable` where no graph can be captured, `foreach` with
            `differentiable`, or `grad_scale` without `fused`; nothing has changed then.

        Examples
        --------
        >>> w = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> optimizer = ACProp([w], lr=1e-3, clip_exponent=0.25)
        >>> w.grad = torch.tensor([0.5, -2.0])
        >>> optimizer.step()
        >>> w.detach()
        tensor([0.9995, 1.0010])
        """
        private.check_graph_capture(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling() or not self._steps_again():
            self._step_anew()
        return loss

    def _steps_again(self) -> bool:
        """Take the step that was kept, if all is as it was; return whether it was taken."""
        scaling = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        kept, self._kept = self._kept, None
        if kept is None or not kept.run(self.param_groups, self.state, scaling):
            return False
        self._kept = kept
        return True

    def _step_anew(self) -> None:
        # anything that can be refused is refused here, before anything is written
        compiling = torch.compiler.is_compiling()
        if len(self.param_groups) > 1 and not compiling:  # `_init_group` asks again, of its group
            for group in self.param_groups:
                self._check_options(group)
        runs, kept = _ways.together(self.param_groups, list(map(self._prepare, self.param_groups)))
        for run in runs:
            run()
        if not compiling:
            self._kept = kept
            note_sharded(self.param_groups)

    def _prepare(self, group: dict[str, Any]) -> tuple[Batch | None, _ways.Runs]:
        """Return the rows of a group for Numba, and the steps of the others; none if there are no gradients."""
        params: list[Tensor] = []
        grads: list[Tensor] = []
        exp_avgs: list[Tensor] = []
        exp_avg_vars: list[Tensor] = []
        carries: list[Tensor | None] = []
        steps: list[Tensor] = []
        has_complex = self._init_group(group, params, grads, exp_avgs, exp_avg_vars, carries, steps)
        if not params:
            return None, []
        compiling = torch.compiler.is_compiling()
        if not (compiling or group["differentiable"]):
            states.check_moments(params, exp_avgs + exp_avg_vars, self.state, lambda i: called(group, params[i]))
        columns = local_columns(Row(params, grads, exp_avgs, exp_avg_vars, carries), has_complex)
        foreach = _ways.on_lists(group, params)
        grad_scale, found_inf = (getattr(self, name, None) for name in ("grad_scale", "found_inf"))
        counts = None
        if not compiling:
            counts = states.check_steps(steps, lambda i: called(group, params[i]))
            check_ways(group, params, steps, foreach, grad_scale is not None or found_inf is not None)
            if not group["fused"]:
                check_shapes(columns)
        traced = compiling or group["differentiable"] or (group["capturable"] and not group["fused"])
        if traced or counts is None:  # a count of shape (1,) would widen its parameter, or not be stacked with others
            steps = [step.squeeze() if step.ndim else step for step in steps]
        batch = Batch(columns, steps, counts, hyperparameters_of(group, traced), grad_scale, found_inf)
        return _ways.prepare(group, batch, traced, foreach)

    def _check_options(self, group: dict[str, Any]) -> None:
        def owner() -> str:
            return f" of parameter group {next(i for i, x in enumerate(self.param_groups) if x is group)}"

        check_options(group, True, owner)

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
        self._check_options(group)
        has_complex = False
        compensates = group["compensate"]
        for p in group["params"]:
            grad = p.grad
            if grad is None:
                continue
            if grad.layout is not torch.strided or p.is_nested:
                states.refuse_layout(called(group, p), p, grad)
            if grad.is_complex() and not p.is_complex():
                states.refuse_complex(called(group, p), grad)
            state = self.state[p]
            if not state:
                states.check_parameter(called(group, p), p)
                if group["fused"]:
                    private.device_dtype_check_for_fused(p)
                state.update(states.begin(group, p))
            carry = state.get("carry")
            # not as wanted at the first step, and after a change of option or dtype
            if compensates or carry is not None:
                if not states.has_carry(group, p):
                    carry = None
                    state.pop("carry", None)
                elif carry is None:
                    carry = state["carry"] = torch.zeros_like(p)
                elif getattr(carry, "dtype", None) != p.dtype:
                    states.check_tensors(called(group, p), state, p)
                    carry = state["carry"] = carry.to(p.dtype)
            if group["differentiable"] and getattr(state.get("step"), "requires_grad", False):
                raise RuntimeError("`requires_grad` is not supported for `step` in differentiable mode")
            has_complex |= p.is_complex()
            if not state.keys() >= states.KEYS:
                states.refuse_incomplete(called(group, p), state)
            exp_avgs.append(state["exp_avg"])
            exp_avg_vars.append(state["exp_avg_var"])
            steps.append(state["step"])
            params.append(p)
            grads.append(grad)
            carries.append(carry)
        return has_complex

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a copy of a state_dict; moments get the dtype that this optimizer gives them.

        Also continues a run of the authors' own optimizer, with ``eps_root = eps`` as their code has it; and, with the
        options ``asynchronous=False, centering="none"``, a run of torch.optim.Adam or AdamW, with ``eps_root = 0.0``.
        Options that their files lack (such as `clip_exponent`, `moment_dtype`) stay as this optimizer was made.

        Parameters
        ----------
        state_dict : dict
            From `state_dict` of an optimizer of this class, of the authors' or of Adam, with as many parameters.

        Raises
        ------
        ValueError
            If it is of another optimizer, of Adam and the two options are not as above, of a run with ``amsgrad`` or
            ``rectify``, its groups differ in size, or a value in it is out of range; nothing has changed then.
        TypeError
            If a value in it is of a wrong type; nothing has changed then.

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
                f"the state_dict is a {type(state_dict).__name__}; pass the dict that state_dict() of ACProp returned"
            )
        saved: dict[str, Any] = {}

        def check(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            saved.update(states.checked(state_dict, self))
            return saved

        def restore(optimizer: torch.optim.Optimizer) -> None:
            states.restore_dtypes(saved, self)

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
