"""The log of all changes: one record a version, appended, synced, followed and cut.

    log/       = SYNCED segment* spare*
    segment    = 00000000000000000001.log       segment.py; named by its first version
    spare      = 00000000000000000001.spare     preallocated, without a header; of no use later
    SYNCED     = mark[512] mark[512]            written in turn
    mark       = version u64 | first u64 | end u64 | checksum u64 | zeros       little-endian

* mark       up to ``version``, which ends at byte ``end`` of segment ``first``, all is on disk
* checksum   xxh3_64 of the 24 bytes before it, seeded by xxh3_64 of the lineage

The marks are not synced themselves. They survive the death of the process, so that not one byte of
a synced log can change unnoticed, the last record's included. After a power failure the newer mark
may be missing, and then the frames testify (segment.py).

**Threads.** The engine thread reserves and appends. The log thread takes everything that was
appended meanwhile, writes it at once, and tells those who wait for that. The sync thread brings to
disk what is written, while the log thread goes on writing, and tells the others. Checkpoints sync
and cut; subscribers read through cursors, each on its own descriptor: nobody waits for a reader.

**Opening** checks every segment's header and that the segments follow each other, and verifies the
frames of the last segment only: it is the only one that can be torn. A cursor verifies every frame
that it reads, so the others are verified as they are replayed, and nothing is read for nothing.

**Failure.** When a write or a sync fails nobody can say what is on disk, and trying again can
report success for pages that are lost. So the log stops: ``fail`` is called, nobody is
acknowledged, and the process should end.
"""

from __future__ import annotations

import bisect
import contextlib
import heapq
import itertools
import os
import re
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from xxhash import xxh3_64_intdigest

from storage.errors import Compacted, Corrupt, DiskFull, LogFailed
from storage.segment import (
    CHUNK,
    FULL,
    HEADER,
    MAX_PAYLOAD,
    Disk,
    Frame,
    Header,
    Part,
    Reader,
    encode,
    erase,
    find_tail,
    frame_bytes,
    place,
    preallocate,
    write_all,
)

SEGMENT_BYTES = 256 << 20
FLUSH_SECONDS = 0.02
RUN_BYTES = 8 << 20  # written before those who wait for it are told
NEVER = float("inf")  # seconds
HINT_BYTES = 256 << 10  # of a segment, between places that a cursor may start from
CACHED_BYTES = 32 << 20  # newest bytes of a segment that the OS may keep in its cache
UNCACHE_BYTES = 4 << 20  # forgotten at once
SEGMENT_NAME = re.compile(r"(\d{20})\.log")
SLOT = 512  # bytes
MARK = struct.Struct("<QQQQ")


class Mark(NamedTuple):
    """Up to where the log is on disk."""

    version: int
    first: int  # of the segment that holds the version
    end: int  # byte of that segment behind the version's frame


class Marks:
    """The file SYNCED: the newest mark and the one before."""

    def __init__(self, disk: Disk, path: Path, lineage: bytes) -> None:
        self._disk = disk
        self._path = path
        self._seed = xxh3_64_intdigest(lineage)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o640)
        self._slot = 0  # the older mark's, to be written next

    def read(self) -> Mark | None:
        """The newest mark; None if there is none; Corrupt if there were some and all are bad."""
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
        """Put ``mark`` in place of the older one."""
        fields = MARK.pack(*mark, 0)[:-8]
        whole = fields + xxh3_64_intdigest(fields, self._seed).to_bytes(8, "little")
        slot = memoryview(whole.ljust(SLOT, b"\0"))
        write_all(self._disk, self._fd, [slot], SLOT * self._slot)
        self._slot = 1 - self._slot

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


@dataclass(slots=True, eq=False)
class Segment:
    """A segment's file, as the log knows it.

    The log thread writes ``end``, ``hints`` and ``last`` before it announces the versions that
    they cover; readers look at them after.
    """

    path: Path
    size: int  # bytes that are preallocated
    first: int = 0
    end: int = HEADER.size  # bytes that are written and will not change
    last: int | None = None  # None: it is the one being written
    fd: int = -1  # for writing; the log thread's
    uncached: int = 0  # bytes from the start that the OS was told to forget
    hints: list[tuple[int, int]] = field(default_factory=list)  # versions and their offsets


