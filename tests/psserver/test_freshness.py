"""How long acknowledged pushes take to reach subscribers."""

from __future__ import annotations

import asyncio

import numpy as np
from peers import Peer, until, with_server

from psproto import codec
from psproto import ps_pb2 as pb
from psserver.freshness import Freshness


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def fresh(recent: int = 100) -> tuple[Freshness, Clock]:
    clock = Clock()
    return Freshness(clock, recent), clock


def test_each_push_counts_once_for_each_subscriber() -> None:
    freshness, clock = fresh()
    for version in (1, 2, 3):
        freshness.acknowledged(version)
        clock.now += 1
    freshness.written([1, 2])  # 3 s and 2 s ago
    clock.now += 10
    freshness.written([1, 2, 3])
    assert freshness.seconds.total == 5
    assert freshness.seconds.sum == 3 + 2 + 13 + 12 + 11


def test_a_push_that_is_seen_before_it_is_acknowledged_is_fresh() -> None:
    freshness, clock = fresh()
    freshness.written([1])
    freshness.written([1])
    assert freshness.seconds.total == 0
    clock.now += 5
    freshness.acknowledged(1)
    assert (freshness.seconds.total, freshness.seconds.sum) == (2, 0.0)
    assert freshness.seconds.counts[0] == 2


def test_a_push_that_is_forgotten_counts_as_old_as_the_oldest_that_is_not() -> None:
    freshness, clock = fresh(recent=2)
    for version in (1, 2, 3, 4):
        freshness.acknowledged(version)
        clock.now += 1
    freshness.written([1])
    assert (freshness.seconds.total, freshness.seconds.sum) == (1, 2.0)  # as version 3


def test_memory_is_bounded_whatever_is_written_or_acknowledged() -> None:
    freshness, _ = fresh(recent=10)
    for version in range(1000):
        freshness.acknowledged(2 * version)
        freshness.written([2 * version + 1])
    assert len(freshness._acknowledged) <= 10
    assert len(freshness._early) <= 10


def test_only_pushes_after_the_subscription_began_count(tmp_path: object) -> None:
    keys = np.arange(10, dtype=np.uint64)
    header = pb.PushHeader(table="t", dtype=pb.DTYPE_FLOAT32, durability=pb.DURABILITY_FSYNC)
    message = codec.PushMessage(header, keys, None, np.ones((10, 4), np.float32))
    push = codec.encode_push(message)

    async def act(peer: Peer) -> None:
        feed = peer.server._feed
        assert feed is not None
        await peer.call("RowService/Push", push)
        request = pb.SubscribeRequest(start=pb.START_EARLIEST).SerializeToString()
        calls = [peer.many("LogService/Subscribe", request) for _ in range(2)]
        readers = [asyncio.create_task(read(call)) for call in calls]
        await until(lambda: all(each[-1:] == [2] for each in seen.values()) and len(seen) == 2)
        assert feed.freshness.total == 0
        for _ in range(3):
            await peer.call("RowService/Push", push)
        await until(lambda: feed.freshness.total == 6)
        assert 0 < feed.freshness.sum < 60
        for call, reader in zip(calls, readers, strict=True):
            call.cancel()
            reader.cancel()

    seen: dict[int, list[int]] = {}

    async def read(call: object) -> None:
        mine = seen.setdefault(id(call), [])
        async for data in call:  # type: ignore[attr-defined]
            mine.append(codec.decode_delta(data).header.version)

    with_server(act, "--data-dir", str(tmp_path))
