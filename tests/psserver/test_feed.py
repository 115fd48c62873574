"""Subscriptions over a shard with its data directory, in this process.

``History`` notes what the shard holds after every version. A subscriber that is told the truth
holds, at every commit mark, what the shard held at that version: `Copy`, which follows the comments
of ps.proto with dicts and nothing clever, is compared with it at every mark of every test.
"""

from __future__ import annotations

import asyncio
import copy
import os
import random
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from stores import DIM, Home, change, copy_of, power_cut, push, schema

from psproto import codec
from psproto import ps_pb2 as pb
from psserver import rowscan
from psserver.engine import Engine
from psserver.errors import (
    BadRequest,
    Draining,
    LogDiverged,
    TooLarge,
    VersionCompacted,
    VersionInFuture,
)
from psserver.feed import Feed
from psserver.position import Phase, decode
from psserver.shard import Shard
from storage.disk import Disk
from storage.optimizers import make_optimizer

K = pb.DeltaHeader
Rows = dict[int, tuple[float, ...]]
Tables = dict[str, Rows]
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
        await asyncio.wait({get, self.task}, return_when=asyncio.FIRST_COMPLETED, timeout=20)
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

    wrapped.__name__, wrapped.__doc__ = test.__name__, test.__doc__
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


# ---- where a subscription starts


@run
async def test_a_snapshot_is_every_row_and_then_the_changes(node: Node) -> None:
    await node.create()
    await node.push([1, 2, 3])
    await node.delete([2])
    await node.durable()
    async with node.subscribe() as reader:
        found = await reader.up_to(3)
        assert kinds(found) == ["SNAPSHOT", "TABLE_CREATED", "ROWS", "SNAPSHOT_END"]
        assert [delta.header.more for delta in found] == [True, True, True, False]
        assert all(reader.tokens)
        assert found[2].versions.tolist() == [2, 2]
        await node.push([4], 2.0)
        found = await reader.up_to(4)
        assert kinds(found) == ["ROWS"]
        assert said(found[0]) == ("t", 4, [4])
        assert found[0].header.time_us == 1_500_000


@run
async def test_an_empty_shard_is_an_empty_snapshot(node: Node) -> None:
    async with node.subscribe(start=pb.START_SNAPSHOT) as reader:
        assert kinds(await reader.up_to(0)) == ["SNAPSHOT", "SNAPSHOT_END"]
        await node.create()
        assert kinds(await reader.up_to(1)) == ["TABLE_CREATED"]


@run
async def test_earliest_is_every_change_in_its_order(node: Node) -> None:
    await node.create("a")
    await node.create("b")
    await node.push([1, 2], table="a")
    await node.push([7], table="b")
    await node.barrier("noon")
    await node.delete([1], table="a")
    await node.drop("b")
    await node.create("b", dim=3)
    found = await node.read(start=pb.START_EARLIEST)
    assert kinds(found) == [
        "PROGRESS",
        "TABLE_CREATED",
        "TABLE_CREATED",
        "ROWS",
        "ROWS",
        "BARRIER",
        "DELETES",
        "TABLE_DROPPED",
        "TABLE_CREATED",
    ]
    assert [delta.header.version for delta in found] == list(range(9))
    assert not any(delta.header.more for delta in found)
    assert found[5].header.barrier == "noon"
    assert (found[6].header.cause, said(found[6])) == ("request", ("a", 6, [1]))
    assert found[7].header.table == "b"
    assert (found[8].header.schema.dim, found[8].header.dim) == (3, 3)


@run
async def test_latest_is_what_comes_from_now_on(node: Node) -> None:
    await node.create()
    await node.push([1])
    await node.durable()
    async with node.subscribe(start=pb.START_LATEST) as reader:
        reader._checks = False  # it never had the rest
        first = await reader.next()
        assert (kinds([first]), first.header.version) == (["PROGRESS"], 2)
        assert await reader.silent()
        await node.push([2])
        reader.copy.tables["t"] = (1, {})
        assert [said(each) for each in await reader.up_to(3)] == [("t", 3, [2])]


@run
async def test_a_token_goes_on_behind_its_change_without_a_gap(node: Node) -> None:
    await node.create()
    copied = Copy()
    token = b""
    for i in range(5):
        await node.push([i, i + 1])
        await node.durable()
        async with node.subscribe(copied, token=token) as reader:
            found = await reader.up_to(i + 2)
            token = reader.token
        if i:
            assert kinds(found) == ["PROGRESS", "ROWS"]
            assert said(found[1]) == ("t", i + 2, [i, i + 1])


def test_only_what_is_on_disk_is_sent(tmp_path: Path) -> None:
    gate = threading.Event()
    gate.set()

    def slow(fd: int) -> None:
        assert gate.wait(20)
        os.fdatasync(fd)

    async def test(node: Node) -> None:
        await node.create()
        await node.durable()
        async with node.subscribe(start=pb.START_EARLIEST) as reader:
            await reader.up_to(1)
            gate.clear()
            await node.push([1])
            assert await reader.silent()
            async with node.subscribe() as other:  # a snapshot of a version that may be lost
                assert await other.silent()
                gate.set()
                assert kinds(await other.up_to(2))[0] == "SNAPSHOT"
            assert kinds(await reader.up_to(2)) == ["ROWS"]

    asyncio.run(with_node(tmp_path / "shard", test, disk=Disk(fdatasync=slow)))


