"""The version log of one shard: a write-ahead log with one record for every change.

Each change of the shard gets the next version and appends one record. Records are written in
groups and synced to disk. Subscribers read them through cursors. A segment (log file) is deleted
once nobody needs its records. logfiles.py describes the files.

**Threads.** The engine thread reserves room and appends records. The log thread takes all records
that were appended since its last turn, writes them, and runs the callbacks that wait for the write.
The sync thread syncs the written records while the log thread continues to write, and runs the
callbacks that wait for the sync. The flush thread syncs and truncates. Each subscriber reads
through a cursor with its own file descriptor, so that a slow reader delays nobody.

**Failure.** After a failed write or sync it is unknown which records are on disk, and a second sync
can report success although pages are lost. So the log stops: it calls ``fail``, runs no further
callbacks, and the process should end.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from storage.cursor import Cursor
from storage.disk import CHUNK, Disk, write_all
from storage.errors import DiskFull, LogFailed
from storage.histogram import Histogram
from storage.history import History, draw_epoch
from storage.logfiles import Append, LogFiles, SegmentFile, uncache
from storage.logprogress import LogProgress
from storage.segment import HEADER, MAX_PAYLOAD, Frame, Part, encode, frame_bytes
from storage.threads import Background

SEGMENT_BYTES = 256 << 20
SYNC_SECONDS = 0.02
RUN_BYTES = 8 << 20  # bytes written before the callbacks that wait for them are run
RECORD_MEMORY = 2048  # bytes of the objects of one record that waits to be written
HINT_BYTES = 256 << 10  # least distance in a segment between offsets that a cursor may start from


class VersionLog:
    """Writes the changes of one shard to its version log, syncs them, and lets cursors read them.

    The module docstring describes its threads.

    history  epochs of the log (one random number per start of the server); the code that recovers
             the shard sets it before the log is used
    last     version of the newest record appended, 0 without records
    writes   seconds that each write of a group of records to the file took
    """

    def __init__(
        self,
        files: LogFiles,
        *,
        sync_seconds: float,
        fail: Callable[[Exception], None],
        wake: Callable[[], None],
    ) -> None:
        """Store the settings, which ``open`` describes. ``open`` also starts the threads."""
        self.files = files
        self.history = History((draw_epoch(),))
        self.last = 0
        self.writes = Histogram()
        self._fail = fail
        self._wake = wake

        # the engine thread's: where the next record will be written
        self._plan = files.active
        self._at = 0
        self._appended = 0  # bytes since opening

        # the log thread's
        self._handed = 0  # bytes since opening
        self._spare_refused = False  # preallocating this segment's successor failed
        self._thread = Background("version log", self._run)

        # the sync thread's
        self._syncing = threading.Lock()  # held while a segment is synced or replaced
        self._syncer = Background("log sync", self._keep_synced)

        # shared, under the lock
        self._progress = LogProgress(sync_seconds)
        self._lock = self._progress.lock
        self._changed = threading.Condition(self._lock)  # the log thread sleeps on it
        self._sleeping = False
        self._closing = False
        self._queue: list[Append] = []

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
        log.last = log._progress.written = log._progress.durable = last
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
    def written(self) -> int:
        """Newest version handed to the OS: it survives a crash of the process."""
        return self._progress.written

    @property
    def durable(self) -> int:
        """Newest version synced to disk: it survives a power failure."""
        return self._progress.durable

    @property
    def syncs(self) -> Histogram:
        """Seconds that each sync of written records to disk took."""
        return self.files.syncs

    @property
    def written_bytes(self) -> int:
        """Bytes of records handed to the OS since the log was opened."""
        return self._handed

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
        if self._progress.failed is not None:
            raise LogFailed(str(self._progress.failed))
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

        The caller must have called ``reserve`` for it; then this cannot fail. If the log has
        failed, the record is silently dropped, and the callbacks of ``wait`` for it are never run.
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
            if self._progress.failed is None:
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
        self._progress.wait(version, durable, call)

    def sync(self, version: int) -> None:
        """Block until ``version`` is synced to disk.

        Raises ValueError if the version was not appended, and LogFailed if the log fails or closes
        first.
        """
        if version > self.last:
            raise ValueError(
                f"cannot sync version {version}: the newest appended version is {self.last}"
            )
        self._progress.sync(version)

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
        """Delete the oldest segments whose versions are all <= ``version``.

        Returns the size of the deleted segments in bytes.

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
        if self._progress.failed is not None:
            raise LogFailed(str(self._progress.failed))

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
            if self._progress.failed is not None:
                return
            self._progress.failed = error
            self._drop_everything()
            self._changed.notify_all()
        self._fail(error)

    def _drop_everything(self) -> None:
        """Drop all queued records, and stop the progress. The caller holds the lock."""
        self._queue = []
        self._progress.stop()

    def _turn(self) -> bool:
        """Sleep until records are queued, and write them. Returns False if the thread must end."""
        with self._lock:
            while not (self._queue or self._closing or self._progress.failed):
                self._sleeping = True
                self._changed.wait()
                self._sleeping = False
            batch, self._queue = self._queue, []
            if self._progress.failed:
                return False
        if batch:
            self._write(batch)
            self._prepare()
        return bool(batch) or not self._closing

    def _write(self, batch: list[Append]) -> None:
        """Write queued records to their segments, in runs of about 8 MiB (RUN_BYTES)."""
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
        """Write buffers to the active segment, and run the callbacks that wait for the write.

        run      buffers of consecutive frames; nothing happens if it is empty
        start    offset of the first frame in the segment
        version  version of the last frame
        """
        if not run:
            return
        segment, began = self.files.active, time.monotonic()
        end = write_all(self.files.disk, segment.fd, run, start)
        self.writes.add(time.monotonic() - began)
        self._handed += end - start
        with self._lock:
            segment.end = end
            if end - (segment.hints[-1][1] if segment.hints else HEADER.size) >= HINT_BYTES:
                segment.hints.append((version + 1, end))
            self._progress.wrote(version)
        self._progress.announce()

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
            while self._progress.sleep_until_due():
                self._sync()
        except Exception as error:
            self._give_up(error)

    def _sync(self) -> None:
        """Sync all written records, run the callbacks that wait for that, and call ``wake``.

        Called on the log thread and the sync thread. Raises LogFailed if the log has failed.
        """
        progress = self._progress
        with self._syncing:
            with self._lock:
                if progress.failed is not None:
                    raise LogFailed(str(progress.failed))
                if progress.durable == progress.written:
                    return
                segment, end, version = self.files.active, self.files.active.end, progress.written
            self.files.sync(version, end)  # also updates SYNCED, before any callback is run
            progress.synced(version)
            uncache(segment, end)
        self._wake()
