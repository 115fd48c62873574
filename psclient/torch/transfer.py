"""Copies of rows to a GPU, and of gradients back, that the training loop does not wait for.

Rows of a batch come to the GPU in two ways, which may be mixed: in page-locked buffers of the
pipeline, and in rooms of the same-host lane, which are GPU memory that a server writes to. Both are
copied to a tensor of the batch's own, on a CUDA stream of their own. These are the orders that
matter, and what keeps each:

* A copy begins after its rows have arrived: it is launched after the server's answer. A server
  answers once its kernels have written the room, and a pull that goes through host memory is
  decoded before the ticket is handed out.
* Kernels of the training loop begin after the copy: their stream waits for the stream of copies.
* A room is not written again before it is copied: the transfer keeps a reference to it until the
  event after the copy is over. Only then can a later pull get the same memory. The server is
  another process, so its kernels cannot wait for the event.
* A buffer is not written again before it is copied: ``finish`` waits for that before the ticket
  is given back, and so does the wait for gradients, which are copied on the same stream later.
* The memory of the tensor is not used again before the kernels of the loop are over: PyTorch's
  allocator is told that their stream uses it (``record_stream``).
* Gradients are copied after the kernels that compute them: the stream of copies waits for the
  stream of the loop. The thread that sends them waits for the event after this copy.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from psclient.gpurows import Arrived, copy_torch, sources
from psclient.outputs import Output
from psclient.ticket import Ring

Rows = NDArray[np.float32]


class Transfer:
    """Leaves rows and gradients in host memory: the case without a device.

    empty  allocates the buffers of a Pipeline; None: as usual
    gpu    number of the GPU that the rows are copied to; None: none
    """

    empty: Callable[[tuple[int, int]], Rows] | None = None
    gpu: int | None = None

    def rows(self, array: Rows, output: Output | None) -> Tensor:
        """Return pulled rows float32[n, dim] as a tensor.

        array   buffer of the pipeline with the rows
        output  says which rows are in GPU memory instead; None: none
        """
        return torch.from_numpy(array)

    def gradients(self, table: str, tensor: Tensor) -> Any:
        """Return gradients of a table, float32[n, dim], as an array or a function that returns one.

        The numbers of the array may change once ``pushes`` later gradients of the table were given.
        """
        return tensor.cpu().numpy()

    def finish(self) -> None:
        """Wait until all rows are copied, so that their buffers may be used again."""


class CudaTransfer(Transfer):
    """Copies to a GPU, and from there to page-locked buffers, on a CUDA stream of its own.

    device  the GPU, with its number
    pushes  maximum number of pushes under way

    Only ``wait``, the function that ``gradients`` returns, may be called by another thread than
    the training loop's.
    """

    def __init__(self, device: torch.device, pushes: int) -> None:
        self._device, self.gpu = device, device.index
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pushes = pushes
        self._rings: dict[str, Ring] = {}  # by table: buffers for gradients
        self._copying: deque[tuple[Any, list[Arrived]]] = (
            deque()
        )  # (event after it, rooms it reads)

    def empty(self, shape: tuple[int, int]) -> Rows:
        """Allocate page-locked memory."""
        buffer: Rows = torch.empty(shape, dtype=torch.float32, pin_memory=True).numpy()
        return buffer

    def rows(self, array: Rows, output: Output | None) -> Tensor:
        self._release()
        arrived = [] if output is None else output.arrived
        given = sources(arrived, len(array))
        with torch.cuda.stream(self._stream):
            copied = torch.empty(array.shape, dtype=torch.float32, device=self._device)
            for some in given.host:
                copied[some].copy_(torch.from_numpy(array[some]), non_blocking=True)
            for each, to, of in given.rooms:
                copy_torch(each.view(array.shape[1]), copied, to, of)
            if given.rooms:
                self._copying.append((self._event(), list(arrived)))
                arrived.clear()
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        copied.record_stream(current)
        return copied

    def gradients(self, table: str, tensor: Tensor) -> Any:
        self._release()
        if tensor.device.type != "cuda":  # sums over several batches
            return tensor.numpy()
        n, dim = tensor.shape
        if table not in self._rings:
            self._rings[table] = Ring(dim, self._pushes, self.empty)
        buffer = torch.from_numpy(self._rings[table].take(n))
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            buffer.copy_(tensor, non_blocking=True)
            tensor.record_stream(self._stream)
            copied = self._event()

        def wait() -> Rows:
            copied.synchronize()
            return np.asarray(buffer.numpy(), np.float32)

        return wait

    def finish(self) -> None:
        self._stream.synchronize()
        self._copying.clear()

    def _event(self) -> Any:
        """Return an event after all copies that were launched so far."""
        event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event

    def _release(self) -> None:
        """Give back the rooms whose copies are over."""
        while self._copying and self._copying[0][0].query():
            self._copying.popleft()


def transfer_to(device: Any, pushes: int) -> Transfer:
    """Return the Transfer for a device; None: host memory.

    pushes  maximum number of pushes under way
    """
    if device is None or torch.device(device).type == "cpu":
        return Transfer()
    chosen = torch.device(device)
    if chosen.index is None:
        chosen = torch.device(chosen.type, torch.cuda.current_device())
    return CudaTransfer(chosen, pushes)