# ---- what a message holds


@run
async def test_a_large_change_takes_several_messages_and_one_mark(node: Node) -> None:
    await node.create()
    await node.push(list(range(100)))
    await node.delete(list(range(60)))
    found = await node.read(start=pb.START_EARLIEST, chunk_bytes=240)
    rows = [each for each in found if each.header.kind == K.KIND_ROWS]
    assert [len(each.keys) for each in rows] == [10] * 10
    gone = [each for each in found if each.header.kind == K.KIND_DELETES]
    assert [len(each.keys) for each in gone] == [15] * 4
    for parts in (rows, gone):
        assert [each.header.more for each in parts] == [True] * (len(parts) - 1) + [False]
        assert [bool(each.header.token) for each in parts] == [False] * (len(parts) - 1) + [True]
        assert len({each.header.version for each in parts}) == 1
    assert not [each for each in found if len(each.versions)]


@run
async def test_the_pushes_of_one_exchange_are_changes_of_their_own(node: Node) -> None:
    await node.create()
    await node.do(lambda shard: shard.exchange([push([1]), push([1, 2])], []))
    node.history.pop(3)
    found = await node.read(start=pb.START_EARLIEST)
    assert [said(each) for each in found[2:]] == [("t", 2, [1]), ("t", 3, [1, 2])]


@run
async def test_keys_alone_and_whole_rows(node: Node) -> None:
    await node.create(optimizer=make_optimizer("adagrad", 1.0, {}))
    await node.push([3, 4], 2.0)
    await node.push([4], 1.0, step=9)
    await node.durable()
    whole = node.shard.dump()["t"]
    for start in (pb.START_EARLIEST, pb.START_SNAPSHOT):
        found = await node.read(start=start, content=pb.CONTENT_KEYS)
        rows = [each for each in found if each.header.kind == K.KIND_ROWS]
        assert [each.keys.tolist() for each in rows][-1] in ([4], [3, 4])
        assert {(each.header.width, each.rows.size) for each in rows} == {(0, 0)}
        state = pb.CONTENT_VALUES_AND_STATE
        rows = [
            each
            for each in await node.read(start=start, content=state)
            if each.header.kind == K.KIND_ROWS
        ]
        last: dict[int, Any] = {}
        for each in rows:
            header = each.header
            assert (header.dim, header.width, header.dtype) == (DIM, 2 * DIM, pb.DTYPE_FLOAT32)
            values = each.rows.reshape(-1, header.width)
            assert len(each.steps) == len(each.frequencies) == len(each.keys)
            for i, key in enumerate(each.keys.tolist()):
                last[key] = (values[i].tolist(), int(each.steps[i]), int(each.frequencies[i]))
        assert last == {
            int(key): (row.tolist(), int(meta[2]), int(meta[3]))
            for key, row, meta in zip(whole.keys, whole.rows, whole.meta, strict=True)
        }


@pytest.mark.parametrize("dtype", [pb.DTYPE_BFLOAT16, pb.DTYPE_FLOAT16])
def test_embeddings_come_in_16_bits_where_asked_for(tmp_path: Path, dtype: int) -> None:
    async def test(node: Node) -> None:
        await node.create()
        await node.push([1], 0.1)
        for start in (pb.START_EARLIEST, pb.START_SNAPSHOT):
            await node.durable()
            async with node.subscribe(start=start, dtype=dtype) as reader:
                reader._checks = False
                found = await reader.up_to(2)
            rows = next(each for each in found if each.header.kind == K.KIND_ROWS)
            assert rows.header.dtype == dtype
            assert rows.rows.nbytes == 2 * DIM
            values = codec.from_wire(rows.rows, dtype)
            assert np.allclose(values, -0.1, rtol=0.01)

    asyncio.run(with_node(tmp_path / "shard", test))


@run
async def test_only_the_tables_asked_for_are_sent(node: Node) -> None:
    await node.create("a")
    await node.create("b")
    await node.push([1], table="a")
    await node.push([2], table="b")
    await node.barrier("x")
    await node.delete([2], table="b")
    for start in (pb.START_EARLIEST, pb.START_SNAPSHOT):
        found = await node.read(start=start, tables=["a", "unborn"])
        assert {each.header.table for each in found} == {"", "a"}
        assert "BARRIER" in kinds(found) or start == pb.START_SNAPSHOT
        assert found[-1].header.version == 6
    async with node.subscribe(start=pb.START_LATEST, tables=["unborn"]) as reader:
        reader._checks = False
        await reader.next()
        await node.push([9], table="a")
        found = await reader.up_to(7)
        assert kinds(found) == ["PROGRESS"]
        await node.create("unborn")
        assert kinds(await reader.up_to(8)) == ["TABLE_CREATED"]


