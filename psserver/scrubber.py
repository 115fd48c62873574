"""Verify the blocks on disk in the background, so that damage is noticed before it is needed.

A request verifies only the pieces of a block that it reads, and each piece only once. The scrubber
reads whole blocks again and again, at a low rate. It also examines a block at once if a request,
a scan or a flush has noticed damage of it. Rows of a damaged block that can still be read are moved
to a new block by the next flush. Requests that need the other rows fail.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from queue import Empty

import numpy as np
import structlog

from psproto import ps_pb2 as pb
from psserver.blockchecks import BlockChecks
from psserver.engine import Engine
from psserver.flusher import Flusher
from psserver.work import Progress
from storage.blockcheck import BlockCheck
from storage.damage import Damage
from storage.threads import Background

LONGEST = 60.0  # seconds between two looks at how many blocks there are

log = structlog.get_logger()


class Scrubber:
    """The thread that verifies blocks.

    seconds  time for one pass over all blocks; 0: verify only blocks in which damage was noticed

    passes   number of passes that have ended
    bytes    number of bytes verified
    """

    def __init__(
        self, checks: BlockChecks, engine: Engine, flusher: Flusher, seconds: float
    ) -> None:
        self.passes = self.bytes = 0
        self._checks, self._engine, self._flusher = checks, engine, flusher
        self._seconds = seconds
        self._stop = threading.Event()
        self._turn = threading.Lock()  # held while a block is verified
        self._thread = Background("scrubber", self._run)

    def open(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """Stop the thread. Call it after the flusher is closed, and before the engine is."""
        self._stop.set()
        self._checks.suspects.put(None)
        self._thread.join()

    def verify(
        self, request: pb.VerifyRowsRequest, progress: Progress
    ) -> Iterator[pb.VerifyRowsResponse]:
        """Verify all blocks of a table, as fast as possible: yield progress, then damaged blocks.

        progress  raises an error if the server stops

        Must run on a worker thread. Raises UnknownTable, OSError.
        """
        run, checks = self._engine.run, self._checks
        number = run(partial(checks.number_of, request.table))
        _, progress.total = run(partial(checks.count, number))
        for size in self._over(number):
            progress.add(size)
            yield pb.VerifyRowsResponse(bytes=progress.bytes, total=progress.total)
        for each in run(partial(checks.damaged, number)):
            keys = np.empty(0, np.uint64)
            if request.keys:
                found = run(partial(checks.lost_keys, number, each.number))
                if found is None:
                    continue
                keys = found
            damaged = pb.DamagedBlock(
                number=each.number,
                rows=each.live,
                lost_rows=each.lost,
                problem=each.what,
                keys=keys.astype("<u8").tobytes(),
            )
            yield pb.VerifyRowsResponse(bytes=progress.bytes, total=progress.bytes, damaged=damaged)

    def _run(self) -> None:
        blocks, due = self._endless(), time.monotonic() + self._pause()
        while not self._stop.is_set():
            wait = min(LONGEST, max(0.0, due - time.monotonic()))
            try:
                suspect = self._checks.suspects.get(timeout=wait)
                if suspect is not None:
                    self._guarded(partial(self._examine_suspect, *suspect))
            except Empty:
                if self._seconds and time.monotonic() >= due:
                    self._guarded(partial(next, blocks))
                    due = time.monotonic() + self._pause()
                elif self._seconds:
                    due = min(due, time.monotonic() + self._pause())

    def _guarded(self, call: Callable[[], object]) -> None:
        """Run ``call``; log an error instead of raising it."""
        try:
            call()
        except Exception as error:
            log.warning(
                "scrubber failed", error=str(error), exc_info=not isinstance(error, OSError)
            )

    def _pause(self) -> float:
        """Return how many seconds after one block the next one is due."""
        count, _ = self._engine.run(self._checks.count)
        return self._seconds / max(1, count) if self._seconds else LONGEST

    def _endless(self) -> Iterator[int]:
        """Verify all blocks of all tables again and again, one block per step. Yields sizes."""
        while True:
            found = False
            for number in self._engine.run(self._checks.numbers):
                for size in self._over(number):
                    found = True
                    yield size
            self.passes += 1
            if not found:
                yield 0

    def _over(self, number: int) -> Iterator[int]:
        """Verify the blocks of the table with this number. Yields the size of each block."""
        at = 0
        while not self._stop.is_set():
            check = self._engine.run(partial(self._checks.begin, number))
            if check is None or not check.next(at):
                return
            at = check.number + 1
            size = self._examine(number, check)
            del check  # so that the block may be deleted while the caller waits
            yield size

    def _examine_suspect(self, number: int, block: int) -> None:
        """Verify a block in which damage was noticed, unless it is known already."""
        if self._engine.run(partial(self._checks.known, number, block)):
            return
        check = self._engine.run(partial(self._checks.begin, number))
        if check is not None and check.next(block) and check.number == block:
            self._examine(number, check)

    def _examine(self, number: int, check: BlockCheck) -> int:
        """Verify the block that ``check`` holds, and return its size.

        number  number of its table
        """
        with self._turn:
            block, size = check.number, check.size
            damage = check.examine()
            self.bytes += size
            if damage is None:
                self._engine.run(partial(self._checks.record, number, block, None))
            else:
                self._found(number, block, damage)
        return size

    def _found(self, number: int, block: int, damage: Damage) -> None:
        """Record the damage of a block, and have its readable rows moved to a new block."""
        with self._flusher.paused():
            new = self._engine.run(partial(self._checks.record, number, block, damage))
        if new is not None:
            log.error(
                "a block on disk is damaged",
                table=new.table,
                block=new.number,
                rows=new.live,
                lost_rows=new.lost,
                error=new.what,
            )
            self._flusher.ask()
