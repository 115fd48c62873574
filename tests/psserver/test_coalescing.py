"""Subscriptions that are sent the newest values of several changes."""

from __future__ import annotations

import asyncio

from feeds import (
    K,
    Node,
    kinds,
    run,
    said,
)

from psproto import ps_pb2 as pb


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
    """A machine that takes longer for the changes than they wait gets a longer wait."""
    now = asyncio.get_running_loop().time
    await node.create()
    for wait in (0.15, 1.0, 10.0):
        version = await node.durable()
        milliseconds = int(wait * 1000)
        async with node.subscribe(start=pb.START_EARLIEST, coalesce_ms=milliseconds) as reader:
            await reader.up_to(version)
            began = now()
            for i in range(5):
                await node.push([1, i])
                await node.durable()
            if now() - began > wait:
                continue
            found = await reader.up_to(version + 5)
            assert 0.9 * wait < now() - began < wait + 5
            assert kinds(found) == ["ROWS"]
            assert sorted(found[0].keys.tolist()) == [0, 1, 2, 3, 4]
            return
    raise AssertionError("five changes took ten seconds")


@run
async def test_a_coalesced_batch_is_chunked_too(node: Node) -> None:
    await node.create()
    await node.push(list(range(50)))
    await node.push(list(range(25, 75)))
    found = await node.read(start=pb.START_EARLIEST, coalesce_rows=1000, chunk_bytes=240)
    rows = found[2:]
    assert [len(each.keys) for each in rows] == [10] * 7 + [5]
    assert [each.header.more for each in rows] == [True] * 7 + [False]
