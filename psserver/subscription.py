"""One subscription: the log, and a scan of the rows wherever the log does not reach back.

tail       the log after the subscriber's version
snapshot   every row, then the log
catch-up   rows of versions above the subscriber's, and the deletes since then, then the log:
           for a subscriber whose position in the log was truncated
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from psserver.deltas import Deltas
from psserver.logtail import LogTail
from psserver.position import SCANS, WHEN_CUT_OFF, Phase, Position
from psserver.rowscan import RowScan
from psserver.sender import Sender, Write
from psserver.source import Source
from psserver.wanted import Wanted
from storage.errors import Compacted

LARGE_BYTES = 8 << 20  # of records, which a subscriber that does not read may keep in memory
PATIENCE = 60.0  # seconds for which it may keep more


class Subscription:
    """One subscriber, served until something fails."""

    def __init__(
        self,
        source: Source,
        wanted: Wanted,
        position: Position,
        write: Write,
        count: Callable[[int], None],
    ) -> None:
        """Start at ``position``. See Sender for ``write`` and ``count``."""
        self.sender = Sender(position, write, count)
        self._source = source
        self._wanted = wanted
        self._deltas = Deltas(wanted, lambda: source.log.durable, source.log.history)

    async def run(self) -> None:
        """Send changes. Ends only by raising."""
        sender = self.sender
        scan = RowScan(self._source, self._wanted, self._deltas, sender)
        while True:
            if sender.position.phase in SCANS:
                sender.since = time.time()
                await scan.run()
                sender.since = float("inf")
            else:
                tail = LogTail(self._source, self._wanted, self._deltas, sender.position)
                try:
                    await self._follow(tail)
                except Compacted:
                    sender.position = _rescanned(sender.position)
                finally:
                    tail.close()

    async def _follow(self, tail: LogTail) -> None:
        """Send changes as they become durable."""
        source, sender, wanted = self._source, self.sender, self._wanted
        flush = False
        position = sender.position
        if position.phase == Phase.TAIL and source.log.first <= position.version + 1:
            await sender.send([tail.progress(first=True)])
        idle = time.monotonic()  # since when nothing was sent
        while True:
            source.check_draining()
            moved = source.moved
            hurry = flush or not wanted.coalesce_seconds or tail.within
            messages = await source.work(partial(tail.messages, hurry))
            if messages:
                sender.since = tail.since or float("inf")
                await sender.send(messages, PATIENCE if tail.pending > LARGE_BYTES else None)
                sender.since, tail.since = float("inf"), 0.0
            sender.position = tail.position
            if messages:
                idle = time.monotonic()
                flush = False
                continue
            due = idle + wanted.progress_seconds
            if tail.gathering:
                due = tail.gathering + wanted.coalesce_seconds
            late = tail.seen >= source.log.durable and not await _happens(moved, due)
            flush = late and bool(tail.gathering)
            if late and not flush:
                await sender.send([tail.progress()])
                idle = time.monotonic()


def _rescanned(position: Position) -> Position:
    """Return where to go on when the log no longer has the next change: a scan of the rows."""
    return replace(
        position,
        phase=WHEN_CUT_OFF[position.phase],
        after=position.version,
        until=0,
        table=0,
        slot=0,
        boot=0,
    )


async def _happens(event: asyncio.Event, due: float) -> bool:
    """Wait for an event until a monotonic time. Returns whether it happened."""
    try:
        async with asyncio.timeout(max(due - time.monotonic(), 0)):
            await event.wait()
    except TimeoutError:
        return False
    return True
