"""What test_scale_torch.py runs on each of several processes: runs on torch's own engines, whose results it compares.

Data and model are such that every gradient is an integer for any weights. Sums of them are exact in any order, so
a run on several ranks has to end with the very bits of a run of one process on all of the data.
"""

import datetime
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import acprop_core
from acprop_torch import ACProp, export_state, import_state
from hosts import torch_version

if torch_version() >= (2, 6):
    from torch.distributed.fsdp import fully_shard
else:
    from torch.distributed._composable.fsdp import fully_shard

WAYS = {"for-loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
OF_16_BITS = {"wide": {}, "narrow": {"moment_dtype": torch.bfloat16}, "compensated": {"compensate": True}}
HYPER = {"lr": 1e-2, "weight_decay": 0.1, "clip_exponent": 0.25}
HALF, ALL = 2, 4  # steps

Results = dict[str, torch.Tensor | str]


class Model(torch.nn.Module):
    """Layers side by side: one larger than a tile, and some whose shards are uneven, or empty on some ranks."""

    def __init__(self, sizes: tuple[int, ...] = (401, 5, 1), dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = torch.nn.ModuleList(torch.nn.Linear(300, n, dtype=dtype) for n in sizes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([layer(x) for layer in self.layers], dim=1)


def groups_of(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Only weights decay."""
    named = dict(model.named_parameters())
    weights = {"params": [p for name, p in named.items() if name.endswith("weight")]}
    return [weights, {"params": [p for name, p in named.items() if name.endswith("bias")], "weight_decay": 0.0}]


def optimizer_of(model: torch.nn.Module, **options: Any) -> ACProp:
    return ACProp(groups_of(model), **HYPER, **options)


def train(model: torch.nn.Module, optimizer: Any, steps: range, part: int = 0, parts: int = 1) -> None:
    """Train on every `parts`-th row; with the mean over all parts, which the engines take, as if on all of them."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x, weights = (
            torch.randint(-n, n + 1, (8, size), generator=generator).to(next(model.parameters()).dtype)
            for n, size in ((4, 300), (2, 1))
        )
        optimizer.zero_grad()
        (parts * weights[part::parts] * model(x[part::parts])).sum().backward()
        optimizer.step()


def whole(x: torch.Tensor) -> torch.Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def everything(model: torch.nn.Module, optimizer: torch.optim.Optimizer | None) -> Results:
    results: Results = {}
    for name, p in model.named_parameters():
        results[name] = whole(p)
        kept = [] if optimizer is None else [key for key in optimizer.state[p] if key != "step"]
        for key in kept:  # in one order on all ranks: each of them gathers
            results[f"{key}/{name}"] = whole(optimizer.state[p][key])
    return results


def alone(model: torch.nn.Module, **options: Any) -> Results:
    """Return what one process without any engine ends with."""
    optimizer = optimizer_of(model, **options)
    train(model, optimizer, range(ALL))
    return everything(model, optimizer)


def ddp(way: str) -> Results:
    model = Model()
    engine = DistributedDataParallel(model)
    optimizer = optimizer_of(model, **WAYS[way])
    train(engine, optimizer, range(ALL), dist.get_rank(), dist.get_world_size())
    return everything(model, optimizer)


def sharded(mesh: DeviceMesh | None = None, model: torch.nn.Module | None = None) -> torch.nn.Module:
    """Shard by FSDP2, as its users do: each layer, and what is left."""
    model = Model() if model is None else model
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if mesh is None else mesh
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp(way: str) -> Results:
    model = sharded()
    optimizer = optimizer_of(model, **WAYS[way])
    train(model, optimizer, range(ALL), dist.get_rank(), dist.get_world_size())
    for p in model.parameters():
        assert isinstance(optimizer.state[p]["exp_avg"], DTensor)
        assert optimizer.state[p]["exp_avg"].placements == p.placements
        assert not isinstance(optimizer.state[p]["step"], DTensor)
    return everything(model, optimizer)


def hsdp(way: str, folder: Path) -> Results:
    """Sharded within pairs of ranks, replicated over the pairs."""
    model = sharded(init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    return around_an_export(model, optimizer_of(model, **WAYS[way]), folder / f"hsdp-{way}", 4)


def sizes_for_2d() -> Model:
    return Model((400, 8, 4))  # tensor parallelism below FSDP2 wants even shards


def tensor_parallel(way: str, folder: Path) -> Results:
    """Each layer's rows over two ranks, and each such part over two more, by FSDP2: a mesh of two dimensions."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = sizes_for_2d()
    plan = {f"layers.{i}": ColwiseParallel(output_layouts=Replicate()) for i in range(3)}
    parallelize_module(model, mesh["tensor"], plan)
    sharded(mesh["data"], model)
    optimizer = optimizer_of(model, **WAYS[way])
    return around_an_export(model, optimizer, folder / f"2d-{way}", 2, mesh["data"].get_local_rank())


def around_an_export(
    model: torch.nn.Module, optimizer: Any, path: Path, parts: int, part: int | None = None
) -> Results:
    """Train, export, train by another gradient, which the import has to undo, and train on."""
    part = dist.get_rank() if part is None else part
    train(model, optimizer, range(HALF), part, parts)
    exported = export_state(optimizer, model)
    results: Results = {}
    if dist.get_rank() == 0:
        acprop_core.save(path, *exported)
    else:
        kept = [x for moments in exported[1][1:] if moments is not None for x in moments.values()]
        results["devices"] = str(sorted({x.device.type for x in kept}))
        results["save"] = refusal(acprop_core.save, path, *exported)
        results["import"] = refusal(import_state, optimizer, model, *exported)
    dist.barrier()
    before = {name: p.to_local().detach().clone() for name, p in model.named_parameters()}
    train(model, optimizer, range(HALF + 7, HALF + 8), part, parts)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.to_local().copy_(before[name])
    import_state(optimizer, model, *acprop_core.load(path))
    train(model, optimizer, range(HALF, ALL), part, parts)
    return results | everything(model, optimizer)


def portable(way: str, folder: Path) -> Results:
    model = sharded()
    optimizer = optimizer_of(model, **WAYS[way])
    return around_an_export(model, optimizer, folder / f"fsdp-{way}", dist.get_world_size())


def portable_adamw(way: str, folder: Path) -> Results:
    """The same of torch's AdamW, whose fused step has other bits where a shard ends, and of its state_dict."""
    model, uninterrupted = sharded(), sharded()
    optimizer, other = (
        torch.optim.AdamW(groups_of(x), lr=1e-2, weight_decay=0.1, **WAYS[way]) for x in (model, uninterrupted)
    )
    results = around_an_export(model, optimizer, folder / f"adamw-{way}", dist.get_world_size())
    train(uninterrupted, other, range(ALL), dist.get_rank(), dist.get_world_size())
    expected = everything(uninterrupted, other)
    assert len(expected) == 18
    assert [name for name, x in expected.items() if not torch.equal(x, results[name])] == []
    saved, state = export_state(optimizer, model)
    own, again = export_state(dcp.get_optimizer_state_dict(model, optimizer), model)
    assert saved == own
    for x, y in zip([*state.mu.values(), *state.nu.values()], [*again.mu.values(), *again.nu.values()], strict=True):
        assert x.shape == y.shape
        assert dist.get_rank() > 0 or (x == y).all()
    return results


def portable_16_bits(name: str, folder: Path) -> Results:
    model = sharded(model=Model(dtype=torch.bfloat16))
    optimizer = optimizer_of(model, **OF_16_BITS[name])
    return around_an_export(model, optimizer, folder / f"fsdp-{name}", dist.get_world_size())


def portable_complex() -> Results:
    """A sharded complex parameter counts as two real ones, like any other."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    generator = torch.Generator().manual_seed(0)
    start, *grads = torch.randn(4, 5, 3, dtype=torch.complex64, generator=generator)
    plain = start.clone().requires_grad_()
    shards = [distribute_tensor(start, mesh, [Shard(0)]).requires_grad_() for _ in range(2)]
    optimizers = [ACProp([x], lr=0.1, clip_exponent=0.25) for x in (plain, *shards)]
    for i, grad in enumerate(grads):
        if i == 2:
            with torch.no_grad():
                shards[1].copy_(shards[0])
            exported = export_state(optimizers[0], {"x": plain})
            gathered = export_state(optimizers[1], {"x": shards[0]})
            for x, y in zip(gathered[1][1:3], exported[1][1:3], strict=True):
                assert x["x"].shape == (5, 3, 2)
                assert dist.get_rank() > 0 or (x["x"] == y["x"]).all()
            import_state(optimizers[2], {"x": shards[1]}, *exported)
        for x, optimizer in zip((plain, *shards), optimizers, strict=True):
            x.grad = grad if x is plain else distribute_tensor(grad, mesh, [Shard(0)])
            optimizer.step()
    assert torch.equal(whole(shards[0]), plain)
    assert torch.equal(whole(shards[1]), plain)
    return {}


def from_a_file(path: Path) -> Results:
    """Continue with what another number of processes exported, from the parameters that it had."""
    model = Model()
    train(model, optimizer_of(model), range(HALF))
    sharded(model=model)
    optimizer = optimizer_of(model)
    import_state(optimizer, model, *acprop_core.load(path))
    train(model, optimizer, range(HALF, ALL), dist.get_rank(), dist.get_world_size())
    return everything(model, optimizer)


def refusal(function: Callable[..., Any], *args: Any) -> str:
    try:
        function(*args)
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"


def refusals(folder: Path) -> Results:
    """Refuse on every rank, and before the first collective: or else a rank would wait, or stop at another one."""
    model = sharded()
    optimizer = optimizer_of(model)
    train(model, optimizer, range(1), dist.get_rank(), dist.get_world_size())
    results: Results = {}
    last = model.layers[-1].bias
    optimizer.state[last]["step"] += 1
    results["counts"] = refusal(export_state, optimizer, model)
    optimizer.state[last]["step"] -= 1
    optimizer.param_groups[0]["maximize"] = True
    results["options"] = refusal(export_state, optimizer, model)
    optimizer.param_groups[0]["maximize"] = False
    exported = export_state(optimizer, model)
    path = folder / "refusals"
    if dist.get_rank() == 0:
        acprop_core.save(path, *exported)
    dist.barrier()
    before = str(optimizer.state_dict())
    without = {"layers.2.weight": None}
    results["names"] = refusal(import_state, optimizer, model, *acprop_core.load(path, rename=without))
    part = {"layers.0.weight": lambda x: x[: len(x) // 2]}  # what a rank would have of it
    results["shapes"] = refusal(import_state, optimizer, model, *acprop_core.load(path, transform=part))
    assert str(optimizer.state_dict()) == before
    return results


def zero(name: str, folder: Path, options: dict[str, Any], dtype: torch.dtype = torch.float32) -> Results:
    """ZeroRedundancyOptimizer: each rank keeps the moments of some parameters; saved and continued by their names."""

    def make(model: torch.nn.Module) -> ZeroRedundancyOptimizer:
        return ZeroRedundancyOptimizer(groups_of(model), ACProp, **HYPER, **options)

    rank, world = dist.get_rank(), dist.get_world_size()
    model = Model(dtype=dtype)
    engine, optimizer = DistributedDataParallel(model), make(model)
    train(engine, optimizer, range(HALF), rank, world)
    assert 0 < len(optimizer.optim.state) < len(list(model.parameters()))
    results: Results = {"wrapper": refusal(export_state, optimizer, model)}
    path = folder / f"zero-{name}"

    optimizer.consolidate_state_dict(to=0)
    if rank == 0:
        one = optimizer_of(model, **options)
        one.load_state_dict(optimizer.state_dict())
        acprop_core.save(path, *export_state(one, model))
    dist.barrier()

    optimizer = make(model)
    one = optimizer_of(model, **options)  # which are loaded too
    import_state(one, model, *acprop_core.load(path))
    optimizer.load_state_dict(one.state_dict())
    train(engine, optimizer, range(HALF, ALL), rank, world)
    return results | everything(model, None)


def network() -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(64, 33), torch.nn.Tanh(), torch.nn.Linear(33, 10))


def train_network(model: torch.nn.Module) -> Results:
    optimizer = optimizer_of(model)
    for step in range(10):
        x = torch.randn(16, 64, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), torch.arange(16) % 10).backward()
        optimizer.step()
    return everything(model, optimizer)


def fsdp_of_a_network() -> Results:
    """A usual network, whose gradients are any; each rank has the same batch, and half of each and half is exact."""
    model = network()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    return train_network(model)


def save_checkpoint(folder: Path) -> Results:
    model = sharded()
    optimizer = optimizer_of(model)
    train(model, optimizer, range(HALF), dist.get_rank(), dist.get_world_size())
    parts = dcp.get_state_dict(model, optimizer)
    torch.distributed.checkpoint.save(dict(zip(("model", "optimizer"), parts, strict=True)), checkpoint_id=folder)
    return {}


def load_checkpoint(folder: Path) -> Results:
    model = sharded()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    optimizer = optimizer_of(model)
    parts = dict(zip(("model", "optimizer"), dcp.get_state_dict(model, optimizer), strict=True))
    torch.distributed.checkpoint.load(parts, checkpoint_id=folder)
    dcp.set_state_dict(model, optimizer, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"])
    train(model, optimizer, range(HALF, ALL), dist.get_rank(), dist.get_world_size())
    return everything(model, optimizer)


def placed_otherwise(way: str) -> Results:
    """Step uneven shards by gradients that each rank holds a summand of."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(shape, generator=generator) for shape in ((5, 3), (1,))]
    shards = [distribute_tensor(x, mesh, [Shard(0)]).requires_grad_() for x in xs]
    plain = [x.requires_grad_() for x in xs]
    optimizers = [ACProp(params, lr=0.1, weight_decay=0.1, **WAYS[way]) for params in (plain, shards)]
    for _ in range(3):
        for x, shard in zip(plain, shards, strict=True):
            x.grad = torch.randint(-4, 5, x.shape, generator=generator).float()
            summand = x.grad / 4 if dist.get_rank() == 0 else x.grad * 3 / 4 if dist.get_rank() == 1 else 0 * x.grad
            shard.grad = DTensor.from_local(summand, mesh, [Partial()])
        for optimizer in optimizers:
            optimizer.step()
    for x, shard in zip(plain, shards, strict=True):
        assert torch.equal(whole(shard), x)
    return {}


def on_a_rank(rank: int, world: int, folder: Path, checks: dict[str, tuple[Callable[..., Results], Any]]) -> None:
    """Run the checks one after the other in one group; leave the results of this rank in a file."""
    timeout = datetime.timedelta(seconds=120)
    store = f"file://{folder / f'store-{world}'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timeout)
    results = {name: function(*args) for name, (function, args) in checks.items()}
    torch.save(results, folder / f"results-{world}-{rank}.pt")
    dist.barrier()  # as at the end of docs/examples/scale_torch.py
    dist.destroy_process_group()


def run(world: int, folder: Path, checks: dict[str, tuple[Callable[..., Results], Any]]) -> dict[str, list[Results]]:
    """Run the checks on `world` processes; return what each of them found, on every rank."""
    group = torch.multiprocessing.spawn(on_a_rank, (world, folder, checks), world, join=False, daemon=True)
    deadline = time.monotonic() + 400
    try:
        while not group.join(timeout=1):  # raises what a rank raised
            if time.monotonic() > deadline:
                raise TimeoutError(f"{world} processes are not through with {list(checks)}")
    finally:
        for process in group.processes:
            process.kill()
            process.join()
    found = [torch.load(folder / f"results-{world}-{rank}.pt") for rank in range(world)]
    return {name: [results[name] for results in found] for name in checks}
