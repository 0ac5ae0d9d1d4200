"""The part of the host in fused=True on CUDA devices, with an imitated device: what is sent, when, to which stream."""

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("torch")
pytest.importorskip("numba_cuda")

import numpy as np
import torch

import acprop_torch
from acprop_core import kernels
from acprop_core.adapt import Row
from acprop_core.kernels import cuda, element
from acprop_core.rule import Decay, Hyperparameters
from acprop_torch import _cuda, _fused, _kept, _numba
from acprop_torch._rows import Batch

CPU = torch.device("cpu")


class Recorder:
    """A program that writes down what it is called with, the first two rows of the options, and the scaling."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.options: list[Any] = []
        self.scaling: list[tuple[Any, ...]] = []

    def run(self, *arguments: Any) -> None:
        self.calls.append(arguments)
        self.scaling.append(tuple(ctypes.c_float.from_address(x).value if x else None for x in arguments[8:]))
        memory = (ctypes.c_double * (2 * len(element.OPTIONS))).from_address(arguments[6])
        self.options.append(np.array(memory).reshape(2, -1))


@pytest.fixture
def pinned() -> Iterator[list[torch.Tensor]]:
    """Have memory of the host be no device's; give all of it that was asked for."""
    made: list[torch.Tensor] = []

    def make(size: int) -> torch.Tensor:
        made.append(torch.zeros(size, dtype=torch.uint8))
        return made[-1]

    with (
        mock.patch.object(_cuda, "_pinned", make),
        mock.patch.object(_cuda, "_of_graphs", []),
        mock.patch.object(_cuda, "_spares", {}),
        mock.patch.object(torch.cuda, "device", contextlib.nullcontext),
    ):
        yield made


def test_an_array_is_sent_once_for_a_stream_and_a_content(pinned: list[torch.Tensor]) -> None:
    array = np.arange(6)
    sent = _cuda.OnDevice(array, CPU)
    first = sent.bring(1, False)
    assert first.tolist() == array.tolist()
    assert sent.bring(1, False) is first
    array[2] = 7
    second = sent.bring(1, False)
    assert second.tolist() == array.tolist()
    assert second.data_ptr() != first.data_ptr()  # the device may still read the first
    assert first[2] == 2
    assert sent.bring(2, False).data_ptr() != second.data_ptr()


def test_a_graph_copies_from_memory_that_stays(pinned: list[torch.Tensor]) -> None:
    array = np.arange(6)
    sent = _cuda.OnDevice(array, CPU)
    before = sent.bring(1, False)
    made = len(pinned)
    array[2] = 7  # as the address of a gradient of the graph
    captured = sent.bring(1, True)
    assert captured.tolist() == array.tolist()
    assert len(pinned) == made  # nothing is pinned while a graph is captured
    assert [x.data_ptr() for x in _cuda._of_graphs] == [captured.data_ptr()]
    assert sent.bring(1, True).tolist() == array.tolist()  # the graph's next step
    assert len(pinned) == made
    assert len(_cuda._of_graphs) == 1
    array[2] = 2
    assert sent.bring(1, False) is before  # a step outside has its own
    assert captured[2] == 7
    array[2] = 8
    again, once_more = sent.bring(1, False), sent.bring(1, True)
    assert captured.tolist()[2:3] + again.tolist()[2:3] + once_more.tolist()[2:3] == [7, 8, 8]
    assert len({x.data_ptr() for x in (captured, again, once_more)}) == 3


def test_a_step_that_is_prepared_in_a_capture_takes_memory_of_earlier_ones(pinned: list[torch.Tensor]) -> None:
    for n in (6, 7, 5):  # a little more, or less, as with other parameters
        _cuda.OnDevice(np.arange(n), CPU).bring(1, False)
    made = len(pinned)
    assert made == 4  # one for each copy, and one for captures
    captured = _cuda.OnDevice(np.arange(4), CPU).bring(1, True)
    assert captured.tolist() == [0, 1, 2, 3]
    assert len(pinned) == made
    assert [x.data_ptr() for x in _cuda._of_graphs] == [captured.data_ptr()]
    assert _cuda._spares == {64: []}
    _cuda.OnDevice(np.arange(4), CPU).bring(1, False)
    assert len(pinned) == made + 2
    assert len(_cuda._spares[64]) == 1


def test_the_end_of_python_may_take_names_first(pinned: list[torch.Tensor]) -> None:
    sent = _cuda.OnDevice(np.arange(6), CPU)
    sent.bring(1, False)
    with mock.patch.object(_cuda, "_spares", None):
        sent.__del__()
    del sent
    assert len(_cuda._spares[64]) == 1


def table_of(sizes: list[int]) -> Any:
    table = np.full((element.ROWS, len(sizes)), 16, np.int64)
    table[element.SIZE] = sizes
    return table


