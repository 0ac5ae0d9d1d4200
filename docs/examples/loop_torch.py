"""Train, stop half way, resume: the bits are those of a run without a stop."""

import math
import os
import tempfile

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from acprop_torch import ACProp

STEPS, WARMUP, BATCH, PARTS = 240, 16, 64, 2
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE, SCALED = torch.bfloat16, False  # or torch.float16, True


def rate(done: int) -> float:
    """Return the factor of the learning rate: a warm-up, then a cosine to 0."""
    warm = min(1.0, (done + 1) / WARMUP)
    return warm * 0.5 * (1.0 + math.cos(math.pi * done / STEPS))


class Training:
    """The parts of a run; a checkpoint holds the state of each."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(64, 64),
            torch.nn.LayerNorm(64),
            torch.nn.GELU(),
            torch.nn.Dropout(0.1),
            torch.nn.Linear(64, 10),
        ).to(DEVICE)
        params = list(self.model.parameters())
        groups = [
            {"params": [p for p in params if p.ndim > 1], "weight_decay": 0.01},
            # biases and norms do not decay
            {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = ACProp(groups, lr=1e-2, clip_exponent=0.25)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rate)
        self.scaler = torch.amp.GradScaler(DEVICE, enabled=SCALED)
        averaging = get_ema_multi_avg_fn(0.95)
        self.average = AveragedModel(self.model, multi_avg_fn=averaging)
        self.order = torch.Generator().manual_seed(1)  # of the data
        self.done = 0

    def step(self, x: torch.Tensor, y: torch.Tensor) -> None:
        batch = torch.randint(len(x), (BATCH,), generator=self.order)
        for part in batch.chunk(PARTS):  # gradients of the parts add up
            with torch.autocast(DEVICE, dtype=DTYPE):
                loss = cross_entropy(self.model(x[part]), y[part])
            self.scaler.scale(loss / PARTS).backward()

        self.scaler.unscale_(self.optimizer)  # the norm is the true one
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_norm=1.0)
        self.scaler.step(self.optimizer)  # not if there is an infinity
        self.scaler.update()
        self.optimizer.zero_grad()
        self.schedule.step()  # after the optimizer
        self.average.update_parameters(self.model)
        self.done += 1

    def parts(self) -> dict:
        names = ("model", "optimizer", "schedule", "scaler", "average")
        return {name: getattr(self, name) for name in names}

    def save(self, path: str) -> None:
        content = {name: part.state_dict() for name, part in self.parts().items()}
        content["order"] = self.order.get_state()
        content["dropout"] = torch.get_rng_state()  # on CUDA torch.cuda's, too
        content["done"] = self.done
        torch.save(content, f"{path}.new")
        os.replace(f"{path}.new", path)  # a crash leaves one of the two

    def load(self, path: str) -> None:
        content = torch.load(path, weights_only=True)
        for name, part in self.parts().items():
            part.load_state_dict(content[name])
        self.order.set_state(content["order"])
        torch.set_rng_state(content["dropout"])
        self.done = content["done"]

    def bits(self) -> list[bytes]:
        """Return the bits of parameters, averages, moments and counts."""
        parts = self.model.state_dict(), self.average.state_dict()
        tensors = [x for part in parts for x in part.values()]
        for state in self.optimizer.state.values():
            tensors += [x for x in state.values() if torch.is_tensor(x)]
        return [x.detach().cpu().numpy().tobytes() for x in tensors]


def main() -> None:
    """Train without a stop, train with one, compare."""
    digits = load_digits()
    x = torch.tensor(digits.data / 16, dtype=torch.float32, device=DEVICE)
    y = torch.tensor(digits.target, device=DEVICE)

    whole = Training()
    while whole.done < STEPS:
        whole.step(x[:1500], y[:1500])

    with tempfile.TemporaryDirectory() as folder:
        stopped = Training()
        while stopped.done < STEPS // 2:
            stopped.step(x[:1500], y[:1500])
        stopped.save(f"{folder}/run.pt")

        resumed = Training()  # in a new process, usually
        resumed.load(f"{folder}/run.pt")
    while resumed.done < STEPS:
        resumed.step(x[:1500], y[:1500])

    resumed.average.eval()
    with torch.no_grad():
        right = resumed.average(x[1500:]).argmax(1) == y[1500:]
    accuracy = right.float().mean().item()
    print("test accuracy of the average above 0.85:", accuracy > 0.85)
    print("the bits of a run without a stop:", resumed.bits() == whole.bits())


if __name__ == "__main__":
    main()
