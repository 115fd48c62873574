"""A quiet connection stays: what a client's pings need, a server allows."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from psproto import keepalive
from psproto.keepalive import Options, client_options, server_options

SCALE = 0.1  # a ping each second, as often as gRPC pings at most
QUIET_SECONDS = 7.0  # gRPC's default server allows two pings without data, then closes

EMPTY_SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # the frame that opens an HTTP/2 connection


class Echo(grpc.GenericRpcHandler):
    """Streams that return what they get."""

    def service(self, _: Any) -> Any:
        async def stream(requests: AsyncIterator[bytes], __: Any) -> AsyncIterator[bytes]:
            async for request in requests:
                yield request

        return grpc.stream_stream_rpc_method_handler(stream)


async def quiet(server_has: Options) -> bytes:
    """Keep a stream open in silence, then use it again; its answer."""
    server = grpc.aio.server(options=server_has)
    server.add_generic_rpc_handlers((Echo(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        address, options = f"127.0.0.1:{port}", client_options(SCALE)
        async with grpc.aio.insecure_channel(address, options=options) as channel:
            call: Any = channel.stream_stream("/a/b")()
            await call.write(b"1")
            assert await call.read() == b"1"
            await asyncio.sleep(QUIET_SECONDS)
            assert not call.done(), await call.details()
            await call.write(b"2")
            answer: bytes = await call.read()
            call.cancel()
            return answer
    finally:
        await server.stop(0)


@pytest.mark.slow
def test_a_quiet_stream_outlives_many_pings() -> None:
    assert asyncio.run(quiet(server_options(SCALE))) == b"2"


@pytest.mark.slow
def test_a_server_of_other_numbers_would_end_it() -> None:
    with pytest.raises(AssertionError, match=r"[Tt]oo.many.pings"):
        asyncio.run(quiet(()))


def test_a_lost_server_is_noticed() -> None:
    """By a client of a server that has opened the connection, and answers nothing any more."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with grpc.insecure_channel(address, options=client_options(SCALE)) as channel:
            call: Any = channel.stream_stream("/a/b")(iter([b"1"]))
            connection, _ = listener.accept()
            with connection:
                connection.sendall(EMPTY_SETTINGS)
                start = time.monotonic()
                with pytest.raises(grpc.RpcError) as caught:
                    next(call)
                took = time.monotonic() - start
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]
    assert took < 10  # seconds; gRPC's own timeout is 60


def test_a_server_allows_what_a_client_does() -> None:
    assert 2 * keepalive.LEAST_SECONDS <= keepalive.PING_SECONDS
