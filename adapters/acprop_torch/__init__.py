"""ACProp as a torch.optim.Optimizer: the rule of acprop_core, run on parameter groups in place."""

from collections.abc import Callable, Iterable
from typing import Any

import array_api_compat.torch as xp
import torch
from torch.optim.optimizer import ParamsT

import acprop_core

__all__ = ["ACProp"]

_MOMENTS = ("exp_avg", "exp_avg_var")
_TILE = 2**16  # elements


class ACProp(torch.optim.Optimizer):
    """ACProp (Zhuang et al. 2021, arXiv:2110.05454); the equations stand at `acprop_core.ACProp`.

    Parameters
    ----------
    params : iterable of tensors, of (name, tensor) pairs, or of dicts that define parameter groups
        Floating-point parameters. As everywhere in torch.optim, a complex one counts as two real ones.
    lr : float
        Learning rate, at least 0.
    betas : tuple of two floats
        Decay rates b1, b2 of the two moments, in [0, 1).
    eps, eps_root : float
        Added to the root of the second moment, and to the second moment at every step; at least 0.
    weight_decay : float
        Decoupled weight decay, multiplied by `lr`; at least 0.
    clip_exponent : float, optional
        No element moves by more than ``lr * t**clip_exponent`` at step t; None for no clip. 0.25 is recommended.
    centering : {"current", "previous"}
        Centre the second moment on m_t as the paper does, or on m_{t-1} as the code of ``optax.contrib.acprop``.
    moment_dtype : torch.dtype, optional
        Dtype of the moments; by default the parameter's, and float32 for 16-bit parameters.

    Raises
    ------
    ValueError
        If an option is out of its range or not finite.
    TypeError
        If an option is of a wrong type.

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
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-16,
        eps_root: float = 1e-16,
        weight_decay: float = 0.0,
        *,
        clip_exponent: float | None = None,
        centering: str = "current",
        moment_dtype: torch.dtype | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "eps_root": eps_root,
            "weight_decay": weight_decay,
            "clip_exponent": clip_exponent,
            "centering": centering,
            "moment_dtype": moment_dtype,
        }
        super().__init__(params, defaults)

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
        """
        _functional({**self.defaults, **param_group})  # for its checks
        super().add_param_group(param_group)

    @torch.no_grad()
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
            If a gradient is sparse; nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        ready = []
        for group in self.param_groups:  # whatever can be refused is refused before anything is written
            optimizer = _functional(group)
            steps: dict[int, Any] = {}  # parameters that joined late have a count of their own
            for param in group["params"]:
                if param.grad is None:
                    continue
                if param.grad.is_sparse:
                    raise RuntimeError("ACProp does not support sparse gradients, please consider SparseAdam instead")
                state = self._state_of(param, optimizer)
                count = int(state["step"])
                if count not in steps:
                    steps[count] = optimizer.at(count, xp)
                ready.append((param, state, steps[count], group["weight_decay"] != 0))
        for param, state, step, decay in ready:
            whole = map(_real, (param, param.grad, *(state[key] for key in _MOMENTS)))
            for x, grad, mu, nu in _tiles(*whole):
                update, new_mu, new_nu = step(grad, mu, nu, x, decay)
                x.add_(update)
                mu.copy_(new_mu)
                nu.copy_(new_nu)
            state["step"] += 1
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a copy of what `state_dict` returned; moments keep the dtype in which they were saved.

        Parameters
        ----------
        state_dict : dict
            From `state_dict` of an optimizer of this class, with as many parameters.

        Raises
        ------
        ValueError
            If it is of another optimizer, or its parameter groups differ in size; nothing has changed then.
        """
        wanted = [
            (f"parameter group {i}", group, tuple(self.defaults)) for i, group in enumerate(state_dict["param_groups"])
        ]
        states = state_dict["state"].items()
        wanted += [(f"the state of parameter {i}", state, ("step", *_MOMENTS)) for i, state in states if state]
        for name, saved, keys in wanted:
            if missing := [key for key in keys if key not in saved]:
                raise ValueError(
                    f"{name} lacks {', '.join(map(repr, missing))}: it is that of another optimizer; "
                    "load one that ACProp saved"
                )
        super().load_state_dict(state_dict)
        # The base class casts moments to their parameter's dtype, which would round those of 16-bit parameters.
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for number, param in zip(numbers, params, strict=True):
            if state := state_dict["state"].get(number):
                for key in _MOMENTS:
                    self.state[param][key] = state[key].to(param.device, copy=True)
                self.state[param]["step"] = state["step"].clone()

    def _state_of(self, param: torch.Tensor, optimizer: acprop_core.ACProp) -> dict[str, torch.Tensor]:
        if not self.state[param]:
            moments = optimizer.init(_real(param))
            # as in all of torch.optim: in a 16-bit default dtype counting would end at 256
            dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
            state = {"step": torch.tensor(0.0, dtype=dtype)}
            for key, moment in zip(_MOMENTS, (moments.mu, moments.nu), strict=True):
                state[key] = torch.view_as_complex(moment) if param.is_complex() else moment
            self.state[param] = state
        return self.state[param]


def _functional(group: dict[str, Any]) -> acprop_core.ACProp:
    b1, b2 = group["betas"]
    return acprop_core.ACProp(
        learning_rate=group["lr"],
        b1=b1,
        b2=b2,
        **{
            key: group[key] for key in ("eps", "eps_root", "weight_decay", "clip_exponent", "centering", "moment_dtype")
        },
    )


def _tiles(*tensors: torch.Tensor) -> Iterable[tuple[torch.Tensor, ...]]:
    # temporaries of a large tensor are new memory at every operation, whose page faults cost more than the arithmetic
    if tensors[0].is_cpu and tensors[0].numel() > _TILE and all(x.is_contiguous() for x in tensors):
        return zip(*(torch.split(x.view(-1), _TILE) for x in tensors), strict=True)
    return [tensors]


def _real(x: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(x) if x.is_complex() else x
