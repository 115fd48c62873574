"""The version log of one shard: a write-ahead log with one record for every change.

Each change of the shard gets the next version and appends one record. Records are written in
groups and synced to disk. Subscribers read them through cursors. A segment (log file) is deleted
once nobody needs its records. logfiles.py describes the files.

**Threads.** The engine thread reserves room and appends records. The log thread takes all records
that were appended since its last turn, writes them, and calls back the waiters for ``written``. The
sync thread syncs the written records while the log thread continues to write, and calls back the
waiters for ``durable``. The flush thread syncs and truncates. Each subscriber reads through a
cursor with its own file descriptor, so that a slow reader delays nobody.

**Failure.** After a failed write or sync it is unknown which records are on disk, and a second sync
can report success although pages are lost. So the log stops: it calls ``fail``, runs no further
callbacks, and the process should end.
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
from typing import Any

from storage.cursor import Cursor
from storage.disk import CHUNK, Disk, write_all
from storage.errors import DiskFull, LogFailed
from storage.history import History, draw_epoch
from storage.logfiles import Append, LogFiles, SegmentFile, uncache
from storage.segment import HEADER, MAX_PAYLOAD, Frame, Part, encode, frame_bytes

SEGMENT_BYTES = 256 << 20
SYNC_SECONDS = 0.02
RUN_BYTES = 8 << 20  # bytes written before their waiters are called back
RECORD_MEMORY = 2048  # bytes of the objects of one record that waits to be written
NEVER = float("inf")  # seconds
HINT_BYTES = 256 << 10  # least distance in a segment between offsets that a cursor may start from


class VersionLog:
    """The version log of one shard; see the top of the file for its threads.

    lineage     16 random bytes that identify this log; every segment contains them
    history     epochs of the log (one random number per start of the server); the code that
                recovers the shard sets it before the log is used
    last        version of the newest record appended, 0 without records
    written     newest version handed to the OS: it survives a crash of the process
    durable     newest version synced: it survives a power failure
    torn_bytes  bytes of incomplete frames at the end, which ``open`` erased
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
        self._unsynced_since = 0.0  # monotonic time at which the first unsynced version was written
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
        self._queue: list[Append] = []
        self._sync_wanted = 0  # newest version for which a sync was requested
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
        lineage        id of the log, 16 bytes. An existing log must have this id; a new log gets
                       it. None: accept any id, or draw a random one
        after          version of the base (the on-disk copy of all rows at one log version). An
                       existing log must have every version after it. A new log begins there. None:
                       no check; a new log begins with version 1
        made           the log existed before, so raise Corrupt if it is missing
        clock          seconds, comparable with the modification times of files
        disk           the system calls that write

        Raises Corrupt if synced bytes are damaged or missing, UnknownFormat for a log in the format
        of a different release, and DiskFull if there is no room for the first segment. The log's
        records are unchanged then.
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
        """Bytes of incomplete frames at the end of the log, which ``open`` erased."""
        return self.files.torn_bytes

    @property
    def first(self) -> int:
        """Oldest version that can still be read."""
        return self.files.segments[0].first

    @property
    def backlog(self) -> int:
        """Bytes appended and not yet handed to the OS."""
        return self._appended - self._handed

    @property
    def memory(self) -> int:
        """Approximate bytes of memory taken by the records of ``backlog``.

        Counts 2048 bytes (RECORD_MEMORY) per record for its Python objects, and its bytes.
        """
        return self.backlog + RECORD_MEMORY * (self.last - self.written)

    # ---- the engine thread

    @property
    def room(self) -> int:
        """Bytes of records that still fit into the current segment, which is preallocated."""
        return self._plan.size - self._at

    def reserve(self, *sizes: int) -> None:
        """Make sure that disk space is allocated for the next records, so that ``append`` succeeds.

        sizes  bytes of payload of each record, at most 4 GiB - 1; ValueError for more

        Raises DiskFull or OSError if the space cannot be allocated, and LogFailed if the log has
        failed before. Nothing is changed then. Accesses the disk only if the records do not fit
        into the current segment and the next one is not preallocated.
        """
        if self._failed is not None:
            raise LogFailed(str(self._failed))
        need = 0
        for size in sizes:
            if size > MAX_PAYLOAD:
                raise ValueError(f"a record may have at most {MAX_PAYLOAD} bytes, got {size}")
            need += frame_bytes(size)
        if self._at + need > self._plan.size:
            self.files.preallocate(HEADER.size + need)

    def append(self, version: int, kind: int, parts: Sequence[Part]) -> None:
        """Hand the next record to the log thread, which writes it. Returns at once.

        version  version of the record; must be ``last + 1``
        kind     kind of the record, 1 or more
        parts    C-contiguous buffers that make up the payload, one after another. They are not
                 copied, so the caller must not change them until ``written`` >= ``version``

        Call ``reserve`` before: then this cannot fail. If the log has failed, the record is
        silently dropped, and the callbacks of ``wait`` for it are never called.
        """
        if version != self.last + 1:
            raise ValueError(f"expected a record of version {self.last + 1}, got {version}")
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
        item = Append(self._plan, self._at, version, kind, views, size)
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
        """Call ``call`` when ``version`` is written (durable=False) or on disk (durable=True).

        If that is already so, calls it at once on this thread. Otherwise a thread of the log calls
        it later, or never if the log fails or closes first. ``call`` must not block. It must not
        raise either: an exception on a thread of the log makes the log fail.
        """
        with self._lock:
            if version > (self.durable if durable or self._failed else self.written):
                heapq.heappush(self._waiting[durable], (version, next(self._tickets), call))
                if durable:
                    self._want_sync(version)
                return
        call()

    def sync(self, version: int) -> None:
        """Block until ``version`` is synced to disk.

        Raises ValueError if the version was not appended, and LogFailed if the log fails or closes
        first.
        """
        if version > self.last:
            raise ValueError(
                f"cannot sync version {version}: the newest appended version is {self.last}"
            )
        with self._lock:
            self._want_sync(version)
            while self.durable < version:
                if self._failed is not None:
                    raise LogFailed(str(self._failed))
                if self._stopped:
                    raise LogFailed(
                        f"closed with version {self.durable} on disk, before version {version}"
                    )
                self._synced.wait()

    def read(self, after: int, *, upto: int | None = None, max_bytes: int = CHUNK) -> list[Frame]:
        """Return the frames after version ``after``, read with a temporary cursor.

        For ``upto``, ``max_bytes`` and errors see ``Cursor.read``.
        """
        with contextlib.closing(Cursor(self, after)) as cursor:
            return cursor.read(upto=upto, max_bytes=max_bytes)

    def cursor(self, after: int) -> Cursor:
        """Return a cursor whose first frame is version ``after + 1``. The caller closes it."""
        return Cursor(self, after)

    def truncate(self, version: int, keep_bytes: int = 0, keep_seconds: float = 0.0) -> int:
        """Delete the oldest segments whose versions are all <= ``version``; return their bytes.

        keep_bytes    keep at least this many of the newest bytes of the log
        keep_seconds  keep segments whose last record is younger than this, by the file's
                      modification time; 0: delete regardless of age

        Only one thread at a time may call this. The segment that is being written always stays.
        Raises LogFailed, and the log stops, if a segment cannot be deleted or the deletion cannot
        be synced, because after a restart segments could be missing in the middle of the log.
        """
        try:
            return self.files.truncate(version, keep_bytes, keep_seconds)
        except OSError as error:
            self._give_up(error)
            raise LogFailed(str(error)) from error

    def close(self) -> None:
        """Write and sync all appended records, then stop the threads. Raises LogFailed if the log
        fails meanwhile or has failed before.
        """
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
        """Ask the sync thread to sync ``version`` now. The caller holds the lock."""
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
        """Stop the log because of ``error``, and call ``fail``, unless it has failed before."""
        with self._lock:
            if self._failed is not None:
                return
            self._failed = error
            self._drop_everything()
            self._changed.notify_all()
        self._fail(error)

    def _drop_everything(self) -> None:
        """Drop all queued records and waiting callbacks, and wake the blocked threads, so that they
        end. The caller holds the lock.
        """
        self._stopped = True
        self._queue = []
        for heap in self._waiting:
            heap.clear()
        self._synced.notify_all()
        self._unsynced.notify_all()

    def _turn(self) -> bool:
        """Sleep until records are queued, and write them. Returns False if the thread must end."""
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

    def _write(self, batch: list[Append]) -> None:
        """Write queued records, in runs of about RUN_BYTES bytes, into the right segments."""
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
        """Write buffers to the active segment, and call back the waiters for ``written``.

        run      buffers of consecutive frames; nothing happens if it is empty
        start    offset of the first frame in the segment
        version  version of the last frame
        """
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
        """Call back the waiters whose version is now written, or now durable if they want that."""
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
        """Sync the active segment, and make ``segment`` the active one."""
        self._sync()
        self.files.roll(segment)
        self._spare_refused = False

    def _prepare(self) -> None:
        """Preallocate the next segment once half of the active one is used.

        Ignores a failure: ``reserve`` tries again when it needs the segment, and raises the error.
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
        """Return the seconds until the next sync is due; infinity if everything is synced."""
        if self.durable == self.written:
            return NEVER
        if self.durable < self._sync_wanted:
            return 0.0
        return max(0.0, self._unsynced_since + self._sync_seconds - time.monotonic())

    def _sync(self) -> None:
        """Sync all written records, then call back the waiters for ``durable``, and ``wake``.

        Called on the log thread and the sync thread. Raises LogFailed if the log has failed.
        """
        with self._syncing:
            with self._lock:
                if self._failed is not None:
                    raise LogFailed(str(self._failed))
                if self.durable == self.written:
                    return
                segment, end, version = self.files.active, self.files.active.end, self.written
            self.files.sync(version, end)  # also updates SYNCED, before any waiter is called
            with self._lock:
                self._unsynced_since = time.monotonic()  # for records written during the sync
                self.durable = version
                self._synced.notify_all()
            self._announce()
            uncache(segment, end)
        self._wake()
