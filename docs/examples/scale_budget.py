"""Compute the cost of a step of ACProp at scale on paper: the tables of docs/scale.md.

    python docs/examples/scale_budget.py

Memory per parameter, bytes moved in a step, and the share of the optimizer in a training step, for models of 7 and 70
billion parameters on 64 and 1,024 accelerators. Every assumption is a constant below; the page states them with their
sources. `tests/test_scale_budget.py` compares the page with these tables, and the sizes of the states with the real
sizes.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

# The accelerator: NVIDIA H100 SXM, and the network of a DGX H100, from their datasheets.
MEMORY = 80e9  # bytes
BANDWIDTH = 3.35e12  # bytes a second
PEAK = 989.4e12  # bfloat16 FLOPs a second, dense (the datasheet's 1,979 are with sparsity)
NETWORK = 50e9  # bytes a second that each accelerator sends between nodes: 400 Gbit/s

# Assumptions: the shares of these that are reached, and the work.
ACHIEVED = 0.8  # of the memory bandwidth, by an elementwise kernel
UTILISATION = 0.4  # of the peak, by forward and backward passes
LAUNCH = 5e-6  # seconds to start one kernel; a step starts one for each parameter tensor
TOKENS = 4 * 2**20  # in a global batch


class Model(NamedTuple):
    """A transformer, by its size and the number of its parameter tensors."""

    name: str
    parameters: float
    tensors: int

    def flops(self) -> float:
        """Return the FLOPs of a forward and a backward pass over the batch."""
        return 6.0 * self.parameters * TOKENS


# nine tensors a layer (four of attention, three of the MLP, two norms), embedding, head and last norm
MODELS = (Model("7B", 7e9, 32 * 9 + 3), Model("70B", 70e9, 80 * 9 + 3))
ACCELERATORS = (64, 1024)


class Configuration(NamedTuple):
    """The memory of an optimizer, in bytes for each parameter."""

    name: str
    params: int
    grads: int
    state: int

    def kept(self) -> int:
        return self.params + self.grads + self.state

    def moved(self) -> int:
        """Return the bytes that a step reads and writes: parameters and state both ways, gradients one."""
        return 2 * self.params + self.grads + 2 * self.state

    def sent(self) -> dict[str, int]:
        """Return the bytes that each accelerator sends a step, for each parameter of the whole model."""
        # an all-reduce is a reduce-scatter and an all-gather; ZeRO-3 gathers for the forward and the backward pass
        sharded = self.grads + self.params
        return {"replicated": 2 * self.grads, "ZeRO-1, ZeRO-2": sharded, "ZeRO-3": sharded + self.params}


CONFIGURATIONS = (
    Configuration("ACProp, float32", 4, 4, 8),
    Configuration("ACProp, bfloat16", 2, 2, 8),
    Configuration("ACProp, bfloat16, compensate", 2, 2, 10),
    Configuration("AdamW, float32", 4, 4, 8),
    Configuration("AdamW, bfloat16", 2, 2, 4),
)
PLACEMENTS = ("replicated", "ZeRO-1", "ZeRO-2", "ZeRO-3")  # the last is also called FSDP


def placed(c: Configuration, placement: str, devices: int) -> float:
    """Return bytes for each parameter of the model on each of `devices` accelerators."""
    split = {"replicated": 0, "ZeRO-1": c.state, "ZeRO-2": c.grads + c.state, "ZeRO-3": c.kept()}[placement]
    return c.kept() - split + split / devices


def step_time(c: Configuration, model: Model, devices: int) -> float:
    """Return the seconds of one step over the part of the model that one of `devices` accelerators updates."""
    return max(c.moved() * model.parameters / devices / (BANDWIDTH * ACHIEVED), model.tensors * LAUNCH)


def training_time(model: Model, devices: int) -> float:
    """Return the seconds of forward and backward passes."""
    return model.flops() / (devices * PEAK * UTILISATION)


def table(title: str, head: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [f"**{title}**", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows), ""])


def per_parameter() -> Iterator[Sequence[str]]:
    """Yield the bytes kept: in all, and on each accelerator."""
    for c in CONFIGURATIONS:
        placements = (
            str(c.kept()),
            f"{c.params + c.grads} + {c.state}/D",
            f"{c.params} + {c.grads + c.state}/D",
            f"{c.kept()}/D",
        )
        yield c.name, str(c.params), str(c.grads), str(c.state), *placements


def gigabytes() -> Iterator[Sequence[str]]:
    """Yield the gigabytes kept on each accelerator, in italics if the accelerator has less."""
    for model in MODELS:
        for devices in ACCELERATORS:
            for placement in PLACEMENTS:
                sizes = [placed(c, placement, devices) * model.parameters for c in CONFIGURATIONS]
                cells = [f"{size / 1e9:.3g}" if size <= MEMORY else f"*{size / 1e9:.4g}*" for size in sizes]
                yield f"{model.name} on {devices:,}", placement, *cells


def traffic() -> Iterator[Sequence[str]]:
    """Yield the bytes that a step moves through memory, and the bytes that a training step sends."""
    for c in CONFIGURATIONS:
        yield c.name, str(c.moved()), *(str(sent) for sent in c.sent().values())


def shares() -> Iterator[Sequence[str]]:
    """Yield the times of the passes and of a step, and the step's share; in italics if the memory is too small."""
    for model in MODELS:
        for devices in ACCELERATORS:
            passes = training_time(model, devices)
            for parts, placement, name in ((1, "replicated", "replicated"), (devices, "ZeRO-3", "ZeRO-1, -2, -3")):
                cells = []
                for c in CONFIGURATIONS:
                    seconds = step_time(c, model, parts)
                    cell = f"{1e3 * seconds:.3g} ms, {100 * seconds / (seconds + passes):.2g}%"
                    fits = placed(c, placement, devices) * model.parameters <= MEMORY
                    cells.append(cell if fits else f"*{cell}*")
                yield f"{model.name} on {devices:,}", f"{passes:.3g} s", name, *cells


def network() -> Iterator[Sequence[str]]:
    """Yield how long the network needs, if nothing hides it."""
    for model in MODELS:
        for c in CONFIGURATIONS[:3]:
            yield model.name, c.name, *(f"{sent * model.parameters / NETWORK:.3g} s" for sent in c.sent().values())


def main() -> None:
    """Print all tables."""
    names = [c.name for c in CONFIGURATIONS]
    head = ["", "parameters", "gradients", "state", *PLACEMENTS]
    print(table("Bytes kept for each parameter; the last four on each of D accelerators", head, per_parameter()))
    head = ["model", "placement", *names]
    print(table("Gigabytes on each of 64 or 1,024 accelerators, without activations", head, gigabytes()))
    head = ["", "moved in a step", *(f"sent: {placement}" for placement in CONFIGURATIONS[0].sent())]
    print(table("Bytes moved and sent for each parameter", head, traffic()))
    head = ["model", "passes", "placement", *names]
    print(table("Time of the passes and of a step of the optimizer, and its share of the whole", head, shares()))
    head = ["model", "", *CONFIGURATIONS[0].sent()]
    print(table("Time on the network, if nothing hides it", head, network()))


if __name__ == "__main__":
    main()
