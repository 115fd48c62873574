"""The version log of one shard: every change as one record, written ahead of its acknowledgement.

Each change of the shard gets the next version and appends one record. Records are written in
groups, synced to disk, read by subscribers through cursors, and deleted with their segments once
nobody needs them. logfiles.py describes the files.

**Threads.** The engine thread reserves and appends. The log thread takes all records that were
appended since its last turn, writes them with one system call, and calls whoever waits for
``written``. The sync thread syncs what is written while the log thread goes on writing, and calls
whoever waits for ``durable``. The flush thread syncs and truncates. Subscribers read through
cursors, each with its own descriptor, so a slow reader delays nobody.

**Failure.** After a failed write or sync nobody can know what is on disk, and a second attempt can
report success for pages that are lost. So the log stops: it calls ``fail``, acknowledges nobody
any more, and the process should end.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from storage.cursor import Cursor
from storage.disk import CHUNK, Disk, write_all
from storage.errors import DiskFull, LogFailed
from storage.history import History, draw_epoch
from storage.logfiles import LogFiles, SegmentFile
from storage.segment import HEADER, MAX_PAYLOAD, Frame, Part, encode, frame_bytes

SEGMENT_BYTES = 256 << 20
SYNC_SECONDS = 0.02
RUN_BYTES = 8 << 20  # bytes written before their waiters are called
RECORD_MEMORY = 2048  # bytes of the objects of one record that waits to be written
NEVER = float("inf")  # seconds
HINT_BYTES = 256 << 10  # of a segment, between offsets that a cursor may start from
CACHED_BYTES = 32 << 20  # newest bytes of a segment that stay in the OS's cache
UNCACHE_BYTES = 4 << 20  # bytes dropped from the cache at a time


class _Append(NamedTuple):
    """A record on its way to the log thread."""

    segment: SegmentFile
    offset: int
    version: int
    kind: int
    parts: list[memoryview]
    size: int  # bytes of the payload


class VersionLog:
    """The version log of one shard; see the top of the file for its threads.

    lineage     16 random bytes that identify this log; every segment contains them
    history     epochs of the log; whoever recovers the shard sets it before the log is used
    last        version of the newest record appended, 0 without records
    written     newest version handed to the OS: it survives the death of the process
    durable     newest version synced: it survives a power failure
    torn_bytes  bytes of a torn tail that opening erased
    """

    def __init__(
        self,
        files: LogFiles,
        *,
        sync_seconds: float,
        fail: Callable[[Exception], None],
        wake: Callable[[], None],
    ) -> None:
        """Store the settings. ``open`` reads the files and starts the threads."""
        self.files = files
        self.history = History((draw_epoch(),))
        self.last = self.written = self.durable = 0
        self._sync_seconds = sync_seconds
        self._fail = fail
        self._wake = wake

        # the engine thread's: where the next record will be written
        self._plan = files.active
        self._at = 0
        self._appended = 0  # bytes since opening

        # the log thread's
        self._unsynced_since = 0.0  # monotonic; of the first version above durable
        self._handed = 0  # bytes since opening
        self._spare_refused = False  # preallocating this segment's successor failed
        self._thread = threading.Thread(target=self._run, name="version log", daemon=True)

        # the sync thread's
        self._syncing = threading.Lock()  # held while a segment is synced or replaced
        self._syncer = threading.Thread(target=self._keep_synced, name="log sync", daemon=True)

        # shared, under the lock
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

    @classmethod
    def open(
        cls,
        directory: Path,
        *,
        fail: Callable[[Exception], None],
        wake: Callable[[], None],
        segment_bytes: int = SEGMENT_BYTES,
        sync_seconds: float = SYNC_SECONDS,
        lineage: bytes | None = None,
        after: int | None = None,
        made: bool = False,
        clock: Callable[[], float] = time.time,
        disk: Disk | None = None,
    ) -> VersionLog:
        """Open or create the log in ``directory``, and start its threads.

        directory      no other process may have it open
        fail           called once, on a thread of the log, after a failed write or sync; must not
                       close the log
        wake           called on a thread of the log whenever ``durable`` has grown; must not block
        segment_bytes  size of a segment; a larger record gets a segment of its own size
        sync_seconds   longest time that a record waits until its sync begins, if no sync is running
        lineage        16 bytes that the log must have, or gets when it is created; None: any, or
                       random
        after          version of the base. An existing log must have every version after it, a new
                       log begins there. None: no check
        made           the log existed before, so a missing one is Corrupt
        clock          seconds, comparable with the modification times of files
        disk           the system calls that write

        Raises Corrupt if anything synced is damaged or missing, UnknownFormat for a log of another
        release, DiskFull if the first segment does not fit. The files are unchanged then.
        """
        disk = disk or Disk()
        files = LogFiles(directory, segment_bytes=segment_bytes, clock=clock, disk=disk)
        try:
            last = files.open(lineage, after, made)
        except BaseException:
            files.close()
            raise
        log = cls(files, sync_seconds=sync_seconds, fail=fail, wake=wake)
        log.last = log.written = log.durable = last
        log._at = files.active.end
        log._thread.start()
        log._syncer.start()
        return log

    @property
    def directory(self) -> Path:
        """Directory of the log's files."""
        return self.files.directory

    @property
    def lineage(self) -> bytes:
        """16 random bytes that identify this log."""
        return self.files.lineage

    @property
    def torn_bytes(self) -> int:
        """Bytes of a torn tail that opening erased."""
        return self.files.torn_bytes

    @property
    def first(self) -> int:
        """Oldest version that can still be read; the log horizon is the version before it."""
        return self.files.segments[0].first

    @property
    def backlog(self) -> int:
        """Bytes appended and not yet handed to the OS."""
        return self._appended - self._handed

    @property
    def memory(self) -> int:
        """Approximate bytes of memory that the records of the backlog take.

        A small record takes more memory for its objects than for its bytes.
        """
        return self.backlog + RECORD_MEMORY * (self.last - self.written)

    # ---- the engine thread

    @property
    def room(self) -> int:
        """Bytes of records that fit into the current segment without asking the disk."""
        return self._plan.size - self._at

    def reserve(self, *sizes: int) -> None:
        """Make sure that records with ``sizes`` bytes of payload can be appended next.

        Raises DiskFull, OSError, or LogFailed after a failure; nothing has changed then. Asks the
        disk only when a segment ends and the next one was not preallocated in time.
        """
        if self._failed is not None:
            raise LogFailed(str(self._failed))
        need = 0
        for size in sizes:
            if size > MAX_PAYLOAD:
                raise ValueError(f"a record takes at most {MAX_PAYLOAD} bytes, not {size}")
            need += frame_bytes(size)
        if self._at + need > self._plan.size:
            self.files.preallocate(HEADER.size + need)

    def append(self, version: int, kind: int, parts: Sequence[Part]) -> None:
        """Hand the record of ``version``, which must be ``last + 1``, to the log thread.

        kind   kind of the payload, 1 or more
        parts  make up the payload, one after another. C-contiguous. They are not copied, so nobody
               may change them until ``written`` has reached the version

        Returns at once. Cannot fail once ``reserve`` has made room. After a failure of the log it
        does nothing: nobody will be acknowledged.
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
            self._plan = self.files.take_spare(size, version)
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

    # ---- any thread

    def wait(self, version: int, durable: bool, call: Callable[[], object]) -> None:
        """Have ``call`` called once ``version`` is written, or durable.

        It is called on this thread if that is so already, else on a thread of the log; never if
        the log fails or closes first. ``call`` must not block or raise: an exception from it is a
        failure of the log.
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
        """Return what the first ``Cursor.read`` of a cursor after version ``after`` returns."""
        with contextlib.closing(Cursor(self, after)) as cursor:
            return cursor.read(upto=upto, max_bytes=max_bytes)

    def cursor(self, after: int) -> Cursor:
        """Return a cursor after version ``after``. The caller closes it."""
        return Cursor(self, after)

    def truncate(self, version: int, keep_bytes: int = 0, keep_seconds: float = 0.0) -> int:
        """Delete the oldest segments whose versions are all <= ``version``. One thread at a time.

        keep_bytes    at least this many of the newest bytes of the log stay
        keep_seconds  records younger than this stay; the age of a segment is that of its last
                      record, by the file's modification time

        Returns the bytes deleted. The segment being written always stays. If a segment cannot be
        deleted, or its deletion not be synced, the log could come back with a gap. So it fails and
        LogFailed is raised.
        """
        try:
            return self.files.truncate(version, keep_bytes, keep_seconds)
        except OSError as error:
            self._give_up(error)
            raise LogFailed(str(error)) from error

    def close(self) -> None:
        """Write and sync everything, then stop. LogFailed if that could not be done."""
        with self._lock:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        self._syncer.join()
        self.files.close()
        if self._plan.fd >= 0:  # taken, and the log failed before it was written
            os.close(self._plan.fd)
            self._plan.fd = -1
        if self._failed is not None:
            raise LogFailed(str(self._failed))

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
        """Stop for good, since nobody can know what is on disk."""
        with self._lock:
            if self._failed is not None:
                return
            self._failed = error
            self._drop_everything()
            self._changed.notify_all()
        self._fail(error)

    def _drop_everything(self) -> None:
        """Drop records and waiters: nobody who still waits will be acknowledged."""
        self._stopped = True
        self._queue = []
        for heap in self._waiting:
            heap.clear()
        self._synced.notify_all()
        self._unsynced.notify_all()

    def _turn(self) -> bool:
        """Sleep until there is something to write, and write it. Returns False at the end."""
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
        files = self.files
        start, size = batch[0].offset, 0
        version = batch[0].version - 1
        for item in batch:
            if item.segment is not files.active or size >= RUN_BYTES:
                self._write_run(run, start, version)
                run, start, size = [], item.offset, 0
                if item.segment is not files.active:
                    self._roll(item.segment)
            version = item.version
            run += encode(files.seed, version, self.durable, item.kind, item.parts, item.size)
            size += frame_bytes(item.size)
        self._write_run(run, start, version)

    def _write_run(self, run: list[memoryview], start: int, version: int) -> None:
        if not run:
            return
        segment = self.files.active
        end = write_all(self.files.disk, segment.fd, run, start)
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
        """Call whoever waits for a version that is written or durable by now."""
        calls = []
        with self._lock:
            if self._failed is not None:
                return
            for heap, version in zip(self._waiting, (self.written, self.durable), strict=True):
                while heap and heap[0][0] <= version:
                    calls.append(heapq.heappop(heap)[2])
        for call in calls:
            call()

    def _roll(self, segment: SegmentFile) -> None:
        """Sync the active segment, and continue in another one."""
        self._sync()
        self.files.roll(segment)
        self._spare_refused = False

    def _prepare(self) -> None:
        """Preallocate the next segment once half of this one is used.

        If that fails, ``reserve`` tries again and reports it when it matters.
        """
        files = self.files
        if not files.has_spare and not self._spare_refused:
            segment = files.active
            if segment is self._plan and segment.end * 2 > segment.size:
                try:
                    files.preallocate()
                except (DiskFull, OSError):
                    self._spare_refused = True

    # ---- the sync thread

    def _keep_synced(self) -> None:
        try:
            while self._sleep_until_due():
                self._sync()
        except Exception as error:
            self._give_up(error)

    def _sleep_until_due(self) -> bool:
        """Sleep until a sync is due. Returns False once the log has stopped."""
        with self._lock:
            while not self._stopped:
                pause = self._sync_in()
                if pause <= 0:
                    return True
                self._unsynced.wait(None if pause == NEVER else pause)
            return False

    def _sync_in(self) -> float:
        """Return the seconds until the next sync is due."""
        if self.durable == self.written:
            return NEVER
        if self.durable < self._sync_wanted:
            return 0.0
        return max(0.0, self._unsynced_since + self._sync_seconds - time.monotonic())

    def _sync(self) -> None:
        """Sync what is written. Both threads call this. Raises LogFailed after a failure."""
        with self._syncing:
            with self._lock:
                if self._failed is not None:
                    raise LogFailed(str(self._failed))
                if self.durable == self.written:
                    return
                segment, end, version = self.files.active, self.files.active.end, self.written
            self.files.sync(version, end)  # and mark it, before any waiter is called
            with self._lock:
                self._unsynced_since = time.monotonic()  # of what was written meanwhile
                self.durable = version
                self._synced.notify_all()
            self._announce()
            _uncache(segment, end)
        self._wake()


def _uncache(segment: SegmentFile, end: int) -> None:
    """Drop synced bytes from the OS's cache, except the newest, which subscribers read next.

    They would push useful pages out of the cache; and memory that was freed a moment ago is the
    cheapest to write the next records to.
    """
    stop = (end - CACHED_BYTES) // UNCACHE_BYTES * UNCACHE_BYTES
    if stop > segment.uncached:
        length = stop - segment.uncached
        os.posix_fadvise(segment.fd, segment.uncached, length, os.POSIX_FADV_DONTNEED)
        segment.uncached = stop
