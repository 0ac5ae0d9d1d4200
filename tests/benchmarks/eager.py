"""ACProp as one would write it in eager torch: a stand-in for the authors' optimizer, which others measure against.

The textbook recurrences of the paper (arXiv:2110.05454, algorithm 2), one parameter after the other, each operation a
kernel of its own: b1 m + (1 - b1) g rather than the lerp of acprop_core, bias corrections from b2 to the power of t.
"""

import math
from collections.abc import Iterable

import torch


class EagerACProp(torch.optim.Optimizer):
    """ACProp by a loop over the parameters, with the equations of the paper."""

    def __init__(
        self,
        params: Iterable[torch.Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-16,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            lr, (b1, b2), eps = group["lr"], group["betas"], group["eps"]
            for param in group["params"]:
                if param.grad is None:
                    continue
                grad, state = param.grad, self.state[param]
                if not state:
                    state["step"] = 0
                    state["exp_avg"], state["exp_avg_var"] = torch.zeros_like(param), torch.zeros_like(param)
                mean, variance = state["exp_avg"], state["exp_avg_var"]
                if group["weight_decay"]:
                    param.mul_(1.0 - lr * group["weight_decay"])
                if state["step"]:
                    # the second moment of the step before
                    correction = 1.0 - b2 ** state["step"]
                    denominator = variance.sqrt().div_(math.sqrt(correction)).add_(eps)
                    param.addcdiv_(grad, denominator, value=-lr)
                else:
                    param.add_(grad, alpha=-lr)
                mean.mul_(b1).add_(grad, alpha=1.0 - b1)
                residual = grad - mean
                variance.mul_(b2).addcmul_(residual, residual, value=1.0 - b2).add_(eps)
                state["step"] += 1
