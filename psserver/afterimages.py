"""Reusable buffers for after-images: copies of the rows that a push changed, for its log record."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.kernels import Rows

KEPT = 64  # maximum number of free buffers
KEPT_BYTES = 64 << 20  # maximum size of all free buffers, in bytes

Buffer = NDArray[np.uint8]


class ImageBuffers:
    """Pool of buffers, each in use (the log still has to write it) or free (a push may take it).

    The log limits the size of buffers in use, because it limits its unwritten records. KEPT and
    KEPT_BYTES limit the free buffers; further free buffers are deleted.

    bytes  size of all buffers, in use and free; any thread may read it
    """

    def __init__(self) -> None:
        self._flying: deque[tuple[int, Buffer]] = deque()  # in use: version of the push, buffer
        self._kept: list[Buffer] = []  # free; the one freed last, which the CPU caches, is last
        self._kept_bytes = 0
        self.bytes = 0

    def take(self, count: int, width: int, version: int, written: int) -> tuple[NDArray[Any], Rows]:
        """Return uninitialized arrays (frequencies, rows) for the after-images of a push.

        count, width  shape of the result: frequencies uint64[count], rows float32[count, width]
        version       version of this push; it grows from call to call
        written       newest version that the log has written

        Both are views of one buffer, which stays in use until the log has written ``version``.
        """
        if self._flying and self._flying[0][0] <= written:
            self.reclaim(written)
        size, kept = count * (8 + 4 * width), self._kept
        if kept and size <= len(kept[-1]) <= 2 * size:
            buffer = kept.pop()
            self._kept_bytes -= len(buffer)
        else:
            buffer = self._take_smallest(size)
        self._flying.append((version, buffer))
        frequencies = buffer[: 8 * count].view(np.uint64)
        rows = buffer[8 * count : size].view(np.float32).reshape(count, width)
        return frequencies, rows

    def _take_smallest(self, size: int) -> Buffer:
        """Remove and return the smallest free buffer that has at least ``size`` bytes.

        Returns a new buffer of ``size`` bytes if there is none.
        """
        fitting = [at for at, each in enumerate(self._kept) if len(each) >= size]
        if not fitting:
            self.bytes += size
            return np.empty(size, np.uint8)
        buffer = self._kept.pop(min(fitting, key=lambda at: len(self._kept[at])))
        self._kept_bytes -= len(buffer)
        return buffer

    def reclaim(self, written: int) -> None:
        """Free the buffers of all versions up to ``written``, the newest that the log has written.

        If more than KEPT buffers are free, the smallest are deleted. If the free buffers have more
        than KEPT_BYTES together, the largest are deleted.
        """
        while self._flying and self._flying[0][0] <= written:
            buffer = self._flying.popleft()[1]
            self._kept.append(buffer)
            self._kept_bytes += len(buffer)
            if len(self._kept) > KEPT:
                self._free(min(self._kept, key=len))
        while self._kept_bytes > KEPT_BYTES:
            self._free(max(self._kept, key=len))

    def drain(self, written: int) -> None:
        """Delete all buffers, except those in use for versions newer than ``written``.

        written  newest version that the log has written
        """
        self.reclaim(written)
        while self._kept:
            self._free(self._kept[-1])

    def _free(self, buffer: Buffer) -> None:
        """Delete a free buffer."""
        self._kept = [each for each in self._kept if each is not buffer]
        self._kept_bytes -= len(buffer)
        self.bytes -= len(buffer)
