"""Tests of psserver/transport.py: limits of what a connection may send before the service acts."""

from __future__ import annotations

import asyncio

import pytest
from peers import Peer, with_server

from psserver import transport
from psserver.transport import STREAMS


async def until(reached: int, peer: Peer) -> None:
    async with asyncio.timeout(60):
        while peer.stats.streams != reached:
            await asyncio.sleep(0.01)


def test_a_connection_has_a_limited_number_of_calls_in_progress_and_others_wait() -> None:
    async def act(peer: Peer) -> None:
        streams = [peer.stream() for _ in range(STREAMS + 2)]
        await until(STREAMS, peer)
        async with peer.another() as channel:
            other = channel.stream_stream("/ps.v1.RowService/Stream")()
            await until(STREAMS + 1, peer)  # another connection has a limit of its own
            other.cancel()
            await until(STREAMS, peer)
        for stream in streams[:-2]:
            stream.cancel()
        await until(2, peer)  # those that waited
        for stream in streams[-2:]:
            stream.cancel()

    with_server(act)


def test_a_connection_that_says_nothing_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would count to max_connections, and keep others out without any credential."""
    monkeypatch.setattr(transport, "HANDSHAKE_SECONDS", 0.2)

    async def act(peer: Peer) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", peer.port)
        try:
            async with asyncio.timeout(60):
                while await reader.read(1 << 16):  # the server's own settings, then the end
                    pass
        except ConnectionError:
            pass
        finally:
            writer.close()
        await peer.call("InfoService/GetServerInfo", b"")  # other connections go on

    with_server(act)