def test_a_part_passes_addresses_on_the_current_stream(pinned: list[torch.Tensor]) -> None:
    program = Recorder()
    scale, found = torch.tensor(8.0, dtype=torch.float64), torch.tensor([1.0])
    options = np.zeros((2, len(element.OPTIONS)))
    part = _cuda.Part(program, CPU, table_of([5, 2 * cuda.CHUNK + 1]), options)
    with mock.patch.object(_cuda, "_stream_of", return_value=(9, False)):
        part.run({(1, 0): torch.tensor([0.5]), (0, 2): torch.tensor(0.25, dtype=torch.float64)}, (scale, found))
        part.run({}, (scale, found))
        part.run({}, (None, None))
    (number, stream, table, columns, chunks, blocks, _, _, *scaling), again, unscaled = program.calls
    assert (number, stream, columns, blocks) == (0, 9, 2, 4)
    assert chunks == table + 8 * element.ROWS * 2
    assert again[:6] == (0, 9, table, 2, chunks, 4)  # nothing was sent again
    assert len(again) == len(scaling) + 8
    first, second, _ = program.options
    assert (first[1, 0], first[0, 2]) == (0.5, 0.25)
    assert not second.any()  # those on the host again: none of the tensors' is left
    assert program.scaling == [(8.0, 1.0), (8.0, 1.0), (None, None)]
    assert unscaled[-2:] == (0, 0)


def batch_of(sizes: list[int], dtype: torch.dtype = torch.float32, device: str = "meta", **options: Any) -> Batch:
    def column(dtype: torch.dtype = dtype) -> list[torch.Tensor]:
        return [torch.zeros(n, dtype=dtype, device=device) for n in sizes]

    rows = Row(column(), column(), column(torch.float32), column(torch.float32), [None] * len(sizes))
    steps = [torch.zeros((), device=device) for _ in sizes]
    return Batch(rows, steps, None, Hyperparameters(**options))


@pytest.fixture
def parts() -> Iterator[list[tuple[Any, ...]]]:
    """Have every device but the CPU be one that Numba can compile for; give the arguments of all parts."""
    made: list[tuple[Any, ...]] = []

    class Part:
        def __init__(self, *arguments: Any) -> None:
            made.append(arguments)
            self.table = arguments[2]

        def run(self, tensors: Any, scaling: Any) -> None:
            made.append(("run", dict(tensors), scaling))

        def check(self) -> bool:
            return True

    with (
        mock.patch.object(_cuda, "has_numba_cuda", lambda device: device.type != "cpu"),
        mock.patch.object(_cuda, "Part", Part),
        mock.patch.object(_numba, "_launcher", lambda kind: kind),
        mock.patch.object(_numba, "_overlap", return_value=False),
    ):
        yield made


def test_all_groups_of_a_kind_are_one_launch(parts: list[tuple[Any, ...]]) -> None:
    batches = [batch_of([3, 0]), batch_of([5], weight_decay=0.1), batch_of([7], torch.bfloat16)]
    compiled = _numba.Compiled(batches)
    (first, device, table, *_), (second, *_) = parts
    assert (first.param, second.param, device.type) == (torch.float32, torch.bfloat16, "meta")
    assert table[element.SIZE].tolist() == [3, 0, 5]
    assert table[element.GROUP].tolist() == [0, 0, 1]
    assert table[element.DECAY].tolist() == [Decay.NONE, Decay.NONE, Decay.DECOUPLED]
    assert compiled.set_gradients([10, 11, 12, 13])
    assert [x[2][1].tolist() for x in parts] == [[10, 11, 12], [13]]


def test_rows_that_share_memory_are_launched_one_by_one(parts: list[tuple[Any, ...]]) -> None:
    with mock.patch.object(_numba, "_overlap", return_value=True):
        compiled = _numba.Compiled([batch_of([3, 4])])
    assert [x[2][element.SIZE].tolist() for x in parts] == [[3], [4]]
    compiled.set_gradients([10, 11])
    assert [x[2][1].tolist() for x in parts] == [[10], [11]]


def test_options_on_a_device_are_not_read(parts: list[tuple[Any, ...]]) -> None:
    rate, found = torch.zeros(1, device="meta"), torch.zeros((), device="meta")
    batch = batch_of([3], learning_rate=rate)._replace(grad_scale=torch.zeros((), device="meta"), found_inf=found)
    compiled = _numba.Compiled([batch])
    scaling = batch.grad_scale, found
    assert parts[0][3][0, element.OPTIONS.index("grad_scale")] == 1.0
    compiled.run([], scaling)
    assert parts[-1] == ("run", {(0, 0): rate}, scaling)
    compiled.set_options(0, Hyperparameters(learning_rate=0.5))
    compiled.run([], (None, None))
    assert parts[-1] == ("run", {}, (None, None))
    assert parts[0][3][0, 0] == 0.5


