"""Access to the shard, its log and worker threads for all subscriptions of the shard."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TypeVar

from psproto import ps_pb2 as pb
from psserver.engine import Engine
from psserver.errors import Draining
from psserver.freshness import Freshness
from psserver.loops import post
from psserver.shard import Shard
from storage.versionlog import VersionLog

THREADS = 2  # worker threads for all subscriptions
COALESCED_BYTES = 128 << 20  # bytes of log records that all subscriptions may keep to merge

Result = TypeVar("Result")


class Source:
    """Gives subscriptions access to the shard's log and rows, and wakes them for new changes.

    boot       random number of this process, never 0
    moved      event to wait for new changes: it is set when there are some, and a new event takes
               its place
    draining   True while the server is stopping
    readers    number of running subscriptions
    freshness  measures when acknowledged pushes reach subscribers
    """

    def __init__(self, shard: Shard, engine: Engine, log: VersionLog) -> None:
        """Store the arguments. Call ``open`` on the event loop before use."""
        self.shard = shard
        self.engine = engine
        self.log = log
        self.boot = int.from_bytes(os.urandom(8), "little") | 1
        self.moved = asyncio.Event()
        self.draining = False
        self.readers = 0
        self.freshness = Freshness()
        # futures that ``_logged`` waits for, by its arguments
        self._awaited: dict[tuple[int, bool], set[asyncio.Future[None]]] = {}
        self._pool = ThreadPoolExecutor(THREADS, "feed")

    def open(self, loop: asyncio.AbstractEventLoop) -> None:
        """Set the event loop on which all subscriptions run."""
        self._loop = loop

    def close(self) -> None:
        """Stop the worker threads. Call it after all subscriptions have ended."""
        self._pool.shutdown()

    def wake(self) -> None:
        """Wake the subscriptions because there are new changes. Any thread may call this."""
        post(self._loop, self.signal)

    def signal(self) -> None:
        """Wake the subscriptions. Must run on the event loop."""
        moved, self.moved = self.moved, asyncio.Event()
        moved.set()

    @property
    def coalesce_bytes(self) -> int:
        """Size of the log records that each subscription may keep in memory to merge them."""
        return COALESCED_BYTES // max(self.readers, 1)

    def check_draining(self) -> None:
        """Raise Draining if the server is stopping."""
        if self.draining:
            raise Draining("the server is stopping")

    async def work(self, call: Callable[[], Result]) -> Result:
        """Run ``call`` on a worker thread, and return its result.

        If the caller is canceled, it still waits until ``call`` has ended, then raises
        CancelledError.
        """
        running = self._loop.run_in_executor(self._pool, call)
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            while not running.done():
                with suppress(asyncio.CancelledError):
                    await asyncio.wait({running})
            raise

    async def settled(self, version: int, level: int) -> int:
        """Wait until a version has reached a durability level; return the newest version on disk.

        level  pb.Durability: LOG waits until the log record is written, FSYNC until it is on disk;
               other levels do not wait
        """
        log = self.log
        if level == pb.DURABILITY_LOG:
            if version > log.written:
                await self._logged(version, False)
        elif level == pb.DURABILITY_FSYNC and version > log.durable:
            await self._logged(version, True)
        return log.durable

    async def durable(self, version: int) -> None:
        """Wait until a version is on disk."""
        await self.settled(version, pb.DURABILITY_FSYNC)

    async def _logged(self, version: int, durable: bool) -> None:
        """Wait until a version is written to the log or, if ``durable``, on disk.

        All calls with equal arguments share one callback of the log, so that canceled calls do not
        leave callbacks behind.
        """
        key, future = (version, durable), self._loop.create_future()
        waiting = self._awaited.get(key)
        if waiting is None:
            waiting = self._awaited[key] = set()
            self.log.wait(version, durable, partial(post, self._loop, self._reach, key))
        waiting.add(future)
        try:
            await future
        finally:
            waiting.discard(future)

    def _reach(self, key: tuple[int, bool]) -> None:
        """Wake all calls of ``_logged`` with the arguments ``key``. Must run on the event loop."""
        for future in self._awaited.pop(key):
            if not future.done():
                future.set_result(None)
