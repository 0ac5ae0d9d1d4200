"""Train a small transformer with AdamW in PyTorch, continue in JAX with optax.adamw, and come back to PyTorch.

    python docs/examples/move_adamw.py [--steps 300] [--out out]

A third of the steps each. At both borders the parameters go over by hand, and the state of the optimizer (the count and
two moments for each parameter) by one file of `acprop_core.save`. The same model also runs in PyTorch without a stop.
In float64 the two loss curves must agree to the rounding of the two frameworks, and they are drawn together.

The text is in every Python: the docstrings of its standard library.
"""

import argparse
import math
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
import torch
from flax import nnx
from torch.nn import functional
from tqdm import tqdm

import acprop_core
import acprop_optax
import acprop_torch
from language_model import docstrings

CONTEXT, BATCH, WIDTH, HEADS, DEPTH = 32, 16, 32, 2, 2
WEIGHT_DECAY = 0.1
# torch.optim.AdamW and optax.adamw as the core calls them; the learning rate is a schedule, which each keeps itself.
ADAMW = {"eps": 1e-8, "eps_root": 0.0, "asynchronous": False, "centering": "none", "weight_decay": WEIGHT_DECAY}
Batches = Iterable[np.ndarray]  # (BATCH, CONTEXT + 1) characters each


class TorchBlock(torch.nn.Module):
    """Attention, then two layers, each on normalized input and added to it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = torch.nn.LayerNorm(WIDTH), torch.nn.LayerNorm(WIDTH)
        self.qkv, self.out = torch.nn.Linear(WIDTH, 3 * WIDTH), torch.nn.Linear(WIDTH, WIDTH)
        self.up, self.down = torch.nn.Linear(WIDTH, 4 * WIDTH), torch.nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class TorchModel(torch.nn.Module):
    """Predict the next character."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.token, self.position = torch.nn.Embedding(vocabulary, WIDTH), torch.nn.Embedding(CONTEXT, WIDTH)
        self.blocks = torch.nn.ModuleList(TorchBlock() for _ in range(DEPTH))
        self.norm, self.head = torch.nn.LayerNorm(WIDTH), torch.nn.Linear(WIDTH, vocabulary)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.token(x) + self.position.weight
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class JaxBlock(nnx.Module):
    """The same block in flax."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm1, self.norm2 = norm(rngs), norm(rngs)
        self.qkv, self.out = linear(WIDTH, 3 * WIDTH, rngs), linear(WIDTH, WIDTH, rngs)
        self.up, self.down = linear(WIDTH, 4 * WIDTH, rngs), linear(4 * WIDTH, WIDTH, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        q, k, v = jnp.moveaxis(self.qkv(self.norm1(x)).reshape(*x.shape[:-1], 3, HEADS, -1), -3, 0)
        # jax.nn.dot_product_attention would compute the softmax in float32
        scores = jnp.einsum("bqhc,bkhc->bhqk", q, k) / math.sqrt(WIDTH // HEADS)
        scores = jnp.where(jnp.tri(x.shape[1], dtype=bool), scores, -jnp.inf)
        attended = jnp.einsum("bhqk,bkhc->bqhc", jax.nn.softmax(scores), v)
        x = x + self.out(attended.reshape(x.shape))
        return x + self.down(jax.nn.gelu(self.up(self.norm2(x)), approximate=False))


class JaxModel(nnx.Module):
    """The same model in flax."""

    def __init__(self, vocabulary: int, rngs: nnx.Rngs) -> None:
        self.token = nnx.Embed(vocabulary, WIDTH, param_dtype=jnp.float64, rngs=rngs)
        self.position = nnx.Embed(CONTEXT, WIDTH, param_dtype=jnp.float64, rngs=rngs)
        self.blocks = nnx.List(JaxBlock(rngs) for _ in range(DEPTH))
        self.norm, self.head = norm(rngs), linear(WIDTH, vocabulary, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.token(x) + self.position.embedding[...]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def linear(inputs: int, outputs: int, rngs: nnx.Rngs) -> nnx.Linear:
    """Return a Linear of flax, whose kernel is (in, out); PyTorch's weight is (out, in)."""
    return nnx.Linear(inputs, outputs, param_dtype=jnp.float64, rngs=rngs)


