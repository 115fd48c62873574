"""Subscriptions over a shard with its data directory, in this process.

``History`` notes what the shard holds after every version. A subscriber that is told the truth
holds, at every commit mark, what the shard held at that version: `Copy`, which follows the comments
of ps.proto with dicts and nothing clever, is compared with it at every mark of every test.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from stores import DIM, Home, change, push, schema

from psproto import codec
from psproto import ps_pb2 as pb
from psserver import wanted
from psserver.engine import Engine
from psserver.feed import Feed
from psserver.shard import Shard

K = pb.DeltaHeader
Rows = dict[int, tuple[float, ...]]
Tables = dict[str, Rows]
wanted.LEAST_CHUNK_BYTES = 1  # so that a few rows take several messages
SEGMENT = 4096  # bytes: a few changes each
QUIET = 0.05  # seconds in which nothing comes


# ---- what a shard held, and what a subscriber holds


def held(shard: Shard) -> Tables:
    """Embeddings by table and key."""
    return {
        name: {
            int(key): tuple(row[:DIM].tolist())
            for key, row in zip(dump.keys, dump.rows, strict=True)
        }
        for name, dump in shard.dump().items()
    }


class Copy:
    """A subscriber's copy: rows with their versions, applied where they are newer."""

    def __init__(self) -> None:
        self.tables: dict[str, tuple[int, dict[int, tuple[int, tuple[float, ...]]]]] = {}
        self.newest = 0  # version of what was applied
        self.building: Copy | None = None
        self.stated: set[str] | None = None

    def rows(self) -> Tables:
        return {
            name: {key: row for key, (_, row) in rows.items()}
            for name, (_, rows) in self.tables.items()
        }

    def take(self, delta: codec.Delta) -> None:
        header = delta.header
        self.newest = max(self.newest, header.version)
        if header.kind == K.KIND_SNAPSHOT:
            self.building = Copy()
        if self.building is not None:
            self.building._apply(delta)
            if header.kind == K.KIND_SNAPSHOT_END:
                self.tables, self.building = self.building.tables, None
        else:
            self._apply(delta)

    def _apply(self, delta: codec.Delta) -> None:
        header, name = delta.header, delta.header.table
        versions = delta.versions.tolist() or [header.version] * len(delta.keys)
        pairs = list(zip(delta.keys.tolist(), versions, strict=True))
        assert len({key for key, _ in pairs}) == len(pairs)
        match header.kind:
            case K.KIND_ROWS if name in self.tables and header.version < self.tables[name][0]:
                pass  # a repetition, of an older table of the name
            case K.KIND_ROWS if name in self.tables or self.stated is None:
                values = delta.rows.reshape(len(pairs), header.width)[:, : header.dim].tolist()
                rows = self.tables[name][1]
                for (key, version), row in zip(pairs, values, strict=True):
                    if key not in rows or rows[key][0] <= version:
                        rows[key] = version, tuple(row)
            case K.KIND_DELETES if name in self.tables:
                rows = self.tables[name][1]
                for key, version in pairs:
                    if key in rows and rows[key][0] <= version:
                        del rows[key]
            case K.KIND_TABLE_CREATED:
                assert header.schema.name == name
                if name not in self.tables or self.tables[name][0] < header.version:
                    self.tables[name] = header.version, {}
                if self.stated is not None:
                    self.stated.add(name)
            case K.KIND_TABLE_DROPPED:
                if name in self.tables and self.tables[name][0] < header.version:
                    del self.tables[name]
            case K.KIND_SNAPSHOT | K.KIND_CATCH_UP:
                self.stated = set()
            case K.KIND_SNAPSHOT_END:
                assert self.stated is not None
                for gone in self.tables.keys() - self.stated:
                    del self.tables[gone]
                self.stated = None


