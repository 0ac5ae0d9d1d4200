"""What only a CUDA device can show of the torch adapter: graphs, no waiting for the device, scalers, memory."""

import pytest

pytest.importorskip("torch")

import contextlib
import copy
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from acprop_torch import ACProp, _cuda

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


needs_numba_cuda = pytest.mark.skipif(
    not torch.cuda.is_available() or not _cuda.has_numba_cuda(torch.device("cuda", 0)),
    reason="numba-cuda does not work",
)


@contextlib.contextmanager
def launches() -> Iterator[list[Any]]:
    """Give the launches of compiled kernels."""
    from acprop_core.kernels import cuda

    made: list[Any] = []

    def run(self: Any, *arguments: Any) -> None:
        made.append(arguments)
        original(self, *arguments)

    original = cuda.Program.run
    with mock.patch.object(cuda.Program, "run", run):
        yield made


def models(dtype: torch.dtype, sizes: list[int], **options: Any) -> tuple[ACProp, ACProp]:
    """Return fused optimizers of the same parameters, on the host and on the device, with gradients."""
    generator = torch.Generator().manual_seed(0)
    optimizers = []
    for device in ("cpu", "cuda"):
        generator.manual_seed(0)
        xs = [torch.randn(n, generator=generator).to(device, dtype).requires_grad_() for n in sizes]
        for x in xs:
            x.grad = torch.randn(len(x), generator=generator).to(device, dtype)
        groups = [{"params": xs[::2], "weight_decay": 0.1}, {"params": xs[1::2], "lr": 0.02}]
        optimizers.append(ACProp([x for x in groups if x["params"]], lr=0.01, fused=True, **options))
    return optimizers[0], optimizers[1]


def contents(optimizer: ACProp) -> list[torch.Tensor]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [x.detach().cpu() for p in params for x in (p, *optimizer.state[p].values())]


@needs_numba_cuda
@pytest.mark.parametrize(
    "options", [{}, {"clip_exponent": 0.25}, {"asynchronous": False, "centering": "none"}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("compensate", [False, True])
def test_the_kernel_has_the_bits_of_a_cpu(dtype: torch.dtype, options: dict[str, Any], compensate: bool) -> None:
    host, device = models(dtype, [1, 3, 1000, 2**14 + 5, 2**16, 0], compensate=compensate, **options)
    for _ in range(3):
        host.step()
        with launches() as made:
            device.step()
        assert len(made) == 1
    if dtype is torch.float64:  # the logarithms of two libraries may differ
        assert_close(contents(device), contents(host))
    else:
        assert [x.tobytes() for x in map(to_bits, contents(device))] == [
            x.tobytes() for x in map(to_bits, contents(host))
        ]


def to_bits(x: torch.Tensor) -> Any:
    return x.reshape(-1).view(torch.uint8).numpy()


@needs_numba_cuda
def test_the_kernel_takes_views_and_permuted_tensors() -> None:
    for make in (
        lambda x: x[1:],  # behind aligned memory
        lambda x: x.reshape(4, -1).t(),
        lambda x: x.reshape(2, 2, 2, -1).contiguous(memory_format=torch.channels_last),
    ):
        results = []
        for device in ("cpu", "cuda"):
            x = make(torch.arange(64.0).to(device))[:].detach().requires_grad_()
            x.grad = make(torch.ones(64).to(device))[:]
            optimizer = ACProp([x], fused=True)
            optimizer.step()
            results.append(x.detach().cpu())
        assert torch.equal(*results)


@needs_numba_cuda
def test_the_kernel_runs_on_the_current_stream_and_counts_for_each_parameter() -> None:
    host, device = models(torch.float32, [100, 200])
    late = [optimizer.param_groups[1]["params"][0] for optimizer in (host, device)]
    grads, late[0].grad, late[1].grad = [x.grad for x in late], None, None
    stream = torch.cuda.Stream()
    for i in range(4):
        if i == 2:
            for x, grad in zip(late, grads, strict=True):
                x.grad = grad
        host.step()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), launches() as made:
            device.step()
        assert [arguments[1] for arguments in made] == [stream.cuda_stream]
        torch.cuda.current_stream().wait_stream(stream)
    assert [x.item() for x in contents(device) if x.ndim == 0] == [4, 2]
    assert all(map(torch.equal, contents(device), contents(host)))


@needs_numba_cuda
def test_gradscaler_skips_and_resumes() -> None:
    _, device = models(torch.float32, [100, 200])
    scaler = torch.amp.GradScaler("cuda", init_scale=4.0)
    params = [p for group in device.param_groups for p in group["params"]]
    before = None
    for bad in (False, True, False):
        for p in params:
            p.grad = torch.full_like(p, torch.inf if bad else 4.0)
        scaler.scale(torch.ones((), device="cuda"))
        scaler.step(device)
        scaler.update()
        now = contents(device)
        assert before is None or all(map(torch.equal, before, now)) == bad
        before = now
    assert [x.item() for x in before or [] if x.ndim == 0] == [2, 2]


@needs_numba_cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one device")
def test_each_device_has_its_launch() -> None:
    xs = [torch.ones(100, device=f"cuda:{i}").requires_grad_() for i in range(2)]
    for x in xs:
        x.grad = torch.ones_like(x)
    with launches() as made:
        ACProp(xs, fused=True).step()
    assert [arguments[0] for arguments in made] == [0, 1]
    assert torch.equal(xs[0].cpu(), xs[1].cpu())
