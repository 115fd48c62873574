"""Start and stop the server of one shard: open and close its components in order.

A server has these threads, in addition to those of the log, the flusher, the sweeper, the feed and
the worker pools:

    engine thread   changes the shard; while it is idle, the event loop may do small changes itself
    event loop      runs gRPC, on uvloop
    HTTP thread     serves the status page, /metrics and probes
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import structlog

from psproto import ps_pb2 as pb
from psproto import routing
from psserver.addresses import cannot_listen
from psserver.analysis import Analyses
from psserver.checkpoints import Checkpoints
from psserver.config import ServerConfig
from psserver.datadir import DataDirectory
from psserver.engine import Engine
from psserver.exposition import Exposition
from psserver.feed import Feed
from psserver.gpu import open_gpu
from psserver.hostnames import host_of
from psserver.info import ServerInfo
from psserver.lane import Lanes
from psserver.listener import Listener
from psserver.livestatus import LiveStatus
from psserver.metrics.registry import Metrics
from psserver.overview import Overview
from psserver.parts import Parts
from psserver.phase import Phases
from psserver.preloader import Preloader
from psserver.restore import Restores
from psserver.scrubber import Scrubber
from psserver.security.guard import guard_of
from psserver.security.httptoken import HttpToken
from psserver.service import Service
from psserver.shard import Shard
from psserver.site import Site
from psserver.stats import ServiceStats
from psserver.swap import State
from psserver.sweeper import Sweeper
from psserver.unusable import ConfigError
from storage.gpu.gpu import Gpu
from storage.store import Store

NO_COLD_TIER = (  # end of the message of OutOfMemory
    ": without data_dir, this shard cannot keep rows on disk only; set data_dir, or raise"
    " host_bytes"
)
LAST_ANSWERS_SECONDS = 1.0  # maximum time, at a stop, for the last replies to reach their clients

log = structlog.get_logger()


class Server:
    """gRPC server of one shard. Call ``listen``, ``open`` and, in the end, ``close``."""

    def __init__(self, config: ServerConfig, restart: Callable[[], None]) -> None:
        """Create what is needed to answer health checks and metrics; ``open`` recovers the shard.

        restart  called when the process must close this server and start again; on any thread
        """
        self._config = config
        self._restart = restart
        self._engine = Engine()
        self._stats = ServiceStats()
        self._guard = guard_of(config.policy_file, config.audit_file, config.shard)
        self._listener = Listener(config, self._guard, restart)
        self._phases = Phases(pb.PHASE_NOT_A_SHARD if config.surplus else pb.PHASE_KERNELS)
        connections = self._listener.connections
        connections.counted = self._stats.count_clients
        self._live = LiveStatus(
            config, self._phases, self._stats, self._engine, connections, self._listener.expiries
        )
        self._metrics = Metrics(
            config,
            self._phases,
            self._stats,
            connections,
            self._guard,
            self._listener.expiries,
        )
        self._exposition: Exposition | None = None
        self._gpu: Gpu | None = None
        self._data: DataDirectory | None = None
        self._feed: Feed | None = None
        self._preloader: Preloader | None = None
        self._scrubber: Scrubber | None = None
        path = config.lane_path
        self._lanes = None if path is None else Lanes(path, config.lane_bytes, self._guard)

    def _new_shard(self) -> Shard:
        """Return an empty shard with the configured limits."""
        config = self._config
        return Shard(
            number=config.shard,
            shard_map=routing.even_map(config.shards),
            memory_bytes=config.host_bytes,
            reply_bytes=config.max_message_bytes,
            max_tables=config.max_tables,
            max_sessions=config.max_sessions,
            session_ttl=config.session_ttl_seconds,
            session_pushes=config.session_pushes,
            clock=time.monotonic,
            max_tombstones=config.max_tombstones,
            max_backlog=config.memory.backlog,
            disk_bytes=config.disk_bytes,
            settings=config.tables,
            gpu=self._gpu,
        )

    async def listen(self) -> None:
        """Bind the gRPC and the HTTP port. Health checks then report alive, but not ready.

        Raises ConfigError if a port cannot be used.
        """
        await self._listener.listen()
        self._guard.open()
        try:
            self._open_http()
        except ConfigError:
            await self._listener.stop(0)
            raise

    async def open(self) -> None:
        """Recover the shard and serve it. Raises ConfigError if a setting must be changed.

        After any error both ports are closed.
        """
        try:
            await self._open()
        except BaseException:
            await self.abandon()
            raise

    async def _open(self) -> None:
        """Do what ``open`` describes, but leave the ports open after an error."""
        config = self._config
        if config.hbm_bytes:
            self._phases.enter(pb.PHASE_GPU)
            self._gpu = await asyncio.to_thread(open_gpu, config.hbm_bytes)
            if self._lanes is not None:
                self._lanes.use_gpu()
        self._phases.enter(pb.PHASE_RECOVERY)
        await self._open_shard()
        self._create_lane()
        self._open_parts()
        self._engine.open(asyncio.get_running_loop(), config.busy_poll_seconds)
        if self._data is not None:
            self._data.flusher.open()
            self._preloader = Preloader(self._shard.preloads, self._engine)
            self._preloader.open()
            assert self._scrubber is not None
            self._scrubber.open()
        self._sweeper.open()
        if self._lanes is not None:
            self._service.open_lanes(self._lanes)
        await self._listener.serve(self._service)
        self._phases.enter(pb.PHASE_READY)

    def _create_lane(self) -> None:
        """Create the socket of the same-host lane.

        Raises ConfigError if that fails, unless the lane is only offered by default: some file
        systems cannot have sockets.
        """
        if self._lanes is None:
            return
        try:
            self._lanes.listen()
        except ConfigError as error:
            if self._config.lane != "auto":
                raise
            log.warning("no same-host lane", reason=str(error))
            self._lanes = None

    async def abandon(self) -> None:
        """Close the ports and the socket of a server whose start failed."""
        if self._lanes is not None:
            await self._lanes.close(0)
        await self._listener.stop(0)
        self._close_http()
        self._guard.close()

    async def _open_shard(self) -> None:
        """Recover the shard from the data directory; without a directory, create an empty shard."""
        directory = self._config.data_dir
        if directory is None:
            self._shard = self._new_shard()
            self._shard.budget.advice = NO_COLD_TIER
            return
        self._data = DataDirectory(
            directory, self._config, self._engine, self._new_shard, self._wake
        )
        self._shard = await asyncio.to_thread(self._data.open)

    def _open_parts(self) -> None:
        """Create checkpoints, restores, feed, sweeper and service for the recovered shard."""
        config, data, shard, engine = self._config, self._data, self._shard, self._engine
        versions = None if data is None else data.log
        flusher = None if data is None else data.flusher
        restore: State | None = None if data is None else data.restore
        checkpoints = Checkpoints(
            shard, engine, versions, flusher, self._store(), directory=config.data_dir
        )
        restores = Restores(shard, engine, checkpoints, config.data_dir, restore, self._restart)
        if versions is not None:
            self._feed = Feed(shard, engine, versions, max_subscribers=config.max_subscribers)
            self._feed.open(asyncio.get_running_loop())
        self._sweeper = Sweeper(shard, engine)
        if flusher is not None:
            self._scrubber = Scrubber(shard.checks, engine, flusher, config.scrub_seconds)
        flushed = None if data is None else lambda: data.flusher.flushed
        offer = None if self._lanes is None else self._lanes.offer_to
        self._phases.blocked = lambda: restores.held
        parts = Parts(
            shard=shard,
            checkpoints=checkpoints,
            restores=restores,
            log=versions,
            feed=self._feed,
            flusher=flusher,
            lanes=self._lanes,
        )
        self._live.attach(parts)
        self._metrics.add(parts, engine, self._scrubber)
        info = ServerInfo(shard, config, self._live, versions, flushed, offer)
        self._service = Service(
            shard,
            engine,
            self._stats,
            config,
            info,
            checkpoints,
            restores,
            self._sweeper,
            Analyses(shard, engine, checkpoints, versions),
            self._listener.connections,
            self._guard,
            versions,
            self._feed,
            flusher,
            self._scrubber,
        )

    def _open_http(self) -> None:
        """Serve HTTP if a port is configured. Raises ConfigError if the port cannot be used."""
        config = self._config
        if not config.metrics_port:
            return
        names = {host_of(each) for each in [*config.http_addresses, config.advertise, config.host]}
        names |= {each.strip().lower() for each in config.http_names.split(",")}
        token = None if config.http_token_file is None else HttpToken(config.http_token_file)
        overview = Overview(self._live, config.shard, config.http_addresses, token)
        loop = asyncio.get_running_loop()
        site = Site(self._metrics.registry, overview, self._phases, loop, names, token)
        exposition = Exposition(site)
        try:
            exposition.open(config.host, config.metrics_port)
        except OSError as error:
            text = cannot_listen("metrics_port", config.host, config.metrics_port, error)
            raise ConfigError(text) from error
        self._exposition = exposition

    def _close_http(self) -> None:
        if self._exposition is not None:
            self._exposition.close()

    async def close(self) -> None:
        """Refuse new calls, and wait at most drain_seconds for the calls in flight. Then stop all
        threads and close the data directory.
        """
        self._phases.enter(pb.PHASE_DRAINING)
        await self._listener.refuse()
        self._service.drain()
        grace = self._config.drain_seconds
        stopping = asyncio.ensure_future(self._listener.stop(grace))
        finished = asyncio.ensure_future(self._service.finished())
        await asyncio.wait({stopping, finished}, return_when=asyncio.FIRST_COMPLETED)
        finished.cancel()
        if not stopping.done():  # some replies are still being sent; a client may not read its own
            await self._listener.stop(min(grace, LAST_ANSWERS_SECONDS))
        await stopping
        if self._lanes is not None:
            await self._lanes.close(LAST_ANSWERS_SECONDS)
        await asyncio.to_thread(self._close_threads)
        self._guard.close()
        self._close_http()

    def _close_threads(self) -> None:
        """Stop all threads and close the data directory. Blocks while a file operation hangs."""
        if self._preloader is not None:
            self._preloader.close()
        self._sweeper.close()
        self._service.close()
        if self._feed is not None:
            self._feed.close()
        if self._data is not None:
            self._data.flusher.close()
        if self._scrubber is not None:
            self._scrubber.close()
        self._engine.close()
        if self._data is not None:
            self._data.close()

    def _store(self) -> Store | None:
        """Return the store of the setting checkpoint_url, or None if it is not set.

        Raises ConfigError for an invalid URL.
        """
        url = self._config.checkpoint_url
        if url is None:
            return None
        if url.startswith("memory:"):
            raise ConfigError(
                "checkpoint_url: expected file:// or the URL of an object store, which all shards"
                f" can read; got {url}, which only one process can read"
            )
        try:
            return Store(url, self._config.checkpoint_store_seconds)
        except ValueError as error:
            raise ConfigError(f"checkpoint_url: {error}") from error

    def _wake(self) -> None:
        """Wake the subscriptions because more of the log is on disk. The log calls this on its own
        thread.
        """
        if self._feed is not None:
            self._feed.wake()
