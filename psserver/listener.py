"""The port of one shard: gRPC, health, reflection; alive before it is ready.

A server listens at once. It is alive then, and refuses work with UNAVAILABLE until its kernels are
loaded and its shard is recovered; then health turns SERVING.
"""

from __future__ import annotations

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc
from grpc_reflection.v1alpha._async import ReflectionServicer

from psproto import keepalive
from psserver import transport
from psserver.config import ConfigError, ServerConfig
from psserver.connections import Connections
from psserver.door import Door
from psserver.health import Health
from psserver.service import Service

SERVICES = (
    "ps.v1.TableService",
    "ps.v1.RowService",
    "ps.v1.LogService",
    "ps.v1.CheckpointService",
    "ps.v1.AnalysisService",
    "ps.v1.InfoService",
)
READINESS = ("", "readiness", *SERVICES)
HEALTH = (*READINESS, "liveness")
Status = health_pb2.HealthCheckResponse


class Listener:
    """The gRPC server, from ``listen`` to ``stop``."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._health = Health()
        self.connections = Connections(config.port, config.memory.transport, config.receive_seconds)
        self._door = Door(self.connections)

    async def listen(self) -> None:
        """Answer that the shard is alive, and not ready; ConfigError if the port is taken."""
        config = self._config
        self._server = grpc.aio.server(
            options=[
                ("grpc.so_reuseport", 0),
                *transport.options(config),
                *keepalive.server_options(),
            ]
        )
        self._server.add_generic_rpc_handlers((self._door,))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._door)
        names = (*SERVICES, "grpc.health.v1.Health", reflection.SERVICE_NAME)
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(
            ReflectionServicer(names), self._door
        )
        address = f"{config.host}:{config.port}"
        try:
            self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise ConfigError(f"port: cannot listen on {address}: {error}") from error
        self._health.set(READINESS, Status.NOT_SERVING)
        self._health.set(["liveness"], Status.SERVING)
        await self._server.start()
        self.connections.open()

    async def serve(self, service: Service) -> None:
        """Let calls in, and be ready."""
        self._door.open(service.methods())
        self._health.set(READINESS, Status.SERVING)

    async def refuse(self) -> None:
        """Be alive, and not ready."""
        self._health.set(READINESS, Status.NOT_SERVING)

    async def stop(self, grace: float) -> None:
        """Close the port, and end the calls that are left after ``grace`` seconds."""
        await self._server.stop(grace)
        self.connections.close()
