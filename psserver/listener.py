"""Serve gRPC, including health checks and reflection, on the port of one shard.

The port opens at once. Until the kernels are loaded and the shard is recovered, the health service
reports that the server is alive but not ready. Meanwhile all calls are refused with UNAVAILABLE and
a delay for the retry. A server whose number is not below the number of shards stays in this state,
and refuses calls with NOT_A_SHARD.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc
from grpc_reflection.v1alpha._async import ReflectionServicer

from psproto import keepalive
from psserver import acceptor, transport
from psserver.addresses import bind, cannot_listen, join
from psserver.config import ServerConfig
from psserver.connections import Connections
from psserver.door import Door
from psserver.errors import NotAShard, Starting
from psserver.health import Health
from psserver.identity import Identity
from psserver.security.certificates import Certificates
from psserver.security.guard import Guard
from psserver.security.verbs import LANE, METHODS
from psserver.service import Service
from psserver.unusable import ConfigError

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

log = structlog.get_logger()


class Listener:
    """Runs the gRPC server of one shard, from ``listen`` to ``stop``.

    guard  finds out who calls, and what the caller may do
    lost   called if gRPC's server ends although nobody has stopped it; the process must start again

    certificates  the TLS certificates in use; None: the port is plaintext

    Raises ConfigError if a certificate cannot be used.
    """

    def __init__(self, config: ServerConfig, guard: Guard, lost: Callable[[], None]) -> None:
        self._config = config
        self._lost = lost
        self._stopping = False
        self.certificates = Certificates(config) if config.tls else None
        self._health = Health()
        self.connections = Connections(config.port, config.memory.transport, config.receive_seconds)
        surplus = NotAShard(config.shard, config.shards) if config.surplus else None
        identity = Identity(config.shard, config.shards, config.cluster)
        self._door = Door(self.connections, surplus or Starting(), identity, guard)

    async def listen(self) -> None:
        """Open the port and report that the shard is alive but not ready.

        Raises ConfigError if the port cannot be used.
        """
        config = self._config
        self._server = acceptor.server(
            self._door,
            [path for path in METHODS if path != LANE],
            [
                ("grpc.so_reuseport", 0),
                *transport.options(config),
                *keepalive.server_options(),
            ],
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._door)
        names = (*SERVICES, "grpc.health.v1.Health", reflection.SERVICE_NAME)
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(
            ReflectionServicer(names), self._door
        )
        try:
            self._bind()
        except ConfigError:
            await self._server.stop(0)
            raise
        self._health.set(READINESS, Status.NOT_SERVING)
        self._health.set(["liveness"], Status.SERVING)
        await self._server.start()
        self._watching = asyncio.create_task(self._watch())
        self.connections.open()

    async def _watch(self) -> None:
        """Call ``lost`` if gRPC's server ends before ``stop``: nobody could reach the shard."""
        why = "no reason"
        try:
            await self._server.wait_for_termination()
        except Exception as error:
            why = repr(error)
        if not self._stopping:
            log.critical("gRPC's server has ended; the process starts again", reason=why)
            self._lost()

    def expiries(self) -> dict[str, float]:
        """Return use of a certificate -> when it expires, in seconds since 1970; {} without TLS."""
        return {} if self.certificates is None else self.certificates.expiries()

    def _bind(self) -> None:
        """Bind the port. Raises ConfigError with the reason if that fails."""
        host, port = self._config.host, self._config.port
        try:
            for listener in bind(host, port):  # gRPC would not report the reason
                listener.close()
            if self.certificates is None:
                self._server.add_insecure_port(join(host, port))
            else:
                self._server.add_secure_port(join(host, port), self.certificates.credentials())
        except OSError as error:
            raise ConfigError(cannot_listen("port", host, port, error)) from error
        except RuntimeError as error:
            raise ConfigError(f"port: cannot listen on {join(host, port)}: {error}") from error

    async def serve(self, service: Service) -> None:
        """Pass calls to ``service`` from now on, and report that the shard is ready."""
        self._door.open(service.methods())
        self._health.set(READINESS, Status.SERVING)

    async def refuse(self) -> None:
        """Report that the shard is alive but no longer ready. Calls are still passed on."""
        self._health.set(READINESS, Status.NOT_SERVING)

    async def stop(self, grace: float) -> None:
        """Close the port. Calls still in flight after ``grace`` seconds are cancelled."""
        self._stopping = True
        await self._server.stop(grace)
        self.connections.close()
