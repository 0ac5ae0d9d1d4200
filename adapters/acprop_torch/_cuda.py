"""The way to step of fused=True on CUDA devices with numba-cuda: one launch for all tensors that are alike in dtypes.

No value of a device is read, and nothing waits for a device. It has not yet run on a device: its logic is tested with a
device that is imitated, and its kernels in Numba's simulator and as machine code.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from acprop_core import kernels
from acprop_core.adapt import warn

Scaling = tuple[Tensor | None, Tensor | None]
"""`grad_scale` and `found_inf`, of one element each."""

# Memory from which a graph copies at every replay. It is kept as long as the process, because a graph does not say when
# it ends; some kilobytes for each captured step.
_of_graphs: list[Tensor] = []
# Memory for later captures, by its bytes, because none should be pinned while a graph is captured.
_spares: dict[int, list[Tensor]] = {}


@functools.cache
def has_numba_cuda(device: torch.device) -> bool:
    """Return whether numba-cuda can be used on a device; warn, once a device, if it is installed and cannot."""
    if device.type != "cuda" or torch.version.cuda is None:  # AMD's devices are called "cuda" too
        return False
    why = kernels.why_no_numba_cuda(torch.cuda.get_device_capability(device))
    if why not in (None, kernels.NO_CUDA):
        warn(
            f"fused=True compiles by torch.compile, because numba-cuda cannot be used: {why}; repair or uninstall it",
            RuntimeWarning,
        )
    return why is None


class Part:
    """The rows of one kind on one device: one launch, after a small one for the numbers of the step.

    Parameters
    ----------
    launcher : Launcher
        Of these rows.
    device : torch.device
        Where they are.
    table, options : array
        As `acprop_core.kernels.cuda.Launcher.run` takes them, of these rows. Both may be changed between two steps.
    """

    def __init__(self, launcher: Any, device: torch.device, table: Any, options: Any) -> None:
        import numpy as np

        from acprop_core.kernels import cuda, element

        self._launcher, self._device = launcher, device
        chunks = cuda.chunks_of(table[element.SIZE])
        self._blocks = len(chunks)
        addresses = np.concatenate([table.reshape(-1), chunks.reshape(-1)])
        self.table = addresses[: table.size].reshape(table.shape)
        self._addresses, self._options = OnDevice(addresses, device), OnDevice(options, device)

    def check(self) -> bool:
        """Return True: step counts on a device are not read."""
        return True

    def run(self, tensors: dict[tuple[int, int], Tensor], scaling: Scaling) -> None:
        """Step the rows, and count the step of each; `tensors` are options on devices, by their place in `options`."""
        from acprop_core.kernels import cuda

        with torch.cuda.device(self._device):
            stream, is_captured = _stream_of(self._device)
            table, options = (x.bring(stream, is_captured) for x in (self._addresses, self._options))
            if tensors:  # a copy, because the next step may have a number in its place
                options = options.clone()
            for place, x in tensors.items():
                options[place].copy_(x.squeeze(), non_blocking=True)
            columns = self.table.shape[1]
            numbers = torch.empty((columns, cuda.NUMBERS), dtype=torch.float64, device=self._device)
            scales = [None if x is None else x.to(self._device, torch.float32, non_blocking=True) for x in scaling]
            addresses = [0 if x is None else x.data_ptr() for x in scales]
            self._launcher.run(
                *(self._device.index or 0, stream, table.data_ptr(), columns, table[self.table.size :].data_ptr()),
                *(self._blocks, options.data_ptr(), numbers.data_ptr(), *addresses),
            )


class OnDevice:
    """A copy on a device of a NumPy array, made anew when the array or the stream is another than at the last step.

    Each copy is new memory, because a kernel on the device may still read the last one; torch's allocator gives that
    memory away in the order of the stream.
    """

    def __init__(self, array: Any, device: torch.device) -> None:
        self._array, self._device = array, device
        self._copied: Any = None
        self._stream: int | None = None
        self._tensor: Any = None
        self._spare: Tensor | None = None  # for a capture
        self._captured: Any = None  # of the last one; it never changes

    def __del__(self) -> None:
        # the next step may be prepared while it is captured; at the end of Python `_spares` may already be None
        if self._spare is not None and _spares is not None:
            _spares.setdefault(len(self._spare), []).append(self._spare)

    def bring(self, stream: int, is_captured: bool) -> Tensor:
        """Return the copy, for use on the current stream."""
        import numpy as np

        array, size = self._array, 1 << self._array.nbytes.bit_length()
        if is_captured and self._captured is not None and np.array_equal(array, self._captured.numpy()):
            return self._captured.to(self._device, non_blocking=True)  # one graph may have several steps
        if self._spare is None:
            try:
                self._spare = _spares[size].pop()
            except (KeyError, IndexError):  # none, or another thread has taken the last one
                self._spare = _pinned(size)
        is_current = self._tensor is not None and stream == self._stream and not is_captured
        if is_current and np.array_equal(array, self._copied):
            return self._tensor
        memory = self._spare if is_captured else _pinned(size)
        host = memory[: array.nbytes].view(getattr(torch, array.dtype.name)).view(array.shape)
        host.numpy()[...] = array
        tensor = host.to(self._device, non_blocking=True)
        if is_captured:
            _of_graphs.append(host)
            self._captured, self._spare = host, None
        else:
            self._copied, self._stream, self._tensor = array.copy(), stream, tensor
        return tensor


def _stream_of(device: torch.device) -> tuple[int, bool]:
    """Return the handle of the current stream, and whether a graph captures it."""
    return torch.cuda.current_stream(device).cuda_stream, torch.cuda.is_current_stream_capturing()


def _pinned(size: int) -> Tensor:
    """Return so many bytes of the host, from which a device copies while the host continues."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)
