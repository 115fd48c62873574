"""Read and encode segments. A segment is one file of the version log: a header, then frames.

    segment  = header *frame *zero         preallocated, so that writing it cannot run out of space
    header   = magic[8] | format u32 | zero u32 | lineage[16] | first u64 | previous u64
             | checksum u64                                                             (56 bytes)
    frame    = checksum u64 | size u32 | kind u32 | version u64 | synced u64
             | payload[size] | 0..7 zeros                              (32 bytes before the payload)

All numbers are little-endian. Every frame, and so every payload, begins at a multiple of 8.

* lineage    random id of the log; a restore from a checkpoint begins a new log with a new id
* first      version of the first frame; each following frame has the next version
* previous   ``first`` of the previous segment, or 0 in the first segment of a log; it reveals a
             missing file
* kind       kind of the record in the payload, 1 or more; 0: end of the frames
* synced     newest version that was known to be on disk when the frame was written
* checksum   in a header: xxh3_64 of the bytes before it. In a frame: xxh3_64 of the bytes from
             ``size`` to the end of the payload, seeded by lineage and first, so that a frame of
             a different segment or log is never accepted
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray
from xxhash import xxh3_64, xxh3_64_intdigest

from storage.disk import CHUNK, open_file, pread_all
from storage.errors import Corrupt, UnknownFormat

FORMAT = 1
MAGIC = b"PSLOG\r\n\x1a"
HEADER = struct.Struct("<8sII16sQQQ")
FRAME = struct.Struct("<QIIQQ")
HEAD = struct.Struct("<IIQQ")  # a frame's header without its checksum
CHECKSUM = struct.Struct("<Q")
MAX_PAYLOAD = (1 << 32) - 1  # bytes
MAX_VERSION = (1 << 64) - 1

SMALL = 4096  # bytes; a smaller payload is copied into one buffer, a larger one is not copied
LARGE_CHUNK = 4 << 20  # bytes per read where frames are large
SKIP_CHUNK = 64 << 10  # bytes per read where only the headers of frames are needed
_PADDING = tuple(bytes(n) for n in range(8))

Part = bytes | memoryview | NDArray[Any]  # C-contiguous memory that becomes part of a payload


class Frame(NamedTuple):
    """One record of the log with its version. Creating many of these tuples is cheap."""

    version: int
    kind: int
    payload: memoryview  # read-only, 8-byte aligned; keeps a buffer of up to 4 MiB in memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The header of a segment."""

    lineage: bytes  # 16 random bytes that identify the log
    first: int  # version of the first frame
    previous: int  # ``first`` of the previous segment; 0 without one

    @property
    def seed(self) -> int:
        """Seed of the checksums of all frames in the segment."""
        return int(xxh3_64_intdigest(self.lineage + CHECKSUM.pack(self.first)))

    def encode(self) -> bytes:
        """Return the header's bytes."""
        fields = (MAGIC, FORMAT, 0, self.lineage, self.first, self.previous)
        whole = HEADER.pack(*fields, 0)[: -CHECKSUM.size]
        return whole + CHECKSUM.pack(xxh3_64_intdigest(whole))

    @classmethod
    def decode(cls, whole: bytes, where: str) -> Header:
        """Decode the header at the start of ``whole``. Raises Corrupt or UnknownFormat.

        where  file name, for errors

        Later formats keep the layout of these 56 bytes, so that this release can distinguish a
        later format from damage.
        """
        if len(whole) < HEADER.size:
            raise Corrupt(
                where, f"expected a segment header of {HEADER.size} bytes, got {len(whole)} bytes"
            )
        magic, version, zero, lineage, first, previous, checksum = HEADER.unpack_from(whole)
        if magic != MAGIC:
            raise Corrupt(where, "this file is not a segment of a version log")
        if xxh3_64_intdigest(whole[: HEADER.size - CHECKSUM.size]) != checksum:
            raise Corrupt(where, "the checksum of the segment's header does not match its bytes")
        if version != FORMAT:
            raise UnknownFormat(where, version, FORMAT)
        if zero or first <= previous:
            raise Corrupt(
                where,
                f"invalid segment header: field 'zero' must be 0, got {zero}, and 'first' must"
                f" exceed 'previous', got {first} and {previous}",
            )
        return cls(lineage=lineage, first=first, previous=previous)


def place(path: Path, offset: int) -> str:
    """Return the text by which errors name byte ``offset`` of a file."""
    return f"{path} at byte {offset}"


def frame_bytes(size: int) -> int:
    """Return how many bytes a frame takes in a segment, with header and padding.

    size  bytes of its payload
    """
    return FRAME.size + (size + 7 & ~7)


