"""transformers: its Trainer takes an optimizer in two ways, and resumes."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import Trainer, get_constant_schedule_with_warmup

from acprop_torch import ACProp
from runs import HALF, STEPS, Run, check, torch_arrays


def model() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=16, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    )


def texts() -> list[dict[str, torch.Tensor]]:
    """Return sequences in which each token is the one before it plus one."""
    rows = (torch.arange(16)[:, None] + torch.arange(8)) % 16
    return [{"input_ids": row, "labels": row} for row in rows]


def arguments(folder: Path, steps: int) -> transformers.TrainingArguments:
    return transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=HALF,
        per_device_train_batch_size=4,
        weight_decay=0.01,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=5,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )


def by_optimizers(args: Any, net: Any, train_dataset: Any) -> transformers.Trainer:
    # begin optimizers
    options = {"lr": 1e-2, "weight_decay": 0.01, "clip_exponent": 0.25}
    optimizer = ACProp(net.parameters(), **options)
    schedule = get_constant_schedule_with_warmup(optimizer, num_warmup_steps=5)
    both = {"optimizers": (optimizer, schedule)}
    trainer = Trainer(net, args, train_dataset=train_dataset, **both)
    # end optimizers
    return trainer


def by_class(args: Any, net: Any, train_dataset: Any) -> transformers.Trainer:
    # begin class
    options = {"lr": 1e-2, "clip_exponent": 0.25}
    kind = {"optimizer_cls_and_kwargs": (ACProp, options)}
    trainer = Trainer(net, args, train_dataset=train_dataset, **kind)
    # end class
    return trainer


@pytest.mark.parametrize("way", [by_optimizers, by_class])
def test_transformers(way: Any, tmp_path: Path) -> None:
    def train(steps: int, resume: Path | None, save: Path) -> Run:
        trainer = way(arguments(save, steps), model(), texts())
        trainer.train(resume_from_checkpoint=resume and str(resume / f"checkpoint-{HALF}"))
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        return Run(losses, torch_arrays(trainer.model, trainer.optimizer))

    check("transformers", train, tmp_path, way.__name__)


def test_weight_decay_of_the_arguments_overrides_that_of_the_options(tmp_path: Path) -> None:
    options = {"lr": 1e-2, "weight_decay": 0.5}
    args = arguments(tmp_path, STEPS)
    trainer = transformers.Trainer(model(), args, train_dataset=texts(), optimizer_cls_and_kwargs=(ACProp, options))
    groups = trainer.create_optimizer().param_groups
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0]  # biases and norms do not decay
    assert [group["lr"] for group in groups] == [1e-2, 1e-2]
