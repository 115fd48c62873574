"""Buffers for the after-images of pushes, used again once the log has written them."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.kernels import Rows

KEPT = 64  # buffers that wait for the next pushes
KEPT_BYTES = 64 << 20  # in all of them

Buffer = NDArray[np.uint8]


class ImageBuffers:
    """Buffers in flight, which the log may still read, and some that wait for the next pushes.

    A buffer in flight belongs to a record in the backlog of the log, which is bounded. Those that
    wait are bounded by KEPT and KEPT_BYTES. Everything else is freed once it is written.

    bytes  in all buffers; may be read from any thread
    """

    def __init__(self) -> None:
        self._flying: deque[tuple[int, Buffer]] = deque()  # with the version of the push
        self._kept: list[Buffer] = []  # smallest first
        self._kept_bytes = 0
        self.bytes = 0

    def take(self, count: int, width: int, version: int, written: int) -> tuple[NDArray[Any], Rows]:
        """Return room for the frequencies uint64[count] and rows float32[count, width] of a push.

        version  of the push
        written  newest version that the log has written
        """
        self.reclaim(written)
        size = count * (8 + 4 * width)
        at = bisect_left(self._kept, size, key=len)
        if at < len(self._kept):
            buffer = self._kept.pop(at)
            self._kept_bytes -= len(buffer)
        else:
            buffer = np.empty(size, np.uint8)
            self.bytes += size
        self._flying.append((version, buffer))
        frequencies = buffer[: 8 * count].view(np.uint64)
        rows = buffer[8 * count : size].view(np.float32).reshape(count, width)
        return frequencies, rows

    def reclaim(self, written: int) -> None:
        """Keep some of the buffers that the log has written, the largest, and free the others."""
        while self._flying and self._flying[0][0] <= written:
            buffer = self._flying.popleft()[1]
            self._kept.insert(bisect_left(self._kept, len(buffer), key=len), buffer)
            self._kept_bytes += len(buffer)
            if len(self._kept) > KEPT:
                self._free(0)
        while self._kept_bytes > KEPT_BYTES:
            self._free(-1)

    def drain(self, written: int) -> None:
        """Free all buffers that the log has written."""
        self.reclaim(written)
        while self._kept:
            self._free(-1)

    def _free(self, at: int) -> None:
        size = len(self._kept.pop(at))
        self._kept_bytes -= size
        self.bytes -= size
