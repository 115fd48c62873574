"""The health service grpc.health.v1, which reports whether each service of this server is ready.

Setting a status does not wait for clients that watch it, so that a client that does not read cannot
block the server.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import TypeAlias

import grpc
from grpc_health.v1 import health_pb2 as pb
from grpc_health.v1 import health_pb2_grpc

Status: TypeAlias = pb.HealthCheckResponse
Serving: TypeAlias = pb.HealthCheckResponse.ServingStatus


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Stores and reports a status, for example SERVING, for each service name.

    Must be used on the event loop.
    """

    def __init__(self) -> None:
        self._statuses: dict[str, Serving] = {}
        self._changed = asyncio.Event()  # set at the next change, then replaced by a new event

    def set(self, names: Iterable[str], status: Serving) -> None:
        """Give all ``names`` the same status, and notify watchers."""
        self._statuses.update(dict.fromkeys(names, status))
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def Check(  # noqa: N802
        self, request: pb.HealthCheckRequest, context: grpc.aio.ServicerContext[bytes, bytes]
    ) -> Status:
        """Return the status of the name ``request.service``; end with NOT_FOUND if it has none."""
        status = self._statuses.get(request.service)
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND)
        return Status(status=status)

    async def List(  # noqa: N802
        self, request: pb.HealthListRequest, context: grpc.aio.ServicerContext[bytes, bytes]
    ) -> pb.HealthListResponse:
        """Return the statuses of all names."""
        found = {name: Status(status=status) for name, status in self._statuses.items()}
        return pb.HealthListResponse(statuses=found)

    async def Watch(  # noqa: N802
        self, request: pb.HealthCheckRequest, context: grpc.aio.ServicerContext[bytes, bytes]
    ) -> None:
        """Send the status of the name ``request.service`` now, and again whenever it changes.

        A name without a status has SERVICE_UNKNOWN. Runs until the client cancels.
        """
        last = None
        while True:
            changed = self._changed
            status = self._statuses.get(request.service, Status.SERVICE_UNKNOWN)
            if status != last:
                await context.write(Status(status=status))
                last = status
            await changed.wait()