@run
async def test_nothing_is_sent_of_changes_without_rows(node: Node) -> None:
    await node.create()
    await node.push([])
    await node.delete([5])
    assert kinds(await node.read(start=pb.START_EARLIEST)) == [
        "PROGRESS",
        "TABLE_CREATED",
        "PROGRESS",
    ]


@run
async def test_an_idle_stream_says_that_it_lives(node: Node) -> None:
    await node.create()
    await node.durable()
    async with node.subscribe(progress_ms=20) as reader:
        await reader.up_to(1)
        tokens = set()
        for _ in range(3):
            delta = await reader.next()
            assert kinds([delta]) == ["PROGRESS"]
            assert (delta.header.version, delta.header.head) == (1, 1)
            tokens.add(delta.header.token)
        assert len(tokens) == 1


# ---- coalescing


@run
async def test_of_several_changes_only_the_newest_value_is_sent(node: Node) -> None:
    await node.create("a")
    await node.create("b")
    await node.push([1, 2, 3], table="a")
    await node.push([1, 7], table="b")
    await node.push([2, 4], table="a")
    await node.delete([3, 4], table="a")
    await node.push([4], 5.0, table="a")
    await node.delete([7], table="b")
    found = await node.read(start=pb.START_EARLIEST, coalesce_rows=1000)
    assert [(kind, *said(each)) for kind, each in zip(kinds(found), found, strict=True)] == [
        ("PROGRESS", "", 0, []),
        ("TABLE_CREATED", "a", 1, []),
        ("TABLE_CREATED", "b", 2, []),
        ("DELETES", "a", 8, [3]),
        ("ROWS", "a", 8, [1, 2, 4]),
        ("DELETES", "b", 8, [7]),
        ("ROWS", "b", 8, [1]),
    ]
    assert found[4].versions.tolist() == [3, 5, 7]
    assert [each.header.more for each in found[3:]] == [True, True, True, False]
    assert [bool(each.header.token) for each in found[3:]] == [False, False, False, True]


@run
async def test_marks_and_tables_are_not_coalesced(node: Node) -> None:
    await node.create()
    await node.push([1])
    await node.push([1])
    await node.barrier("x")
    await node.push([1])
    await node.push([1])
    await node.drop()
    await node.create()
    found = await node.read(start=pb.START_EARLIEST, coalesce_rows=1000)
    assert [
        (each.header.version, kind) for each, kind in zip(found, kinds(found), strict=True)
    ] == [
        (0, "PROGRESS"),
        (1, "TABLE_CREATED"),
        (3, "ROWS"),
        (4, "BARRIER"),
        (6, "ROWS"),
        (7, "TABLE_DROPPED"),
        (8, "TABLE_CREATED"),
    ]


@run
async def test_a_batch_ends_with_the_change_that_fills_it(node: Node) -> None:
    await node.create()
    for i in range(10):
        await node.push([i, i + 1])
    found = await node.read(start=pb.START_EARLIEST, coalesce_rows=5)
    rows = [each for each in found if each.header.kind == K.KIND_ROWS]
    assert [(each.header.version, len(each.keys)) for each in rows] == [
        (4, 4),
        (7, 4),
        (10, 4),
        (11, 2),
    ]


@run
async def test_changes_wait_for_others_no_longer_than_asked(node: Node) -> None:
    await node.create()
    await node.durable()
    async with node.subscribe(start=pb.START_EARLIEST, coalesce_ms=150) as reader:
        await reader.up_to(1)
        began = asyncio.get_running_loop().time()
        for i in range(5):
            await node.push([1, i])
            await node.durable()
        found = await reader.up_to(6)
        assert 0.1 < asyncio.get_running_loop().time() - began < 5
        assert kinds(found) == ["ROWS"]
        assert sorted(found[0].keys.tolist()) == [0, 1, 2, 3, 4]


@run
async def test_a_coalesced_batch_is_chunked_too(node: Node) -> None:
    await node.create()
    await node.push(list(range(50)))
    await node.push(list(range(25, 75)))
    found = await node.read(start=pb.START_EARLIEST, coalesce_rows=1000, chunk_bytes=240)
    rows = found[2:]
    assert [len(each.keys) for each in rows] == [10] * 7 + [5]
    assert [each.header.more for each in rows] == [True] * 7 + [False]


# ---- the log is cut


async def fill(node: Node, changes: int = 60, table: str = "t") -> None:
    """Changes that take many segments."""
    rng = random.Random(node.shard.version)
    for _ in range(changes):
        keys = rng.sample(range(100), 20)
        if rng.random() < 0.3:
            await node.delete(keys[:8], table)
        else:
            await node.push(keys, float(rng.randrange(1, 9)), table)


