"""The way to step with Numba: one compiled call for all tensors of all parameter groups, or one for each device."""

import functools
import importlib.util
from collections.abc import Sequence
from itertools import chain
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from acprop_core import kernels
from acprop_core.adapt import Row, warn
from acprop_core.kernels import openmp
from acprop_core.rule import FORMATS, Decay, Flags, Hyperparameters, flags_of
from acprop_torch import _cuda
from acprop_torch._private import is_intercepted, is_zerotensor
from acprop_torch._rows import PLAIN, Batch, contiguous

_MIN_PER_THREAD = 2**15  # elements: fewer are not worth a thread
_CHUNK = 2**14  # elements that a thread takes at once: 64 kB of float32 numbers
_COUNTS = frozenset({torch.float32, torch.float64})


def has_numba() -> bool:
    """Return whether Numba can be used."""
    return kernels.why_no_numba() is None


@functools.cache
def warn_of_torch_compile() -> None:
    """Warn if Numba is installed and cannot be used."""
    why = kernels.why_no_numba()
    if why is not None and importlib.util.find_spec("numba") is not None:
        warn(f"fused=True compiles by torch.compile, because Numba cannot be used: {why}", RuntimeWarning)


def plain_members(batch: Batch) -> list[int]:
    """Return which rows are memory of one device that holds its values as they are, in dtypes that can be compiled."""
    if _are_plain(batch.columns, batch.steps):
        return list(range(len(batch.steps)))
    singles = (Row(*([x] for x in row)) for row in batch.rows)
    return [i for i, single in enumerate(singles) if _are_plain(single, [batch.steps[i]])]


def _are_plain(columns: Row, steps: Sequence[Tensor]) -> bool:
    param, grad, mu, nu, carry = columns
    carries = [x for x in carry if x is not None]
    if len(carries) not in (0, len(carry)):
        return False
    own, moments = [*param, *grad, *carries], [*mu, *nu]
    tensors = [*own, *moments, *steps]
    return (
        not is_intercepted()
        and PLAIN.issuperset(map(type, tensors))
        and (all(map(attrgetter("is_cpu"), tensors)) or _are_on_one_cuda_device(tensors))
        and _COUNTS.issuperset(map(attrgetter("dtype"), steps))
        and _are_compiled({*map(attrgetter("dtype"), own)}, {*map(attrgetter("dtype"), moments)}, param[0].is_cpu)
        and not any(map(Tensor.is_neg, tensors))
        and not any(map(is_zerotensor, tensors))
        and (all(map(Tensor.is_contiguous, tensors)) or all(contiguous(row) is not None for row in map(Row, *columns)))
    )


def _are_on_one_cuda_device(tensors: Sequence[Tensor]) -> bool:
    device, *others = {*map(attrgetter("device"), tensors)}
    return not others and _cuda.has_numba_cuda(device)


