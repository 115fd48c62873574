"""A client of a server in this process, both on one loop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from servers import free_ports

from psproto import ps_pb2 as pb
from psserver.config import load
from psserver.server import Server

LOCAL = ("grpc.use_local_subchannel_pool", 1)  # a connection of its own


class Peer:
    """A client of one server, both on this loop."""

    def __init__(self, server: Server, channel: grpc.aio.Channel, port: int) -> None:
        self.server = server
        self.port = port
        self.stats = server._stats
        self.engine = server._engine
        self.service = server._service
        self.limits = server._service._limits
        self._channel = channel

    def another(self) -> grpc.aio.Channel:
        """A channel with a connection of its own."""
        return grpc.aio.insecure_channel(f"127.0.0.1:{self.port}", options=[LOCAL])

    async def call(self, method: str, data: bytes, timeout: float = 20) -> bytes:
        return await self._channel.unary_unary(f"/{full(method)}")(data, timeout=timeout)  # type: ignore[no-any-return]

    def many(self, method: str, data: bytes, timeout: float = 20) -> Any:
        return self._channel.unary_stream(f"/{full(method)}")(data, timeout=timeout)

    def stream(self) -> Any:
        return self._channel.stream_stream("/ps.v1.RowService/Stream")()

    async def create(self, name: str, dim: int) -> None:
        rule = pb.Rule(name="sgd", parameters={"lr": 1.0})
        schema = pb.TableSchema(
            name=name, dim=dim, optimizer=rule, initializer=pb.Rule(name="zeros")
        )
        request = pb.CreateTableRequest(schema=schema)
        await self.call("TableService/CreateTable", request.SerializeToString())


def full(method: str) -> str:
    """The full name of a method of ps.v1."""
    return method if "." in method else f"ps.v1.{method}"


def with_server(act: Callable[[Peer], Awaitable[Any]], *flags: str, dim: int = 4) -> Any:
    """Run ``await act(peer)`` next to a server that has a table "t"."""

    async def run() -> Any:
        port = free_ports(1)
        server = Server(load(["--port", str(port), "--metrics-port", "0", *flags]), lambda: None)
        await server.listen()
        await server.open()
        options = [("grpc.max_receive_message_length", -1), LOCAL]
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
                peer = Peer(server, channel, port)
                await peer.create("t", dim)
                return await act(peer)
        finally:
            await server.close()

    return asyncio.run(run())


def details(error: Any) -> dict[type, Any]:
    """The details of a refused call, by kind."""
    metadata = dict(error.trailing_metadata() or ())
    if "grpc-status-details-bin" not in metadata:
        return {}
    status = Status.FromString(metadata["grpc-status-details-bin"])
    found = {}
    for detail in status.details:
        for kind in (ErrorInfo, RetryInfo):
            if detail.Is(kind.DESCRIPTOR):
                found[kind] = kind.FromString(detail.value)
    return found


def refusal(error: Any) -> tuple[str, str]:
    """Code and reason of a refused call."""
    info = details(error).get(ErrorInfo)
    return error.code().name, "" if info is None else info.reason


async def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)
