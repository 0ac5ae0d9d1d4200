"""What torch's compiler makes on a CUDA device: the fused step without numba-cuda, and whole steps compiled."""

import pytest

pytest.importorskip("torch")

from typing import Any

import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from acprop_torch import ACProp, _cuda
from hosts import forget_compiled_torch_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]


def begun(device: str, sizes: list[int], dtype: torch.dtype, **options: Any) -> ACProp:
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(n, generator=generator).to(device, dtype).requires_grad_() for n in sizes]
    for x in xs:
        x.grad = torch.randn(len(x), generator=generator).to(device, dtype)
    return ACProp(xs, lr=0.01, weight_decay=0.1, clip_exponent=0.25, **options)


def assert_close(device: ACProp, host: ACProp) -> None:
    (a,), (b,) = device.param_groups, host.param_groups
    for x, y in zip(a["params"], b["params"], strict=True):
        for p, q in ((x, y), *zip(device.state[x].values(), host.state[y].values(), strict=True)):
            atol = 8 * torch.finfo(q.dtype).eps * q.detach().abs().max().item()
            torch.testing.assert_close(p.detach().cpu(), q.detach(), rtol=0.0, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_fused_step_without_numba_cuda(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor, eight tensors in a call; any sizes by one program, and the rest by another."""
    monkeypatch.setattr(_cuda, "has_numba_cuda", lambda device: False)
    forget_compiled_torch_step()
    counters.clear()
    sizes = [1000 + i % 7 for i in range(20)]
    device, host = (begun(where, sizes, dtype, fused=True) for where in ("cuda", "cpu"))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            device.step()
            host.step()
    assert_close(device, host)
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("options", [{}, {"capturable": True}, {"fused": True}], ids=str)
def test_a_whole_step_is_compiled(options: dict[str, bool]) -> None:
    torch._dynamo.reset()
    device, host = begun("cuda", [1000, 3, 70], torch.float32, **options), begun("cpu", [1000, 3, 70], torch.float32)
    backend = CompileCounterWithBackend("inductor")
    step = torch.compile(lambda: ACProp.step.__wrapped__.__wrapped__(device), backend=backend, fullgraph=True)  # type: ignore[attr-defined]
    with torch.no_grad():
        for _ in range(3):
            step()
            host.step()
    assert backend.frame_count == 1
    assert_close(device, host)