class Node:
    """A shard, its engine thread and its feed, on this loop."""

    def __init__(self, directory: Path, most: int = 4, **options: Any) -> None:
        self._most = most
        self.home = Home(directory, **{"segment_bytes": SEGMENT, **options})
        self.history: dict[int, Tables] = {0: {}}

    async def open(self) -> Node:
        self.engine = Engine()
        self.home._engine = self.engine
        self.home.open()
        self.engine.open(asyncio.get_running_loop())
        self.feed = Feed(self.home.shard, self.engine, self.home.log, max_subscribers=self._most)
        self.feed.open(asyncio.get_running_loop())
        self.home.log._wake = self.feed.wake
        return self

    async def close(self) -> None:
        self.feed.drain()
        while self.feed.subscribers:
            await asyncio.sleep(0.001)
        self.feed.close()
        self.engine.close()
        self.home.close()

    async def reopen(self) -> None:
        await self.close()
        await self.open()

    async def die(self, leave: Callable[[Path, Path], Any]) -> None:
        """Come up with what ``leave`` copies of the directory; nobody subscribes meanwhile."""
        log, written = self.home.log, threading.Event()
        log.wait(log.last, False, written.set)
        await asyncio.to_thread(written.wait)
        durable = log.durable
        target = self.home.directory.with_name(f"{self.home.directory.name}-")
        leave(self.home.directory, target)
        await self.close()
        self.home.directory = target
        await self.open()
        assert self.shard.version >= durable
        for lost in [version for version in self.history if version > self.shard.version]:
            del self.history[lost]

    @property
    def shard(self) -> Shard:
        return self.home.shard

    async def do(self, call: Callable[[Shard], Any]) -> Any:
        """Change the shard, one version at a time, and note what it holds then."""

        def work() -> Any:
            result = call(self.shard)
            self.history[self.shard.version] = held(self.shard)
            return result

        return await self.engine.submit(work)

    async def create(self, name: str = "t", **changes: Any) -> None:
        await self.do(lambda shard: shard.create_table(schema(name, **changes)))

    async def drop(self, name: str = "t") -> None:
        await self.do(lambda shard: shard.drop_table(name))

    async def push(
        self, keys: list[int], value: float = 1.0, table: str = "t", **more: Any
    ) -> None:
        await self.do(lambda shard: shard.exchange([push(keys, value, table, **more)], []))

    async def delete(self, keys: list[int], table: str = "t") -> None:
        await self.do(lambda shard: shard.delete(change(keys, table)))

    async def barrier(self, name: str) -> None:
        await self.do(lambda shard: shard.barrier(name))

    async def durable(self) -> int:
        await asyncio.to_thread(self.home.log.sync, self.home.log.last)
        return self.home.log.durable

    async def cut(self) -> None:
        """Cut the log up to the newest version."""
        await self.durable()
        await asyncio.to_thread(self.home.flush)

    async def cool(self) -> None:
        """Flush, and give up all rows in memory, so that they are only on disk."""

        def demote() -> None:
            for entry in self.shard._tables:
                entry.table.store.demote(entry.table.store.host.slots.rows)

        await asyncio.to_thread(self.home.flush)
        await self.engine.submit(demote)

    @asynccontextmanager
    async def subscribe(self, copied: Copy | None = None, **fields: Any) -> AsyncIterator[Reader]:
        reader = Reader(self, copied or Copy(), pb.SubscribeRequest(**fields))
        try:
            yield reader
        finally:
            await reader.close()

    async def read(self, copied: Copy | None = None, **fields: Any) -> list[codec.Delta]:
        """All that a subscriber is sent until it is up to date."""
        await self.durable()
        async with self.subscribe(copied, **fields) as reader:
            return await reader.up_to(self.shard.version)


