"""Subscriptions: what one may cost the server in time and memory."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from feeds import (
    Node,
    run,
)

from psproto import ps_pb2 as pb
from psserver import logtail, subscription
from psserver.errors import (
    BadRequest,
    Overloaded,
)
from psserver.source import COALESCED_BYTES
from psserver.wanted import parse, read_wanted
from storage.disk import Disk


@run
async def test_one_large_change_in_small_messages_is_made_a_step_at_a_time(node: Node) -> None:
    """A subscriber that does not read holds one step of messages, not all of the change's."""
    await node.create()
    await node.push(list(range(120_000)))
    await node.durable()
    made: list[int] = []
    real = logtail.LogTail.messages

    def messages(tail: Any, flush: bool) -> list[bytes]:
        found = real(tail, flush)
        made.append(sum(len(each) + logtail.MESSAGE_BYTES for each in found))
        return found

    logtail.LogTail.messages = messages  # type: ignore[method-assign]
    try:
        async with node.subscribe(start=pb.START_EARLIEST, chunk_bytes=1000) as reader:
            await reader.up_to(2)
    finally:
        logtail.LogTail.messages = real  # type: ignore[method-assign]
    assert sum(made) > 2 * logtail.STEP_BYTES
    assert max(made) < 1.1 * logtail.STEP_BYTES


@run
async def test_who_stops_reading_in_a_large_change_does_not_keep_it_in_memory(node: Node) -> None:
    """It is disconnected after a while, and continues from its token."""
    await node.create()
    await node.push(list(range(120_000)))
    await node.durable()
    patch = pytest.MonkeyPatch()
    patch.setattr(subscription, "LARGE_BYTES", 100_000)
    patch.setattr(subscription, "PATIENCE", 0.1)
    try:
        async with node.subscribe(start=pb.START_EARLIEST, chunk_bytes=1000) as reader:
            for _ in range(4):
                await reader.next()
            with pytest.raises(Overloaded, match="while a large change was being sent"):
                await asyncio.wait_for(asyncio.shield(reader.task), 20)
            assert node.feed.subscribers == 0
            token, copied = reader.token, reader.copy
        async with node.subscribe(copied, token=token, chunk_bytes=1 << 20) as reader:
            await reader.up_to(2)
    finally:
        patch.undo()


def test_calls_that_wait_for_the_disk_and_are_cancelled_leave_nothing(tmp_path: Path) -> None:
    answers = threading.Event()

    def fdatasync(fd: int) -> None:
        answers.wait(20)
        os.fdatasync(fd)

    async def test(node: Node) -> None:
        log, source = node.home.log, node.feed.source
        for _ in range(100):
            calls = [asyncio.create_task(source.durable(log.last)) for _ in range(10)]
            await asyncio.sleep(0)
            for call in calls:
                call.cancel()
            await asyncio.wait(calls)
        assert len(source._awaited) == 1
        assert len(log._progress._waiting[True]) <= 1
        answers.set()
        await source.durable(log.last)
        assert source._awaited == {}

    async def main() -> None:
        answers.set()
        node = await Node(tmp_path / "shard", disk=Disk(fdatasync=fdatasync)).open()
        try:
            answers.clear()
            await node.create()
            await asyncio.wait_for(test(node), 20)
        finally:
            answers.set()
            await node.close()

    asyncio.run(main())


@run
async def test_a_request_costs_the_loop_little(node: Node) -> None:
    """Whatever is in it: a message that is too large is refused before it is parsed."""
    fields = {
        "many names": pb.SubscribeRequest(tables=["a" * 128] * 4096),
        "empty names": pb.SubscribeRequest(tables=[""] * 300_000),
        "too large": pb.SubscribeRequest(tables=["a"] * 10_000_000),
    }
    for name, request in fields.items():
        data = request.SerializeToString()
        times = []
        for _ in range(5):
            began = time.thread_time()
            with suppress(BadRequest):
                read_wanted(parse(data))
            times.append(time.thread_time() - began)
        assert min(times) < 0.02, name


@run
async def test_subscriptions_share_the_memory_for_coalescing(node: Node) -> None:
    source = node.feed.source
    await node.create()
    await node.durable()
    assert source.coalesce_bytes == COALESCED_BYTES
    async with node.subscribe() as one, node.subscribe() as other:
        await asyncio.gather(one.next(), other.next())
        assert source.coalesce_bytes == COALESCED_BYTES // 2
    assert source.readers == 0
