"""DeepSpeed: one process on the CPU, with ZeRO, bfloat16, clipping, a schedule and its checkpoints."""

from collections.abc import Iterator
from pathlib import Path

import deepspeed
import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch.optim.lr_scheduler import LinearLR

from acprop_torch import ACProp
from runs import Run, check, torch_data, torch_net


@pytest.fixture(autouse=True, scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Be the one process of a run, as deepspeed's launcher would start it."""
    where = f"file://{tmp_path_factory.mktemp('meet')}/here"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False, init_method=where, rank=0, world_size=1)
        yield
    torch.distributed.destroy_process_group()


def train(stage: int, steps: int, resume: Path | None, save: Path) -> Run:
    model, (x, y), losses, done = torch_net(), torch_data(), [], 0
    # begin
    config = {
        "train_micro_batch_size_per_gpu": 64,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": True},
        "gradient_clipping": 1.0,
    }
    options = {"lr": 3e-2, "weight_decay": 0.01, "clip_exponent": 0.25}
    optimizer = ACProp(model.parameters(), **options)
    schedule = LinearLR(optimizer, 1.0, 0.1, total_iters=40)
    parts = {"model": model, "optimizer": optimizer, "lr_scheduler": schedule}
    engine, *_ = deepspeed.initialize(**parts, config=config)
    # end
    if resume is not None:
        engine.load_checkpoint(str(resume))
        done = 20
    for _ in range(done, steps):
        loss = torch.nn.functional.cross_entropy(engine(x.bfloat16()).float(), y)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    engine.save_checkpoint(str(save))
    moments = sorted(next(iter(optimizer.state.values())).keys() - {"step"})
    arrays = []
    for p in engine.module.parameters():  # whole, though a process holds a part of each
        arrays += [safe_get_full_fp32_param(p), *(safe_get_full_optimizer_state(p, key) for key in moments)]
    return Run(losses, [a.numpy().copy() for a in arrays])


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed(tmp_path: Path, stage: int) -> None:
    check("deepspeed", lambda *args: train(stage, *args), tmp_path, f"ZeRO-{stage}")
