"""peft: LoRA adapters are trained, and the rest of the model is frozen."""

from pathlib import Path

import peft
import torch

from acprop_torch import ACProp
from in_transformers import model, texts
from runs import Run, check, torch_arrays


def train(steps: int, resume: Path | None, save: Path) -> Run:
    net, losses, done = model(), [], 0
    batch = {name: torch.stack([row[name] for row in texts()]) for name in ("input_ids", "labels")}
    torch.manual_seed(0)
    # begin
    config = peft.LoraConfig(r=4, target_modules=["c_attn", "c_proj", "lm_head"])
    net = peft.get_peft_model(net, config)
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = ACProp(trained, lr=3e-2, clip_exponent=0.25)
    # end
    if resume is not None:
        peft.set_peft_model_state_dict(net, peft.load_peft_weights(str(resume)))
        saved = torch.load(resume / "optimizer.pt")
        optimizer.load_state_dict(saved["optimizer"])
        done = saved["done"]
    net.train()
    for step in range(done, steps):
        torch.manual_seed(step)  # dropout
        optimizer.zero_grad()
        loss = net(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    net.save_pretrained(str(save))
    torch.save({"optimizer": optimizer.state_dict(), "done": steps}, save / "optimizer.pt")
    return Run(losses, torch_arrays(net, optimizer))


def test_peft(tmp_path: Path) -> None:
    check("peft", train, tmp_path)
