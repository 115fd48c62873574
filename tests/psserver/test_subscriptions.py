"""Subscribers have what the shard had, whatever happens in whatever order."""

from __future__ import annotations

import asyncio
import os
import random
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from feeds import (
    Copy,
    Node,
    Reader,
    fill,
    with_node,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from stores import copy_of, power_cut

from psproto import ps_pb2 as pb
from psserver.errors import (
    VersionCompacted,
)
from psserver.position import decode

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
        st.tuples(st.just("leave memory")),
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
            case "leave memory", _:
                await node.cool()
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
