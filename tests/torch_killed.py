"""Run docs/examples/scale_torch.py under torchrun, and kill a rank: at a step, and once a checkpoint is half finished.

test_scale_torch.py starts it. What is run is the example as it is: the deaths are hooked onto torch.
"""

import os
import runpy
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint
from torch.optim.optimizer import register_optimizer_step_post_hook

LIFE, RANK = (int(os.environ[name]) for name in ("TORCHELASTIC_RESTART_COUNT", "RANK"))
AT = 17


def die() -> None:
    print(f"rank {RANK} is killed in life {LIFE}", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_a_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if any(own["step"] == AT for own in optimizer.state.values()):
        die()


def save_and_die(*args: Any, **kwargs: Any) -> None:
    save(*args, **kwargs)
    if kwargs["checkpoint_id"].with_name("step-10").exists():  # in the middle of the next one
        die()


save = torch.distributed.checkpoint.save
if (LIFE, RANK) == (0, 1):
    register_optimizer_step_post_hook(die_at_a_step)
if (LIFE, RANK) == (1, 0):
    torch.distributed.checkpoint.save = save_and_die
example = Path(__file__).parents[1] / "docs" / "examples" / "scale_torch.py"
runpy.run_path(str(example), run_name="__main__")
