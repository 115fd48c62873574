"""A queue, and the page-locked memory through which batches reach its kernels and come back."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.gpu.device import Device, Mark

BLOCKS = 2  # so that the host fills or reads one block while the device works on the other
ALIGNED = 256  # bytes; each part of a block begins at a multiple of it


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

    def lend(self, *sizes: int) -> list[NDArray[Any]]:
        """Return parts of the next block, uint8[size] each, once no kernel uses the block."""
        mark, turn = self._marks[self._turn], self._turn
        if mark is not None:
            mark.wait()
            self._marks[turn] = None
        starts = np.cumsum([0, *(-(-size // ALIGNED) * ALIGNED for size in sizes)]).tolist()
        if len(self._blocks[turn]) < starts[-1]:
            self._enlarge(starts[-1])
        block = self._blocks[turn]
        return [block[at : at + size] for at, size in zip(starts, sizes, strict=False)]

    def _enlarge(self, size: int) -> None:
        """Make all blocks at least so large: then later parts of a batch do not lack memory."""
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
