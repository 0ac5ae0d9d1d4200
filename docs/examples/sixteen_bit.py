"""Train a small transformer with parameters of 16 bits, with and without compensation, and one with 32 bits.

    python docs/examples/sixteen_bit.py [--steps 500] [--out out]

The text is the same as in language_model.py, and the model is smaller. All three runs start from the same weights,
which bfloat16 can hold. They see the same batches and follow the same schedule: warm-up, then a cosine to zero. They
only differ in the dtype in which parameters and gradients are stored. The passes through the model widen the
parameters to float32, because processors without units for bfloat16 are slow in it. The program prints and draws the
loss on text that was held out, in nats a character. One learning rate suits the model, the other is small, as in
fine-tuning.
"""

import argparse
import pathlib
import time

import matplotlib as mpl
import torch
from torch import Tensor, nn

from acprop_torch import ACProp
from language_model import Transformer, data, train

RATES = (4e-3, 2e-4)
RUNS = {
    "float32": (torch.float32, False),
    "bfloat16, compensate=True": (torch.bfloat16, True),
    "bfloat16": (torch.bfloat16, False),
}


class Widened(nn.Module):
    """A model that stores its parameters as they are, and computes with them in float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        widened = {name: p.float() for name, p in self.model.named_parameters()}
        return torch.func.functional_call(self.model, widened, (x,))


def run(name: str, rate: float, text: Tensor, held_out: Tensor, vocabulary: int, steps: int) -> dict[int, float]:
    """Return {step: loss on held-out text}."""
    dtype, compensate = RUNS[name]
    torch.manual_seed(0)
    model = Widened(Transformer(vocabulary, width=64, depth=2).bfloat16().to(dtype))
    optimizer = ACProp(model.parameters(), lr=rate, clip_exponent=0.25, foreach=True, compensate=compensate)
    return train(model, optimizer, text, held_out, steps, f"{name}, {rate:g}", last_rate=0.0)


def draw(curves: dict[float, dict[str, dict[int, float]]], file: pathlib.Path) -> None:
    """Draw the losses of each run against its steps, each rate in axes of its own."""
    mpl.use("agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 12, "legend.frameon": False})  # for the width of a phone
    figure, panels = plt.subplots(len(curves), 1, figsize=(6, 7.4), layout="constrained", sharex=True)
    for axes, (rate, runs) in zip(panels, curves.items(), strict=True):
        looks = ("#0072B2", "-"), ("#56B4E9", "--"), ("#1B2A6B", "-.")
        for (name, losses), (colour, style) in zip(runs.items(), looks, strict=True):
            axes.plot(list(losses), list(losses.values()), style, color=colour, label=name)
        axes.set_title(f"learning rate {rate:g}, then a cosine to 0", fontsize=12)
        axes.set_ylabel("loss on held-out text\n(nats a character)")
        axes.grid(alpha=0.3)
    panels[-1].set_xlabel("step")
    panels[-1].legend()
    figure.suptitle("A transformer with parameters in 16 bits or 32", fontsize=12)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=160)


def main() -> None:
    """Train, print and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
    options = parser.parse_args()

    source = data()
    curves: dict[float, dict[str, dict[int, float]]] = {}
    for rate in RATES:
        curves[rate] = {}
        for name in RUNS:
            start = time.perf_counter()
            curves[rate][name] = losses = run(name, rate, *source, options.steps)
            seconds = time.perf_counter() - start
            print(f"lr={rate:g}, {name}: {losses[options.steps]:.3f} after {options.steps} steps, {seconds:.0f} s")
    draw(curves, options.out / "sixteen_bit.png")
    print(f"wrote {options.out / 'sixteen_bit.png'}")


if __name__ == "__main__":
    main()
