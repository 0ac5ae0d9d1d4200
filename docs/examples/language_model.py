"""Train a small transformer to write documentation, character by character, with ACProp and with AdamW.

    python docs/examples/language_model.py [--steps 600] [--out out]

The text is in every Python: the docstrings of its standard library. The same model starts from the same weights, sees
the same batches and follows the same schedule (warm-up, then a cosine). Each optimizer uses the learning rate that was
best for it in short runs. The program prints and draws the loss on text that was held out, in nats a character.
"""

import argparse
import ast
import math
import pathlib
import sysconfig
import time
from collections.abc import Callable, Iterable

import matplotlib as mpl
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from acprop_torch import ACProp

CONTEXT, BATCH = 96, 24
RATES = (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
SHORT = 150  # steps of the runs that choose the rate
MakeOptimizer = Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer]

OPTIMIZERS: dict[str, MakeOptimizer] = {
    "ACProp, clip_exponent=0.25": lambda params, lr: ACProp(
        params, lr=lr, weight_decay=0.1, clip_exponent=0.25, fused=True
    ),
    "AdamW": lambda params, lr: torch.optim.AdamW(params, lr=lr, weight_decay=0.1, fused=True),
}


def docstrings() -> str:
    """Return the docstrings of the modules at the top of the standard library, plain ASCII, in alphabetical order."""
    texts = []
    for file in sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts += [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)]
    return "\n\n".join(filter(None, texts)).encode("ascii", "ignore").decode()


class Block(nn.Module):
    """Attention, then two layers, each on normalized input and added to it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        per_head = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = per_head.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Predict the next character."""

    def __init__(self, vocabulary: int, width: int = 128, heads: int = 4, depth: int = 3) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, vocabulary))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.token(x) + self.position.weight[: x.shape[1]]))


def loss_of(model: nn.Module, text: Tensor, starts: Tensor) -> Tensor:
    """Return the mean loss, in nats a character, on the windows of `text` that begin at `starts`."""
    windows = torch.stack([text[start : start + CONTEXT + 1] for start in starts.tolist()])
    return functional.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


def data() -> tuple[Tensor, Tensor, int]:
    """Return the text to train on, the text held out, and the number of characters that there are."""
    vocabulary, text = torch.unique(torch.tensor(list(docstrings().encode("ascii"))), return_inverse=True)
    cut = len(text) * 9 // 10
    print(f"{len(text):,} characters of {len(vocabulary)} kinds, {CONTEXT * BATCH:,} a step")
    return text[:cut], text[cut:], len(vocabulary)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    text: Tensor,
    held_out: Tensor,
    steps: int,
    name: str,
    last_rate: float = 0.1,
) -> dict[int, float]:
    """Return {step: loss on held-out text}; the learning rate ends at `last_rate` of the optimizer's."""
    warm_up = 50
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min(
            (i + 1) / warm_up, (1 + last_rate) / 2 + (1 - last_rate) / 2 * math.cos(math.pi * min(1.0, i / steps))
        ),
    )
    generator = torch.Generator().manual_seed(1)
    tests = torch.linspace(0, len(held_out) - CONTEXT - 1, 96).long()
    losses = {}
    for step in tqdm(range(1, steps + 1), desc=name, leave=False):
        optimizer.zero_grad()
        starts = torch.randint(len(text) - CONTEXT - 1, (BATCH,), generator=generator)
        loss_of(model, text, starts).backward()
        optimizer.step()
        schedule.step()
        if step % 25 == 0 or step == steps:
            with torch.no_grad():
                losses[step] = loss_of(model, held_out, tests).item()
    return losses


def draw(curves: dict[str, dict[int, float]], file: pathlib.Path) -> None:
    """Draw the losses of each run against its steps."""
    mpl.use("agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 12, "legend.frameon": False})  # for the width of a phone
    figure, axes = plt.subplots(figsize=(6, 5), layout="constrained")
    for (name, losses), style in zip(
        curves.items(), ({"color": "#0072B2"}, {"color": "#D55E00", "linestyle": "--"}), strict=True
    ):
        axes.plot(list(losses), list(losses.values()), **style, label=name)
    axes.set(xlabel="step", ylabel="loss on held-out text\n(nats a character)")
    axes.set_title("A transformer on the docstrings\nof Python's standard library", fontsize=12)
    axes.legend()
    axes.grid(alpha=0.3)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=160)


def main() -> None:
    """Choose the rates, train, print and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
    options = parser.parse_args()

    text, held_out, vocabulary = data()

    def run(name: str, rate: float, steps: int) -> dict[int, float]:
        torch.manual_seed(0)
        model = Transformer(vocabulary)
        optimizer = OPTIMIZERS[name](model.parameters(), rate)
        return train(model, optimizer, text, held_out, steps, f"{name}, {rate:g}")

    curves = {}
    for name in OPTIMIZERS:
        trials = {rate: run(name, rate, min(SHORT, options.steps)) for rate in RATES}
        finals = {rate: list(losses.values())[-1] for rate, losses in trials.items()}
        best = min(finals, key=finals.__getitem__)
        print(
            f"{name}: after {min(SHORT, options.steps)} steps", *(f"{r:g}: {loss:.3f};" for r, loss in finals.items())
        )
        start = time.perf_counter()
        curves[f"{name}, lr={best:g}"] = losses = run(name, best, options.steps)
        seconds = time.perf_counter() - start
        print(f"{name}, lr={best:g}: {list(losses.values())[-1]:.3f} after {options.steps} steps, {seconds:.0f} s")
    draw(curves, options.out / "language_model.png")
    print(f"wrote {options.out / 'language_model.png'}")


if __name__ == "__main__":
    main()