class _Append(NamedTuple):
    """A record on its way to the log thread."""

    segment: Segment
    offset: int
    version: int
    kind: int
    parts: list[memoryview]
    size: int  # bytes of the payload


class VersionLog:
    """The version log of one shard; see the module for its files and threads.

    lineage     16 bytes that no other log has; kept by every segment
    epoch       as given to ``open``; the log only carries it. Reserved: it does not change yet, not
                even when a shard comes up without versions that were answered and not durable
    last        version of the newest record appended, 0 if there never was one
    written     newest version handed to the OS: it survives the death of the process
    durable     newest version synced: it survives a power failure
    torn_bytes  of a torn tail that opening found and erased
    """

    def __init__(
        self,
        directory: Path,
        *,
        segment_bytes: int,
        flush_seconds: float,
        fail: Callable[[Exception], None],
        wake: Callable[[], None],
        epoch: int,
        clock: Callable[[], float],
        disk: Disk,
    ) -> None:
        """Nothing is read or started; use ``open``."""
        self.directory = directory
        self.lineage = b""
        self.epoch = epoch
        self.last = self.written = self.durable = 0
        self.torn_bytes = 0
        self._segment_bytes = segment_bytes
        self._flush_seconds = flush_seconds
        self._fail = fail
        self._wake = wake
        self._clock = clock
        self._disk = disk
        self._directory_fd = -1

        # the engine thread's: where the next record will go
        self._plan = Segment(directory, 0)
        self._at = 0
        self._appended = 0  # bytes, ever

        # the log thread's: where it writes
        self._active = self._plan
        self._seed = 0  # of the active segment's checksums
        self._marks: Marks | None = None
        self._unsynced_since = 0.0  # monotonic; of the first version above durable
        self._handed = 0  # bytes, ever
        self._spare_refused = False  # the disk was asked for this segment's successor, in vain
        self._thread = threading.Thread(target=self._run, name="version log", daemon=True)

        # the sync thread's
        self._syncing = threading.Lock()  # held while a segment is synced, or given up
        self._syncer = threading.Thread(target=self._keep_synced, name="log sync", daemon=True)

        # everybody's, under the lock
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)  # the log thread sleeps on it
        self._synced = threading.Condition(self._lock)  # sync() sleeps on it
        self._unsynced = threading.Condition(self._lock)  # the sync thread sleeps on it
        self._sleeping = False
        self._closing = False
        self._stopped = False
        self._failed: Exception | None = None
        self._queue: list[_Append] = []
        self._sync_wanted = 0  # newest version that somebody wants durable
        self._waiting: tuple[list[Any], list[Any]] = ([], [])  # heaps: for written, for durable
        self._tickets = itertools.count()
        self._segments: tuple[Segment, ...] = ()  # replaced, never changed: read without the lock

        self._spare_lock = threading.Lock()  # held while the disk preallocates
        self._spare: Segment | None = None
        self._spares = itertools.count(1)

    @classmethod
    def open(
        cls,
        directory: Path,
        *,
        fail: Callable[[Exception], None],
        wake: Callable[[], None],
        segment_bytes: int = SEGMENT_BYTES,
        flush_seconds: float = FLUSH_SECONDS,
        lineage: bytes | None = None,
        epoch: int = 0,
        after: int | None = None,
        made: bool = False,
        clock: Callable[[], float] = time.time,
        disk: Disk | None = None,
    ) -> VersionLog:
        """Open or make the log in ``directory``, which nobody else has open, and start its
        threads.

        fail           called once, on a thread of the log, when a write or a sync has failed;
                       must not close the log
        wake           called on a thread of the log whenever ``durable`` has grown; must not block
        segment_bytes  of a segment; a record that is larger gets one of its own size
        flush_seconds  longest time that a record waits for its sync to begin, while none runs
        lineage        16 bytes that the log must have, or gets when it is made; None: any, random
        after          version of the base: the log must hold everything after it, and begins there
                       when it is made; None: do not ask
        made           it was made before: Corrupt if it is gone
        clock          seconds, of the same kind as the modification times of files
        disk           the system calls that write

        Corrupt if anything synced is damaged or missing, UnknownFormat for a log of another
        release, DiskFull if the first segment does not fit; nothing is changed then.
        """
        log = cls(
            directory,
            segment_bytes=segment_bytes,
            flush_seconds=flush_seconds,
            fail=fail,
            wake=wake,
            epoch=epoch,
            clock=clock,
            disk=disk or Disk(),
        )
        try:
            log._load(lineage, after, made)
        except BaseException:
            log._release()
            raise
        log._thread.start()
        log._syncer.start()
        return log

    @property
    def first(self) -> int:
        """Oldest version that can still be read; the log horizon is the one before."""
        return self._segments[0].first

    @property
    def backlog(self) -> int:
        """Bytes appended and not yet handed to the OS."""
        return self._appended - self._handed

    # ---- the engine thread

    @property
    def room(self) -> int:
        """Bytes of records that fit into the segment at hand: nobody waits for the disk."""
        return self._plan.size - self._at

    def reserve(self, *sizes: int) -> None:
        """Make sure that records with ``sizes`` bytes of payload can be appended next.

        Or raise DiskFull (or OSError), or LogFailed after a failure; nothing has changed then.
        Asks the disk only when a segment ends and the next was not preallocated in time.
        """
        if self._failed is not None:
            raise LogFailed(str(self._failed))
        need = 0
        for size in sizes:
            if size > MAX_PAYLOAD:
                raise ValueError(f"a record takes at most {MAX_PAYLOAD} bytes, not {size}")
            need += frame_bytes(size)
        if self._at + need > self._plan.size:
            self._preallocate(HEADER.size + need)

    def append(self, version: int, kind: int, parts: Sequence[Part]) -> None:
        """Hand the record of ``version``, the one after ``last``, to the log thread.

        kind   1.., what the payload is
        parts  make up the payload one behind the other; C-contiguous, and nobody changes them
               until ``written`` has reached the version: they are not copied

        Returns at once, and cannot fail once ``reserve`` has made room. After a failure of the log
        it does nothing: nobody will be acknowledged.
        """
        if version != self.last + 1:
            raise ValueError(f"version {version} appended after version {self.last}")
        size = 0
        views = []
        buffers: Sequence[Any] = parts  # numpy's types do not say that arrays are buffers
        for part in buffers:
            view = memoryview(part)
            if view.nbytes:
                views.append(view.cast("B"))
                size += view.nbytes
        taken = frame_bytes(size)
        if self._at + taken > self._plan.size:
            self._plan = self._take_spare(size, version)
            self._at = HEADER.size
        item = _Append(self._plan, self._at, version, kind, views, size)
        self._at += taken
        self._appended += taken
        self.last = version
        with self._lock:
            if self._failed is None:
                self._queue.append(item)
            if self._sleeping:
                self._changed.notify()

    def _take_spare(self, size: int, version: int) -> Segment:
        """The preallocated segment, for ``version`` and what follows it."""
        if self._spare is None or self._spare.size < HEADER.size + frame_bytes(size):
            self.reserve(size)  # which the caller has forgotten
        with self._spare_lock:
            segment, self._spare = self._spare, None
        assert segment is not None
        segment.first = version
        return segment

    def _preallocate(self, size: int) -> None:
        """Have a spare segment of at least ``size`` bytes, or raise and leave what there was."""
        with self._spare_lock:
            spare = self._spare
            if spare is None:
                self._spare = self._new_spare(max(size, self._segment_bytes))
            elif spare.size < size:
                preallocate(self._disk, spare.fd, spare.path, spare.size, size)
                spare.size = size

    def _new_spare(self, size: int) -> Segment:
        path = self.directory / f"{next(self._spares):020}.spare"
        with _disk_full(self.directory, size):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o640)
        try:
            preallocate(self._disk, fd, path, 0, size)
        except BaseException:
            os.close(fd)
            path.unlink()
            raise
        return Segment(path, size, fd=fd)

    # ---- any thread

    def wait(self, version: int, durable: bool, call: Callable[[], None]) -> None:
        """Have ``call`` called once ``version`` is written, or durable: on this thread and at
        once if it is, else on a thread of the log; never if the log fails or closes before.

        ``call`` must not block or raise: what it raises is a failure of the log.
        """
        with self._lock:
            if version > (self.durable if durable or self._failed else self.written):
                heapq.heappush(self._waiting[durable], (version, next(self._tickets), call))
                if durable:
                    self._want_sync(version)
                return
        call()

    def sync(self, version: int) -> None:
        """Block until ``version``, which was appended, is durable. LogFailed if it will not be."""
        if version > self.last:
            raise ValueError(f"version {version} awaited, {self.last} is the newest appended")
        with self._lock:
            self._want_sync(version)
            while self.durable < version:
                if self._failed is not None:
                    raise LogFailed(str(self._failed))
                if self._stopped:
                    raise LogFailed(f"closed at version {self.durable}, {version} is awaited")
                self._synced.wait()

    def read(self, after: int, *, upto: int | None = None, max_bytes: int = CHUNK) -> list[Frame]:
        """What ``Cursor.read`` returns first of a cursor behind ``after``."""
        with contextlib.closing(Cursor(self, after)) as cursor:
            return cursor.read(upto=upto, max_bytes=max_bytes)

    def cursor(self, after: int) -> Cursor:
        """A place in the log behind version ``after``, to read on from; close it."""
        return Cursor(self, after)

    def cut(self, version: int, keep_bytes: int = 0, keep_seconds: float = 0.0) -> int:
        """Delete the oldest segments, as far as their versions are all <= ``version``.

        keep_bytes    newest bytes of the log that stay at least
        keep_seconds  records stay at least that long, as told by the modification time of their
                      segment's file, which is when its last record was written

        Returns the bytes deleted. The segment being written always stays. One thread at a time.
        LogFailed if a segment cannot be deleted, or that it was cannot be brought to disk: with the
        next one gone and it back, the log would have a gap. The log has failed then.
        """
        with self._lock:
            segments = self._segments
            kept = sum(each.end for each in segments)
            old = 0
            for segment in segments[:-1]:
                kept -= segment.end
                assert segment.last is not None
                if segment.last > version or kept < keep_bytes:
                    break
                if keep_seconds and self._clock() - segment.path.stat().st_mtime < keep_seconds:
                    break
                old += 1
            self._segments = segments[old:]
        try:
            for segment in segments[:old]:  # oldest first, and on disk in that order: never a gap
                segment.path.unlink()
                self._disk.fsync(self._directory_fd)
        except OSError as error:
            self._give_up(error)
            raise LogFailed(str(error)) from error
        return sum(each.size for each in segments[:old])

    def close(self) -> None:
        """Write and sync everything, then stop. LogFailed if that could not be done."""
        with self._lock:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        self._syncer.join()
        self._release()
        if self._failed is not None:
            raise LogFailed(str(self._failed))

    def _holding(self, version: int) -> Segment:
        """The segment that ``version`` is in, or will be; Compacted if it was cut."""
        segments = self._segments
        at = bisect.bisect_right(segments, version, key=lambda each: each.first)
        if not at:
            raise Compacted(segments[0].first)
        return segments[at - 1]

    def _want_sync(self, version: int) -> None:
        self._sync_wanted = max(self._sync_wanted, version)
        self._unsynced.notify()

    # ---- the log thread

    def _run(self) -> None:
        try:
            while self._turn():
                pass
            self._sync()
        except Exception as error:
            self._give_up(error)
        else:
            with self._lock:
                self._drop_everything()

    def _give_up(self, error: Exception) -> None:
        """Stop for good: nobody can say what is on disk."""
        with self._lock:
            if self._failed is not None:
                return
            self._failed = error
            self._drop_everything()
            self._changed.notify_all()
        self._fail(error)

    def _drop_everything(self) -> None:
        """Nobody who still waits will be acknowledged."""
        self._stopped = True
        self._queue = []
        for heap in self._waiting:
            heap.clear()
        self._synced.notify_all()
        self._unsynced.notify_all()

    def _turn(self) -> bool:
        """Sleep until there is something to write, and write it; False when that was all."""
        with self._lock:
            while not (self._queue or self._closing or self._failed):
                self._sleeping = True
                self._changed.wait()
                self._sleeping = False
            batch, self._queue = self._queue, []
            if self._failed:
                return False
        if batch:
            self._write(batch)
            self._prepare()
        return bool(batch) or not self._closing

    def _write(self, batch: list[_Append]) -> None:
        """Write the records, in runs of one system call."""
        run: list[memoryview] = []
        start, size = batch[0].offset, 0
        version = batch[0].version - 1
        for item in batch:
            if item.segment is not self._active or size >= RUN_BYTES:
                self._write_run(run, start, version)
                run, start, size = [], item.offset, 0
                if item.segment is not self._active:
                    self._roll(item.segment)
            version = item.version
            run += encode(self._seed, version, self.durable, item.kind, item.parts, item.size)
            size += frame_bytes(item.size)
        self._write_run(run, start, version)

    def _write_run(self, run: list[memoryview], start: int, version: int) -> None:
        if not run:
            return
        segment = self._active
        end = write_all(self._disk, segment.fd, run, start)
        self._handed += end - start
        with self._lock:
            segment.end = end
            if end - (segment.hints[-1][1] if segment.hints else HEADER.size) >= HINT_BYTES:
                segment.hints.append((version + 1, end))
            if self.durable == self.written:
                self._unsynced_since = time.monotonic()
                self._unsynced.notify()
            self.written = version
        self._announce()

    def _announce(self) -> None:
        """Tell those who wait for what is written or durable by now."""
        calls = []
        with self._lock:
            if self._failed is not None:
                return
            for heap, version in zip(self._waiting, (self.written, self.durable), strict=True):
                while heap and heap[0][0] <= version:
                    calls.append(heapq.heappop(heap)[2])
        for call in calls:
            call()

    def _roll(self, segment: Segment) -> None:
        """Go on in another segment, once the one before is on disk.

        Its header is on disk before its name is, so a segment without one is damaged. An old
        segment without a record gives way to the new one, which has the same first version.
        """
        old = self._active
        self._sync()
        with contextlib.suppress(OSError):  # of no use, and harmless if they stay
            os.ftruncate(old.fd, old.end)
        os.close(old.fd)
        old.fd = -1
        kept = tuple(each for each in self._segments if each.first < segment.first)
        self._begin(segment, previous=kept[-1].first if kept else 0)
        with self._lock:
            old.last = segment.first - 1
            kept = tuple(each for each in self._segments if each.first < segment.first)
            self._segments = (*kept, segment)
        self._active = segment
        self._spare_refused = False

    def _begin(self, segment: Segment, previous: int) -> None:
        """Give a spare segment its header and its name."""
        header = Header(lineage=self.lineage, first=segment.first, previous=previous)
        self._seed = header.seed
        write_all(self._disk, segment.fd, [memoryview(header.encode())], 0)
        self._disk.fdatasync(segment.fd)
        path = self.directory / f"{segment.first:020}.log"
        segment.path.rename(path)
        segment.path = path
        self._disk.fsync(self._directory_fd)

    # ---- the sync thread

    def _keep_synced(self) -> None:
        try:
            while self._sleep_until_due():
                self._sync()
        except Exception as error:
            self._give_up(error)

    def _sleep_until_due(self) -> bool:
        """Sleep until a sync is due; False once the log has stopped."""
        with self._lock:
            while not self._stopped:
                pause = self._sync_in()
                if pause <= 0:
                    return True
                self._unsynced.wait(None if pause == NEVER else pause)
            return False

    def _sync_in(self) -> float:
        """Seconds until the next sync is due."""
        if self.durable == self.written:
            return NEVER
        if self.durable < self._sync_wanted:
            return 0.0
        return max(0.0, self._unsynced_since + self._flush_seconds - time.monotonic())

    def _sync(self) -> None:
        """Bring to disk what is written; called by both threads. LogFailed after a failure."""
        with self._syncing:
            with self._lock:
                if self._failed is not None:
                    raise LogFailed(str(self._failed))
                if self.durable == self.written:
                    return
                segment, end, version = self._active, self._active.end, self.written
            assert self._marks is not None
            self._disk.fdatasync(segment.fd)
            self._marks.write(Mark(version, segment.first, end))  # before anybody is told
            with self._lock:
                self._unsynced_since = time.monotonic()  # of what was written meanwhile
                self.durable = version
                self._synced.notify_all()
            self._announce()
            self._uncache(segment, end)
        self._wake()

    def _uncache(self, segment: Segment, end: int) -> None:
        """Let the OS forget synced bytes, but for the newest, which subscribers are about to read.

        They would push useful pages out of its cache; and memory just given back is the cheapest
        to write the next records to.
        """
        stop = (end - CACHED_BYTES) // UNCACHE_BYTES * UNCACHE_BYTES
        if stop > segment.uncached:
            length = stop - segment.uncached
            os.posix_fadvise(segment.fd, segment.uncached, length, os.POSIX_FADV_DONTNEED)
            segment.uncached = stop

    def _prepare(self) -> None:
        """Preallocate the next segment, once half of this one is used.

        If that fails, ``reserve`` tries again and reports it, when it matters.
        """
        if self._spare is None and not self._spare_refused:
            segment = self._active
            if segment is self._plan and segment.end * 2 > segment.size:
                try:
                    self._preallocate(self._segment_bytes)
                except (DiskFull, OSError):
                    self._spare_refused = True

    # ---- opening and closing

    def _load(self, lineage: bytes | None, after: int | None, made: bool) -> None:
        """Bring the log from its files, or make its first segment."""
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
            self._load_last(after)
        else:
            self._make(lineage or os.urandom(16), 0 if after is None else after)
        assert self._marks is not None
        with _disk_full(self.directory, 2 * SLOT):
            for _ in range(2):  # so that one is good while the other is written
                self._marks.write(Mark(self.last, self._active.first, self._active.end))
        self._plan, self._at = self._active, self._active.end

    def _make_directory(self) -> None:
        if not self.directory.exists():
            self.directory.mkdir()
            parent = os.open(self.directory.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                self._disk.fsync(parent)
            finally:
                os.close(parent)
        self._directory_fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)

    def _make(self, lineage: bytes, after: int) -> None:
        """A log without records, the next of which will be of version ``after + 1``."""
        if len(lineage) != 16:
            raise ValueError(f"a lineage has 16 bytes, not {len(lineage)}")
        self.lineage = lineage
        synced = self.directory / "SYNCED"
        if synced.exists() and any(synced.read_bytes()):
            raise self._gone()
        self._preallocate(HEADER.size)
        self._active = self._take_spare(0, after + 1)
        self._begin(self._active, previous=0)
        self._segments = (self._active,)
        self.last = self.written = self.durable = after
        self._marks = Marks(self._disk, synced, lineage)

    def _gone(self) -> Corrupt:
        return Corrupt(str(self.directory), "no segment is left of a log that was synced")

    def _load_segments(self, firsts: list[int], lineage: bytes | None) -> None:
        """Check that the segments are those of one log, by their headers."""
        segments = []
        previous = None
        for first in firsts:
            path = self.directory / f"{first:020}.log"
            with contextlib.closing(Reader(path)) as reader:
                header = reader.header
            lineage = lineage or header.lineage
            if header.lineage != lineage:
                raise Corrupt(
                    str(path), f"of lineage {header.lineage.hex()}, not of {lineage.hex()}"
                )
            if header.first != first:
                raise Corrupt(str(path), f"begins with version {header.first}, says its header")
            if previous is not None and header.previous != previous:
                raise Corrupt(
                    str(path), f"follows segment {header.previous}, but {previous} is before it"
                )
            previous = first
            size = path.stat().st_size
            segments.append(Segment(path, size, first=first, end=size))
        for segment, after in itertools.pairwise(segments):
            segment.last = after.first - 1
        assert lineage is not None
        self.lineage = lineage
        self._segments = tuple(segments)
        self._active = segments[-1]

    def _load_last(self, after: int | None) -> None:
        """Verify the last segment, against the newest mark too, and erase a torn tail.

        What is verified is what the disk holds, not the page cache: after a failed sync of an
        earlier process they may differ.
        """
        segment = self._active
        self._marks = Marks(self._disk, self.directory / "SYNCED", self.lineage)
        mark = self._marks.read() or Mark(0, 0, 0)
        if mark.first > segment.first:
            raise Corrupt(
                str(self.directory), f"segment {mark.first:020}.log is gone, and it was synced"
            )
        segment.fd = os.open(segment.path, os.O_RDWR)
        self._disk.fdatasync(segment.fd)
        os.posix_fadvise(segment.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        synced_end = mark.end if mark.first == segment.first else HEADER.size
        with contextlib.closing(Reader(segment.path)) as reader:
            self._seed = reader.header.seed
            tail = find_tail(reader, segment.size, synced_end)
        if tail.last < mark.version:
            raise Corrupt(
                place(segment.path, tail.end),
                f"ends with version {tail.last}, {mark.version} was synced",
            )
        if after is not None and not self.first - 1 <= after <= tail.last:
            raise Corrupt(
                str(self.directory),
                f"versions {self.first} to {tail.last}, but the base stands at version {after}",
            )
        segment.end = tail.end
        if tail.dirty > tail.end:
            self.torn_bytes = tail.dirty - tail.end
            erase(self._disk, segment.fd, tail.end, tail.dirty)
        self._disk.fsync(self._directory_fd)
        self.last = self.written = self.durable = tail.last

    def _release(self) -> None:
        """Close every file, and give back what was preallocated and not used."""
        if self._spare is not None:
            self._spare.path.unlink()
        for segment in (self._active, self._plan, self._spare):
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


class Cursor:
    """A place in the log, which moves on as it is read; made by ``VersionLog.cursor``.

    For one thread at a time. Holds one descriptor and what was read ahead, some MiB at most.
    ``after`` is the version of the last frame it returned.
    """

    def __init__(self, log: VersionLog, after: int) -> None:
        self.after = after
        self._log = log
        self._segment: Segment | None = None
        self._reader: Reader | None = None

    def read(self, *, upto: int | None = None, max_bytes: int = CHUNK) -> list[Frame]:
        """The frames behind ``after``, in order and without a gap, each one verified.

        upto       version to stop at, clamped to ``written``; None: ``durable``
        max_bytes  of frames to stop at; the last may go beyond it, and the end of a segment stops
                   before it

        Empty only if there is none. Compacted if they were cut; a segment that is cut while the
        cursor is in it can still be read to its end. Corrupt names file and offset.
        """
        log = self._log
        limit = log.durable if upto is None else min(upto, log.written)
        if self.after >= limit:
            return []
        segment, reader = self._here()
        last = limit if segment.last is None else min(limit, segment.last)
        frames = reader.read(last, segment.end, max_bytes)
        self.after = reader.version - 1
        return frames

    def close(self) -> None:
        """Close the file; frames that were returned stay valid."""
        if self._reader is not None:
            self._reader.close()
        self._reader = self._segment = None

    def _here(self) -> tuple[Segment, Reader]:
        """The segment of the next frame, and a reader at that frame."""
        segment, reader, version = self._segment, self._reader, self.after + 1
        if segment is not None and reader is not None:
            if segment.last is None or version <= segment.last:
                return segment, reader
            self.close()
        self._segment, self._reader = segment, reader = self._enter(version)
        hint = bisect.bisect_right(segment.hints, (version, segment.end)) - 1
        if hint >= 0:
            reader.seek(*segment.hints[hint])
        try:
            reader.skip(version, segment.end)
        except BaseException:
            self.close()
            raise
        return segment, reader

    def _enter(self, version: int) -> tuple[Segment, Reader]:
        """The segment that holds ``version``, opened."""
        segment = self._log._holding(version)
        try:
            return segment, Reader(segment.path)
        except FileNotFoundError:  # cut just now, or lost
            if segment is self._log._holding(version):
                raise Corrupt(str(segment.path), "is gone") from None
            return self._enter(version)


@contextlib.contextmanager
def _disk_full(directory: Path, wanted: int) -> Iterator[None]:
    """Raise DiskFull for the errors that mean it."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise DiskFull(str(directory), wanted) from error
        raise
