"""Calls that name a shard reach that shard, or are refused."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from peers import LOCAL, Peer, details, with_server
from servers import free_ports

from psserver.config import load
from psserver.identity import IDENTITY, Identity
from psserver.listener import Listener
from psserver.security.guard import Guard

CALLS = ("ps.v1.InfoService/GetServerInfo", "ps.v1.LogService/Subscribe", "ps.v1.RowService/Stream")
HEALTH = {"grpc.health.v1.Health/Check": ("OK", "")}
REFUSED = dict.fromkeys(CALLS, ("UNAVAILABLE", "OTHER_SHARD")) | HEALTH

HERE = Identity(1, 3, "prod")
NAMELESS = Identity(1, 3, "")


@pytest.mark.parametrize(
    ("identity", "value", "names"),
    [
        (HERE, "1/3/prod", None),
        (HERE, "1/3/", None),
        (NAMELESS, "1/3/prod", None),
        (NAMELESS, "1/3/", None),
        (HERE, "2/3/prod", "shard 2 of 3 of cluster 'prod'"),
        (HERE, "1/4/prod", "shard 1 of 4 of cluster 'prod'"),
        (HERE, "1/3/test", "shard 1 of 3 of cluster 'test'"),
        (NAMELESS, "0/3/test", "shard 0 of 3 of cluster 'test'"),
        (NAMELESS, "0/3/", "shard 0 of 3"),
        (HERE, "", "'', which is not SHARD/SHARDS/CLUSTER"),
        (HERE, "1", "'1', which is not SHARD/SHARDS/CLUSTER"),
        (HERE, "1/3/a b", "'1/3/a b', which is not SHARD/SHARDS/CLUSTER"),
        (HERE, 99 * "1" + "/3/", f"{64 * '1'!r}, which is not SHARD/SHARDS/CLUSTER"),
    ],
)
def test_the_shard_that_a_call_names(identity: Identity, value: str, names: str | None) -> None:
    assert identity.differs(value) == names


async def outcome(channel: grpc.aio.Channel, value: str) -> dict[str, tuple[str, str]]:
    """(code, reason) of a call of each kind of method, all with ``value`` as the metadata."""
    metadata, found = ((IDENTITY, value),), {}
    for method, kind in (
        (CALLS[0], "unary_unary"),
        (CALLS[1], "unary_stream"),
        (CALLS[2], "stream_stream"),
        ("grpc.health.v1.Health/Check", "unary_unary"),
    ):
        request: Any = () if kind == "stream_stream" else (b"",)
        call = getattr(channel, kind)(f"/{method}")(*request, metadata=metadata, timeout=60)
        if kind == "stream_stream":
            await call.done_writing()
        code, info = await call.code(), explained(await call.trailing_metadata())
        reason = info[ErrorInfo].reason if info else ""
        if reason == "OTHER_SHARD":
            assert info[RetryInfo].retry_delay.nanos == 500_000_000
        found[method] = code.name, reason
    return found


def explained(trailers: Any) -> dict[type, Any]:
    """The details of an error, by kind; {} if the call succeeded."""

    class Ended:
        @staticmethod
        def trailing_metadata() -> Any:
            return trailers

    return details(Ended)


@pytest.mark.parametrize(
    ("number", "refusal"),
    [(1, ("UNAVAILABLE", "STARTING")), (3, ("FAILED_PRECONDITION", "NOT_A_SHARD"))],
    ids=["starting", "not a shard"],
)
def test_a_server_that_serves_no_rows_refuses_calls_for_another_shard(
    number: int, refusal: tuple[str, str]
) -> None:
    """So the client searches for its shard at once."""

    async def run() -> None:
        flags = ["--shard", str(number), "--shards", "3", "--cluster", "prod"]
        listener = Listener(load([*flags, "--port", str(port := free_ports(1))]), Guard(), list)
        await listener.listen()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=[LOCAL]) as channel:
                assert await outcome(channel, "2/3/prod") == REFUSED
                right = await outcome(channel, f"{number}/3/prod")
                assert right == dict.fromkeys(CALLS, refusal) | HEALTH
        finally:
            await listener.stop(0)

    asyncio.run(run())


def test_a_shard_refuses_calls_for_another_shard() -> None:
    async def act(peer: Peer) -> None:
        async with peer.another() as channel:
            for wrong in ("1/2/prod", "0/1/prod", "0/2/test"):
                assert await outcome(channel, wrong) == REFUSED
            for right in ("0/2/prod", "0/2/"):
                found = await outcome(channel, right)
                assert found[CALLS[0]] == ("OK", "")
                assert all(reason != "OTHER_SHARD" for _, reason in found.values())

    with_server(act, "--shards", "2", "--cluster", "prod")
