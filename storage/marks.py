"""The file SYNCED: up to where the version log is on disk.

    SYNCED     = mark[512] mark[512]            written in turn
    mark       = version u64 | first u64 | end u64 | checksum u64 | zeros       little-endian

* mark       every version up to ``version`` is on disk; the frame of ``version`` ends at byte
             ``end`` of the segment ``first``
* checksum   xxh3_64 of the 24 bytes before it, seeded by xxh3_64 of the lineage

The marks themselves are not synced. They survive the death of the process, so that no byte of a
synced log can change unnoticed, not even in its last record. After a power failure the newer mark
may be missing. The frames then show what had been synced (tail.py).
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import NamedTuple

from xxhash import xxh3_64_intdigest

from storage.disk import Disk, open_file, write_all
from storage.errors import Corrupt

SLOT = 512  # bytes
MARK = struct.Struct("<QQQQ")


class Mark(NamedTuple):
    """Up to where the log is on disk."""

    version: int
    first: int  # of the segment that contains the version
    end: int  # byte of that segment after the version's frame


class Marks:
    """The newest mark and the one before it."""

    def __init__(self, disk: Disk, path: Path, lineage: bytes) -> None:
        """Open the file ``path``, or create it empty."""
        self._disk = disk
        self._path = path
        self._seed = xxh3_64_intdigest(lineage)
        self._fd = open_file(path, os.O_RDWR | os.O_CREAT)
        self._slot = 0  # of the older mark, which is overwritten next

    def read(self) -> Mark | None:
        """Return the newest mark, None if there is none. Raises Corrupt if all marks are bad."""
        data = os.pread(self._fd, 2 * SLOT, 0)
        marks = []
        for slot in (0, 1):
            whole = data[SLOT * slot :][: MARK.size]
            if len(whole) == MARK.size:
                *fields, checksum = MARK.unpack(whole)
                if checksum == xxh3_64_intdigest(whole[:-8], self._seed):
                    marks.append((Mark(*fields), slot))
        if not marks:
            if any(data):
                raise Corrupt(str(self._path), "no mark in it has the right checksum")
            return None
        newest, slot = max(marks)
        self._slot = 1 - slot
        return newest

    def write(self, mark: Mark) -> None:
        """Replace the older mark by ``mark``."""
        fields = MARK.pack(*mark, 0)[:-8]
        whole = fields + xxh3_64_intdigest(fields, self._seed).to_bytes(8, "little")
        slot = memoryview(whole.ljust(SLOT, b"\0"))
        write_all(self._disk, self._fd, [slot], SLOT * self._slot)
        self._slot = 1 - self._slot

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)
