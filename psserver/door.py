"""Dispatch the calls of all gRPC services of a server, including health checks and reflection."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError

from psproto import codec
from psserver.connections import Connections
from psserver.errors import OtherShard, Overloaded, Refused, TooLarge
from psserver.identity import IDENTITY, Identity
from psserver.limits import CONTROL_BYTES
from psserver.security.guard import Guard
from psserver.security.verbs import METHODS
from psserver.status import abort

STREAMS = 1024  # maximum number of open streams of health checks and reflection

Context: TypeAlias = "grpc.aio.ServicerContext[bytes, bytes]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class Door(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Finds the handler of each gRPC method. Until ``open``, it refuses methods of ps.v1.

    A call without a valid credential learns nothing, not even which shard this is.

    connections  counts the complete messages of each connection
    refusal      the error with which calls are refused until ``open``
    identity     this shard; calls of ps.v1 that name a different one are refused
    guard        finds out who calls, and what the caller may do
    """

    def __init__(
        self, connections: Connections, refusal: Refused, identity: Identity, guard: Guard
    ) -> None:
        self._connections = connections
        self._guard = guard
        self._identity = identity
        self._right = ""  # newest value of the metadata IDENTITY that named this shard
        self._methods: dict[str, Handler] = {}
        self._opened = False
        self._streams = 0  # open streams of services other than ps.v1
        self._refusal = refusal

    def open(self, methods: Mapping[str, Handler]) -> None:
        """Begin to serve methods.

        methods  full name, for example "/ps.v1.RowService/Pull" -> handler
        """
        self._methods.update(methods)
        self._opened = True

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Handler | None:
        """Return the handler of the called method; None if there is no such method."""
        method = handler_call_details.method
        if method.startswith("/ps.v1."):
            for key, value in handler_call_details.invocation_metadata:
                if key == IDENTITY and value != self._right:
                    if (expected := self._identity.differs(value)) is not None:
                        error = OtherShard(str(self._identity), expected)
                        return self._refusing(method, error)
                    self._right = value
            if not self._opened:
                return self._refusing(method, self._refusal)
        return self._methods.get(method)

    def _refusing(self, method: str, error: Refused) -> Handler:
        """Return a handler, for all kinds of methods, that refuses each call with ``error``, or for
        the lack of a right to call ``method``.
        """

        async def refuse(_: Any, context: Context) -> None:
            try:
                if method in METHODS:
                    self._guard.actor(method, context, context.peer())
            except Refused as denied:
                await abort(context, denied)
            await abort(context, error)

        return grpc.stream_stream_rpc_method_handler(refuse)

    # ---- the interface of a server that generated code uses

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Do nothing. Generated code also passes each handler to add_registered_method_handlers."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Handler]) -> None:
        """Serve the methods of a service that is not ps.v1, for example of health checks.

        service   full name of the service
        handlers  name of a method -> handler

        Messages of more than CONTROL_BYTES are refused before they are parsed.
        """
        for name, handler in handlers.items():
            path = f"/{service}/{name}"
            self._methods[path] = self._limited(path, handler)

    @contextmanager
    def _stream(self) -> Iterator[None]:
        """Count a stream of health checks or reflection as open while the block runs.

        Raises Overloaded if STREAMS streams are open already.
        """
        if self._streams >= STREAMS:
            raise Overloaded(
                f"{STREAMS} streams of health checks and reflection are open, the limit; retry"
                " later"
            )
        self._streams += 1
        try:
            yield
        finally:
            self._streams -= 1

    def _limited(self, path: str, handler: Handler) -> Handler:
        """Wrap a handler of health checks or reflection: limit its messages and its streams, and
        require the right to call it.

        path  full name of the method
        """
        parse, answer = handler.request_deserializer, handler.response_serializer

        def read(data: bytes, context: Context) -> Any:
            self._connections.arrived(context.peer(), len(data))
            if len(data) > CONTROL_BYTES:
                raise TooLarge(
                    "MESSAGE_TOO_LARGE",
                    f"message of {len(data)} bytes > {CONTROL_BYTES}, the limit for this service",
                )
            try:
                return parse(data)
            except DecodeError as error:
                raise codec.Malformed(str(error)) from error

        async def requests(many: AsyncIterator[bytes], context: Context) -> AsyncIterator[Any]:
            async for data in many:
                yield read(data, context)

        async def unary(data: bytes, context: Context) -> Any:
            try:
                self._guard.actor(path, context, context.peer())
                request = read(data, context)
            except (Refused, codec.Malformed) as error:
                del data
                await abort(context, error)
            return await handler.unary_unary(request, context)

        async def watch(data: bytes, context: Context) -> None:
            try:
                actor = self._guard.actor(path, context, context.peer())
                with self._stream(), actor.watched():
                    await handler.unary_stream(read(data, context), context)
            except (Refused, codec.Malformed) as error:
                del data
                await abort(context, error)

        async def stream(many: AsyncIterator[bytes], context: Context) -> AsyncIterator[Any]:
            try:
                actor = self._guard.actor(path, context, context.peer())
                with self._stream(), actor.watched():
                    async for reply in handler.stream_stream(requests(many, context), context):
                        yield reply
            except (Refused, codec.Malformed) as error:
                await abort(context, error)

        if handler.request_streaming:
            return grpc.stream_stream_rpc_method_handler(stream, None, answer)
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(watch, None, answer)
        return grpc.unary_unary_rpc_method_handler(unary, None, answer)