def _are_compiled(own: set[torch.dtype], moments: set[torch.dtype], on_cpu: bool) -> bool:
    if on_cpu and not has_numba():
        return own == moments and own in ({torch.float32}, {torch.float64})
    from acprop_core.kernels.sixteen_bits import is_compiled, is_readable

    fits = is_readable if on_cpu else is_compiled
    return len(own) == len(moments) == 1 and fits(_name(*own), _name(*moments))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Compiled:
    """The step of the plain rows of all groups. It keeps no tensor alive.

    Parameters
    ----------
    batches : sequence of Batch
        A batch of plain rows for each group.

    Raises
    ------
    RuntimeError
        If the storage of a tensor is smaller than the tensor.
    """

    def __init__(self, batches: Sequence[Batch]) -> None:
        import numpy as np

        from acprop_core.kernels import element

        self._flags = [_flags_of(batch.hyper) for batch in batches]
        self._options = np.zeros((len(batches), len(element.OPTIONS)))
        kinds: dict[_Kind, list[int]] = {}
        table = np.zeros((element.ROWS, sum(len(batch.steps) for batch in batches)), np.int64)
        rows: list[Row] = []
        steps = list(chain.from_iterable(batch.steps for batch in batches))
        for group, batch in enumerate(batches):
            for row in map(Row, *batch.columns):
                kinds.setdefault(_kind_of(row, self._flags[group]), []).append(len(rows))
                table[element.GROUP, len(rows)] = group
                rows.append(row)
        table[element.SIZE] = [row.param.numel() for row in rows]
        table[element.WIDE] = [step.dtype is torch.float64 for step in steps]
        for i, column in enumerate(zip(*(row._replace(carry=_any_carry(row)) for row in rows), strict=True)):
            table[i] = list(map(Tensor.data_ptr, column))
        table[element.COUNT] = list(map(Tensor.data_ptr, steps))
        for row in rows:
            _check_storages(row)
        self._members: list[list[int]] = []
        self._parts: list[_Part | _cuda.Part] = []
        for kind, members in kinds.items():
            part = np.ascontiguousarray(table[:, members])
            has_overlap = _overlap(part, kind)
            if kind.device.type == "cpu":
                self._members.append(members)
                self._parts.append(_Part(kind, part, self._options, has_overlap))
            else:  # one launch, or one for each row, because threads must not write the same memory
                for chosen in [[i] for i in range(len(members))] if has_overlap else [range(len(members))]:
                    self._members.append([members[i] for i in chosen])
                    own = np.ascontiguousarray(part[:, chosen])
                    self._parts.append(_cuda.Part(_launcher(kind), kind.device, own, self._options))
        self._on_cpu = {i for i, batch in enumerate(batches) if _reads_options(batch)}
        self.reads_options = bool(self._on_cpu)  # those on a device, for rows on a CPU
        self._tensors: dict[tuple[int, int], Tensor] = {}  # options that are not read, by their place
        for group, batch in enumerate(batches):
            self.set_options(group, batch.hyper, batch.grad_scale)

    def set_options(self, group: int, hyper: Hyperparameters, grad_scale: Tensor | None = None) -> bool:
        """Set the hyperparameters of a group; return False if its rows would need another kernel."""
        from acprop_core.kernels import element

        flags = _flags_of(hyper)
        if flags != self._flags[group]:
            return False
        # on CUDA devices the scale is read by the kernel
        scale = 1.0 if grad_scale is None or group not in self._on_cpu else 1.0 / grad_scale.item()
        hyper = hyper._replace(clip_exponent=hyper.clip_exponent or 0.0)
        for i, x in enumerate(hyper[:7]):
            if isinstance(x, Tensor) and group not in self._on_cpu:  # it may change between two steps of a graph
                self._tensors[group, i] = x
            else:
                self._tensors.pop((group, i), None)
                self._options[group, i] = float(x)
        self._options[group, 7:] = hyper.maximize, scale
        decay = flags_of(hyper).decay
        for part in self._parts:
            part.table[element.DECAY, part.table[element.GROUP] == group] = decay
        return True

    def set_gradients(self, addresses: list[int]) -> bool:
        """Set the addresses of all gradients; return False if a count on the host is bad."""
        for members, part in zip(self._members, self._parts, strict=True):
            part.table[1] = addresses if len(members) == len(addresses) else [addresses[i] for i in members]
        return all(part.check() for part in self._parts)

    def run(self, params: list[Tensor], scaling: _cuda.Scaling) -> None:
        """Step all rows, and count the step of each; `params` are their parameters."""
        torch.autograd.graph.increment_version(params)  # because autograd does not see the step
        for part in self._parts:
            part.run(self._tensors, scaling)


def _reads_options(batch: Batch) -> bool:
    return any(map(attrgetter("is_cpu"), batch.columns.param))


class _Kind(NamedTuple):
    """The rows that one kernel steps."""

    flags: Flags
    param: torch.dtype
    moments: torch.dtype
    device: torch.device


