"""One shard as a process: its life from configuration to a graceful stop.

    engine thread   owns the shard
    event loop      gRPC on uvloop
    metrics thread  answers /metrics

A server is ready once its kernels are loaded and it listens. SIGTERM or SIGINT: health turns
NOT_SERVING, new work is refused with UNAVAILABLE, work in hand is finished, the process ends.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import sys
import time
from pathlib import Path
from typing import IO

import grpc
import structlog
import uvloop
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry, GCCollector, ProcessCollector, start_http_server

from psproto import RELEASE, routing
from psserver.config import ConfigError, ServerConfig
from psserver.engine import Engine
from psserver.metrics import Counts, ShardCollector
from psserver.service import Service
from psserver.shard import Shard
from psserver.warm import warm

SERVICES = ("ps.v1.TableService", "ps.v1.RowService", "ps.v1.InfoService")
HEALTH = ("", "liveness", "readiness", *SERVICES)
SWITCH_SECONDS = (
    1e-4  # loop and engine hand work to each other; 5 ms of waiting for the GIL is long
)
TRANSPORT_SLACK = 2  # a message up to twice the limit is read, so that its sender gets a reason

log = structlog.get_logger()


class Server:
    """One shard behind gRPC."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._engine = Engine()
        self._counts = Counts()
        self._shard = Shard(
            number=config.shard,
            shard_map=routing.even_map(config.shards),
            memory_bytes=config.memory_bytes,
            reply_bytes=config.max_message_bytes,
            max_tables=config.max_tables,
            max_sessions=config.max_sessions,
            session_ttl=config.session_ttl_seconds,
            clock=time.monotonic,
        )
        self._service = Service(self._shard, self._engine, self._counts, config, RELEASE)
        self._health = HealthServicer()

    async def open(self) -> None:
        """Listen and serve."""
        config = self._config
        self._engine.open(asyncio.get_running_loop())
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", TRANSPORT_SLACK * config.max_message_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),
            ]
        )
        self._server.add_generic_rpc_handlers(self._service.handlers())
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (*SERVICES, "grpc.health.v1.Health", reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        address = f"{config.host}:{config.port}"
        try:
            self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise ConfigError(f"port: cannot listen on {address}: {error}") from error
        if config.metrics_port:
            registry = CollectorRegistry()
            registry.register(ShardCollector(self._shard, self._engine, self._counts))
            ProcessCollector(registry=registry)
            GCCollector(registry=registry)
            try:
                self._metrics, _ = start_http_server(
                    config.metrics_port, config.host, registry=registry
                )
            except OSError as error:
                raise ConfigError(
                    f"metrics_port: cannot listen on {config.host}:{config.metrics_port}: {error}"
                ) from error
        await self._server.start()
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)

    async def close(self) -> None:
        """Drain, then stop."""
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        self._service.drain()
        await self._server.stop(self._config.drain_seconds)
        self._engine.close()
        if self._config.metrics_port:
            self._metrics.shutdown()

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for name in HEALTH:
            if name != "liveness" or status == health_pb2.HealthCheckResponse.SERVING:
                await self._health.set(name, status)


def lock(directory: Path) -> IO[str]:
    """Make ``directory`` this process's alone for as long as the returned file is open."""
    directory.mkdir(parents=True, exist_ok=True)
    held = (directory / "LOCK").open("a")
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        held.close()
        raise ConfigError(f"data_dir: {directory} is in use by another server") from error
    return held


async def _serve(config: ServerConfig) -> None:
    started = time.monotonic()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    warm()
    server = Server(config)
    await server.open()
    log.info(
        "ready",
        shard=config.shard,
        shards=config.shards,
        address=f"{config.host}:{config.port}",
        seconds=round(time.monotonic() - started, 2),
        pid=os.getpid(),
    )
    print("ready", flush=True)
    await stop.wait()
    log.info("stopping", shard=config.shard)
    await server.close()
    log.info("stopped", shard=config.shard)


def serve(config: ServerConfig) -> None:
    """Run one shard until SIGTERM or SIGINT; ConfigError if it cannot start."""
    held = lock(config.data_dir) if config.data_dir else None
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        uvloop.run(_serve(config))
    finally:
        if held:
            held.close()
