"""Train one network on handwritten digits on several processes, sharded by FSDP2, with checkpoints to resume from.

    torchrun --standalone --nproc-per-node 2 docs/examples/scale_torch.py [--steps 200] [--every 50] [--out out]

Parameters, gradients and moments are each spread over the processes, which communicate by gloo, on CPUs. Every 50
steps torch.distributed.checkpoint saves model and optimizer. A run that finds a checkpoint in the folder continues
from the last one: after a process was killed (`torchrun --max-restarts 1` starts all of them again), to do more steps,
or on another number of processes. In the end the whole state of the optimizer is gathered and exported to one file,
which any framework can load.

clip_exponent=0.25, because pixels in the digits' margins are 0 for some steps and then are not: plain ACProp explodes.
"""

import argparse
import pathlib
import shutil

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from acprop_core import save
from acprop_torch import ACProp, export_state

BATCH = 64


def checkpoints(folder: pathlib.Path) -> list[pathlib.Path]:
    """Return the finished checkpoints in order; the rename in `write` finishes one."""
    return sorted(folder.glob("step-[0-9]*"), key=lambda path: int(path.name[5:]))


def write(folder: pathlib.Path, step: int, model: torch.nn.Module, optimizer: ACProp) -> None:
    """Save the parts of all ranks, and name the checkpoint at the end, so that none resumes from an unfinished one."""
    weights, state = get_state_dict(model, optimizer)
    unfinished = folder / "unfinished"
    if dist.get_rank() == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
    dist.barrier()
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=unfinished)
    if dist.get_rank() == 0:
        unfinished.rename(folder / f"step-{step}")
    dist.barrier()


def read(path: pathlib.Path, model: torch.nn.Module, optimizer: ACProp) -> int:
    """Load into the shards of this rank, and return the step."""
    weights, state = get_state_dict(model, optimizer)
    parts = {"model": weights, "optimizer": state}
    dcp.load(parts, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"])
    return int(path.name[5:])


def main() -> None:
    """Train from the last checkpoint, or from the start if there is none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out", "scale_torch"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()

    def say(*words: object) -> None:
        if rank == 0:
            print(*words, flush=True)

    digits = load_digits()
    split = train_test_split(digits.data / 16.0, digits.target, test_size=0.25, random_state=0)
    x, x_test, y, y_test = map(torch.from_numpy, split)

    torch.manual_seed(0)  # the same weights on every rank
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10)).double()
    mesh = init_device_mesh("cpu", (ranks,))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    optimizer = ACProp(model.parameters(), lr=1e-3, weight_decay=1e-4, clip_exponent=0.25)

    weight = model[0].weight
    say(f"{ranks} processes; of {tuple(weight.shape)} weights rank 0 has {tuple(weight.to_local().shape)}")
    done = 0
    if finished := checkpoints(args.out):
        done = read(finished[-1], model, optimizer)
        say(f"resumed from {finished[-1]}")
    for step in range(done, args.steps):
        # a batch depends on the step alone, so that a resumed run sees the same batches
        batch = torch.randint(len(x), (BATCH,), generator=torch.Generator().manual_seed(step))[rank::ranks]
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x[batch]), y[batch])
        loss.backward()
        optimizer.step()
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            write(args.out, step + 1, model, optimizer)
            say(f"step {step + 1}: loss {loss.item():.4f} on rank 0's part of the batch; saved")

    accuracy = (model(x_test).argmax(dim=1) == y_test).double().mean()
    exported = export_state(optimizer, model)  # on every rank: it gathers
    if rank == 0:
        save(args.out / "acprop.safetensors", *exported)
    say(f"accuracy {accuracy:.3f} on held-out digits; optimizer exported to {args.out / 'acprop.safetensors'}")
    # Here gloo's threads release the last tensors. At the interpreter's end that may abort (pytorch/pytorch#179291).
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