class Reader:
    """A subscriber that takes one message at a time, and checks its copy at every mark."""

    def __init__(self, node: Node, copied: Copy, request: pb.SubscribeRequest) -> None:
        self.copy = copied
        self.token = b""
        self.tokens: list[bytes] = []
        self.marks: list[bytes] = []  # the tokens of commit marks
        self.sent = 0  # messages that the feed has had taken
        self._node = node
        self._tables = list(request.tables)
        self._checks = request.content != pb.CONTENT_KEYS
        self._from = 0
        self._messages: asyncio.Queue[bytes] = asyncio.Queue()
        self._room = asyncio.Semaphore(0)  # messages that the subscriber is ready to read
        self.task = asyncio.create_task(node.feed.serve(request.SerializeToString(), self._write))

    async def _write(self, message: bytes) -> None:
        await self._room.acquire()
        self.sent += 1
        self._messages.put_nowait(message)

    async def close(self) -> None:
        self.task.cancel()
        await asyncio.wait({self.task})
        assert self.task.cancelled() or self.task.exception()

    async def next(self) -> codec.Delta:
        """The next message; raises what ended the subscription."""
        self._room.release()
        return await self._take()

    async def maybe(self) -> bool:
        """Take the next message if it comes soon; whether it did."""
        if self._messages.empty() and await self.silent():
            return False
        await self._take()
        return True

    async def _take(self) -> codec.Delta:
        get = asyncio.create_task(self._messages.get())
        await asyncio.wait({get, self.task}, return_when=asyncio.FIRST_COMPLETED, timeout=60)
        if not get.done():
            get.cancel()
            self.task.result()
            raise AssertionError("nothing came")
        delta = codec.decode_delta(get.result())
        header = delta.header
        self.copy.take(delta)
        self.token = header.token or self.token
        self.tokens.append(header.token)
        assert header.head <= self._node.home.log.durable
        assert header.more or header.token, "a commit mark has a token"
        assert header.kind == K.KIND_TABLE_CREATED or header.version <= header.head
        if not header.more:
            self.marks.append(header.token)
            self.check(header.version)
        return delta

    def check(self, version: int) -> None:
        """The copy is what the shard held at a version."""
        if not self._checks or version not in self._node.history:
            return
        if version < self.copy.newest:  # it has parts of the change that was interrupted
            return
        then = self._node.history[version]
        if self._tables:
            then = {name: rows for name, rows in then.items() if name in self._tables}
        ours = {name: rows for name, rows in self.copy.rows().items() if rows or name in then}
        assert ours == then

    async def up_to(self, version: int) -> list[codec.Delta]:
        """Messages until the copy is at a version."""
        found = [await self.next()]
        while found[-1].header.more or found[-1].header.version < version:
            found.append(await self.next())
        return found

    async def silent(self) -> bool:
        """Whether nothing comes for a moment, though the subscriber would read it."""
        self._room.release()
        await asyncio.sleep(QUIET)
        return self._messages.empty()


def run(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """A test that is a coroutine on a node of its own."""

    def wrapped(tmp_path: Path) -> None:
        async def main() -> None:
            node = await Node(tmp_path / "shard").open()
            try:
                await asyncio.wait_for(test(node), 60)
            finally:
                await node.close()

        asyncio.run(main())

    for each in ("__module__", "__name__", "__qualname__", "__doc__"):  # no __wrapped__: see pytest
        setattr(wrapped, each, getattr(test, each))
    return wrapped


async def with_node(directory: Path, test: Callable[[Node], Awaitable[None]], **more: Any) -> None:
    node = await Node(directory, **more).open()
    try:
        await asyncio.wait_for(test(node), 60)
    finally:
        await node.close()


def kinds(deltas: list[codec.Delta]) -> list[str]:
    return [K.Kind.Name(delta.header.kind).removeprefix("KIND_") for delta in deltas]


def said(delta: codec.Delta) -> tuple[str, int, list[int]]:
    return delta.header.table, delta.header.version, delta.keys.tolist()


async def fill(node: Node, changes: int = 60, table: str = "t") -> None:
    """Changes that take many segments."""
    rng = random.Random(node.shard.version)
    for _ in range(changes):
        keys = rng.sample(range(100), 20)
        if rng.random() < 0.3:
            await node.delete(keys[:8], table)
        else:
            await node.push(keys, float(rng.randrange(1, 9)), table)


async def refused(node: Node, **fields: Any) -> Exception:
    async with node.subscribe(**fields) as reader:
        with pytest.raises(Exception, match=r".") as caught:
            await reader.next()
    return caught.value
