"""A read-only memory map of the base's file, from which rows are read in place.

The base (the on-disk copy of all rows at one log version) is an LMDB file of blocks. LMDB never
moves a committed block, so kernels can read its rows straight from a map of the file. The map
reserves more address space than the file has bytes, so that it rarely has to be replaced when the
file grows. Nothing may be read after the end of the file.

A read from the map waits for the disk if the page is not in memory, and kills the process if the
disk fails. Therefore ``warm`` first reads the pages with system calls, many at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

RESERVED = 1 << 40  # bytes of address space that a map reserves at least
PIECE = 4096  # bytes that are read and verified at once; offsets in the file are multiples


class BlockFile:
    """The memory map of one base's file.

    path   the file
    bytes  uint8[], the whole map; only the bytes within the file may be read
    words  uint64[], the same memory
    floats float32[], the same memory

    The arrays stay valid as long as somebody refers to them, even after ``close``. ``cover`` may
    replace them by larger ones, so take them anew for each use.
    """

    path: Path
    bytes: NDArray[np.uint8]
    words: NDArray[np.uint64]
    floats: NDArray[np.float32]

    def __init__(self, path: Path, reserved: int = RESERVED) -> None:
        """Store the settings. ``open`` maps the file, which must exist then."""
        self.path = path

    def open(self) -> Self:
        """Map the file. Raises OSError if the file cannot be opened or mapped."""
        raise NotImplementedError

    def cover(self, size: int) -> None:
        """Make sure that the first ``size`` bytes of the file are mapped. Raises OSError."""
        raise NotImplementedError

    def warm(self, offsets: NDArray[np.int64], size: int = PIECE) -> None:
        """Read ranges of the file into memory, many at once. Any thread may call this.

        offsets  int64[n]  start of each range in the file; ascending order is fastest
        size     bytes in each range

        Releases the GIL. Raises OSError if the disk fails.
        """
        raise NotImplementedError

    def resident(self, offsets: NDArray[np.int64], size: int = PIECE) -> bool:
        """Return whether all ranges are in memory, as far as the system tells. See ``warm``."""
        raise NotImplementedError

    def close(self) -> None:
        """Close the file. The memory is unmapped once nobody refers to the arrays."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(self, *error: Any) -> None:
        self.close()
