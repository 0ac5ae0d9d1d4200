"""What only a CUDA device can show of the torch adapter: graphs, no waiting for the device, scalers, memory."""

import pytest

pytest.importorskip("torch")

import copy
from collections.abc import Iterator
from typing import Any

import torch

from acprop_torch import ACProp

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]

WAYS = {
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "capturable": {"capturable": True, "foreach": False},
    "capturable foreach": {"capturable": True, "foreach": True},
    "capturable fused": {"capturable": True, "fused": True},
}
ways = pytest.mark.parametrize("flags", WAYS.values(), ids=WAYS)


def parameters(number: int = 3, size: int = 1000) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(size + i, generator=generator).cuda().requires_grad_() for i in range(number)]
    for x in xs:
        x.grad = torch.randn(len(x), generator=generator).cuda()
    return xs


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Raise an error in every operation that waits for the device."""
    yield
    torch.cuda.set_sync_debug_mode("default")


def assert_close(xs: list[torch.Tensor], ys: list[torch.Tensor]) -> None:
    for x, y in zip(xs, ys, strict=True):
        torch.testing.assert_close(x, y, rtol=16 * torch.finfo(x.dtype).eps, atol=0)


@ways
@pytest.mark.parametrize("lr", ["number", "tensor"])
def test_no_way_to_step_waits_for_the_device(flags: dict[str, bool], lr: str, no_waiting: None) -> None:
    if lr == "tensor" and flags == WAYS["foreach"]:
        pytest.skip("refused, as AdamW does")
    if flags == WAYS["foreach"]:
        pytest.skip("its steps are on the host")
    rate: Any = torch.tensor(0.01, device="cuda") if lr == "tensor" else 0.01
    optimizer = ACProp(parameters(), lr=rate, weight_decay=0.1, clip_exponent=0.25, **flags)
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    optimizer.step()


@pytest.mark.parametrize("flags", [WAYS[name] for name in WAYS if "capturable" in name])
def test_a_cuda_graph_repeats_the_step(flags: dict[str, bool]) -> None:
    xs, ys = parameters(), parameters()
    graphed = ACProp(xs, lr=torch.tensor(0.01, device="cuda"), clip_exponent=0.25, **flags)
    eager = ACProp(ys, lr=0.01, clip_exponent=0.25, foreach=False)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            graphed.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        graphed.step()
    for _ in range(4):
        graph.replay()
    for _ in range(6):
        eager.step()
    assert_close([x.detach() for x in xs], [y.detach() for y in ys])
    assert [graphed.state[x]["step"].item() for x in xs] == [6] * len(xs)


def test_what_is_not_capturable_is_refused_in_a_graph() -> None:
    optimizer = ACProp(parameters(), foreach=False)
    optimizer.step()
    with pytest.raises(RuntimeError, match="capturable"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


@pytest.mark.parametrize("scale", [None, 1024.0])
def test_fused_skips_where_an_infinity_was_found(scale: float | None, no_waiting: None) -> None:
    xs = parameters()
    optimizer = ACProp(xs, fused=True)
    optimizer.step()
    before = copy.deepcopy([xs, optimizer.state_dict()["state"]])
    optimizer.found_inf = torch.ones((), device="cuda")
    optimizer.grad_scale = None if scale is None else torch.tensor(scale, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    optimizer.step()
    torch.cuda.set_sync_debug_mode("default")
    assert str(before) == str([xs, optimizer.state_dict()["state"]])


def test_fused_unscales() -> None:
    xs, ys = parameters(), parameters()
    scaled, plain = ACProp(xs, fused=True), ACProp(ys, fused=True)
    scaled.found_inf, scaled.grad_scale = (torch.tensor(x, device="cuda") for x in (0.0, 1024.0))
    for x in xs:
        x.grad *= 1024.0
    for _ in range(3):
        scaled.step()
        plain.step()
    assert_close([x.detach() for x in xs], [y.detach() for y in ys])


@ways
def test_a_state_saved_on_the_host_continues_on_the_device(flags: dict[str, bool]) -> None:
    x = torch.randn(100).requires_grad_()
    x.grad = torch.randn(100)
    host = ACProp([x], clip_exponent=0.25)
    for _ in range(3):
        host.step()
    y = x.detach().cuda().requires_grad_()
    y.grad = x.grad.cuda()
    device = ACProp([y], **flags)
    state = copy.deepcopy(host.state_dict())
    for group in state["param_groups"]:
        group.update(flags)
    device.load_state_dict(state)
    for optimizer in (host, device):
        optimizer.step()
    assert_close([y.detach().cpu()], [x.detach()])


@pytest.mark.parametrize("shape", [(1, 50_000_000), (1_000, 50_000)])
@pytest.mark.parametrize("flags", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
def test_temporaries_are_bounded(shape: tuple[int, int], flags: dict[str, bool]) -> None:
    optimizer = ACProp(parameters(*shape), clip_exponent=0.25, weight_decay=0.1, **flags)
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimizer.step()
    assert torch.cuda.max_memory_allocated() - before <= 64 * 2**20