@run
async def test_who_was_cut_off_is_sent_what_changed_since(node: Node) -> None:
    await node.create()
    await node.push(list(range(100)))
    await node.durable()
    copied = Copy()
    async with node.subscribe(copied) as reader:
        await reader.up_to(2)
        token = reader.token
    await node.push([1, 2, 500])
    await node.delete([3, 500])
    await node.push([3], 7.0)
    await node.delete([1])
    for _ in range(200):
        await node.push([4])
    await node.cut()
    assert node.home.log.first > 4
    async with node.subscribe(copied, token=token) as reader:
        found = await reader.up_to(206)
    assert kinds(found) == ["CATCH_UP", "TABLE_CREATED", "DELETES", "ROWS", "SNAPSHOT_END"]
    assert sorted(found[2].keys.tolist()) == [1, 3, 500]
    assert sorted(found[3].keys.tolist()) == [2, 3, 4]
    assert [each.header.more for each in found] == [True] * 4 + [False]


@run
async def test_tables_that_came_and_went_meanwhile_are_told_by_a_catch_up(node: Node) -> None:
    for name in ("stays", "goes", "again"):
        await node.create(name)
        await node.push([1, 2], table=name)
    await node.durable()
    copied = Copy()
    async with node.subscribe(copied) as reader:
        await reader.up_to(6)
        token = reader.token
    await node.drop("goes")
    await node.drop("again")
    await node.create("again")
    await node.push([9], table="again")
    await node.create("new")
    for _ in range(200):
        await node.push([4], table="stays")
    await node.cut()
    async with node.subscribe(copied, token=token) as reader:
        await reader.up_to(211)
    assert sorted(copied.rows()) == ["again", "new", "stays"]
    assert sorted(copied.rows()["again"]) == [9]


@run
async def test_earliest_begins_where_the_log_does(node: Node) -> None:
    await node.create()
    await fill(node, 100)
    await node.cut()
    first = node.home.log.first
    assert first > 1
    async with node.subscribe(start=pb.START_EARLIEST) as reader:
        reader._checks = False
        reader.copy.tables["t"] = (1, {})
        found = await reader.up_to(node.shard.version)
    assert [each.header.version for each in found] == list(range(first - 1, node.shard.version + 1))


def test_a_token_behind_both_horizons_is_compacted_and_says_so(tmp_path: Path) -> None:
    async def test(node: Node) -> None:
        await node.create()
        await node.push(list(range(40)))
        await node.durable()
        async with node.subscribe() as reader:
            await reader.up_to(2)
            token = reader.token
        await node.delete(list(range(8)))
        await node.delete(list(range(8, 16)))
        for _ in range(200):
            await node.push([40])
        await node.cut()
        async with node.subscribe(token=token) as reader:
            with pytest.raises(VersionCompacted) as caught:
                await reader.next()
        assert caught.value.metadata == {
            "log_horizon": str(node.home.log.first - 1),
            "tombstone_horizon": "3",
        }
        assert node.shard.tombstone_horizon == 3
        await node.reopen()  # the horizon outlives the process
        async with node.subscribe(token=token) as reader:
            with pytest.raises(VersionCompacted):
                await reader.next()

    asyncio.run(with_node(tmp_path / "shard", test, max_tombstones=10))


@run
async def test_a_slow_subscriber_that_falls_off_the_log_is_caught_up(node: Node) -> None:
    await node.create()
    await fill(node, 20)
    await node.durable()
    async with node.subscribe() as reader:
        await reader.up_to(21)
        await fill(node, 100)
        await node.cut()
        for _ in range(2):
            await fill(node, 200)
            await node.cut()
        found = await reader.up_to(521)
        assert "CATCH_UP" in kinds(found)
        await fill(node, 5)
        await reader.up_to(526)


@run
async def test_a_snapshot_that_falls_off_the_log_is_caught_up_within(node: Node) -> None:
    await node.create()
    await node.push(list(range(200)))
    await node.durable()
    async with node.subscribe(chunk_bytes=480) as reader:
        for _ in range(5):
            await reader.next()
        await fill(node, 300)
        await node.cut()
        await fill(node, 20)
        await node.durable()
        found = await reader.up_to(node.shard.version)
        assert kinds(found).count("CATCH_UP") == 1
        assert kinds(found).count("SNAPSHOT_END") == 1


def test_a_snapshot_behind_both_horizons_begins_again(tmp_path: Path) -> None:
    async def test(node: Node) -> None:
        await node.create()
        await node.push(list(range(200)))
        await node.durable()
        async with node.subscribe(chunk_bytes=480) as reader:
            for _ in range(5):
                await reader.next()
            await fill(node, 300)
            await node.cut()
            found = await reader.up_to(node.shard.version)
            assert kinds(found).count("SNAPSHOT") == 1
            assert "CATCH_UP" not in kinds(found)

    asyncio.run(with_node(tmp_path / "shard", test, max_tombstones=5))


