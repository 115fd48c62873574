"""The port of one shard: gRPC, health, reflection; alive before it is ready.

A server listens at once. It is alive then, and refuses work with UNAVAILABLE until its kernels are
loaded and its shard is recovered; then health turns SERVING.
"""

from __future__ import annotations

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from psproto import keepalive
from psserver.config import ConfigError, ServerConfig
from psserver.handlers import Door
from psserver.service import Service

SERVICES = (
    "ps.v1.TableService",
    "ps.v1.RowService",
    "ps.v1.LogService",
    "ps.v1.CheckpointService",
    "ps.v1.AnalysisService",
    "ps.v1.InfoService",
)
HEALTH = ("", "liveness", "readiness", *SERVICES)
TRANSPORT_SLACK = 2  # a message up to twice the limit is read, so that its sender gets a reason
Status = health_pb2.HealthCheckResponse


class Listener:
    """The gRPC server, from ``listen`` to ``stop``."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._health = HealthServicer()
        self._door = Door()

    async def listen(self) -> None:
        """Answer that the shard is alive, and not ready; ConfigError if the port is taken."""
        config = self._config
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", TRANSPORT_SLACK * config.max_message_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),
                *keepalive.server_options(),
            ]
        )
        self._server.add_generic_rpc_handlers((self._door,))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (*SERVICES, "grpc.health.v1.Health", reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        address = f"{config.host}:{config.port}"
        try:
            self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise ConfigError(f"port: cannot listen on {address}: {error}") from error
        await self._set_health(Status.NOT_SERVING)
        await self._health.set("liveness", Status.SERVING)
        await self._server.start()

    async def serve(self, service: Service) -> None:
        """Let calls in, and be ready."""
        self._door.open(service.handlers())
        await self._set_health(Status.SERVING)

    async def refuse(self) -> None:
        """Be alive, and not ready."""
        await self._set_health(Status.NOT_SERVING)

    async def stop(self, grace: float) -> None:
        """Close the port, and end the calls that are left after ``grace`` seconds."""
        await self._server.stop(grace)

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for name in HEALTH:
            if name != "liveness" or status == Status.SERVING:
                await self._health.set(name, status)
