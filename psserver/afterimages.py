"""Buffers for the after-images of pushes, used again once the log has written them."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.kernels import Rows


class ImageBuffers:
    """Buffers that the log may still read, oldest first."""

    def __init__(self) -> None:
        self._buffers: deque[tuple[int, NDArray[np.uint8]]] = deque()  # with the version in them

    def take(self, count: int, width: int, version: int, written: int) -> tuple[NDArray[Any], Rows]:
        """Return room for the frequencies uint64[count] and rows float32[count, width] of a push.

        version  of the push
        written  newest version that the log has written
        """
        size = count * (8 + 4 * width)
        buffer = None
        if self._buffers and self._buffers[0][0] <= written:
            buffer = self._buffers.popleft()[1]
        if buffer is None or len(buffer) < size:
            buffer = np.empty(size, np.uint8)
        self._buffers.append((version, buffer))
        frequencies = buffer[: 8 * count].view(np.uint64)
        rows = buffer[8 * count : size].view(np.float32).reshape(count, width)
        return frequencies, rows