@run
async def test_a_table_that_was_dropped_before_the_base_is_told_by_its_name(node: Node) -> None:
    """After a restart, its rows in the log cannot be told any more; that it is gone can."""
    await node.create("gone")
    await node.create("t")
    await node.push([1, 2], table="gone")
    await node.durable()
    copied = Copy()
    async with node.subscribe(copied) as reader:
        await reader.up_to(3)
        token = reader.token
    await node.push([3], table="gone")
    await node.drop("gone")
    await node.cut()  # one segment: the log stays whole
    await node.reopen()
    assert node.home.log.first == 1
    async with node.subscribe(copied, token=token) as reader:
        found = await reader.up_to(5)
    assert kinds(found) == ["PROGRESS", "TABLE_DROPPED"]
    assert sorted(copied.rows()) == ["t"]


# ---- a scan while pushes go on


@run
async def test_rows_pushed_while_a_snapshot_is_read_come_behind_it(node: Node) -> None:
    await node.create()
    await node.push(list(range(100)))
    await node.durable()
    async with node.subscribe(chunk_bytes=480) as reader:
        while "ROWS" not in kinds([await reader.next()]):
            pass
        # one behind the other: a scan that found the rest of its rows newer ends behind both
        await asyncio.gather(node.push(list(range(150)), 3.0), node.delete([5, 149]))
        await node.durable()
        found = await reader.up_to(4)
        assert "SNAPSHOT_END" in kinds(found)
        end = kinds(found).index("SNAPSHOT_END")
        assert all(each.header.more for each in found[:end])
        assert kinds(found)[end - 1] == "DELETES"  # what came meanwhile is part of it


@run
async def test_a_slot_that_is_used_again_between_two_slices_does_no_harm(node: Node) -> None:
    await node.create()
    await node.push(list(range(100)))
    await node.durable()
    async with node.subscribe(chunk_bytes=480) as reader:
        while "ROWS" not in kinds([await reader.next()]):
            pass
        await node.delete(list(range(0, 100, 2)))
        await node.push(list(range(99, -1, -3)), 4.0)  # into the free slots, on both sides
        await node.push(list(range(1000, 1020)), 5.0)
        await node.durable()
        await reader.up_to(5)


@run
async def test_a_table_dropped_while_it_is_read_is_dropped_behind(node: Node) -> None:
    await node.create()
    await node.push(list(range(100)))
    await node.durable()
    async with node.subscribe(chunk_bytes=480) as reader:
        while "ROWS" not in kinds([await reader.next()]):
            pass
        await node.drop()
        await node.create()
        await node.push([7])
        await node.durable()
        await reader.up_to(5)
        assert reader.copy.rows() == {"t": {7: (-1.0, -1.0)}}


@run
async def test_the_engine_copies_small_slices(node: Node) -> None:
    """Between two slices whoever waits gets his turn."""
    await node.create("wide", dim=512)
    keys = list(range(4000))
    values = np.ones((4000, 512), np.float32)
    await node.engine.submit(
        lambda: node.shard.exchange([push(keys, table="wide", gradients=values)], [])
    )
    sizes = []
    real = rowscan._copy

    def copy_and_note(scan: Any, places: Any, width: int) -> Any:
        sizes.append(len(places) * (4 * width + 32))
        return real(scan, places, width)

    rowscan._copy = copy_and_note  # type: ignore[assignment]
    try:
        await node.durable()
        async with node.subscribe() as reader:
            reader._checks = False
            await reader.up_to(2)
    finally:
        rowscan._copy = real
    assert sum(sizes) >= 4000 * 2048
    assert max(sizes) <= rowscan.SLICE_BYTES


# ---- going on from anywhere


@pytest.mark.slow
@pytest.mark.parametrize("again", ["goes on", "restarted", "cut"])
def test_a_snapshot_can_be_resumed_behind_every_message(tmp_path: Path, again: str) -> None:
    """With what was received up to there, tokens or not, and changes in between."""

    async def prepare(node: Node) -> None:
        await node.create("a")
        await node.create("b")
        await node.push(list(range(30)), table="a")
        await node.push(list(range(12)), table="b")
        await node.delete([3, 4], table="a")
        await node.durable()

    async def play(node: Node, stop: int) -> bool:
        """Receive so many messages, be interrupted, and go on; False at the end."""
        await prepare(node)
        fields: dict[str, Any] = {"chunk_bytes": 80}
        copied = Copy()
        async with node.subscribe(copied, **fields) as reader:
            for i in range(stop):
                last = await reader.next()
                if i == 4:  # changes come while it is read
                    await node.push(list(range(5, 20)), 2.0, table="a")
                    await node.delete([6, 7], table="a")
                    await node.durable()
                if not last.header.more and last.header.version >= 7:
                    return False
            token = reader.token
        await node.delete([1, 8], table="a")
        await node.push([3, 200], 3.0, table="a")
        await node.drop("b")
        await node.create("c")
        await node.push([1], table="c")
        if again == "restarted":
            await node.reopen()
        if again == "cut":
            await fill(node, 150, "a")
            await node.cut()
        await node.durable()
        async with node.subscribe(copied, token=token, **fields) as reader:
            await reader.up_to(node.shard.version)
        return True

    stop = 0
    while True:
        goes: list[bool] = []

        async def test(node: Node, stop: int = stop, goes: list[bool] = goes) -> None:
            goes.append(await play(node, stop))

        asyncio.run(with_node(tmp_path / f"shard{stop}", test))
        if not goes[0]:
            break
        stop += 1
    assert stop > 15


