"""How far a version log is written and synced, and everything that waits for it."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

from storage.errors import LogFailed

NEVER = float("inf")  # seconds


class LogProgress:
    """The newest written and the newest durable version of a log, and who waits for newer ones.

    lock     protects all fields
    written  newest version handed to the OS
    durable  newest version synced to disk
    failed   error of the write or sync that failed; None: no failure
    stopped  True: the log has failed, or its log thread has ended
    """

    def __init__(self, sync_seconds: float) -> None:
        """Create the progress of a log without records.

        sync_seconds  longest time that a record waits until its sync is due
        """
        self.lock = threading.Lock()
        self.written = self.durable = 0
        self.failed: Exception | None = None
        self.stopped = False
        self._sync_seconds = sync_seconds
        self._unsynced_since = 0.0  # monotonic time at which the first unsynced version was written
        self._sync_wanted = 0  # newest version for which a sync was requested
        self._waiting: tuple[list[Any], list[Any]] = ([], [])  # heaps: for written, for durable
        self._tickets = itertools.count()
        self._synced = threading.Condition(self.lock)  # ``sync`` sleeps on it
        self._unsynced = threading.Condition(self.lock)  # ``sleep_until_due`` sleeps on it

    # ---- any thread

    def wait(self, version: int, durable: bool, call: Callable[[], object]) -> None:
        """Call ``call`` when ``version`` is written (durable=False) or durable (durable=True).

        See ``VersionLog.wait``.
        """
        with self.lock:
            if version > (self.durable if durable or self.failed else self.written):
                heapq.heappush(self._waiting[durable], (version, next(self._tickets), call))
                if durable:
                    self._want_sync(version)
                return
        call()

    def sync(self, version: int) -> None:
        """Request a sync of ``version``, which was appended, and block until it is durable.

        Raises LogFailed if the log fails or stops first.
        """
        with self.lock:
            self._want_sync(version)
            while self.durable < version:
                if self.failed is not None:
                    raise LogFailed(str(self.failed))
                if self.stopped:
                    raise LogFailed(
                        f"the log was closed when version {self.durable} was on disk, before"
                        f" version {version}"
                    )
                self._synced.wait()

    def _want_sync(self, version: int) -> None:
        """Make a sync of ``version`` due now. The caller holds the lock."""
        self._sync_wanted = max(self._sync_wanted, version)
        self._unsynced.notify()

    # ---- the threads of the log

    def wrote(self, version: int) -> None:
        """Record that ``version`` is written.

        The caller holds the lock, and calls ``announce`` when it has released it.
        """
        if self.durable == self.written:
            self._unsynced_since = time.monotonic()
            self._unsynced.notify()
        self.written = version

    def synced(self, version: int) -> None:
        """Record that ``version`` is durable, and run the callbacks that wait for that."""
        with self.lock:
            self._unsynced_since = time.monotonic()  # for records written during the sync
            self.durable = version
            self._synced.notify_all()
        self.announce()

    def announce(self) -> None:
        """Run each callback of ``wait`` whose version is now written, or durable if it needs that.

        Does nothing after a failure.
        """
        calls = []
        with self.lock:
            if self.failed is not None:
                return
            for heap, version in zip(self._waiting, (self.written, self.durable), strict=True):
                while heap and heap[0][0] <= version:
                    calls.append(heapq.heappop(heap)[2])
        for call in calls:
            call()

    def sleep_until_due(self) -> bool:
        """Sleep until a sync is due. Returns False once the log has stopped."""
        with self.lock:
            while not self.stopped:
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

    def stop(self) -> None:
        """Drop all callbacks, and wake the threads that sleep here, so that they end.

        The caller holds the lock.
        """
        self.stopped = True
        for heap in self._waiting:
            heap.clear()
        self._synced.notify_all()
        self._unsynced.notify_all()
