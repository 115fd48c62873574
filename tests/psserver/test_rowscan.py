"""Snapshots and catch-ups: rows sent while pushes go on, and resumed anywhere."""

from __future__ import annotations

import asyncio
import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from feeds import (
    Copy,
    Node,
    fill,
    kinds,
    run,
    said,
    with_node,
)
from stores import push

from psproto import ps_pb2 as pb
from psserver import rowscan
from psserver.errors import (
    VersionCompacted,
)
from psserver.position import Phase, decode

# ---- the log is cut


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
