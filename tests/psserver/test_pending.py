"""Thousands of calls at once: each is served or asked to come again; none is dropped silently."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc.error_details_pb2 import RetryInfo
from peers import Peer, details, refusal, with_server

from psproto import codec
from psproto import ps_pb2 as pb

PULL = codec.encode_pull(codec.PullMessage(pb.PullHeader(table="t"), np.ones(1, np.uint64)))
CALLS, CONNECTIONS = 5_000, 50


async def outcomes(peer: Peer, calls: int) -> Counter[Any]:
    """How calls on many connections end that all begin at once."""
    channels = [peer.another() for _ in range(CONNECTIONS)]
    found: Counter[Any] = Counter()

    async def one(channel: Any) -> None:
        try:
            await channel.unary_unary("/ps.v1.RowService/Pull")(PULL, timeout=60)
            found["served"] += 1
        except grpc.aio.AioRpcError as error:
            found[(*refusal(error), RetryInfo in details(error))] += 1

    await asyncio.gather(*(one(channels[at % CONNECTIONS]) for at in range(calls)))
    for channel in channels:
        await channel.close()
    return found


@pytest.mark.slow
def test_of_5000_calls_at_once_all_are_served_or_asked_to_come_again() -> None:
    async def act(peer: Peer) -> Counter[Any]:
        return await outcomes(peer, CALLS)

    found = with_server(act)
    assert set(found) <= {"served", ("RESOURCE_EXHAUSTED", "OVERLOADED", True)}
    assert found["served"] >= 4096


def test_calls_beyond_the_limit_are_asked_to_come_again() -> None:
    async def act(peer: Peer) -> Counter[Any]:
        gate = asyncio.Event()
        finish = peer.service._exchanges.finish

        async def slow(begun: Any) -> Any:
            await gate.wait()
            return await finish(begun)

        peer.service._exchanges.finish = slow  # type: ignore[method-assign]
        asyncio.get_running_loop().call_later(2.0, gate.set)
        return await outcomes(peer, 400)

    found = with_server(act, "--max-calls", "100")
    assert found == {"served": 100, ("RESOURCE_EXHAUSTED", "OVERLOADED", True): 300}
