"""The contract of a device, which runs kernels on memory of its own.

Work is given to a *queue*, which runs it later, in order. A *mark* is a point in a queue. Only
marks order anything else: two queues, or a queue and the host. So a host array that a kernel uses
belongs to the kernel until somebody has waited for a later mark:

    write page-locked host memory -> run(...) -> mark() -> wait() -> read or reuse the memory

Kernels read and write page-locked host memory at its own address, so that a batch needs one launch
and no copy of its own.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from storage.errors import OutOfMemory

Number = np.float32 | np.float64 | np.int32 | np.int64 | np.uint64


class NoDevice(Exception):
    """There is no GPU that this process can use; the message says what to install or check."""


class DeviceLost(Exception):
    """The GPU failed. This process can use it no more, and what its memory had is lost."""


class OutOfDeviceMemory(OutOfMemory):
    """The device has no such piece of memory, whatever the budgets are. Everything else goes on.

    wanted  bytes that were asked for; 0: unknown
    free    bytes that the device has left, possibly in smaller pieces
    what    the memory that is full
    """

    def __init__(self, wanted: int, free: int, what: str = "GPU memory") -> None:
        super().__init__(free, 0, wanted)
        text = f"{what} is full: {wanted or 'more'} bytes wanted; the GPU has {free} bytes free"
        self.args, self.free = (text,), free


class Memory(Protocol):
    """A piece of device memory. It is freed when this object is garbage."""

    address: int


class Mark(Protocol):
    """A point in a queue."""

    def wait(self) -> None:
        """Wait until the queue has run everything that it was given before this point."""
        ...


class Queue(Protocol):
    """Runs kernels in order. One thread at a time may use it."""

    def run(self, kernel: str, rows: int, *arguments: Number) -> None:
        """Run a kernel over ``rows`` rows; nothing if that is 0.

        arguments  numpy numbers of exactly the types that the kernel declares; addresses as uint64
        """
        ...

    def mark(self) -> Mark:
        """Return the point after everything that was given so far."""
        ...

    def follow(self, mark: Mark) -> None:
        """Make everything that is given from now on run after ``mark``, of any queue."""
        ...


class Device(Protocol):
    """Memory, and queues that run kernels on it. Any thread may use it."""

    @property
    def free(self) -> int:
        """Bytes of device memory that are free."""
        ...

    def memory(self, size: int) -> Memory:
        """Return ``size`` bytes of device memory, with any contents. Raises OutOfDeviceMemory."""
        ...

    def pinned(self, size: int) -> NDArray[np.uint8]:
        """Return page-locked host memory that kernels reach at the same address.

        Raises OutOfDeviceMemory.
        """
        ...

    def queue(self) -> Queue:
        """Return a new queue. Raises OutOfDeviceMemory."""
        ...


def address(array: NDArray[Any]) -> np.uint64:
    """Return the address of an array, as kernels take it."""
    return np.uint64(array.ctypes.data)
