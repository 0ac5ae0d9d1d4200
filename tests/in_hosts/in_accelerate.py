"""accelerate: a loop of one's own, with accumulation, clipping, bfloat16 and checkpoints."""

from pathlib import Path

import accelerate
import torch
from torch.optim.lr_scheduler import LinearLR

from acprop_torch import ACProp
from runs import Run, check, torch_arrays, torch_data, torch_net


def train(steps: int, resume: Path | None, save: Path) -> Run:
    model, losses, done = torch_net(), [], 0
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*torch_data()), batch_size=16)
    # begin
    precision = {"mixed_precision": "bf16", "gradient_accumulation_steps": 2}
    accelerator = accelerate.Accelerator(cpu=True, **precision)
    options = {"lr": 3e-2, "weight_decay": 0.01, "clip_exponent": 0.25}
    optimizer = ACProp(model.parameters(), **options)
    schedule = LinearLR(optimizer, 1.0, 0.1, total_iters=40)
    prepared = accelerator.prepare(model, optimizer, schedule, batches)
    model, optimizer, schedule, batches = prepared
    # end
    if resume is not None:
        accelerator.load_state(str(resume))
        done = 20
    while done < steps:
        for x, y in batches:
            with accelerator.accumulate(model):
                loss = torch.nn.functional.cross_entropy(model(x), y)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            done += accelerator.sync_gradients
            losses.append(loss.item())
    accelerator.save_state(str(save))
    return Run(losses, torch_arrays(accelerator.unwrap_model(model), optimizer.optimizer))


def test_accelerate(tmp_path: Path) -> None:
    check("accelerate", train, tmp_path)
