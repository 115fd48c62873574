"""Find the end of a segment's frames, and distinguish a torn tail from damage.

After a power failure or a crash of the process, the last frame of a segment may be incomplete: a
*torn tail*. Intact frames may even follow it, since a disk writes pages in any order. A bad frame
is a torn tail if it had not been synced, and damage if it had been synced. Two facts prove that it
had been synced: it lies in the part that the file SYNCED records as synced (``synced_end``), or a
later intact frame says so: its field ``synced`` has the version of the bad frame or a newer one.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from xxhash import xxh3_64_intdigest

from storage.disk import CHUNK, pread_all
from storage.errors import Corrupt
from storage.segment import CHECKSUM, FRAME, MAX_VERSION, Reader

_ZEROS = bytes(CHUNK)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tail:
    """The end of the frames in a segment."""

    last: int  # version of the last frame; without frames: the segment's first version - 1
    end: int  # offset after the last frame
    dirty: int  # offset after the last byte that is not zero; equal to ``end`` without a torn tail


def find_tail(reader: Reader, size: int, synced_end: int) -> Tail:
    """Verify every frame of a segment and return where the frames end. Raises Corrupt on damage.

    reader      at the first frame of the segment
    size        bytes of the file
    synced_end  bytes of the file that are known to have been synced

    Damage is one of: a bad frame before ``synced_end``; a bad frame that had been synced according
    to a later intact frame; an intact frame with an unexpected version. Any other bad frame is a
    torn tail.
    """
    try:
        while reader.offset < size:
            reader.read(MAX_VERSION, size, CHUNK)
    except Corrupt as bad:
        end, fd, expected = reader.offset, reader.fileno(), reader.version
        dirty = _dirty(fd, end, size)
        damage = (
            end < synced_end
            or _whole(fd, reader.header.seed, end, size)
            or any(_witnesses(fd, reader.header.seed, end, dirty, size, expected))
        )
        if damage:
            raise Corrupt(
                bad.where, f"{bad.what}; this is damage, because the frame had been synced"
            ) from bad
        return Tail(last=expected - 1, end=end, dirty=dirty)
    return Tail(last=reader.version - 1, end=reader.offset, dirty=reader.offset)


def _written(fd: int, start: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of each range of a file from ``start`` to ``size`` that is not a hole."""
    while start < size:
        try:
            start = os.lseek(fd, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only holes up to the end
                return
            raise
        end = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        yield start, end
        start = end


def _dirty(fd: int, start: int, size: int) -> int:
    """Return the offset after the last nonzero byte in ``start``..``size``; ``start`` if none."""
    dirty = start
    for at, end in _written(fd, start, size):
        for offset in range(at, end, CHUNK):
            data = pread_all(fd, min(CHUNK, end - offset), offset)
            if data != _ZEROS[: len(data)]:  # ten times as fast as a search for the last byte
                dirty = offset + len(data.rstrip(b"\0"))
    return dirty


def _whole(fd: int, seed: int, offset: int, size: int) -> bool:
    """Return whether an intact frame of any version begins at ``offset``.

    seed  seed of the frame checksums, ``Header.seed``
    size  bytes of the file
    """
    head = pread_all(fd, FRAME.size, offset)
    if len(head) < FRAME.size:
        return False
    checksum, length, kind, _, _ = FRAME.unpack(head)
    total = FRAME.size + length
    if not kind or total > size - offset:
        return False
    return bool(xxh3_64_intdigest(pread_all(fd, total, offset)[CHECKSUM.size :], seed) == checksum)


def _witnesses(
    fd: int, seed: int, start: int, dirty: int, size: int, expected: int
) -> Iterator[bool]:
    """Search for intact frames that were written after version ``expected`` had been synced.

    seed        seed of the frame checksums, ``Header.seed``
    start       offset at which to begin: that of the bad frame
    dirty       offset at which to stop
    size        bytes of the file
    expected    version of the bad frame

    Finds the offsets, multiples of 8, where the bytes could be the header of such a frame. Yields
    for each of them True if an intact frame begins there, else False.
    """
    newest = expected + (size - start) // FRAME.size
    for offset in range(start, dirty, CHUNK):
        data = pread_all(fd, CHUNK + FRAME.size, offset)
        words = np.frombuffer(data, "<u8", len(data) // 8)
        if len(words) < 4:
            return
        versions, synced = words[2:-1], words[3:]
        likely = (synced >= expected) & (versions > synced) & (versions <= newest)
        for word in np.flatnonzero(likely).tolist():
            yield _whole(fd, seed, offset + 8 * word, size)
