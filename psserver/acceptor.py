"""The gRPC server of a shard, which no call can stop.

The server of grpc.aio decodes the path of each call in the task that accepts all calls. A path that
is not UTF-8 ends this task, and with it the server: one request of anybody who reaches the port
would stop the shard. So here gRPC's core is told the paths of all methods, and accepts the calls of
each method separately. Calls of any other path are answered with UNIMPLEMENTED, and their path is
never looked at.

This uses names of gRPC that are not public. With a gRPC that has others, ``server`` returns the
server of grpc.aio as it is.
"""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Iterable, Sequence
from typing import Any

import grpc
import structlog

cygrpc: Any = importlib.import_module("grpc._cython.cygrpc")
aio: Any = importlib.import_module("grpc.aio._server")
HANDLE = ("method_name", "method_resolver", "interceptors", "rpc_state", "loop")
SCHEDULE = ("rpc_coro", "rpc_state", "loop", "method_name")

log = structlog.get_logger()


class _Core(cygrpc.AioServer):  # type: ignore[misc]
    """The part of gRPC's server that accepts calls.

    handlers  finds the handler of each method
    """

    def serve(self, handlers: grpc.GenericRpcHandler, loop: asyncio.AbstractEventLoop) -> None:
        """Set what answers the calls, before the start."""
        self._resolver = cygrpc._MethodResolver([handlers], {})
        self._events = loop
        self._calls: set[asyncio.Task[None]] = set()

    def _make_request_call_future(self, method: bytes | None) -> asyncio.Task[None]:
        """Return a task that accepts all calls of a method; None: of paths that are no method.

        gRPC expects a future of the next call. This one is done only when the server stops.
        """
        return self._events.create_task(self._accept(method))

    async def _accept(self, method: bytes | None) -> None:
        """Accept calls until the server stops. Then raises an error of gRPC, which expects it."""
        path = "" if method is None else method.decode()
        while True:
            if method is None:
                state = await self._request_call()
            else:
                state = await self._request_registered_call(method)
            answer = cygrpc._handle_rpc(path, self._resolver, (), state, self._events, False)
            task = self._events.create_task(
                cygrpc._schedule_rpc_coro(answer, state, self._events, path)
            )
            self._calls.add(task)
            task.add_done_callback(self._calls.discard)


class _Server(aio.Server):  # type: ignore[misc]
    """A server of grpc.aio with ``_Core``."""

    def __init__(self, core: _Core, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._server = core


def supported() -> bool:
    """Return whether this gRPC has the names that this file uses."""
    try:
        return (
            _arguments(cygrpc._handle_rpc)[: len(HANDLE)] == HANDLE
            and _arguments(cygrpc._schedule_rpc_coro) == SCHEDULE
            and hasattr(cygrpc.AioServer, "_request_registered_call")
            and hasattr(cygrpc.AioServer, "_make_request_call_future")
            and hasattr(cygrpc, "_MethodResolver")
        )
    except AttributeError:
        return False


def server(
    handlers: grpc.GenericRpcHandler,
    paths: Iterable[str],
    options: Sequence[tuple[str, Any]],
) -> grpc.aio.Server:
    """Return a server, not started yet.

    handlers  finds the handler of each method
    paths     full names of all methods, for example "/ps.v1.RowService/Pull"
    options   options of gRPC
    """
    if not supported():
        log.warning("a call can stop the server", grpc=grpc.__version__, advice="use another gRPC")
        made = grpc.aio.server(options=options)
        made.add_generic_rpc_handlers((handlers,))
        return made
    loop = cygrpc.get_working_loop()
    core = _Core(loop, None, (), None, tuple(options), None)
    core.serve(handlers, loop)
    core.add_registered_method_handlers(dict.fromkeys(paths))
    return _Server(core, loop)


def _arguments(function: Any) -> tuple[str, ...]:
    code = function.__code__
    return tuple(code.co_varnames[: code.co_argcount])
