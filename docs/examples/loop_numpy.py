"""Train in NumPy, stop half way, resume in NumPy, and resume in PyTorch."""

import tempfile

import numpy as np
from sklearn.datasets import load_digits

from acprop_core import load, save
from acprop_stepper import Stepper, export_state, import_state

Array = np.ndarray
STEPS, WARMUP, BATCH = 240, 16, 64


def rate(done: int) -> float:
    """Return the learning rate: a warm-up, then a cosine that ends at 0."""
    warm = min(1.0, (done + 1) / WARMUP)
    return 1e-2 * warm * 0.5 * (1.0 + np.cos(np.pi * done / STEPS))


def new_params() -> dict[str, Array]:
    """Return new weights, by the names that PyTorch has for them."""
    rng = np.random.default_rng(0)
    return {
        "0.weight": rng.normal(0.0, 64**-0.5, (64, 64)).astype(np.float32),
        "0.bias": np.zeros(64, np.float32),
        "2.weight": rng.normal(0.0, 64**-0.5, (10, 64)).astype(np.float32),
        "2.bias": np.zeros(10, np.float32),
    }


def new_stepper(params: dict[str, Array]) -> Stepper:
    """Return a stepper of these arrays, with the options of this run."""
    return Stepper(
        params,
        rate,
        weight_decay=0.01,
        mask=lambda params: {name: x.ndim > 1 for name, x in params.items()},
        clip_exponent=0.25,
        clip_norm=1.0,  # of all gradients together
        nonfinite="skip",  # a step with NaN or Inf changes nothing
    )


def logits_of(p: dict, x: Array) -> tuple[Array, Array]:
    """Return the hidden layer and the logits."""
    hidden = np.maximum(x @ p["0.weight"].T + p["0.bias"], 0)
    return hidden, hidden @ p["2.weight"].T + p["2.bias"]


def gradients(p: dict, x: Array, y: Array) -> dict[str, Array]:
    """Return the gradients of the mean cross entropy."""
    hidden, logits = logits_of(p, x)
    exp = np.exp(logits - logits.max(axis=1, keepdims=True))
    d_logits = exp / exp.sum(axis=1, keepdims=True)
    d_logits[np.arange(len(y)), y] -= 1
    d_logits /= len(y)
    d_hidden = d_logits @ p["2.weight"] * (hidden > 0)
    return {
        "0.weight": d_hidden.T @ x,
        "0.bias": d_hidden.sum(axis=0),
        "2.weight": d_logits.T @ hidden,
        "2.bias": d_logits.sum(axis=0),
    }


def batch(done: int) -> Array:
    """Return the rows of a step, made from its number."""
    return np.random.default_rng(done).integers(1500, size=BATCH)


def train(p: dict, stepper: Stepper, x: Array, y: Array, steps: range) -> None:
    """Train for these steps."""
    for done in steps:
        rows = batch(done)
        record = stepper.step(gradients(p, x[rows], y[rows]))
        if record.skipped:
            print(f"step {done}: gradient norm {record.grad_norm}, skipped")


def train_in_torch(folder: str, x: Array, y: Array) -> dict[str, Array]:
    """Continue the saved run in PyTorch, and return its parameters."""
    import torch

    import acprop_torch

    layers = torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10)
    model = torch.nn.Sequential(*layers)
    with np.load(f"{folder}/params.npz") as content:
        model.load_state_dict({k: torch.from_numpy(x) for k, x in content.items()})
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = acprop_torch.ACProp(
        [{"params": matrices, "weight_decay": 0.01}, {"params": vectors}],
        clip_exponent=0.25,
    )
    saved = load(f"{folder}/run.safetensors", learning_rate=rate)
    acprop_torch.import_state(optimizer, model, *saved, prefer="own")

    for done in range(STEPS // 2, STEPS):
        for group in optimizer.param_groups:
            group["lr"] = rate(done)
        rows = batch(done)
        logits = model(torch.from_numpy(x[rows]))
        optimizer.zero_grad()
        labels = torch.from_numpy(y[rows])
        torch.nn.functional.cross_entropy(logits, labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
        optimizer.step()
    return {name: p.detach().numpy() for name, p in model.named_parameters()}


def main() -> None:
    """Train without a stop, train with one, compare."""
    digits = load_digits()
    x, y = (digits.data / 16).astype(np.float32), digits.target

    whole = new_params()
    train(whole, new_stepper(whole), x, y, range(STEPS))

    with tempfile.TemporaryDirectory() as folder:
        params = new_params()
        stepper = new_stepper(params)
        train(params, stepper, x, y, range(STEPS // 2))
        np.savez(f"{folder}/params.npz", **params)
        save(f"{folder}/run.safetensors", *export_state(stepper))

        with np.load(f"{folder}/params.npz") as content:  # in a new process
            resumed = dict(content)
        stepper = new_stepper(resumed)
        # a file cannot hold a schedule, so pass it again
        saved = load(f"{folder}/run.safetensors", learning_rate=rate)
        import_state(stepper, *saved)
        train(resumed, stepper, x, y, range(STEPS // 2, STEPS))

        in_torch = train_in_torch(folder, x, y)

    right = logits_of(resumed, x[1500:])[1].argmax(axis=1) == y[1500:]
    print("test accuracy above 0.85:", right.mean() > 0.85)
    same = all(resumed[name].tobytes() == whole[name].tobytes() for name in whole)
    print("the bits of a run without a stop:", same)
    apart = max(np.abs(in_torch[name] - whole[name]).max() for name in whole)
    print("largest difference in PyTorch below 1e-4:", apart < 1e-4)


if __name__ == "__main__":
    main()
