"""Threads for what blocks: no kind of work waits for another, and long work has a limit."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import RetryInfo
from peers import Peer, details, refusal, until, with_server

from psproto import ps_pb2 as pb
from psserver.errors import Busy
from psserver.pool import Pool
from psserver.workers import LONG, SHORT, STORE, Workers

LONG_METHODS: dict[str, Any] = {
    "CheckpointService/WriteCheckpoint": pb.WriteCheckpointRequest(name="a"),
    "CheckpointService/VerifyCheckpoint": pb.VerifyCheckpointRequest(name="a"),
    "CheckpointService/PrepareRestore": pb.PrepareRestoreRequest(name="a"),
    "CheckpointService/LoadTable": pb.LoadTableRequest(name="a"),
    "CheckpointService/ReadRows": pb.ReadRowsRequest(table="t"),
    "AnalysisService/Analyze": pb.AnalyzeRequest(table="t"),
    "TableService/Evict": pb.EvictRequest(table="t"),
}


async def occupied(pool: Pool, threads: int, gate: threading.Event) -> list[Any]:
    return [asyncio.wrap_future(pool.submit(gate.wait, 20)) for _ in range(threads)]


@pytest.mark.parametrize("method", LONG_METHODS)
def test_long_work_beyond_its_threads_is_refused_with_busy(method: str) -> None:
    request = LONG_METHODS[method].SerializeToString()

    async def ask(peer: Peer) -> None:
        if method == "TableService/Evict":
            await peer.call(method, request)
        else:
            async for _ in peer.many(method, request):
                pass

    async def act(peer: Peer) -> None:
        gate, workers = threading.Event(), peer.service._workers
        busy = [workers.start_long(gate.wait, 20) for _ in range(LONG)]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(peer)
        assert refusal(caught.value) == ("RESOURCE_EXHAUSTED", "BUSY")
        assert RetryInfo in details(caught.value)
        gate.set()
        await asyncio.gather(*busy)
        await until(lambda: workers._slots == LONG)

    with_server(act)


def test_short_calls_wait_for_neither_long_work_nor_the_store() -> None:
    inspect = pb.InspectRequest(table="t", keys=(1).to_bytes(8, "little")).SerializeToString()

    async def act(peer: Peer) -> None:
        gate, workers = threading.Event(), peer.service._workers
        busy = [workers.start_long(gate.wait, 20) for _ in range(LONG)]
        busy += await occupied(workers.store, STORE, gate)
        busy += await occupied(workers.checks, 2, gate)
        await peer.call("AnalysisService/Inspect", inspect, timeout=60)
        await peer.call("CheckpointService/Restore", b"", timeout=60)
        write = pb.WriteRowsRequest(table="t", width=4).SerializeToString()
        await peer.call("CheckpointService/WriteRows", write, timeout=60)
        gate.set()
        await asyncio.gather(*busy)

    with_server(act)


def test_calls_that_wait_for_the_store_hinder_no_long_work() -> None:
    async def act(peer: Peer) -> None:
        gate, workers = threading.Event(), peer.service._workers
        busy = await occupied(workers.store, STORE, gate) + await occupied(
            workers.short, SHORT, gate
        )
        await peer.call("TableService/Evict", pb.EvictRequest(table="t").SerializeToString(), 5)
        gate.set()
        await asyncio.gather(*busy)

    with_server(act)


def test_a_slot_is_taken_until_abandoned_work_has_ended() -> None:
    async def run() -> None:
        workers, gate = Workers(), threading.Event()
        abandoned = [workers.start_long(gate.wait, 20) for _ in range(LONG)]
        await asyncio.sleep(0.05)
        for each in abandoned:
            each.cancel()
        with pytest.raises(Busy, match=r"^this shard already runs 8 long operations, its limit"):
            workers.start_long(gate.wait)
        gate.set()
        await until(lambda: workers._slots == LONG)
        await workers.start_long(time.monotonic)
        workers.close()

    asyncio.run(run())


def test_an_iterator_that_ends_where_it_must_not_is_an_error() -> None:
    async def run() -> None:
        workers = Workers()
        with pytest.raises(RuntimeError, match="unexpected end of an iterator"):
            await workers.start_long(next, iter(()))
        with pytest.raises(RuntimeError, match="unexpected end of an iterator"):
            await workers.run(workers.short, lambda: next(iter(())))
        workers.close()

    asyncio.run(run())


def test_a_thread_that_hangs_does_not_hold_up_a_stop() -> None:
    async def run() -> float:
        pool, gate = Pool("hung", 1), threading.Event()
        hung = asyncio.wrap_future(pool.submit(gate.wait))
        await asyncio.sleep(0.05)
        start = time.monotonic()
        pool.close(0.1)
        took = time.monotonic() - start
        assert all(thread.daemon for thread in pool._threads)
        gate.set()
        await hung
        return took

    assert asyncio.run(run()) < 5
