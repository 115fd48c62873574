"""A file of frames: one piece of the version log.

    segment  = header *frame *zero         preallocated, so that writing it never lacks room
    header   = magic[8] | format u32 | zero u32 | lineage[16] | first u64 | previous u64
             | checksum u64                                                             (56 bytes)
    frame    = checksum u64 | size u32 | kind u32 | version u64 | synced u64
             | payload[size] | 0..7 zeros                              (32 bytes before the payload)

Little-endian; every frame, and so every payload, begins at a multiple of 8.

* first      version of the first frame; those that follow count up by one
* previous   first of the segment before, 0 for a log's very first: a missing file is noticed
* kind       1.., what the payload is; 0 is no frame
* synced     the newest version that was known to be on disk when the frame was written
* checksum   of a header: xxh3_64 of what stands before it; of a frame: xxh3_64 of everything from
             size to the end of the payload, seeded by lineage and first, so that a frame of another
             segment or log never passes

Where a segment's frames end because the power failed or the process died, bytes may be left that
are no frame: a *torn tail*. Frames behind it may even be whole, since a disk writes pages in any
order. What tells a torn tail from damage is whether the bad frame had been synced: either the
caller knows (``synced_end``), or a whole frame further on testifies by its ``synced``.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64, xxh3_64_intdigest

from storage.errors import Corrupt, DiskFull, UnknownFormat

FORMAT = 1
MAGIC = b"PSLOG\r\n\x1a"
HEADER = struct.Struct("<8sII16sQQQ")
FRAME = struct.Struct("<QIIQQ")
HEAD = struct.Struct("<IIQQ")  # a frame's header without its checksum
CHECKSUM = struct.Struct("<Q")
MAX_PAYLOAD = (1 << 32) - 1  # bytes
MAX_VERSION = (1 << 64) - 1

SMALL = 4096  # bytes of a payload that is joined rather than written part by part
CHUNK = 1 << 20  # bytes read at once
_ZEROS = bytes(CHUNK)
LARGE_CHUNK = 4 << 20  # bytes read at once where frames are large
SKIP_CHUNK = 64 << 10  # bytes read at once where only the headers of frames matter
MAX_BUFFERS = 1024  # of one pwritev (IOV_MAX)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PADDING = tuple(bytes(n) for n in range(8))


Part = bytes | memoryview | NDArray[Any]  # C-contiguous memory that becomes part of a payload


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """The system calls that write, so that a test can let one fail."""

    pwritev: Callable[[int, Sequence[memoryview], int], int] = os.pwritev
    fdatasync: Callable[[int], None] = os.fdatasync
    fsync: Callable[[int], None] = os.fsync
    posix_fallocate: Callable[[int, int, int], None] = os.posix_fallocate


class Frame(NamedTuple):
    """One record as it lies in the log. A tuple: a log of small records makes very many."""

    version: int
    kind: int
    payload: memoryview  # read-only, 8-byte aligned; keeps up to 4 MiB around it alive


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a segment says about itself."""

    lineage: bytes  # 16 bytes, drawn when the log was made
    first: int
    previous: int

    @property
    def seed(self) -> int:
        """What the checksums of the segment's frames start from."""
        return int(xxh3_64_intdigest(self.lineage + CHECKSUM.pack(self.first)))

    def encode(self) -> bytes:
        """The header's bytes."""
        fields = (MAGIC, FORMAT, 0, self.lineage, self.first, self.previous)
        whole = HEADER.pack(*fields, 0)[: -CHECKSUM.size]
        return whole + CHECKSUM.pack(xxh3_64_intdigest(whole))

    @classmethod
    def decode(cls, whole: bytes, where: str) -> Header:
        """The header in ``whole``; Corrupt or UnknownFormat name ``where``.

        A later format keeps these 56 bytes, so that this one can tell it from damage.
        """
        if len(whole) < HEADER.size:
            raise Corrupt(where, f"{len(whole)} bytes, too short for a segment's header")
        magic, held, zero, lineage, first, previous, checksum = HEADER.unpack_from(whole)
        if magic != MAGIC:
            raise Corrupt(where, "not a segment of a version log")
        if xxh3_64_intdigest(whole[: HEADER.size - CHECKSUM.size]) != checksum:
            raise Corrupt(where, "the checksum of the segment's header differs")
        if held != FORMAT:
            raise UnknownFormat(where, held, FORMAT)
        if zero or first <= previous:
            raise Corrupt(where, f"a segment from version {first} that follows {previous}")
        return cls(lineage=lineage, first=first, previous=previous)


def place(path: Path, offset: int) -> str:
    """How errors name a place in a file."""
    return f"{path} at byte {offset}"


