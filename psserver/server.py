"""One shard as a process: its life from configuration to a graceful stop.

    engine thread   owns the shard
    event loop      gRPC on uvloop; small work in the engine's place, while that is idle
    metrics thread  answers /metrics

A server listens at once. It is alive then, and refuses work with UNAVAILABLE until its kernels are
loaded and its shard is recovered; then health turns SERVING. SIGTERM or SIGINT: health turns
NOT_SERVING, new work is refused with UNAVAILABLE, work in hand is finished, the process ends.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
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
from psserver.analysis import Analyses
from psserver.checkpointer import Checkpointer, recover
from psserver.checkpoints import Checkpoints
from psserver.config import ConfigError, ServerConfig
from psserver.engine import Engine
from psserver.feed import Feed
from psserver.metrics import CheckpointCollector, Counts, FeedCollector, ShardCollector
from psserver.restore import COMMITTED, Restores, State, failed, loaded, settle
from psserver.service import Door, Service
from psserver.shard import Shard
from psserver.sweeper import Sweeper
from psserver.warm import warm
from storage.base import Base
from storage.checkpoint import from_json, to_json
from storage.disk import replace
from storage.errors import Corrupt, StorageError
from storage.store import Store
from storage.versionlog import VersionLog

SERVICES = (
    "ps.v1.TableService",
    "ps.v1.RowService",
    "ps.v1.LogService",
    "ps.v1.CheckpointService",
    "ps.v1.AnalysisService",
    "ps.v1.InfoService",
)
OWNER = "SHARD"  # file in a data directory: whose it is
HEALTH = ("", "liveness", "readiness", *SERVICES)
SWITCH_SECONDS = (
    1e-4  # loop and engine hand work to each other; 5 ms of waiting for the GIL is long
)
LAST_ANSWERS_SECONDS = 1.0  # a stop gives them so long to leave
TRANSPORT_SLACK = 2  # a message up to twice the limit is read, so that its sender gets a reason

log = structlog.get_logger()


class Server:
    """One shard behind gRPC."""

    def __init__(self, config: ServerConfig, restart: Callable[[], None]) -> None:
        """``restart``, called on any thread: close, and have another process take this place."""
        self._config = config
        self._restart = restart
        self._engine = Engine()
        self._counts = Counts()
        self._shard = self._new_shard()
        self._health = HealthServicer()

    def _new_shard(self) -> Shard:
        config = self._config
        return Shard(
            number=config.shard,
            shard_map=routing.even_map(config.shards),
            memory_bytes=config.memory_bytes,
            reply_bytes=config.max_message_bytes,
            max_tables=config.max_tables,
            max_sessions=config.max_sessions,
            session_ttl=config.session_ttl_seconds,
            clock=time.monotonic,
            max_tombstones=config.max_tombstones,
        )

    async def listen(self) -> None:
        """Answer that the shard is alive, and not ready; ConfigError if the port is taken."""
        config = self._config
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", TRANSPORT_SLACK * config.max_message_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),
            ]
        )
        self._door = Door()
        self._server.add_generic_rpc_handlers((self._door,))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (*SERVICES, "grpc.health.v1.Health", reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        address = f"{config.host}:{config.port}"
        try:
            self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise ConfigError(f"port: cannot listen on {address}: {error}") from error
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._health.set("liveness", health_pb2.HealthCheckResponse.SERVING)
        await self._server.start()

    async def open(self) -> None:
        """Recover and serve; ConfigError if that cannot be."""
        try:
            await self._open()
        except BaseException:
            await self._server.stop(0)
            raise

    async def _open(self) -> None:
        config = self._config
        self._log: VersionLog | None = None
        self._feed: Feed | None = None
        restore: State | None = None
        if config.data_dir is not None:
            restore = await asyncio.to_thread(self._begin, config.data_dir)
        pins: dict[str, int] = {} if self._log is None else self._checkpointer.pins
        self._checkpoints = Checkpoints(self._shard, self._engine, self._log, pins, self._store())
        self._restores = Restores(
            self._shard, self._engine, self._checkpoints, config.data_dir, restore, self._restart
        )
        if self._log is not None:
            most = config.max_subscribers
            self._feed = Feed(self._shard, self._engine, self._log, max_subscribers=most)
            self._feed.open(asyncio.get_running_loop())
        self._sweeper = Sweeper(self._shard, self._engine)
        self._service = Service(
            self._shard,
            self._engine,
            self._counts,
            config,
            RELEASE,
            self._checkpoints,
            self._restores,
            self._sweeper,
            Analyses(self._shard, self._engine, self._checkpoints, self._log),
            self._log,
            self._feed,
        )
        self._engine.open(asyncio.get_running_loop(), config.busy_poll_seconds)
        if config.metrics_port:
            registry = CollectorRegistry()
            registry.register(ShardCollector(self._shard, self._engine, self._counts, self._log))
            if self._feed is not None:
                registry.register(FeedCollector(self._feed))
            if self._log is not None:
                registry.register(CheckpointCollector(self._checkpointer))
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
        if self._log is not None:
            self._checkpointer.open()
        self._sweeper.open()
        self._door.open(self._service)
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)

    async def close(self) -> None:
        """Drain, then stop."""
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        self._service.drain()
        grace = self._config.drain_seconds
        stopping = asyncio.ensure_future(self._server.stop(grace))
        finished = asyncio.ensure_future(self._service.finished())
        await asyncio.wait({stopping, finished}, return_when=asyncio.FIRST_COMPLETED)
        finished.cancel()
        if not stopping.done():  # last answers are on their way, and to some who do not read
            await self._server.stop(min(grace, LAST_ANSWERS_SECONDS))
        await stopping
        self._sweeper.close()
        self._service.close()
        if self._feed is not None:
            self._feed.close()
        if self._log is not None:
            self._checkpointer.close()
        self._engine.close()
        if self._log is not None:
            self._log.close()
            self._base.close()
        if self._config.metrics_port:
            self._metrics.shutdown()

    def _store(self) -> Store | None:
        url = self._config.checkpoint_url
        if url is None:
            return None
        if url.startswith("memory:"):
            raise ConfigError(f"checkpoint_url: {url} is seen by one process only")
        try:
            return Store(url)
        except ValueError as error:
            raise ConfigError(f"checkpoint_url: {error}") from error

    def _begin(self, directory: Path) -> State | None:
        """Recover; where a restore was committed, from what it brought, or else from what was."""
        try:
            claim(directory, self._config.shard, self._shard.shard_map)
            restore = settle(directory)
        except (StorageError, OSError) as error:
            raise _unfit(error) from error
        if restore is None or restore.phase != COMMITTED:
            self._recover(directory)
            return restore
        try:
            self._recover(directory)
        except ConfigError as error:
            log.error("restore failed", name=restore.name, error=str(error))
            restore = failed(directory, restore, str(error))
            self._shard = self._new_shard()
            self._recover(directory)
            return restore
        return loaded(directory, restore)

    def _recover(self, directory: Path) -> None:
        """Open log and base, and bring the shard to where it was; ConfigError if that fails."""
        config, start = self._config, time.monotonic()
        try:
            self._log, self._base = None, Base(directory / "base")
            self._base.open()
            state = self._base.state
            self._log = VersionLog.open(
                directory / "log",
                fail=partial(_fail, "the version log"),
                wake=self._wake,
                segment_bytes=config.segment_bytes,
                flush_seconds=config.fsync_seconds,
                lineage=state.lineage if state else None,
                epoch=state.epoch if state else 1,
                after=state.version if state else None,
                made=state is not None and state.logged,
            )
            found = recover(self._shard, self._base, self._log)
        except StorageError as error:
            self._base.close()
            if self._log is not None:
                self._log.close()
            raise _unfit(error) from error
        self._shard.attach(self._log)
        self._checkpointer = Checkpointer(
            self._shard,
            self._engine,
            self._base,
            self._log,
            fail=partial(_fail, "the base"),
            seconds=config.checkpoint_seconds,
            keep=(config.log_keep_bytes, config.log_keep_seconds),
            stored_rows=found.rows,
        )
        log.info(
            "recovered",
            shard=config.shard,
            version=self._shard.version,
            rows=found.rows,
            records=found.records,
            record_bytes=found.record_bytes,
            torn_bytes=self._log.torn_bytes,
            seconds=round(time.monotonic() - start, 2),
        )

    def _wake(self) -> None:
        """More of the log is on disk; called on its thread."""
        if self._feed is not None:
            self._feed.wake()

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for name in HEALTH:
            if name != "liveness" or status == health_pb2.HealthCheckResponse.SERVING:
                await self._health.set(name, status)


def _unfit(error: Exception) -> ConfigError:
    damaged = "DATA_LOSS: " if isinstance(error, Corrupt) else ""
    return ConfigError(f"data_dir: {damaged}{error}")


def _fail(what: str, error: Exception) -> None:
    """What is on disk cannot be trusted any more: end without another word to any client."""
    log.critical(f"{what} failed", error=str(error))
    os._exit(74)  # EX_IOERR


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


def claim(directory: Path, shard: int, shard_map: routing.ShardMap) -> None:
    """Note whose ``directory`` is; ConfigError if it is another shard's, or of another map.

    A shard would find keys in it that are not its own, and miss others. Corrupt if the note is
    damaged.
    """
    path = directory / OWNER
    asked = {"format": 1, "shard": shard, "shards": shard_map.shards, "epoch": shard_map.epoch}
    if not path.exists():
        replace(path, to_json(asked))
        return
    held = {"format": 1, **from_json(path.read_bytes(), str(path))}
    if held != asked:
        owner, other = (
            f"shard {each['shard']} of {each['shards']} (shard map of epoch {each['epoch']})"
            for each in (held, asked)
        )
        raise ConfigError(
            f"data_dir: {directory} is of {owner}, and this is {other}; for another number of"
            " shards: psctl checkpoint, psserver on new directories, psctl restore"
        )


async def _serve(config: ServerConfig) -> bool:
    """Serve until told to stop; whether to start anew then."""
    started = time.monotonic()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    again, over = threading.Event(), False

    def restart() -> None:
        again.set()
        loop.call_soon_threadsafe(stop.set)

    def end() -> None:
        nonlocal over
        over = True
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end)

    server = Server(config, restart)
    await server.listen()
    await asyncio.to_thread(warm)
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
    return again.is_set() and not over


def serve(config: ServerConfig) -> None:
    """Run one shard until SIGTERM or SIGINT; ConfigError if it cannot start.

    To start anew it becomes the command that it was started as, so that whoever looks after the
    process sees nothing but a shard that is not ready for a while.
    """
    held = lock(config.data_dir) if config.data_dir else None
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        again = uvloop.run(_serve(config))
    finally:
        if held:
            held.close()
    if again:
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606
