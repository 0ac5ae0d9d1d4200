"""Record the gradients of a run in PyTorch, replay them in NumPy, and compare the parameters bit by bit.

    python docs/examples/same_bits.py [--steps 300] [--out out]

A small network is trained in float32 in PyTorch. Its first parameters, the gradients of every step, and a digest of the
parameters after it go to `out/run.npz`. The Stepper replays the file in NumPy and compares each digest. The exit
code is 1 if one differs.
"""

import argparse
import hashlib
import pathlib
import sys

import numpy as np

from acprop_stepper import Stepper

Arrays = dict[str, np.ndarray]

HYPER = {"weight_decay": 1e-4, "clip_exponent": 0.25}  # both runs write out what they use


def rate(count: int) -> float:
    """Return a learning rate that falls from 1e-2 to 0; computed in Python, so that all frameworks get one number."""
    return 1e-2 * max(0.0, 1.0 - count / 1_000)


def digest(params: Arrays) -> str:
    """Return a digest of the bits of all parameters."""
    bits = hashlib.sha256()
    for name in sorted(params):
        bits.update(np.ascontiguousarray(params[name]).tobytes())
    return bits.hexdigest()


def record(path: pathlib.Path, steps: int) -> None:
    """Train in PyTorch, and write everything that determines the parameters to a file."""
    import torch

    from acprop_torch import ACProp

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
    params = dict(model.named_parameters())
    x = torch.randn(256, 20)
    y = x.square().mean(dim=1, keepdim=True)
    optimizer = ACProp(params.values(), **HYPER)

    def arrays_of(tensors: dict[str, torch.Tensor]) -> Arrays:
        return {name: tensor.detach().numpy().copy() for name, tensor in tensors.items()}

    contents = {f"start/{name}": array for name, array in arrays_of(params).items()}
    digests = []
    for t in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x), y).backward()
        contents |= {f"{t}/{name}": g for name, g in arrays_of({n: p.grad for n, p in params.items()}).items()}
        optimizer.param_groups[0]["lr"] = rate(t)
        optimizer.step()
        digests.append(digest(arrays_of(params)))
    np.savez(path, digests=digests, **contents)


def replay(path: pathlib.Path) -> list[int]:
    """Take the steps of a file in NumPy; return those that leave other bits."""
    apart = []
    with np.load(path) as file:
        params = {name.removeprefix("start/"): file[name] for name in file if name.startswith("start/")}
        stepper = Stepper(params, learning_rate=rate, **HYPER)
        for t, expected in enumerate(file["digests"]):
            stepper.step({name: file[f"{t}/{name}"] for name in params})
            if digest(params) != expected:
                apart.append(t + 1)
    return apart


def main() -> int:
    """Record, replay, and say how many steps have the same bits."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300, help="training steps")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"), help="folder of the file")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "run.npz"
    record(path, arguments.steps)
    apart = replay(path)
    print(f"NumPy has the bits of PyTorch after {arguments.steps - len(apart)} of {arguments.steps} steps.")
    if apart:
        print(f"The first step that differs is step {apart[0]}.", file=sys.stderr)
    return 1 if apart else 0


if __name__ == "__main__":
    sys.exit(main())
