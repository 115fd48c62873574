"""A queue, and the page-locked memory through which batches reach its kernels and come back."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.gpu.device import Device, Mark

BLOCKS = 2  # so that the host fills or reads one block while the device works on the other
ALIGNED = 256  # bytes; each part of a block begins at a multiple of it
SCANS = 4  # batches of scans that may use page-locked memory at the same time


class Staging:
    """A queue with blocks of page-locked memory, which take turns. One thread at a time.

    device  the device of the queue
    queue   runs the kernels that use the blocks

    For each launch, call ``lend``, fill the memory, give the queue its kernel, and call
    ``launched``. The memory then belongs to the kernel until the mark was waited for. What the
    kernel wrote can be read from then on until ``lend`` is called BLOCKS times more.

    If ``lend`` raises OutOfDeviceMemory, the queue has run everything.
    """

    def __init__(self, device: Device) -> None:
        self.device, self.queue = device, device.queue()
        self._blocks = [np.empty(0, np.uint8)] * BLOCKS
        self._marks: list[Mark | None] = [None] * BLOCKS
        self._turn = 0

    @cached_property
    def scans(self) -> Scans:
        """Queues with page-locked memory of their own, for scans on other threads."""
        return Scans(self.device)

    def lend(self, *sizes: int) -> list[NDArray[Any]]:
        """Return parts of the next block, uint8[size] each, once no kernel uses the block."""
        mark, turn = self._marks[self._turn], self._turn
        if mark is not None:
            mark.wait()
            self._marks[turn] = None
        starts = np.cumsum([0, *(-(-size // ALIGNED) * ALIGNED for size in sizes)]).tolist()
        if len(self._blocks[turn]) < starts[-1]:
            self.reserve(starts[-1])
        block = self._blocks[turn]
        return [block[at : at + size] for at, size in zip(starts, sizes, strict=False)]

    def reserve(self, size: int) -> None:
        """Make all blocks at least so large: then later parts of a batch do not lack memory.

        Raises OutOfDeviceMemory.
        """
        self.finish()  # also so that nothing is being used if the caller gives up
        for turn, block in enumerate(self._blocks):
            if len(block) < size:
                self._blocks[turn] = self.device.pinned(size)

    def launched(self) -> Mark:
        """Return the mark of the kernel that uses the lent memory; the next block is lent next."""
        mark = self.queue.mark()
        self._marks[self._turn] = mark
        self._turn = (self._turn + 1) % BLOCKS
        return mark

    def finish(self) -> None:
        """Wait until the queue has run everything."""
        self.queue.mark().wait()


class Scans:
    """Queues for the batches of scans, which any thread may borrow. At most SCANS exist.

    So page-locked memory has a bound, however many scans there are. Whoever finds all of them
    borrowed waits. This is short: a borrower waits for kernels only, and returns the queue after
    each batch.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._unused = threading.BoundedSemaphore(SCANS)
        self._idle: list[Staging] = []  # appending and popping are atomic

    def reserve(self, size: int) -> None:
        """Make all queues now, with blocks of so many bytes. Raises OutOfDeviceMemory."""
        self._idle = [Staging(self._device) for _ in range(SCANS)]
        for each in self._idle:
            each.reserve(size)

    @contextmanager
    def borrow(self, mark: Mark) -> Iterator[Staging]:
        """Lend a queue whose kernels run after ``mark``. At the end, wait for its kernels."""
        with self._unused:
            try:
                staging = self._idle.pop()
            except IndexError:
                staging = Staging(self._device)
            try:
                staging.queue.follow(mark)
                yield staging
                staging.finish()
            finally:
                self._idle.append(staging)
