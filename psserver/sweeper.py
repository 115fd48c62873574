"""Evict rows in the background and on demand, in slices between the pushes.

A sweep scans a table for rows that its eviction rules select, and deletes them. It runs in slices
of about a millisecond on the engine thread. After each slice, background eviction pauses, so that
it takes 3 % of the engine's time. While a table exceeds its row limit by more than 1/16, it takes
half of the time. A sweep may end early, because the next sweep finds the same rows. If a slice
needs rows that are on disk, the sweep's own thread reads them first, so that the engine need not
wait for the disk.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import structlog

from psproto import ps_pb2 as pb
from psserver.engine import Engine
from psserver.errors import Draining, Overloaded
from psserver.shard import Shard
from storage.errors import DiskFull, LogFailed
from storage.threads import Background

IDLE_SECONDS = 0.1  # seconds until the next check, if no sweep was due
FULL_SECONDS = 1.0  # seconds until the next try after an error, such as a full disk
SHORTEST = 5e-4  # shortest pause between two slices, in seconds

log = structlog.get_logger()


class Sweeper:
    """Evicts rows: in the background on a thread of its own, and on demand by ``evict``."""

    def __init__(self, shard: Shard, engine: Engine) -> None:
        self._shard = shard
        self._engine = engine
        self._stop = threading.Event()
        self._on_demand = threading.Lock()  # locked by a sweep on demand
        self._thread = Background("sweeper", self._run)

    def open(self) -> None:
        """Start the thread of background eviction."""
        self._thread.start()

    def close(self) -> None:
        """Stop the thread and all sweeps on demand. Call it before the engine is closed."""
        self.stop()
        self._thread.join()

    def stop(self) -> None:
        """Make all sweeps end after their current slice; returns immediately."""
        self._stop.set()

    def evict(
        self, request: pb.EvictRequest, gone: threading.Event | None = None
    ) -> pb.EvictResponse:
        """Sweep a table once by all its rules. With dry_run in the request, only count the rows
        that the sweep would evict.

        gone  event that another thread sets to end the sweep, when nobody waits for its result

        Blocks until the sweep is done. Returns the number of rows evicted per rule.

        Raises UnknownTable; DiskFull or Overloaded if the log cannot take the deletes; Overloaded
        if another sweep on demand is running, or the table's rules are altered meanwhile; Draining
        if the server stops or ``gone`` is set. Rows evicted before an error are not restored.
        """
        if not self._on_demand.acquire(blocking=False):
            raise Overloaded("another sweep on demand is in progress on this shard; retry later")
        try:
            return self._evict(request, gone or threading.Event())
        finally:
            self._on_demand.release()

    def _evict(self, request: pb.EvictRequest, gone: threading.Event) -> pb.EvictResponse:
        shard, run = self._shard, self._engine.run
        number, sweep = run(lambda: shard.sweeps.begin(request.table, request.dry_run))
        rows = run(lambda: shard.describe(request.table)[1].rows)
        while not (sweep.done or self._stop.is_set() or gone.is_set()):
            start = time.monotonic()
            run(lambda: shard.sweeps.take_slice(number, sweep))
            self._stop.wait(time.monotonic() - start)  # leave pushes at least half of the time
            if sweep.wanted is not None:
                sweep.wanted()
        if not sweep.done:
            raise Draining("the sweep ended early: the server is stopping, or the caller is gone")
        evicted = {cause.name.lower(): count for cause, count in sweep.counts.items()}
        return pb.EvictResponse(evicted=evicted, rows=rows, version=shard.version)

    def _tick(self) -> tuple[float, float, Callable[[], None] | None]:
        """Run one slice of background eviction. Must run on the engine thread.

        Returns (share of the engine's time that eviction should get, or 0 if nothing is due;
        seconds that the slice took; function to call before the next slice, or None).
        """
        start = time.monotonic()
        share = self._shard.sweeps.tick()
        return share, time.monotonic() - start, self._shard.sweeps.wanted

    def _run(self) -> None:
        """Evict rows in the background until ``stop`` is called. Runs on the sweeper's thread."""
        pause, warned = IDLE_SECONDS, False
        while not self._stop.wait(pause):
            try:
                share, took, wanted = self._engine.run(self._tick)
                if wanted is not None:
                    wanted()
            except LogFailed:
                return
            except (DiskFull, Overloaded, OSError) as error:
                if not warned:
                    log.warning("eviction waits", error=str(error))
                pause, warned = FULL_SECONDS, True
                continue
            except Exception as error:  # the rows stay, and the next sweep finds them
                log.exception("eviction failed", error=str(error))
                pause = FULL_SECONDS
                continue
            pause = max(SHORTEST, took * (1 / share - 1)) if share else IDLE_SECONDS
            warned = False