@run
async def test_a_catch_up_can_be_resumed_behind_every_message(node: Node) -> None:
    await node.create("a")
    await node.create("b")
    await node.push(list(range(60)), table="a")
    await node.push(list(range(12)), table="b")
    await node.durable()
    base = Copy()
    async with node.subscribe(base) as reader:
        await reader.up_to(4)
        start = reader.token
    await node.drop("b")
    await fill(node, 150, "a")
    await node.cut()
    copies, tokens = [], []
    whole = copy.deepcopy(base)
    async with node.subscribe(whole, token=start, chunk_bytes=240) as reader:
        while not copies or reader.copy.stated is not None:
            delta = await reader.next()
            copies.append(copy.deepcopy(whole))
            tokens.append(reader.token)
            if kinds([delta]) == ["SNAPSHOT_END"]:
                break
    assert len(copies) > 8
    await fill(node, 3, "a")
    await node.durable()
    for copied, token in zip(copies, tokens, strict=True):
        async with node.subscribe(copied, token=token, chunk_bytes=240) as reader:
            await reader.up_to(node.shard.version)


@run
async def test_a_scan_goes_on_where_it_was_in_the_same_process(node: Node) -> None:
    await node.create()
    await node.push(list(range(100)))
    await node.durable()
    copied = Copy()
    async with node.subscribe(copied, chunk_bytes=480) as reader:
        for _ in range(4):
            await reader.next()
        token = reader.token
    assert decode(token).phase == Phase.SNAPSHOT
    assert decode(token).slot > 0
    async with node.subscribe(copied, token=token, chunk_bytes=480) as reader:
        found = await reader.up_to(2)
    assert set(kinds(found)) == {"ROWS", "SNAPSHOT_END"}
    assert sum(len(each.keys) for each in found) < 100


@run
async def test_a_chunked_change_that_was_interrupted_comes_again_whole(node: Node) -> None:
    await node.create()
    await node.push(list(range(100)))
    await node.push(list(range(50, 150)), 2.0)
    await node.durable()
    copied = Copy()
    async with node.subscribe(copied, start=pb.START_EARLIEST, chunk_bytes=480) as reader:
        await reader.up_to(2)
        for _ in range(3):
            await reader.next()
        token = reader.token
    assert decode(token).version == 2
    async with node.subscribe(copied, token=token, chunk_bytes=480) as reader:
        found = await reader.up_to(3)
    assert sum(len(each.keys) for each in found) == 100


def test_rows_of_a_table_that_is_gone_are_told_after_a_restart(tmp_path: Path) -> None:
    """Neither the base nor what is replayed says anything of it."""

    async def test(node: Node) -> None:
        await node.create("a")
        await node.push([1, 2], table="a")
        await node.create("b")
        await node.push([3], table="b")
        await node.delete([2], table="a")
        await node.drop("a")
        await node.cut()
        await node.reopen()
        assert node.home.recovered.records == 0
        found = await node.read(start=pb.START_EARLIEST)
        assert [each.header.version for each in found] == list(range(7))
        assert said(found[2]) == ("a", 2, [1, 2])
        found = await node.read(start=pb.START_EARLIEST, tables=["b"])
        assert {each.header.table for each in found} == {"", "b"}

    asyncio.run(with_node(tmp_path / "shard", test, keep=(1 << 30, 0.0)))


# ---- tokens that are none here


async def refused(node: Node, **fields: Any) -> Exception:
    async with node.subscribe(**fields) as reader:
        with pytest.raises(Exception, match=r".") as caught:
            await reader.next()
    return caught.value


@run
async def test_tokens_of_another_history_are_refused(node: Node) -> None:
    await node.create()
    await node.durable()
    async with node.subscribe() as reader:
        await reader.up_to(1)
    here = decode(reader.token)
    other = replace(here, lineage=bytes(16)).encode()
    assert isinstance(await refused(node, token=other), LogDiverged)
    other = replace(here, epoch=here.epoch + 1).encode()
    assert isinstance(await refused(node, token=other), LogDiverged)
    error = await refused(node, token=replace(here, version=2).encode())
    assert isinstance(error, VersionInFuture)
    assert str(error) == "the token stands at version 2, shard 0 is at 1"
    error = await refused(node, token=reader.token, tables=["t"])
    assert isinstance(error, BadRequest)
    assert str(error) == "the token is of a subscription to other tables"


