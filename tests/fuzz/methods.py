"""Call the gRPC methods of a server in this process with any bytes.

The first byte of an input chooses the method, the rest is the message. A method must answer, or
refuse with a status other than INTERNAL, and later calls must work.
"""

from __future__ import annotations

import asyncio
import os
import socket
import tempfile
import time
from types import SimpleNamespace
from typing import Any

import grpc
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status

from psproto import ps_pb2 as pb
from psserver.config import load
from psserver.server import Server
from tests.psproto.wire_examples import GOLDEN, golden

SERVICES = pb.DESCRIPTOR.services_by_name
METHODS = [method for name in sorted(SERVICES) for method in SERVICES[name].methods]
CALL_SECONDS = 0.05  # then a call that goes on is cancelled
INTERNAL = grpc.StatusCode.INTERNAL.value[0]
ANSWERS = 16  # messages that a stream may send before it is cancelled
FLAGS = (
    *("--metrics-port", "0", "--host-bytes", str(32 << 20), "--max-tables", "32"),
    *("--max-message-bytes", str(1 << 20), "--max-inflight-bytes", str(8 << 20)),
    *("--segment-bytes", str(1 << 20), "--log-keep-bytes", "0", "--disk-bytes", str(64 << 20)),
)


class Ended(Exception):
    """A call was aborted with a status."""


class Context:
    """What a handler sees of a call: a peer on this machine that reads up to ANSWERS messages.

    sent  what a stream of requests reads
    """

    def __init__(self, *sent: bytes) -> None:
        self._trailers: dict[str, bytes] = {}
        self._left = ANSWERS
        self._sent, self._reads = list(sent), bool(sent)

    def peer(self) -> str:
        return "ipv4:127.0.0.1:9"

    def invocation_metadata(self) -> tuple[Any, ...]:
        return ()

    def auth_context(self) -> dict[str, Any]:
        return {}

    def time_remaining(self) -> float:
        return 60.0

    def set_trailing_metadata(self, trailers: Any) -> None:
        self._trailers = dict(trailers)

    async def read(self) -> Any:
        return self._sent.pop(0) if self._sent else grpc.aio.EOF

    async def write(self, data: bytes) -> None:
        if self._reads:
            refused = pb.StreamResponse.FromString(data).error
            assert refused.code != INTERNAL, refused.message
        self._left -= 1
        if self._left < 0:
            raise asyncio.CancelledError
        await asyncio.sleep(0)

    async def abort(self, code: grpc.StatusCode, details: str = "") -> None:
        status = Status.FromString(self._trailers["grpc-status-details-bin"])
        reason = ErrorInfo.FromString(status.details[0].value).reason
        assert code is not grpc.StatusCode.INTERNAL, f"{reason}: {details}"
        raise Ended


def examples() -> list[bytes]:
    """Return one message of each method."""
    return [
        bytes([number]) + golden(method.input_type.name)
        for number, method in enumerate(METHODS)
        if (GOLDEN / f"{method.input_type.name}.hex").exists()
    ]


class Methods:
    """A server in this process, with a table "t", a log and a checkpoint directory."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._directory = tempfile.TemporaryDirectory()
        root = self._directory.name
        os.mkdir(f"{root}/data")
        flags = [*FLAGS, "--data-dir", f"{root}/data", "--checkpoint-url", f"file://{root}/saved"]
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self._server = Server(load(["--port", str(port), *flags]), lambda: None)
        self._loop.run_until_complete(self._start())

    def close(self) -> None:
        self._loop.run_until_complete(self._server.close())
        self._loop.close()
        self._directory.cleanup()

    async def _start(self) -> None:
        await self._server.listen()
        await self._server.open()
        self._door = self._server._listener._door
        sgd = pb.Rule(name="sgd", parameters={"lr": 1.0})
        schema = pb.TableSchema(
            name="users", dim=2, optimizer=sgd, initializer=pb.Rule(name="zeros")
        )
        create = next(i for i, method in enumerate(METHODS) if method.name == "CreateTable")
        request = pb.CreateTableRequest(schema=schema).SerializeToString()
        await self._call(METHODS[create], request)

    def call(self, data: bytes) -> None:
        """Call the method that the first byte names with the rest as its message."""
        if data:
            method = METHODS[data[0] % len(METHODS)]
            self._loop.run_until_complete(self._bounded(method, bytes(data[1:])))

    async def _bounded(self, method: Any, data: bytes) -> None:
        work = asyncio.ensure_future(self._call(method, data))
        await asyncio.wait([work], timeout=CALL_SECONDS)
        began = time.monotonic()
        while not work.done():
            work.cancel()
            await asyncio.wait([work], timeout=1)
            assert time.monotonic() < began + 60, f"{method.name} does not end"
        if not work.cancelled() and not isinstance(work.exception(), Ended | None):
            work.result()

    async def _call(self, method: Any, data: bytes) -> None:
        name = f"/{method.containing_service.full_name}/{method.name}"
        handler = self._door.service(
            SimpleNamespace(method=name, invocation_metadata=())  # type: ignore[arg-type]
        )
        if handler.request_streaming:
            context: Any = Context(data)
            await handler.stream_stream(context, context)
        elif handler.response_streaming:
            await handler.unary_stream(data, Context())
        else:
            await handler.unary_unary(data, Context())