def _kind_of(row: Row, flags: Flags) -> _Kind:
    own = row.param.dtype
    if row.carry is not None:
        flags = flags._replace(format=FORMATS[_name(own)])
    return _Kind(flags, own, row.mu.dtype, row.param.device)


def _flags_of(hyper: Hyperparameters) -> Flags:
    """Return the flags for which a kernel is compiled."""
    return flags_of(hyper)._replace(decay=Decay.NONE)


def _any_carry(row: Row) -> Tensor:
    return row.param if row.carry is None else row.carry  # without carries the address is not read


def has_memory(x: Tensor) -> bool:
    """Return whether the storage of a contiguous tensor is as large as the tensor needs."""
    return not x.numel() or x.untyped_storage().nbytes() >= (x.storage_offset() + x.numel()) * x.element_size()


def _check_storages(row: Row) -> None:
    for x in row:
        if x is not None and not has_memory(x):
            raise RuntimeError(
                f"a tensor of shape {tuple(x.shape)} among a parameter, its gradient and its state has only "
                f"{x.untyped_storage().nbytes()} bytes of memory, because its storage was resized; resize it back "
                "before the step"
            )


class _Part:
    """The rows of one kind on a CPU: one compiled call."""

    def __init__(self, kind: _Kind, table: Any, options: Any, has_overlap: bool) -> None:
        from acprop_core.kernels import cpu, element

        self.table = table
        self._program = kind.flags, _name(kind.param), _name(kind.moments)
        self._kernel = cpu.kernel_of(*self._program)
        self._check = cpu.check_kernel()
        self._options = options
        self._size = int(table[element.SIZE].sum())
        self._most = 1 if has_overlap else self._size // _MIN_PER_THREAD  # threads must not write the same memory
        self._shared = (0, 0)
        self._arguments: tuple[Any, ...] = ()

    def check(self) -> bool:
        return self._check(self.table)

    def run(self, tensors: dict[tuple[int, int], Tensor], scaling: _cuda.Scaling) -> None:
        threads = max(1, min(torch.get_num_threads(), self._most))
        region = openmp.region() if threads > 1 else 0
        if (threads, region) != self._shared:
            from acprop_core.kernels import cpu

            # a new record, because a thread may still read the old one
            record = cpu.shared(self._size, max(1, self._size if threads == 1 else _CHUNK))
            if region:
                member = cpu.member_of(*self._program).address
                cpu.share_by_openmp(record, self.table, self._options, region, member, threads)
            self._shared, self._arguments = (threads, region), (self.table, self._options, record)
        if threads > 1 and not region:
            from acprop_core.kernels.helpers import call_beside

            call_beside(functools.partial(self._kernel, *self._arguments, False), threads - 1)
        self._kernel(*self._arguments, True)


def _launcher(kind: _Kind) -> Any:
    from acprop_core.kernels import cuda

    capability = torch.cuda.get_device_capability(kind.device)
    return cuda.launcher_of(kind.flags, _name(kind.param), _name(kind.moments), capability)


def _overlap(table: Any, kind: _Kind) -> bool:
    """Return whether two of the arrays that a step of these rows writes share bytes; none overlaps itself."""
    import numpy as np

    from acprop_core.kernels import element

    own, moments = kind.param.itemsize, kind.moments.itemsize
    widths = np.array([own, moments, moments, own])[:, None]
    written = table[[element.PARAM, element.MU, element.NU, element.CARRY][: 4 if kind.flags.format else 3]]
    sizes = table[element.SIZE] * widths[: len(written)]
    written = np.append(written, table[[element.COUNT]], axis=0)
    sizes = np.append(sizes, np.where(table[[element.WIDE]], 8, 4), axis=0)
    starts, sizes = written[sizes > 0], sizes[sizes > 0]
    order = np.argsort(starts)
    return bool((starts[order][:-1] + sizes[order][:-1] > starts[order][1:]).any())