@run
async def test_no_byte_of_a_token_can_be_changed(node: Node) -> None:
    await node.create()
    await node.durable()
    async with node.subscribe() as reader:
        await reader.up_to(1)
    token = reader.token
    for at in range(len(token)):
        bad = token[:at] + bytes([token[at] ^ 0x41]) + token[at + 1 :]
        error = await refused(node, token=bad)
        assert isinstance(error, BadRequest)
        assert str(error).startswith(f"token {bad[:16].hex()}... is malformed")


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"content": 9}, "content 9 is unknown"),
        ({"start": 9}, "start 9 is unknown"),
        ({"tables": ["no good"]}, "'no good' cannot be the name of a table"),
        ({"tables": ["t"] * 5000}, "5000 tables named, 4096 may be"),
        ({"coalesce_ms": 60_001}, "coalesce_ms must be in 0..60000, got 60001"),
        ({"chunk_bytes": 1 << 25}, "chunk_bytes must be in 0..16777216, got 33554432"),
        (
            {"content": pb.CONTENT_VALUES_AND_STATE, "dtype": pb.DTYPE_FLOAT16},
            "state is sent as float32 only",
        ),
    ],
)
def test_bad_requests_are_refused_by_name(tmp_path: Path, fields: Any, why: str) -> None:
    async def test(node: Node) -> None:
        error = await refused(node, **fields)
        assert isinstance(error, BadRequest)
        assert str(error) == f"subscription: {why}"

    asyncio.run(with_node(tmp_path / "shard", test))


@run
async def test_what_is_no_request_is_malformed(node: Node) -> None:
    with pytest.raises(codec.Malformed, match="SubscribeRequest"):
        await node.feed.serve(b"\xff", lambda _: asyncio.sleep(0))
    with pytest.raises(codec.Malformed, match="dtype 9"):
        raise await refused(node, dtype=9)


# ---- many subscribers, slow subscribers


@run
async def test_a_stopped_subscriber_is_sent_no_more_than_it_takes(node: Node) -> None:
    await node.create()
    await node.push([1])
    await node.durable()
    async with node.subscribe() as stopped, node.subscribe() as other:
        await stopped.next()
        await other.up_to(2)
        before = threading.active_count()
        await fill(node, 200)
        await node.durable()
        await other.up_to(202)
        assert stopped.sent == 1
        assert threading.active_count() == before
        lag = node.feed.lag
        assert lag.versions >= 199
        assert lag.seconds > 0
        await stopped.up_to(202)
        await asyncio.sleep(QUIET)
        assert node.feed.lag == (0, 0.0)


@run
async def test_there_is_a_limit_of_subscribers(node: Node) -> None:
    readers = [Reader(node, Copy(), pb.SubscribeRequest()) for _ in range(4)]
    for reader in readers:
        await reader.up_to(0)
    error = await refused(node)
    assert isinstance(error, TooLarge)
    assert error.reason == "TOO_MANY_SUBSCRIBERS"
    assert node.feed.subscribers == 4
    for reader in readers:
        await reader.close()
    assert node.feed.subscribers == 0
    async with node.subscribe() as reader:
        await reader.up_to(0)


@run
async def test_what_was_sent_is_counted(node: Node) -> None:
    await node.create()
    await node.push(list(range(100)))
    async with node.subscribe() as reader:
        await node.durable()
        await reader.up_to(2)
        await asyncio.sleep(0)
    assert node.feed.messages == len(reader.tokens)
    assert 100 * 24 < node.feed.bytes < 100 * 24 + 2000


@run
async def test_a_server_that_stops_says_so_and_waits_for_nobody_to_read(node: Node) -> None:
    await node.create()
    await node.durable()
    async with node.subscribe() as idle, node.subscribe() as stopped:
        await idle.up_to(1)
        await stopped.next()
        await asyncio.sleep(QUIET)  # it waits for the next message to be read
        node.feed.drain()
        await asyncio.wait({idle.task, stopped.task}, timeout=5)
        assert isinstance(idle.task.exception(), Draining)
        assert stopped.task.cancelled()
    assert isinstance(await refused(node), Draining)


@run
async def test_a_subscriber_that_goes_leaves_no_file_open(node: Node) -> None:
    await node.create()
    await fill(node, 30)
    await node.durable()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        async with node.subscribe(start=pb.START_EARLIEST) as reader:
            await reader.next()
            await reader.next()
    assert len(os.listdir("/proc/self/fd")) == before


# ---- anything, in any order

LAZY = 1000.0  # seconds until the log syncs by itself: tests say when
EXAMPLES = int(os.environ.get("PS_FEED_EXAMPLES", "25"))
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("push"), st.integers(0, 1), st.integers(0, 30), st.integers(1, 25)),
        st.tuples(st.just("push"), st.integers(0, 1), st.integers(0, 30), st.integers(1, 25)),
        st.tuples(st.just("delete"), st.integers(0, 1), st.integers(0, 30), st.integers(1, 10)),
        st.tuples(st.just("table"), st.integers(0, 1)),
        st.tuples(st.just("barrier")),
        st.tuples(st.just("burst"), st.integers(0, 1)),
        st.tuples(st.just("cut")),
        st.tuples(st.just("sync")),
        st.tuples(st.just("restart")),
        st.tuples(st.just("kill")),
        st.tuples(st.just("power cut"), st.integers(0, 2**32)),
        st.tuples(st.just("repeat"), st.integers(0, 2), st.integers(1, 9)),
        st.tuples(st.just("read"), st.integers(0, 2), st.integers(1, 12)),
        st.tuples(st.just("read"), st.integers(0, 2), st.integers(1, 12)),
        st.tuples(st.just("come back"), st.integers(0, 2), st.integers(1, 12)),
        st.tuples(st.just("leave"), st.integers(0, 2)),
    ),
    min_size=3,
    max_size=25,
)
REQUESTS: list[dict[str, Any]] = [
    {"chunk_bytes": 200},
    {"chunk_bytes": 200, "coalesce_rows": 40},
    {"chunk_bytes": 200, "tables": ["a"]},
]


