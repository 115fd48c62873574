"""Eviction in the background, and on demand: slices of sweeps between the pushes.

A slice takes the engine for about a millisecond. The background pauses after each one so
long that eviction has 3 % of the engine's time, or half of it while a table exceeds its rows by
more than a sixteenth. Nothing is lost if a sweep ends early: the next one finds the same rows.
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

IDLE_SECONDS = 0.1  # between two looks at whether something is due
FULL_SECONDS = 1.0  # between two tries while the log has no room
SHORTEST = 5e-4  # seconds between two slices

log = structlog.get_logger()


class Sweeper:
    """A thread that evicts, and what sweeps on demand need."""

    def __init__(self, shard: Shard, engine: Engine) -> None:
        self._shard = shard
        self._engine = engine
        self._stop = threading.Event()
        self._asked = threading.Lock()  # held by a sweep on demand
        self._thread = threading.Thread(target=self._run, name="sweeper", daemon=True)

    def open(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """Stop it, and sweeps on demand; the engine must still run."""
        self.stop()
        self._thread.join()

    def stop(self) -> None:
        """Let no sweep go on."""
        self._stop.set()

    def evict(
        self, request: pb.EvictRequest, gone: threading.Event | None = None
    ) -> pb.EvictResponse:
        """Sweep a table once by all its rules, or only count what that would evict; blocks.

        gone  set when nobody waits for the answer any more: the sweep ends

        Raises UnknownTable, DiskFull or Overloaded where the log has no room for the deletes,
        Overloaded while another sweep is asked for, and Draining; what was evicted until then stays
        so.
        """
        if not self._asked.acquire(blocking=False):
            raise Overloaded("the shard is at another sweep that was asked for")
        try:
            return self._evict(request, gone or threading.Event())
        finally:
            self._asked.release()

    def _evict(self, request: pb.EvictRequest, gone: threading.Event) -> pb.EvictResponse:
        shard, run = self._shard, self._engine.run
        number, sweep = run(lambda: shard.sweeps.begin(request.table, request.dry_run))
        rows = run(lambda: shard.describe(request.table)[1].rows)
        while not (sweep.done or self._stop.is_set() or gone.is_set()):
            start = time.monotonic()
            run(lambda: shard.sweeps.take_slice(number, sweep))
            self._stop.wait(time.monotonic() - start)  # leave pushes at least half of the time
        if not sweep.done:
            raise Draining("the server is stopping, or whoever asked is gone")
        evicted = {cause.name.lower(): count for cause, count in sweep.counts.items()}
        return pb.EvictResponse(evicted=evicted, rows=rows, version=shard.version)

    def _tick(self) -> tuple[float, float]:
        start = time.monotonic()
        share = self._shard.sweeps.tick()
        return share, time.monotonic() - start

    def _run(self) -> None:
        pause, told = IDLE_SECONDS, False
        while not self._stop.wait(pause):
            try:
                share, took = self._engine.run(self._tick)
            except LogFailed:
                return
            except (DiskFull, Overloaded, OSError) as error:
                if not told:
                    log.warning("eviction waits", error=str(error))
                pause, told = FULL_SECONDS, True
                continue
            except Exception as error:  # memory, say: the rows stay, and the next sweep finds them
                log.exception("eviction failed", error=str(error))
                pause = FULL_SECONDS
                continue
            pause, told = max(SHORTEST, took * (1 / share - 1)) if share else IDLE_SECONDS, False