def norm(rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Return a LayerNorm of flax with the epsilon of PyTorch's."""
    return nnx.LayerNorm(WIDTH, epsilon=1e-5, param_dtype=jnp.float64, use_fast_variance=False, rngs=rngs)


def to_flax(name: str) -> str:
    """Return the name in flax of a parameter of PyTorch."""
    layer, _, kind = name.rpartition(".")
    if kind == "bias":
        return name
    if layer in ("token", "position"):
        return f"{layer}.embedding"
    return f"{layer}.scale" if "norm" in layer else f"{layer}.kernel"


def transposed(name: str, x: np.ndarray) -> np.ndarray:
    """Return an array in the layout of the other framework; `name` is flax's."""
    return x.T if name.endswith("kernel") else x


def train_in_torch(model: TorchModel, optimizer: torch.optim.Optimizer, rates: list[float], batches: Batches) -> list:
    """Return the loss before each step."""
    losses = []
    for rate, batch in zip(rates, batches, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        text = torch.from_numpy(batch)
        loss = functional.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def train_in_jax(graph: Any, params: Any, state: Any, transform: Any, batches: Batches) -> tuple[Any, Any, list]:
    """Return parameters and state after the last step, and the loss before each step."""

    @jax.jit
    def step(params: Any, state: Any, batch: jax.Array) -> Any:
        def loss_of(params: Any) -> jax.Array:
            logits = nnx.merge(graph, params)(batch[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, state = transform.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for batch in batches:
        params, state, loss = step(params, state, jnp.asarray(batch))
        losses.append(float(loss))
    return params, state, losses


def moved_run(model: TorchModel, legs: list[list[np.ndarray]], schedule: Callable[[Any], Any], file: str) -> list:
    """Return the losses of a run that is in PyTorch, then in JAX, then in PyTorch again."""
    first, second, third = legs
    rates = [float(schedule(t)) for t in range(sum(map(len, legs)))]
    adamw = torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY)
    losses = train_in_torch(model, adamw, rates[: len(first)], tqdm(first, desc="PyTorch", leave=False))

    # to JAX: the optimizer by a file, the parameters by hand
    acprop_core.save(file, *acprop_torch.export_state(adamw, model))
    graph, params = nnx.split(JaxModel(model.head.out_features, nnx.Rngs(0)), nnx.Param)
    arrays = {to_flax(name): x.detach().numpy() for name, x in model.named_parameters()}
    params = jax.tree.map_with_path(lambda path, x: jnp.array(transposed(dotted(path), arrays[dotted(path)])), params)
    transform, hyper = optax.adamw(schedule, weight_decay=WEIGHT_DECAY), acprop_core.ACProp(schedule, **ADAMW)
    saved = acprop_core.load(file, rename=to_flax, transform=transposed)
    state = acprop_optax.import_state(transform.init(params), hyper, *saved, prefer="own")
    params, state, more = train_in_jax(graph, params, state, transform, tqdm(second, desc="JAX", leave=False))
    losses += more

    # and back: PyTorch's names by flax's
    acprop_core.save(file, *acprop_optax.export_state(state, hyper))
    names = {to_flax(name): name for name, _ in model.named_parameters()}
    with torch.no_grad():
        by_name = {dotted(path): np.array(x) for path, x in jax.tree.leaves_with_path(params)}
        for name, x in model.named_parameters():
            x.copy_(torch.from_numpy(transposed(to_flax(name), by_name[to_flax(name)])))
    adamw = torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY)
    back = {name: np.transpose for flax, name in names.items() if flax.endswith("kernel")}
    saved = acprop_core.load(file, rename=names, transform=back, learning_rate=1e-3)
    acprop_torch.import_state(adamw, model, *saved)
    return losses + train_in_torch(model, adamw, rates[-len(third) :], tqdm(third, desc="PyTorch", leave=False))


def dotted(path: Any) -> str:
    """Return the dotted name of a leaf of flax's parameters."""
    return ".".join(str(getattr(key, "key", getattr(key, "idx", ""))) for key in path if not hasattr(key, "name"))


def batches_of(text: np.ndarray, steps: int) -> Iterator[np.ndarray]:
    """Yield random windows of the text."""
    rng = np.random.default_rng(1)
    for _ in range(steps):
        starts = rng.integers(len(text) - CONTEXT, size=BATCH)
        yield np.stack([text[start : start + CONTEXT + 1] for start in starts])


def draw(stayed: list[float], moved: list[float], borders: tuple[int, int], file: pathlib.Path) -> None:
    """Draw both loss curves, each loss averaged over 10 steps, and their difference."""
    mpl.use("agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 12, "legend.frameon": False})  # for the width of a phone
    figure, (above, below) = plt.subplots(2, figsize=(6, 7.0), layout="constrained", sharex=True, height_ratios=(2, 1))
    smooth = [np.convolve(losses, np.full(10, 0.1), "valid") for losses in (stayed, moved)]
    steps = np.arange(10, len(stayed) + 1)
    above.plot(steps, smooth[0], color="0.7", linewidth=5, label="PyTorch, without a stop")
    above.plot(steps, smooth[1], color="#D55E00", linewidth=1.5, label="PyTorch, then JAX, then PyTorch")
    above.set_ylabel("loss (nats a character)")
    above.set_title("An AdamW run that moves: a transformer in float64", fontsize=12)
    above.set_ylim(top=5.1)  # room for the names
    figure.legend(loc="outside lower center")
    below.plot(np.arange(1, len(stayed) + 1), np.subtract(moved, stayed), color="#D55E00")
    below.set(xlabel="step", ylabel="moved minus stayed")
    for axes in (above, below):
        for border in borders:
            axes.axvline(border, color="0.4", linestyle=":")
        axes.grid(alpha=0.3)
    for border, name in zip((0, *borders), ("torch.optim.AdamW", "optax.adamw", "torch.optim.AdamW"), strict=True):
        above.annotate(
            f"  {name}", (border, 0.97), xycoords=("data", "axes fraction"), va="top", color="0.3", fontsize=10
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=160)


def main() -> None:
    """Run both, compare and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    torch.set_default_dtype(torch.float64)

    characters, text = np.unique(np.frombuffer(docstrings().encode(), np.uint8), return_inverse=True)
    batches = list(batches_of(text, options.steps))
    schedule_of = optax.warmup_cosine_decay_schedule(0.0, 3e-3, options.steps // 10, options.steps, 3e-4)
    first, second = options.steps // 3, 2 * options.steps // 3

    def schedule(count: Any) -> jax.Array:
        # optax's schedules compute in float32 when the count is an int32, as that of an optimizer is
        return schedule_of(jnp.asarray(count, jnp.float64))

    def model() -> TorchModel:
        torch.manual_seed(0)
        return TorchModel(len(characters))

    stays = model()
    adamw = torch.optim.AdamW(stays.parameters(), weight_decay=WEIGHT_DECAY)
    rates = [float(schedule(t)) for t in range(options.steps)]
    stayed = train_in_torch(stays, adamw, rates, tqdm(batches, desc="without a stop", leave=False))
    with tempfile.TemporaryDirectory() as folder:
        legs = [batches[:first], batches[first:second], batches[second:]]
        moved = moved_run(model(), legs, schedule, f"{folder}/run.safetensors")

    print(f"loss in nats a character: {stayed[0]:.4f} at first, chance is {math.log(len(characters)):.4f}")
    print(f"after {options.steps} steps: {stayed[-1]:.4f} without a stop, {moved[-1]:.4f} moved")
    difference = max(abs(a - b) for a, b in zip(stayed, moved, strict=True))
    print(f"largest difference of the two runs' losses: {difference:.1e}")
    if difference > 1e-12:
        raise SystemExit("the run that moved is not the run that stayed")
    draw(stayed, moved, (first, second), options.out / "move_adamw.png")
    print(f"drawn: {options.out / 'move_adamw.png'}")


if __name__ == "__main__":
    main()