async def play_all(node: Node, operations: list[tuple[Any, ...]]) -> None:
    """Three subscribers that read now and then, leave and come back, are always told the truth.

    What is not synced is lost in a power cut, and other changes get the versions of it.
    """
    copies = [Copy() for _ in REQUESTS]
    tokens = [b""] * len(REQUESTS)
    marks: list[list[bytes]] = [[] for _ in REQUESTS]
    readers: list[Reader | None] = [None] * len(REQUESTS)

    def reader_of(at: int) -> Reader:
        reader = readers[at]
        if reader is None:
            request = pb.SubscribeRequest(token=tokens[at], **REQUESTS[at])
            reader = readers[at] = Reader(node, copies[at], request)
            reader.token = tokens[at]
        return reader

    async def leave(at: int) -> None:
        reader, readers[at] = readers[at], None
        if reader is not None:
            tokens[at] = reader.token
            marks[at] += reader.marks
            await reader.close()

    async def leave_all() -> None:
        for at in range(len(REQUESTS)):
            await leave(at)

    async def ensure(table: str) -> None:
        if table not in node.shard.tables():
            await node.create(table)

    for kind, *rest in operations:
        match kind, rest:
            case "push", [table, low, count]:
                await ensure("ab"[table])
                await node.push(list(range(low, low + count)), float(count), "ab"[table])
            case "delete", [table, low, count]:
                await ensure("ab"[table])
                await node.delete(list(range(low, low + count)), "ab"[table])
            case "table", [table]:
                await (node.drop if "ab"[table] in node.shard.tables() else node.create)(
                    "ab"[table]
                )
            case "barrier", _:
                await node.barrier("b")
            case "burst", [table]:
                await ensure("ab"[table])
                await fill(node, 40, "ab"[table])
            case "cut", _:
                await node.cut()
            case "sync", _:
                await node.durable()
            case "restart", _:
                await leave_all()
                await node.reopen()
            case "kill", _:
                await leave_all()
                await node.die(copy_of)
            case "power cut", [seed]:
                await leave_all()
                await node.die(partial(power_cut, rng=random.Random(seed)))
            case "leave", [at]:
                await leave(at)
            case "repeat", [at, back]:  # as who kept its rows, and an older token
                await leave(at)
                if marks[at] and copies[at].building is copies[at].stated is None:
                    tokens[at] = marks[at][-back:][0]
            case "read" | "come back", [at, count]:
                if kind == "come back":
                    await leave(at)
                reader = reader_of(at)
                with suppress(VersionCompacted):  # anew from the start, at the end
                    for _ in range(count):
                        if not await reader.maybe():
                            break
    await leave_all()
    await node.durable()
    for at in range(len(REQUESTS)):
        with suppress(VersionCompacted):
            await reader_of(at).up_to(node.shard.version)
            await leave(at)
            continue
        assert decode(tokens[at]).version < node.shard.tombstone_horizon
        await leave(at)
        tokens[at], copies[at].stated = b"", None
        await reader_of(at).up_to(node.shard.version)
        await leave(at)


@pytest.mark.slow
@settings(max_examples=EXAMPLES, deadline=None)
@given(operations=OPERATIONS)
@example(  # a subscriber that comes while the newest change is not on disk yet
    [
        ("push", 0, 0, 9),
        ("read", 0, 9),
        ("leave", 0),
        ("push", 0, 3, 4),
        ("read", 0, 9),
        ("power cut", 1),
        ("push", 0, 5, 6),
        ("read", 0, 9),
    ]
)
@example(  # changes of an older table of the name come again
    [
        ("table", 0),
        ("read", 0, 9),
        ("push", 0, 0, 3),
        ("sync",),
        ("read", 0, 9),
        ("table", 0),
        ("table", 0),
        ("sync",),
        ("read", 0, 9),
        ("repeat", 0, 4),
    ]
)
def test_whatever_happens_subscribers_hold_what_the_shard_held(
    operations: list[tuple[Any, ...]],
) -> None:
    with TemporaryDirectory() as directory:
        test = with_node(
            Path(directory) / "shard",
            lambda node: play_all(node, operations),
            max_tombstones=60,
            sync_seconds=LAZY,
        )
        asyncio.run(test)
