"""Serve one subscription: send changes from the log, after a scan of the rows if one is needed.

tail      the log has all changes after the subscriber's version: send them
snapshot  send all rows, then the changes from the log
catch-up  the log was truncated and lacks changes after the subscriber's version: send the rows
          and deletes that are newer than this version, then the changes from the log
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

LARGE_BYTES = 8 << 20  # bytes of records that may wait for a slow subscriber without time limit
PATIENCE = 60.0  # if more bytes wait: maximum seconds until the subscriber reads a message


class Subscription:
    """One subscription: sends all changes after a position to one subscriber, until an error.

    sender  writes the messages, and has the present position
    """

    def __init__(
        self,
        source: Source,
        wanted: Wanted,
        position: Position,
        write: Write,
        count: Callable[[int], None],
    ) -> None:
        """Store the arguments.

        wanted    options that the subscriber requested
        position  the first change to send is the one after this position
        write     sends one message; waits while the subscriber does not read
        count     called after each sent message with its size in bytes
        """
        self.sender = Sender(position, write, count)
        self._source = source
        self._began = source.shard.version
        self._wanted = wanted
        self._deltas = Deltas(wanted, lambda: source.log.durable, source.log.history)

    async def run(self) -> None:
        """Send changes until an error. Never returns.

        Raises Draining when the server stops, Overloaded if the subscriber does not read, and
        VersionCompacted if the shard no longer knows all deletes that the subscriber needs.
        """
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
        """Send changes from the log as soon as they are on disk, or merged as the options of the
        subscription require. Send progress messages while there are no changes. Never returns.

        tail  reads the log and encodes messages

        Raises Compacted if the log no longer has the next change.
        """
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
            self._measure(tail)
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

    def _measure(self, tail: LogTail) -> None:
        """Count the freshness of the pushes that are written now, unless they were made before the
        subscription began.
        """
        pushes, tail.pushes = tail.pushes, []
        if pushes:
            new = [version for version in pushes if version > self._began]
            self._source.freshness.written(new)


def _rescanned(position: Position) -> Position:
    """Return the position from which a subscriber continues if the log lacks its next change.

    position  its position so far

    It continues with a scan of the rows, which sends those newer than the version of ``position``.
    """
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
    """Wait until ``event`` is set, at most until the monotonic time ``due``, in seconds.

    Returns whether the event was set in time.
    """
    try:
        async with asyncio.timeout(max(due - time.monotonic(), 0)):
            await event.wait()
    except TimeoutError:
        return False
    return True
