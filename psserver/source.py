"""What the subscriptions of one shard share: its log, its engine and the threads of the feed."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

from psproto import ps_pb2 as pb
from psserver.engine import Engine
from psserver.errors import Draining
from psserver.loops import post
from psserver.shard import Shard
from storage.versionlog import VersionLog

THREADS = 2
COALESCED_BYTES = 128 << 20  # bytes of records that all subscriptions coalesce at a time

Result = TypeVar("Result")


class Source:
    """Where subscriptions read changes and rows.

    boot      random number of this process, never 0
    moved     an event that is set, and replaced, whenever there is more to send
    draining  the server is stopping
    readers   number of subscriptions
    """

    def __init__(self, shard: Shard, engine: Engine, log: VersionLog) -> None:
        """Store the parts. ``open`` must follow, on the loop."""
        self.shard = shard
        self.engine = engine
        self.log = log
        self.boot = int.from_bytes(os.urandom(8), "little") | 1
        self.moved = asyncio.Event()
        self.draining = False
        self.readers = 0
        self._awaited: dict[tuple[int, bool], asyncio.Event] = {}  # version, whether durable
        self._pool = ThreadPoolExecutor(THREADS, "feed")

    def open(self, loop: asyncio.AbstractEventLoop) -> None:
        """Serve subscriptions that run on ``loop``."""
        self._loop = loop

    def close(self) -> None:
        """Stop the threads. The subscriptions have ended."""
        self._pool.shutdown()

    def wake(self) -> None:
        """Report that there is more to send. Any thread may call this."""
        post(self._loop, self.signal)

    def signal(self) -> None:
        """Wake the subscriptions; called on the loop."""
        moved, self.moved = self.moved, asyncio.Event()
        moved.set()

    @property
    def coalesce_bytes(self) -> int:
        """Bytes of records that each subscription may coalesce: its share of COALESCED_BYTES."""
        return COALESCED_BYTES // max(self.readers, 1)

    def check_draining(self) -> None:
        """Raise Draining if the server is stopping."""
        if self.draining:
            raise Draining("the server is stopping")

    async def work(self, call: Callable[[], Result]) -> Result:
        """Run ``call`` on a thread of the feed. A cancelled caller still waits until it ends."""
        running = self._loop.run_in_executor(self._pool, call)
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            while not running.done():
                with suppress(asyncio.CancelledError):
                    await asyncio.wait({running})
            raise

    async def settled(self, version: int, level: int) -> int:
        """Wait until a version is as safe as the pb.Durability ``level`` asks.

        Returns the newest durable version.
        """
        log = self.log
        if level == pb.DURABILITY_FSYNC and version > log.durable:
            await self._logged(version, durable=True)
        elif level == pb.DURABILITY_LOG and version > log.written:
            await self._logged(version, durable=False)
        return log.durable

    async def durable(self, version: int) -> None:
        """Wait until a version is durable."""
        await self.settled(version, pb.DURABILITY_FSYNC)

    async def _logged(self, version: int, *, durable: bool) -> None:
        """Wait with everybody who waits for the same, so that cancelled calls leave nothing."""
        key = version, durable
        reached = self._awaited.get(key)
        if reached is None:
            reached = self._awaited[key] = asyncio.Event()
            self.log.wait(version, durable, lambda: post(self._loop, self._reach, key))
        await reached.wait()

    def _reach(self, key: tuple[int, bool]) -> None:
        self._awaited.pop(key).set()
