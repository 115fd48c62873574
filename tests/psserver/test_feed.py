"""Subscriptions that follow the log: what they are sent, and when."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from alone import alone
from feeds import (
    QUIET,
    Copy,
    K,
    Node,
    Reader,
    fill,
    kinds,
    refused,
    run,
    said,
    with_node,
)
from stores import DIM, push

from psproto import codec
from psproto import ps_pb2 as pb
from psserver.errors import (
    Draining,
    TooLarge,
)
from psserver.source import THREADS
from storage.disk import Disk
from storage.optimizers import make_optimizer

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
async def test_an_alteration_is_sent_with_the_new_settings(node: Node) -> None:
    await node.create("a")
    await node.create("b")
    await node.push([1, 2], table="a")
    for name in "ab":
        await node.do(
            lambda shard, name=name: shard.alter_table(
                name, lambda old: dataclasses.replace(old, serving_default=2.5)
            )
        )
    await node.push([3], table="a")
    found = await node.read(start=pb.START_EARLIEST, tables=["a"], coalesce_rows=100)
    assert kinds(found) == ["PROGRESS", "TABLE_CREATED", "ROWS", "TABLE_ALTERED", "ROWS"]
    altered = found[3].header
    assert (altered.table, altered.version, altered.dim, altered.more) == ("a", 4, DIM, False)
    assert altered.schema.serving_default == 2.5
    assert found[1].header.schema.serving_default == 0.0


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
    async with node.subscribe(progress_ms=100) as reader:
        await reader.up_to(1)
        tokens = set()
        for _ in range(3):
            delta = await reader.next()
            assert kinds([delta]) == ["PROGRESS"]
            assert (delta.header.version, delta.header.head) == (1, 1)
            tokens.add(delta.header.token)
        assert len(tokens) == 1


# ---- many subscribers, slow subscribers


@pytest.mark.slow
@alone
@run
async def test_a_stopped_subscriber_is_sent_no_more_than_it_takes(node: Node) -> None:
    await node.create()
    await node.push([1])
    await node.durable()
    async with node.subscribe() as stopped, node.subscribe() as other:
        await stopped.next()
        await other.up_to(2)
        await fill(node, 200)
        await node.durable()
        await other.up_to(202)
        assert stopped.sent == 1
        threads = [each.name for each in threading.enumerate() if each.name.startswith("feed")]
        assert len(threads) <= THREADS
        lag = node.feed.lag
        assert lag.versions >= 199
        assert lag.seconds > 0
        await stopped.up_to(202)
        async with asyncio.timeout(60):
            while node.feed.lag != (0, 0.0):
                await asyncio.sleep(0.01)


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


@pytest.mark.slow
@alone
@run
async def test_a_subscriber_that_goes_leaves_no_file_open(node: Node) -> None:
    await node.create()
    await fill(node, 30)
    await node.durable()
    before = os.listdir("/proc/self/fd")
    for _ in range(10):
        async with node.subscribe(start=pb.START_EARLIEST) as reader:
            await reader.next()
            await reader.next()
    assert os.listdir("/proc/self/fd") == before
