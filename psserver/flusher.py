"""Write changed rows to the base in the background, so that a restart replays little of the log.

The base is the copy of all rows on disk, at one version of the log; basewriter.py writes it. After
a flush, a restart no longer needs the log up to the base's version. Rows that were flushed may
leave host memory, so a flush is also asked for when host memory is full of rows that may not leave.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import structlog

from psserver.basewriter import BaseWriter, Stopped
from psserver.capture import Capture
from psserver.engine import Engine
from psserver.errors import Draining
from psserver.pinned import PinnedBase
from psserver.shard import Shard
from psserver.timings import Timings
from storage.errors import Corrupt, DiskFull, LogFailed
from storage.threads import Background
from storage.versionlog import VersionLog

PAUSE_SECONDS = 0.2  # least time between a flush that failed and the next

log = structlog.get_logger()


class Flusher:
    """Thread that flushes changed rows to the base, and then deletes old segment files of the log.

    The base is the copy of all rows on disk, at one version of the log.

    writer   writes the base
    fail     called with the error, on the flusher's thread, if a failed write leaves the files in
             an unknown state; the thread then ends
    seconds  seconds between flushes
    keep     (b, s): keep the newest b bytes of the log for subscribers, and in any case the records
             of the last s seconds
    flushed  monotonic time of the last flush, in seconds; a restart replays only later changes
    since    the same time in seconds since 1970
    timings  durations and failures of the flushes that found changes to write
    rounds   number of flushes that have ended, successfully or not
    failure  why the last flush failed; "" if it did not
    pins     reader of the log, for example a running checkpoint -> version; log records newer than
             the version are not deleted while the entry exists
    """

    def __init__(
        self,
        shard: Shard,
        engine: Engine,
        writer: BaseWriter,
        versions: VersionLog,
        *,
        fail: Callable[[Exception], None],
        seconds: float,
        keep: tuple[int, float],
    ) -> None:
        self._shard = shard
        self._engine = engine
        self._writer = writer
        self._base = writer.base
        self._versions = versions
        self._fail = fail
        self._seconds = seconds
        self._keep = keep
        self.pins: dict[str, int] = {}
        self.flushed, self.since = time.monotonic(), time.time()
        self.timings = Timings()
        self.rounds, self.failure = 0, ""
        self._turn = threading.Lock()  # held during a flush
        self._wanted = threading.Event()
        self._stop = threading.Event()
        self._thread = Background("flusher", self._run)
        writer.stop, writer.hurry = self._stop.is_set, self._wanted.is_set
        shard.on_pressure(self.ask)

    def open(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """Stop the thread. A flush in progress is abandoned, and the base stays unchanged."""
        self._stop.set()
        self._wanted.set()
        self._thread.join()

    def ask(self) -> None:
        """Have the thread flush soon, even if the time for it has not come. Any thread may call it.

        ``rounds`` grows when the flush has ended. A flush that runs already may not include the
        newest changes: then a second one follows it.
        """
        self._wanted.set()

    def flush(self) -> None:
        """Write all changes since the last flush to the base, then delete log that nobody needs.

        If nothing has changed, only old log is deleted. Does nothing if the server stops. Raises
        DiskFull if the disk is full; the base then stays as the last flush left it.
        """
        with self._turn, suppress(Stopped):
            self._flush()

    @contextmanager
    def pinned(self) -> Iterator[PinnedBase]:
        """Flush, and give access to all rows of the base as of this flush, while the block runs.

        Must run on a thread other than the engine's. Raises the errors of ``flush``, and Draining
        if the server stops.
        """
        with self._turn:
            try:
                captured = self._flush()
            except Stopped as error:
                raise Draining("the server is stopping") from error
            pinned = PinnedBase(self._base, captured, self._shard.suspect)
            self._base.pin(pinned.numbers)
        try:
            yield pinned
        finally:
            self._base.unpin(pinned.numbers)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let no flush run while the block runs. Waits until a running flush has ended."""
        with self._turn:
            yield

    def _flush(self) -> Capture:
        """Flush, as ``flush`` describes, and return the captured shard. The caller has ``_turn``.

        Raises Stopped if the server stops.
        """
        began, since, failure = time.monotonic(), time.time(), "it was interrupted"
        try:
            captured = self._engine.run(self._shard.capture)
            state = self._base.state
            wanted = state is None or not state.distinct or captured.version > state.version
            wanted = wanted or self._writer.crowded(captured, self._engine)
            if wanted or self._engine.run(self._shard.checks.readable):
                with self.timings.run(abandoned=(Stopped,)):
                    self._write(captured)
            self.flushed, self.since, failure = began, since, ""
            needed = min([captured.version, *self.pins.values()])
            self._versions.truncate(needed, *self._keep)
            return captured
        except Exception as error:
            failure = str(error) or type(error).__name__
            raise
        finally:
            self.failure = failure
            self.rounds += 1

    def _write(self, captured: Capture) -> None:
        """Write a captured shard to the base. After an error the base is as the last flush left it.

        If the files are in an unknown state, makes the thread flush soon: its flush then fails, and
        the thread calls ``fail``.
        """
        try:
            self._writer.write(captured, self._engine)
        except BaseException:
            if self._base.failure is None:
                with suppress(Exception):  # then the next flush deletes the blocks
                    self._base.discard()
            elif threading.current_thread() is not self._thread:
                self.ask()
            raise

    def _discard(self) -> None:
        """Delete the blocks of a flush that failed."""
        with self._turn:  # a flush of another thread may be adding blocks
            self._base.discard()

    def _run(self) -> None:
        while not self._stop.is_set():
            self._wanted.wait(self._seconds)
            self._wanted.clear()
            if self._stop.is_set():
                return
            start = time.monotonic()
            try:
                if self._succeeds(self.flush):
                    log.debug("flush", seconds=round(time.monotonic() - start, 3))
                else:  # if this fails too, the next flush deletes the blocks
                    self._succeeds(self._discard)
                    self._stop.wait(min(PAUSE_SECONDS, self._seconds))
            except LogFailed:  # the log has called its own ``fail``
                return
            except Exception as error:
                self._fail(error)
                return

    def _succeeds(self, call: Callable[[], None]) -> bool:
        """Run ``call`` and return True; if it fails but may succeed later, log it and return False.

        Raises Corrupt, LogFailed, and any error after which it is unknown what is on disk.
        """
        try:
            call()
        except (Corrupt, LogFailed):
            raise
        except Exception as error:
            if self._base.failure is not None:
                raise
            expected = isinstance(error, (DiskFull, OSError))
            log.warning("flush failed", error=str(error), exc_info=not expected)
            return False
        return True
