"""timm: parameter groups by layer, the registry of optimizers by name, and a scheduler that writes lr itself."""

from pathlib import Path
from typing import Any

import timm.optim
import timm.scheduler
import torch

from acprop_torch import ACProp
from runs import Run, check, torch_arrays


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, img_size=16, patch_size=8, embed_dim=24, depth=2, num_classes=4
    )


def images() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return x, torch.arange(16) % 4


def by_groups(net: torch.nn.Module) -> torch.optim.Optimizer:
    # begin groups
    decay = {"weight_decay": 0.05, "no_weight_decay_list": net.no_weight_decay()}
    groups = timm.optim.param_groups_layer_decay(net, **decay, layer_decay=0.8)
    optimizer = ACProp(groups, lr=3e-3, clip_exponent=0.25)
    # end groups
    return optimizer


def by_name(net: torch.nn.Module) -> torch.optim.Optimizer:
    # begin name
    from timm.optim import OptimInfo

    # timm has no public name for its registry
    from timm.optim._optim_factory import default_registry

    info = OptimInfo("acprop", ACProp, "ACProp", has_betas=True)
    default_registry.register(info)
    options = {"weight_decay": 0.05, "layer_decay": 0.8, "clip_exponent": 0.25}
    optimizer = timm.optim.create_optimizer_v2(net, "acprop", lr=3e-3, **options)
    # end name
    return optimizer


def train_by(way: Any) -> Any:
    def train(steps: int, resume: Path | None, save: Path) -> Run:
        net = model()
        optimizer = way(net)
        # begin schedule
        steps_of = {"t_initial": 40, "warmup_t": 4, "t_in_epochs": False}
        schedule = timm.scheduler.CosineLRScheduler(optimizer, **steps_of)
        # end schedule
        done, losses = 0, []
        if resume is not None:
            saved = torch.load(resume)
            net.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            done = saved["done"]
            schedule.step_update(done)
        for step in range(done, steps):
            x, y = images()
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
            schedule.step_update(step + 1)
            losses.append(loss.item())
        torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict(), "done": steps}, save)
        return Run(losses, torch_arrays(net, optimizer))

    return train


def test_timm_with_groups(tmp_path: Path) -> None:
    check("timm", train_by(by_groups), tmp_path, "groups")


def test_timm_by_name(tmp_path: Path) -> None:
    check("timm", train_by(by_name), tmp_path, "by name")


def test_both_ways_make_the_same_groups() -> None:
    net = model()
    first, second = (
        [(len(group["params"]), group["weight_decay"], group["lr_scale"]) for group in way(net).param_groups]
        for way in (by_groups, by_name)
    )
    assert first == second
    assert len(first) > 2
