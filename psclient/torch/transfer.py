"""Copies of rows to a GPU, and of gradients back, that the training loop does not wait for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from psclient.ticket import Ring

Rows = NDArray[np.float32]


class Transfer:
    """Leaves rows and gradients in host memory: the case without a device.

    empty  allocates the buffers of a Pipeline; None: as usual
    """

    empty: Callable[[tuple[int, int]], Rows] | None = None

    def rows(self, array: Rows) -> Tensor:
        """Return pulled rows float32[n, dim] as a tensor."""
        return torch.from_numpy(array)

    def gradients(self, table: str, tensor: Tensor) -> Any:
        """Return gradients of a table, float32[n, dim], as an array or a function that returns one.

        The numbers of the array may change once ``pushes`` later gradients of the table were given.
        """
        return tensor.cpu().numpy()

    def finish(self) -> None:
        """Wait until all rows are copied, so that their buffers may be used again."""


class CudaTransfer(Transfer):
    """Copies between page-locked buffers and a GPU, on a CUDA stream of its own.

    device  the GPU
    pushes  maximum number of pushes under way

    Kernels that use the rows wait for their copy; the CPU does not. Gradients are copied once the
    kernels before them have run; the thread that sends them waits for that.
    """

    def __init__(self, device: torch.device, pushes: int) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pushes = pushes
        self._rings: dict[str, Ring] = {}  # by table: buffers for gradients

    def empty(self, shape: tuple[int, int]) -> Rows:
        """Allocate page-locked memory."""
        buffer: Rows = torch.empty(shape, dtype=torch.float32, pin_memory=True).numpy()
        return buffer

    def rows(self, array: Rows) -> Tensor:
        with torch.cuda.stream(self._stream):
            copied = torch.from_numpy(array).to(self._device, non_blocking=True)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        copied.record_stream(current)
        return copied

    def gradients(self, table: str, tensor: Tensor) -> Any:
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
            copied: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record(self._stream)

        def wait() -> Rows:
            copied.synchronize()
            return np.asarray(buffer.numpy(), np.float32)

        return wait

    def finish(self) -> None:
        self._stream.synchronize()


def transfer_to(device: Any, pushes: int) -> Transfer:
    """Return the Transfer for a device; None: host memory.

    pushes  maximum number of pushes under way
    """
    if device is None or torch.device(device).type == "cpu":
        return Transfer()
    return CudaTransfer(torch.device(device), pushes)
