"""Create, check, preallocate and delete the files of one version log.

    log/       = SYNCED segment* spare*
    SYNCED     = marks.py: the newest version that is known to be on disk
    segment    = 00000000000000000001.log       segment.py; named by its first version
    spare      = 00000000000000000001.spare     a preallocated file that will become a segment

**Opening** checks every segment's header, and that no segment is missing in between. It verifies
only the frames of the last segment, since no other segment can have a torn tail (bytes at the end
that a crash left incomplete). The frames of the other segments are verified when a cursor reads
them, for example during replay.

**Threads.** The engine thread preallocates and takes spares. The log thread turns spares into
segments. The flush thread deletes old segments. The tuple ``segments`` is replaced, never changed,
so that readers need no lock.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from storage.disk import (
    Disk,
    as_disk_full,
    erase,
    open_file,
    preallocate,
    read_file,
    write_all,
)
from storage.errors import Compacted, Corrupt
from storage.histogram import Histogram
from storage.marks import SLOT, Mark, Marks
from storage.segment import HEADER, Header, Reader, frame_bytes, place
from storage.tail import Tail, find_tail

CACHED_BYTES = 32 << 20  # newest bytes of a segment that stay in the OS's cache
UNCACHE_BYTES = 4 << 20  # bytes dropped from the cache at a time
SEGMENT_NAME = re.compile(r"(\d{20})\.log")


@dataclass(slots=True, eq=False)
class SegmentFile:
    """The file of one segment or spare, and how much of it is written.

    The log thread updates ``end``, ``hints`` and ``last``, and only then announces that the
    versions are written. So a reader that knows of a version finds these fields up to date.
    """

    path: Path
    size: int  # preallocated bytes
    first: int = 0  # version of the first frame; 0 for a spare
    end: int = HEADER.size  # bytes that are written and will not change
    last: int | None = None  # version of the last frame; None while records are written to it
    fd: int = -1  # descriptor for writing, used by the log thread; -1 if closed
    uncached: int = 0  # bytes from the start that were dropped from the OS's cache
    hints: list[tuple[int, int]] = field(default_factory=list)  # (version, offset of its frame)


class Append(NamedTuple):
    """A record that the engine thread appended and the log thread will write."""

    segment: SegmentFile  # file that the record goes to
    offset: int  # offset of its frame in the segment
    version: int
    kind: int
    parts: list[memoryview]
    size: int  # bytes of the payload


class LogFiles:
    """The segments of one log, its spare file and its file SYNCED.

    lineage     16 random bytes that identify this log; every segment contains them
    segments    all segments, oldest first
    active      the segment that records are written to, the last of ``segments``
    seed        seed of the checksums of the active segment's frames
    torn_bytes  bytes of incomplete frames after the last good frame, which ``open`` erased
    syncs       seconds that each sync of written frames took
    """

    def __init__(
        self, directory: Path, *, segment_bytes: int, clock: Callable[[], float], disk: Disk
    ) -> None:
        """Store the settings. ``open`` reads the files.

        segment_bytes  size of a segment; a larger record gets a segment of its own size
        clock          returns seconds, comparable with the modification times of files
        disk           the system calls that write
        """
        self.directory = directory
        self.disk = disk
        self.lineage = b""
        self.segments: tuple[SegmentFile, ...] = ()
        self.active = SegmentFile(directory, 0)
        self.seed = 0
        self.torn_bytes = 0
        self.syncs = Histogram()
        self._segment_bytes = segment_bytes
        self._clock = clock
        self._marks: Marks | None = None
        self._directory_fd = -1
        self._changing = threading.Lock()  # held while ``segments`` is replaced
        self._spare_lock = threading.Lock()  # held while the disk preallocates
        self._spare: SegmentFile | None = None
        self._spares = itertools.count(1)

    # ---- spares

    @property
    def has_spare(self) -> bool:
        """True if the file of the next segment is preallocated."""
        return self._spare is not None

    def preallocate(self, size: int = 0) -> None:
        """Make sure that there is a spare of at least ``size`` bytes: create or extend it.

        Raises DiskFull or OSError, and changes nothing then.
        """
        with self._spare_lock:
            spare = self._spare
            if spare is None:
                self._spare = self._new_spare(max(size, self._segment_bytes))
            elif spare.size < size:
                preallocate(self.disk, spare.fd, spare.path, spare.size, size)
                spare.size = size

    def take_spare(self, size: int, version: int) -> SegmentFile:
        """Remove the spare from this object, and return it for use as the next segment.

        size     bytes of the first payload that will be written to it
        version  version of the first frame

        Creates or extends the spare first if it is missing or too small.
        """
        need = HEADER.size + frame_bytes(size)
        if self._spare is None or self._spare.size < need:
            self.preallocate(need)  # the caller did not reserve
        with self._spare_lock:
            segment, self._spare = self._spare, None
        assert segment is not None
        segment.first = version
        return segment

    def _new_spare(self, size: int) -> SegmentFile:
        path = self.directory / f"{next(self._spares):020}.spare"
        with as_disk_full(self.directory, size):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o640)
        try:
            preallocate(self.disk, fd, path, 0, size)
        except BaseException:
            os.close(fd)
            path.unlink()
            raise
        return SegmentFile(path, size, fd=fd)

    # ---- segments

    def holding(self, version: int) -> SegmentFile:
        """Return the segment that contains ``version``, or will contain it once it is written.

        Raises Compacted if that segment was deleted.
        """
        segments = self.segments
        at = bisect.bisect_right(segments, version, key=lambda each: each.first)
        if not at:
            raise Compacted(segments[0].first)
        return segments[at - 1]

    def roll(self, segment: SegmentFile) -> None:
        """Make ``segment``, which ``take_spare`` returned, the active segment.

        The caller has synced the previous active segment. If that has no frames, its file is
        replaced, because both files have the same name.
        """
        old = self.active
        with contextlib.suppress(OSError):  # unused preallocated bytes are harmless
            os.ftruncate(old.fd, old.end)
        os.close(old.fd)
        old.fd = -1
        kept = tuple(each for each in self.segments if each.first < segment.first)
        self._begin(segment, previous=kept[-1].first if kept else 0)
        with self._changing:
            old.last = segment.first - 1
            kept = tuple(each for each in self.segments if each.first < segment.first)
            self.segments = (*kept, segment)
        self.active = segment

    def _begin(self, segment: SegmentFile, previous: int) -> None:
        """Turn a spare into a segment: write and sync its header, then rename it.

        previous  first version of the previous segment; 0 without one

        The header is synced before the rename, so that a segment without a valid header is always
        damage, never the result of a crash.
        """
        header = Header(lineage=self.lineage, first=segment.first, previous=previous)
        self.seed = header.seed
        write_all(self.disk, segment.fd, [memoryview(header.encode())], 0)
        self.disk.fdatasync(segment.fd)
        path = self.directory / f"{segment.first:020}.log"
        segment.path.rename(path)
        segment.path = path
        self.disk.fsync(self._directory_fd)

    def sync(self, version: int, end: int) -> None:
        """Sync the active segment, and record in the file SYNCED that ``version`` is on disk.

        end  offset in the active segment at which the frame of ``version`` ends
        """
        assert self._marks is not None
        began = time.monotonic()
        self.disk.fdatasync(self.active.fd)
        self.syncs.add(time.monotonic() - began)
        self._marks.write(Mark(version, self.active.first, end))

    def truncate(self, version: int, keep_bytes: int, keep_seconds: float) -> int:
        """Delete the oldest segments whose versions are all <= ``version``; return their bytes.

        For the parameters see ``VersionLog.truncate``. After an OSError it is unknown which of
        these segments are deleted.
        """
        with self._changing:
            segments = self.segments
            old = self._deletable(segments, version, keep_bytes, keep_seconds)
            self.segments = segments[old:]
        for segment in segments[:old]:  # oldest first, and on disk in that order: never a gap
            segment.path.unlink()
            self.disk.fsync(self._directory_fd)
        return sum(each.size for each in segments[:old])

    def _deletable(
        self,
        segments: tuple[SegmentFile, ...],
        version: int,
        keep_bytes: int,
        keep_seconds: float,
    ) -> int:
        """Return how many of the oldest segments ``truncate`` may delete.

        segments  all segments, oldest first

        For the other parameters see ``VersionLog.truncate``.
        """
        kept = sum(each.end for each in segments)
        for at, segment in enumerate(segments[:-1]):
            kept -= segment.end
            assert segment.last is not None
            if segment.last > version or kept < keep_bytes:
                return at
            if keep_seconds and self._clock() - segment.path.stat().st_mtime < keep_seconds:
                return at
        return len(segments) - 1

    # ---- opening and closing

    def open(self, lineage: bytes | None, after: int | None, made: bool) -> int:
        """Read and check the files, or create the first segment. Returns the newest version.

        For the parameters and errors see ``VersionLog.open``.
        """
        names = sorted(os.listdir(self.directory)) if self.directory.exists() else []
        firsts = [int(match[1]) for name in names if (match := SEGMENT_NAME.fullmatch(name))]
        if made and not firsts:
            raise self._gone()
        self._make_directory()
        for name in names:
            if name.endswith(".spare"):
                (self.directory / name).unlink()
        if firsts:
            self._load_segments(firsts, lineage)
            last = self._load_last(after)
        else:
            last = after or 0
            self._make(lineage or os.urandom(16), last)
        assert self._marks is not None
        with as_disk_full(self.directory, 2 * SLOT):
            for _ in range(2):  # both marks, so that one is good while the other is overwritten
                self._marks.write(Mark(last, self.active.first, self.active.end))
        return last

    def close(self) -> None:
        """Close every file, and delete the unused spare."""
        if self._spare is not None:
            self._spare.path.unlink()
        for segment in (self.active, self._spare):
            if segment is not None and segment.fd >= 0:
                os.close(segment.fd)
                segment.fd = -1
        self._spare = None
        if self._marks is not None:
            self._marks.close()
            self._marks = None
        if self._directory_fd >= 0:
            os.close(self._directory_fd)
            self._directory_fd = -1

    def _make_directory(self) -> None:
        if not self.directory.exists():
            self.directory.mkdir()
            parent = os.open(self.directory.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                self.disk.fsync(parent)
            finally:
                os.close(parent)
        self._directory_fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)

    def _make(self, lineage: bytes, after: int) -> None:
        """Create a log without records. The first record will have version ``after + 1``.

        lineage  16 bytes that will identify the log
        """
        if len(lineage) != 16:
            raise ValueError(f"lineage must have 16 bytes, got {len(lineage)}")
        self.lineage = lineage
        synced = self.directory / "SYNCED"
        if synced.exists() and any(read_file(synced)):
            raise self._gone()
        self.preallocate()
        self.active = self.take_spare(0, after + 1)
        self._begin(self.active, previous=0)
        self.segments = (self.active,)
        self._marks = Marks(self.disk, synced, lineage)

    def _gone(self) -> Corrupt:
        return Corrupt(str(self.directory), "all segments of an existing log are missing")

    def _load_segments(self, firsts: list[int], lineage: bytes | None) -> None:
        """Read the headers of all segments; check that they form one log without a gap.

        firsts   first versions of the segments, from their file names, ascending
        lineage  16 bytes that every header must have; None: those of the first segment
        """
        segments = []
        previous = None
        for first in firsts:
            path = self.directory / f"{first:020}.log"
            with contextlib.closing(Reader(path)) as reader:
                header = reader.header
            lineage = lineage or header.lineage
            _check_header(path, header, lineage, first, previous)
            previous = first
            size = path.stat().st_size
            segments.append(SegmentFile(path, size, first=first, end=size))
        for segment, after in itertools.pairwise(segments):
            segment.last = after.first - 1
        assert lineage is not None
        self.lineage = lineage
        self.segments = tuple(segments)
        self.active = segments[-1]

    def _load_last(self, after: int | None) -> int:
        """Verify the frames of the last segment, and erase a torn tail. Returns the newest version.

        after  version of the base (the on-disk copy of all rows at one log version), which the log
               must reach back to; None: no check

        A torn tail is bytes at the end that a crash left incomplete. Raises Corrupt if a version
        that the file SYNCED records as on disk is missing.
        """
        segment = self.active
        self._marks = Marks(self.disk, self.directory / "SYNCED", self.lineage)
        mark = self._marks.read() or Mark(0, 0, 0)
        tail = self._find_tail(segment, mark)
        if tail.last < mark.version:
            raise Corrupt(
                place(segment.path, tail.end),
                f"the log ends with version {tail.last}, but version {mark.version} was synced",
            )
        first = self.segments[0].first
        if after is not None and not first - 1 <= after <= tail.last:
            raise Corrupt(
                str(self.directory),
                f"the log has versions {first} to {tail.last}, but the base is at version {after}",
            )
        segment.end = tail.end
        if tail.dirty > tail.end:
            self.torn_bytes = tail.dirty - tail.end
            erase(self.disk, segment.fd, tail.end, tail.dirty)
        self.disk.fsync(self._directory_fd)
        return tail.last

    def _find_tail(self, segment: SegmentFile, mark: Mark) -> Tail:
        """Open the last segment, verify its frames, and return where they end.

        mark  position up to which all frames are known to be on disk

        Reads the bytes from the disk and not from the OS's cache, because the two may differ if an
        earlier process failed to sync. Raises Corrupt on damage.
        """
        if mark.first > segment.first:
            raise Corrupt(
                str(self.directory),
                f"segment {mark.first:020}.log is missing, although it was synced",
            )
        segment.fd = open_file(segment.path, os.O_RDWR)
        self.disk.fdatasync(segment.fd)
        os.posix_fadvise(segment.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        synced_end = mark.end if mark.first == segment.first else HEADER.size
        with contextlib.closing(Reader(segment.path)) as reader:
            self.seed = reader.header.seed
            return find_tail(reader, segment.size, synced_end)


def _check_header(
    path: Path, header: Header, lineage: bytes, first: int, previous: int | None
) -> None:
    """Raise Corrupt unless ``header`` belongs to this segment of this log.

    path      the segment, for errors
    lineage   16 random bytes that identify the log
    first     first version of the segment, from its file name
    previous  first version of the segment before it; None for the oldest segment
    """
    if header.lineage != lineage:
        raise Corrupt(
            str(path), f"expected a segment of lineage {lineage.hex()}, got {header.lineage.hex()}"
        )
    if header.first != first:
        raise Corrupt(
            str(path),
            f"the file name has first version {first}, but the file's header has {header.first}",
        )
    if previous is not None and header.previous != previous:
        raise Corrupt(
            str(path),
            f"expected segment {header.previous} before this segment, found {previous}",
        )


def uncache(segment: SegmentFile, end: int) -> None:
    """Drop synced bytes of a segment from the OS's cache, except the newest 32 MiB (CACHED_BYTES).

    end  bytes of the segment that are synced

    Subscribers read the newest bytes next, so these stay. The older ones would displace pages that
    are still useful.
    """
    stop = (end - CACHED_BYTES) // UNCACHE_BYTES * UNCACHE_BYTES
    if stop > segment.uncached:
        length = stop - segment.uncached
        os.posix_fadvise(segment.fd, segment.uncached, length, os.POSIX_FADV_DONTNEED)
        segment.uncached = stop
