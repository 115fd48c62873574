"""Eviction in the background and on demand, in slices between the pushes.

A slice takes about a millisecond of the engine's time. After each slice, background eviction pauses
so that it gets 3 % of the engine's time, or half of it while a table has 1/16 more rows than it may
have. A sweep that ends early loses nothing: the next sweep finds the same rows.
"""

from __future__ import annotations

import threading
import time

import structlog

from psproto import ps_pb2 as pb
from psserver.engine import Engine
from psserver.errors import Draining, Overloaded
from psserver.shard import Shard
from storage.errors import DiskFull, LogFailed

IDLE_SECONDS = 0.1  # seconds until the next check whether a sweep is due
FULL_SECONDS = 1.0  # seconds until the next try, while the log has no room
SHORTEST = 5e-4  # seconds between two slices, at least

log = structlog.get_logger()


class Sweeper:
    """Background eviction, on a thread of its own, and sweeps on demand."""

    def __init__(self, shard: Shard, engine: Engine) -> None:
        self._shard = shard
        self._engine = engine
        self._stop = threading.Event()
        self._on_demand = threading.Lock()  # locked by a sweep on demand
        self._thread = threading.Thread(target=self._run, name="sweeper", daemon=True)

    def open(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """Stop the thread and sweeps on demand. The engine must still run."""
        self.stop()
        self._thread.join()

    def stop(self) -> None:
        """Let all sweeps end after their present slice."""
        self._stop.set()

    def evict(
        self, request: pb.EvictRequest, gone: threading.Event | None = None
    ) -> pb.EvictResponse:
        """Sweep a table once by all its rules, or only count what would be evicted. Blocks.

        gone  set by the caller to end the sweep, because no one waits for the answer any more

        Raises UnknownTable; DiskFull or Overloaded if the log has no room for the deletes;
        Overloaded while another sweep on demand runs, or if the table's rules are altered; Draining
        if the server stops. Rows that were evicted before an error stay evicted.
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
        if not sweep.done:
            raise Draining("the sweep ended early: the server is stopping, or the caller is gone")
        evicted = {cause.name.lower(): count for cause, count in sweep.counts.items()}
        return pb.EvictResponse(evicted=evicted, rows=rows, version=shard.version)

    def _tick(self) -> tuple[float, float]:
        start = time.monotonic()
        share = self._shard.sweeps.tick()
        return share, time.monotonic() - start

    def _run(self) -> None:
        pause, warned = IDLE_SECONDS, False
        while not self._stop.wait(pause):
            try:
                share, took = self._engine.run(self._tick)
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