def test_each_device_has_its_way(parts: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    others: list[Batch] = []
    monkeypatch.setattr(_fused._lists, "prepare_traced", lambda batch: others.append(batch))
    on_meta, on_cpu = batch_of([3, 4]), batch_of([5], device="cpu")
    both = on_meta._replace(
        columns=Row(*(a + b for a, b in zip(on_meta.columns, on_cpu.columns, strict=True))),
        steps=on_meta.steps + on_cpu.steps,
    )
    compiled, runs = _fused.prepare(both)
    assert compiled is both
    assert (runs, others) == ([], [])
    # a row that is not contiguous, and no permutation of one, goes to lists
    on_meta.columns.grad[1] = torch.zeros(8, device="meta")[::2]
    compiled, runs = _fused.prepare(on_meta)
    assert compiled is not None
    assert [x.numel() for x in compiled.columns.param] == [3]
    assert [x.numel() for x in others[0].columns.param] == [4]


@pytest.mark.parametrize("why", [None, kernels.NO_CUDA, "numba-cuda does not work here (OSError: no driver)"])
def test_a_device_without_numba_cuda_is_left_to_torch(why: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(kernels, "why_no_numba_cuda", lambda capability: why)
    _cuda.has_numba_cuda.cache_clear()
    warned = pytest.warns(RuntimeWarning, match="no driver") if why and "driver" in why else contextlib.nullcontext()
    with warned:
        assert _cuda.has_numba_cuda(device) == (why is None)
    _cuda.has_numba_cuda.cache_clear()
    monkeypatch.setattr(torch.version, "cuda", None)  # as in torch for AMD
    assert not _cuda.has_numba_cuda(device)
    _cuda.has_numba_cuda.cache_clear()


def test_a_step_with_options_on_the_device_is_kept(parts: list[tuple[Any, ...]]) -> None:
    """Then a graph captures a step that has been prepared, with memory that was pinned before."""
    rate = torch.zeros((), device="meta")
    group = {**acprop_torch.ACProp([torch.zeros(3, requires_grad=True)]).param_groups[0], "lr": rate}
    batch = batch_of([3], learning_rate=rate)
    group["params"] = batch.columns.param
    group["params"][0].grad = batch.columns.grad[0]
    compiled = _numba.Compiled([batch])
    kept = _kept.Kept.of([group], {0: batch}, compiled)
    assert kept is not None
    assert kept._has_options(0, group)
    group["lr"] = torch.zeros((), device="meta")
    with mock.patch.object(_kept, "check_options"):  # it refuses this device
        assert kept._has_options(0, group)
    compiled.run([], (None, None))
    assert parts[-1][1][0, 0] is group["lr"]
    compiled.reads_options = True
    assert _kept.Kept.of([group], {0: batch}, compiled) is None


def test_a_scaled_step_is_kept_and_its_table_sent_once(
    pinned: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU is used in place of the device. The scaler brings new tensors at each step."""
    program = Recorder()
    monkeypatch.setattr(
        _numba, "_Part", lambda kind, table, options, _: _cuda.Part(program, kind.device, table, options)
    )
    monkeypatch.setattr(_numba, "_reads_options", lambda batch: False)
    monkeypatch.setattr(_cuda, "_stream_of", lambda device: (9, False))
    monkeypatch.setattr(_fused, "prepare", lambda batch: (batch, []))
    xs = [torch.ones(3, requires_grad=True), torch.ones(2, 2, requires_grad=True)]
    for x in xs:
        x.grad = torch.ones_like(x)
    groups = [{"params": [x]} for x in xs]
    optimizer = acprop_torch.ACProp(groups, lr=0.5, fused=True)
    prepare = mock.Mock(side_effect=optimizer._step_anew)
    monkeypatch.setattr(optimizer, "_step_anew", prepare)
    for i in range(4):
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(float(2**i)), torch.tensor(float(i == 2))
        optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf
    optimizer.step()
    assert prepare.call_count == 1
    assert program.scaling == [(1.0, 0.0), (2.0, 0.0), (4.0, 1.0), (8.0, 0.0), (None, None)]
    assert {arguments[2] for arguments in program.calls} == {program.calls[0][2]}  # one table
    sent = len(pinned)
    optimizer.param_groups[1]["lr"] = 0.25
    optimizer.step()
    assert program.options[-1][:, 0].tolist() == [0.5, 0.25]
    assert program.calls[-1][2] == program.calls[0][2]
    assert len(pinned) == sent + 1  # the options alone
    optimizer.param_groups[1]["fused"] = False
    optimizer.found_inf = torch.tensor(1.0)
    with pytest.raises(AssertionError, match="only fused steps unscale gradients"):
        optimizer.step()