# ---- writing


def frame_bytes(size: int) -> int:
    """Bytes that a frame with ``size`` bytes of payload takes in a segment."""
    return FRAME.size + (size + 7 & ~7)


def encode(
    seed: int, version: int, synced: int, kind: int, parts: Sequence[memoryview], size: int
) -> list[memoryview]:
    """The buffers that make up a frame.

    parts  the payload, one-dimensional views of bytes; they are not copied unless they are small
    size   their bytes together
    """
    head = HEAD.pack(size, kind, version, synced)
    padding = _PADDING[-size & 7]
    if size <= SMALL:
        body = b"".join((head, *parts))
        whole = b"".join((CHECKSUM.pack(xxh3_64_intdigest(body, seed)), body, padding))
        return [memoryview(whole)]
    digest = xxh3_64(head, seed)
    for part in parts:
        digest.update(part)
    first = memoryview(CHECKSUM.pack(digest.intdigest()) + head)
    return [first, *parts, memoryview(padding)] if padding else [first, *parts]


def write_all(disk: Disk, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
    """Write ``buffers``, one behind the other, from ``offset`` on; the offset behind the last.

    A system call may write less than it was given; an error leaves some prefix written.
    """
    left = list(buffers)
    done = 0  # buffers that are written in full
    while done < len(left):
        written = disk.pwritev(fd, left[done : done + MAX_BUFFERS], offset)
        if written <= 0:
            raise OSError(errno.EIO, "nothing could be written, and no error was given")
        offset += written
        while done < len(left) and written >= len(left[done]):
            written -= len(left[done])
            done += 1
        if written:
            left[done] = left[done][written:]
    return offset


def preallocate(disk: Disk, fd: int, path: Path, held: int, size: int) -> None:
    """Make a file of ``held`` bytes one of ``size``, with zeros that the disk has room for.

    Or raise DiskFull, or another OSError, and leave it as it was. What cannot fit is refused
    before the disk is asked: a full disk is asked for every push.
    """
    wanted = size - held
    room = os.fstatvfs(fd)
    if room.f_blocks and room.f_bfree * room.f_frsize < wanted:
        raise DiskFull(str(path.parent), wanted)
    try:
        disk.posix_fallocate(fd, held, wanted)
    except OSError as error:
        os.ftruncate(fd, held)
        if error.errno in FULL:
            raise DiskFull(str(path.parent), wanted) from error
        raise


def erase(disk: Disk, fd: int, start: int, end: int) -> None:
    """Write zeros over ``start``..``end``, and sync them."""
    zeros = memoryview(bytes(min(CHUNK, end - start)))
    while start < end:
        start = write_all(disk, fd, [zeros[: end - start]], start)
    disk.fdatasync(fd)


# ---- reading


def pread_all(fd: int, size: int, offset: int) -> bytes:
    """``size`` bytes from ``offset`` on, fewer only where the file ends."""
    data = os.pread(fd, size, offset)
    if len(data) == size or not data:
        return data
    parts = [data]
    while data and (size := size - len(data)):
        offset += len(data)
        data = os.pread(fd, size, offset)
        parts.append(data)
    return b"".join(parts)


class Reader:
    """The frames of one segment, in order, each one verified.

    Not thread-safe; any number of readers may follow one writer, each with its own descriptor.
    ``version`` is the next frame's, ``offset`` the byte at which it begins.
    """

    def __init__(self, path: Path) -> None:
        """Open ``path`` and read its header: Corrupt, UnknownFormat, or OSError."""
        self.path = path
        self._fd = os.open(path, os.O_RDONLY)
        try:
            self.header = Header.decode(pread_all(self._fd, HEADER.size, 0), place(path, 0))
        except BaseException:
            self.close()
            raise
        self._seed = self.header.seed
        self._chunk = memoryview(b"")  # bytes of the file from _start on
        self._start = 0
        self.seek(self.header.first, HEADER.size)

    def close(self) -> None:
        """Close the file; frames that were returned stay valid."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def fileno(self) -> int:
        """The descriptor, for reading."""
        return self._fd

    def seek(self, version: int, offset: int) -> None:
        """Go on with the frame of ``version``, which begins at ``offset``."""
        self.version, self.offset = version, offset

    def skip(self, version: int, end: int) -> None:
        """Go forward to the frame of ``version`` by the headers of those before it, unverified.

        Corrupt if they do not lead there; ``end`` as in ``read``.
        """
        while self.version < version:
            at = self._at(FRAME.size, end, SKIP_CHUNK)
            _, size, kind, held, _ = FRAME.unpack_from(self._chunk, at)
            if not kind or held != self.version:
                raise self._corrupt(f"no frame of version {self.version}")
            self.seek(self.version + 1, self.offset + frame_bytes(size))

    def read(self, upto: int, end: int, max_bytes: int) -> list[Frame]:
        """The next frames, until ``upto`` or ``max_bytes`` is reached; one at least, if there is.

        upto       version of the last frame wanted; it lies below ``end``
        end        bytes of the file that are written and will not change
        max_bytes  of frames; the last one may go beyond it

        Corrupt if the next frame is not what was written; those before it are returned first.
        """
        frames: list[Frame] = []
        stop = self.offset + max_bytes
        while self.version <= upto and (self.offset < stop or not frames):
            try:
                frames.append(self._next(end))
            except Corrupt:
                if frames:
                    break
                raise
        return frames

    def _next(self, end: int) -> Frame:
        at = self._at(FRAME.size, end, CHUNK)
        size: int = HEAD.unpack_from(self._chunk, at + CHECKSUM.size)[0]
        total = FRAME.size + size
        if total > len(self._chunk) - at:
            taken = frame_bytes(size)  # equal frames are common: read a whole number of them
            at = self._at(total, end, max(taken, LARGE_CHUNK // taken * taken))
        checksum, size, kind, version, _ = FRAME.unpack_from(self._chunk, at)
        frame = self._chunk[at : at + total]
        if not kind or size != total - FRAME.size:
            raise self._corrupt(f"no frame of version {self.version}")
        if xxh3_64_intdigest(frame[CHECKSUM.size :], self._seed) != checksum:
            raise self._corrupt(f"the checksum of the frame of version {self.version} differs")
        if version != self.version:
            raise self._corrupt(f"a frame of version {version} instead of {self.version}")
        self.version += 1
        self.offset += frame_bytes(size)
        return Frame(version, kind, frame[FRAME.size :])

    def _at(self, need: int, end: int, chunk: int) -> int:
        """Where in the chunk the next frame begins, ``need`` bytes of which are in it then."""
        at = self.offset - self._start
        if 0 <= at <= len(self._chunk) - need:
            return at
        left = end - self.offset
        if need > left:
            raise self._corrupt(f"{max(left, 0)} bytes left, the next frame takes {need}")
        data = pread_all(self._fd, min(left, max(need, chunk)), self.offset)
        if len(data) < need:
            raise self._corrupt(f"the file ends {need - len(data)} bytes before the frame does")
        self._chunk, self._start = memoryview(data), self.offset
        return 0

    def _corrupt(self, what: str) -> Corrupt:
        return Corrupt(place(self.path, self.offset), what)


# ---- the tail


@dataclass(frozen=True, slots=True, kw_only=True)
class Tail:
    """Where a segment's frames end."""

    last: int  # version of the last frame; first - 1 where there is none
    end: int  # byte behind it
    dirty: int  # byte behind the last one that is not zero; `end` if the tail is clean


def find_tail(reader: Reader, size: int, synced_end: int) -> Tail:
    """Verify every frame of the segment and tell a torn tail from damage, which is Corrupt.

    size        bytes of the file
    synced_end  bytes of it that are known to have been synced

    Damage is a bad frame below ``synced_end``, or one before a whole frame that was written after
    the bad one had been synced, or a whole frame out of order. Everything else is torn.
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
            raise Corrupt(bad.where, f"{bad.what}, and that is no torn tail") from bad
        return Tail(last=expected - 1, end=end, dirty=dirty)
    return Tail(last=reader.version - 1, end=reader.offset, dirty=reader.offset)


def _written(fd: int, start: int, size: int) -> Iterator[tuple[int, int]]:
    """Stretches of the file from ``start`` on that were ever written; the others read as zero."""
    while start < size:
        try:
            start = os.lseek(fd, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but holes up to the end
                return
            raise
        end = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        yield start, end
        start = end


def _dirty(fd: int, start: int, size: int) -> int:
    """The byte behind the last one that is not zero, ``start`` if all are."""
    dirty = start
    for at, end in _written(fd, start, size):
        for offset in range(at, end, CHUNK):
            data = pread_all(fd, min(CHUNK, end - offset), offset)
            if data != _ZEROS[: len(data)]:  # ten times as fast as looking for the last one
                dirty = offset + len(data.rstrip(b"\0"))
    return dirty


def _whole(fd: int, seed: int, offset: int, size: int) -> bool:
    """Whether a frame of any version begins at ``offset`` and its checksum agrees."""
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
    """For each place behind ``start`` that looks like a frame written after ``expected`` was
    synced, whether it is one.
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