def encode(
    seed: int, version: int, synced: int, kind: int, parts: Sequence[memoryview], size: int
) -> list[memoryview]:
    """Encode a frame as a list of buffers, to be written one after another.

    seed     ``Header.seed`` of the segment
    version  version of the record
    synced   newest version that is known to be on disk now
    kind     kind of the record, 1 or more
    parts    the payload as one-dimensional views of bytes; copied only up to 4096 bytes in total
    size     total bytes of ``parts``
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


class Reader:
    """Reads the frames of one segment in order and verifies each one.

    version  version of the next frame
    offset   offset in the file at which the next frame begins

    Not thread-safe. Any number of readers may follow one writer, each with its own descriptor.
    """

    def __init__(self, path: Path) -> None:
        """Open ``path`` and read its header. Raises Corrupt, UnknownFormat or OSError."""
        self.path = path
        self._fd = open_file(path, os.O_RDONLY)
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
        """Close the file. Frames that were returned before stay valid."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def fileno(self) -> int:
        """Return the file descriptor, which is open for reading only."""
        return self._fd

    def seek(self, version: int, offset: int) -> None:
        """Let the next ``read`` begin with the frame of ``version``, at byte ``offset``."""
        self.version, self.offset = version, offset

    def skip(self, version: int, end: int) -> None:
        """Move forward to the frame of ``version``. Reads only the headers of the frames before it.

        end  bytes of the file that are written and will not change

        The checksums of the skipped frames are not verified. Raises Corrupt if their headers do not
        lead to ``version``.
        """
        while self.version < version:
            at = self._at(FRAME.size, end, SKIP_CHUNK)
            _, size, kind, found, _ = FRAME.unpack_from(self._chunk, at)
            if not kind or found != self.version:
                raise self._corrupt(f"expected a frame of version {self.version}, found none")
            self.seek(self.version + 1, self.offset + frame_bytes(size))

    def read(self, upto: int, end: int, max_bytes: int) -> list[Frame]:
        """Return the next frames in order, each verified. The list is empty only after ``upto``.

        upto       version of the last frame to return
        end        bytes of the file that are written and will not change; they contain ``upto``
        max_bytes  stop after this many bytes of frames; the last frame may exceed it

        Raises Corrupt if the next frame is damaged. If intact frames come before the damaged one,
        returns these, and the next call raises.
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
        if len(self._chunk) > LARGE_CHUNK:  # the next call may come late: do not keep the memory
            self._chunk = memoryview(b"")
        return frames

    def _next(self, end: int) -> Frame:
        """Read, verify and return the next frame. Raises Corrupt.

        end  bytes of the file that are written and will not change
        """
        at = self._at(FRAME.size, end, CHUNK)
        size: int = HEAD.unpack_from(self._chunk, at + CHECKSUM.size)[0]
        total = FRAME.size + size
        if total > len(self._chunk) - at:
            taken = frame_bytes(size)  # equal frames are common: read a whole number of them
            at = self._at(total, end, max(taken, LARGE_CHUNK // taken * taken))
        checksum, size, kind, version, _ = FRAME.unpack_from(self._chunk, at)
        frame = self._chunk[at : at + total]
        if not kind or size != total - FRAME.size:
            raise self._corrupt(f"expected a frame of version {self.version}, found none")
        if xxh3_64_intdigest(frame[CHECKSUM.size :], self._seed) != checksum:
            raise self._corrupt(
                f"the checksum of the frame of version {self.version} does not match its bytes"
            )
        if version != self.version:
            raise self._corrupt(f"expected a frame of version {self.version}, found {version}")
        self.version += 1
        self.offset += frame_bytes(size)
        return Frame(version, kind, frame[FRAME.size :])

    def _at(self, need: int, end: int, chunk: int) -> int:
        """Return the index of the next frame in ``_chunk``; read from the file if needed.

        need   bytes of the frame, from its start, that ``_chunk`` must have on return
        end    bytes of the file that are written and will not change
        chunk  bytes to read from the file if ``_chunk`` lacks some of them

        Raises Corrupt if the file has fewer than ``need`` bytes left.
        """
        at = self.offset - self._start
        if 0 <= at <= len(self._chunk) - need:
            return at
        left = end - self.offset
        if need > left:
            raise self._corrupt(f"the next frame has {need} bytes, but {max(left, 0)} are left")
        data = pread_all(self._fd, min(left, max(need, chunk)), self.offset)
        if len(data) < need:
            raise self._corrupt(f"the file ends {need - len(data)} bytes before the frame's end")
        self._chunk, self._start = memoryview(data), self.offset
        return 0

    def _corrupt(self, what: str) -> Corrupt:
        return Corrupt(place(self.path, self.offset), what)
