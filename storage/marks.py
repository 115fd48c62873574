"""The file SYNCED: it records up to which version the log is on disk.

    SYNCED     = mark[512] mark[512]            written alternately
    mark       = version u64 | first u64 | end u64 | checksum u64 | zeros       little-endian

* mark       every version up to ``version`` is on disk; the frame of ``version`` ends at byte
             ``end`` of the segment ``first``
* checksum   xxh3_64 of the 24 bytes before it, seeded by xxh3_64 of the lineage (the random id of
             the log)

Marks are written but not synced, so they survive a crash of the process but not always a power
failure. After a crash of the process the newest mark shows how much of the log was on disk, so a
later change of any of these bytes is detected. After a power failure the newest mark may be
missing. tail.py then finds out from the frames how much was on disk.
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
    """A position in the log up to which all frames are on disk."""

    version: int  # newest version on disk
    first: int  # first version of the segment (log file) that contains ``version``
    end: int  # offset in that segment at which the frame of ``version`` ends


class Marks:
    """The file SYNCED, which contains the newest mark and the mark before it."""

    def __init__(self, disk: Disk, path: Path, lineage: bytes) -> None:
        """Open the file ``path``, or create it empty.

        lineage  16 random bytes that identify the log
        """
        self._disk = disk
        self._path = path
        self._seed = xxh3_64_intdigest(lineage)
        self._fd = open_file(path, os.O_RDWR | os.O_CREAT)
        self._slot = 0  # 0 or 1: the half of the file with the older mark, overwritten next

    def read(self) -> Mark | None:
        """Return the newest mark with a correct checksum; None if the file has no marks.

        Raises Corrupt if the file has marks, but no checksum is correct.
        """
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
                raise Corrupt(str(self._path), "neither of the two marks has a correct checksum")
            return None
        newest, slot = max(marks)
        self._slot = 1 - slot
        return newest

    def write(self, mark: Mark) -> None:
        """Overwrite the older of the two marks with ``mark``. Does not sync the file."""
        fields = MARK.pack(*mark, 0)[:-8]
        whole = fields + xxh3_64_intdigest(fields, self._seed).to_bytes(8, "little")
        slot = memoryview(whole.ljust(SLOT, b"\0"))
        write_all(self._disk, self._fd, [slot], SLOT * self._slot)
        self._slot = 1 - self._slot

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)
