"""Lightning: its Trainer clips, accumulates, casts, schedules and resumes."""

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch.optim.lr_scheduler import LinearLR

from acprop_torch import ACProp
from runs import Run, check, torch_arrays, torch_data, torch_net


# begin
class Classifier(lightning.LightningModule):
    def __init__(self, net: torch.nn.Module, **options: Any) -> None:
        super().__init__()
        self.net, self.options, self.losses = net, options, []

    def training_step(self, batch: Any) -> torch.Tensor:
        x, y = batch
        logits = self.net(x.to(self.dtype)).float()
        loss = torch.nn.functional.cross_entropy(logits, y)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        options = {"weight_decay": 0.01, "clip_exponent": 0.25, **self.options}
        optimizer = ACProp(self.parameters(), lr=3e-2, **options)
        schedule = LinearLR(optimizer, 1.0, 0.1, total_iters=40)
        every_step = {"scheduler": schedule, "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": every_step}


# end


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_lightning(precision: str, tmp_path: Path) -> None:
    def train(steps: int, resume: Path | None, save: Path) -> Run:
        model = Classifier(torch_net(), **({"compensate": True} if precision == "bf16-true" else {}))
        batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*torch_data()), batch_size=16)
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_epochs=steps // 2,
            accumulate_grad_batches=2,  # of four batches
            gradient_clip_val=1.0,
            precision=precision,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, batches, ckpt_path=resume)
        trainer.save_checkpoint(save)
        return Run(model.losses, torch_arrays(model, trainer.optimizers[0]))

    check("lightning", train, tmp_path, precision)
