"""The GPU of a shard: what all of its tables share."""

from __future__ import annotations

import time
from collections.abc import Callable

from storage.arena import Budget
from storage.errors import OutOfMemory
from storage.gpu.device import Device, OutOfDeviceMemory
from storage.gpu.slab import PART, SCAN_PART
from storage.gpu.staging import ALIGNED, BLOCKS, SCANS, Staging

ENDS = 2 * ALIGNED  # bytes: a block has two parts, slots and rows
# Page-locked memory of the host, in bytes. It is taken at the start, and never grows: a batch is
# divided into parts that fit, and no row is larger than a part.
PINNED_BYTES = BLOCKS * (PART + ENDS) + SCANS * BLOCKS * (SCAN_PART + ENDS)


PAUSE_SECONDS = 10.0  # time after which promotion is tried again once


class Gpu:
    """A device, the budget of its memory, and page-locked memory for batches.

    device   runs the kernels
    budget   budget of GPU memory: the setting hbm_bytes
    staging  the queue of the engine thread, for all tables
    paused   True: the device had no memory although the budget had some left, for example because
             a different process took it. Rows are not promoted to the GPU then
    """

    def __init__(
        self,
        device: Device,
        limit: int,
        on_pause: Callable[[str], None] = lambda why: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take the page-locked memory. Raises OutOfDeviceMemory if there is none.

        limit     bytes of GPU memory for rows
        on_pause  called with the reason when promotion is paused
        clock     returns monotonic seconds
        """
        self.device, self.budget = device, Budget(limit)
        self.staging, self.paused = Staging(device), False
        self._on_pause, self._clock, self._again = on_pause, clock, 0.0
        self.staging.reserve(PART + ENDS)
        self.staging.scans.reserve(SCAN_PART + ENDS)

    def takes(self, width: int) -> bool:
        """Return whether rows of ``width`` numbers can be in GPU memory: a batch has one at least.

        All rows of the dims and optimizers that exist can.
        """
        return 8 + 4 * width <= SCAN_PART

    @property
    def promotes(self) -> bool:
        """Whether rows may be promoted now. While it is paused, this is True every PAUSE_SECONDS,
        so that promotion is tried again.
        """
        if self.paused and self._clock() < self._again:
            return False
        self._again = self._clock() + PAUSE_SECONDS
        return True

    def full(self, error: OutOfMemory) -> None:
        """Note that a tier got no GPU memory. If the device is full, this pauses promotion.

        error  raised by the tier. If only the budget is used up, nothing pauses: rows can leave
        """
        if not isinstance(error.__cause__ or error, OutOfDeviceMemory):
            return
        self._again = self._clock() + PAUSE_SECONDS
        if not self.paused:
            self.paused = True
            self._on_pause(str(error))

    def resume(self) -> None:
        """Note that a tier got GPU memory: promotion is not paused any more."""
        self.paused = False
