"""Implement the gRPC methods of all services of one shard's server."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial

import grpc

from psproto import codec, names
from psproto import ps_pb2 as pb
from psserver.alterations import altered, require_alterable
from psserver.analysis import Analyses
from psserver.checkpoints import Checkpoints
from psserver.coldruns import ColdRuns, Flushes
from psserver.config import ServerConfig
from psserver.connections import Connections
from psserver.door import Context, Handler
from psserver.engine import Engine
from psserver.errors import BadRequest, NoLog, VersionInFuture
from psserver.exchange import Exchanges
from psserver.feed import Feed
from psserver.handlers import Handlers
from psserver.info import ServerInfo
from psserver.lane import Lanes
from psserver.limits import Limits, Reservation
from psserver.restore import Restores
from psserver.schemas import read_schema, write_schema
from psserver.scrubber import Scrubber
from psserver.security.guard import Actor, Guard
from psserver.security.verbs import ANY
from psserver.shard import Shard
from psserver.stats import ServiceStats
from psserver.stream import Streams
from psserver.sweeper import Sweeper
from psserver.workers import CLOSE_SECONDS, Workers
from storage.errors import UnknownTable
from storage.schema import TableSchema
from storage.versionlog import VersionLog

LISTED = 16  # tables that the engine thread describes per call
SHARES = 8  # one stream may use 1/8 of max_inflight_bytes


class Service:
    """Maps every gRPC method to its handler, and implements those that need only a few lines.

    counts       statistics that the handlers update
    info         answers GetServerInfo, Diagnose and GetStatus
    sweeper      runs Evict
    connections  closes connections whose peers do not finish their messages
    guard        finds out who calls, and what the caller may do
    log          version log of the shard; None: the shard has no data directory
    feed         serves subscriptions, and waits until versions are durable; None without a log
    flushes      the flusher; None: the shard has no data directory
    scrubber     verifies rows on disk; None: the shard has no data directory
    """

    def __init__(
        self,
        shard: Shard,
        engine: Engine,
        counts: ServiceStats,
        config: ServerConfig,
        info: ServerInfo,
        checkpoints: Checkpoints,
        restores: Restores,
        sweeper: Sweeper,
        analyses: Analyses,
        connections: Connections,
        guard: Guard,
        log: VersionLog | None = None,
        feed: Feed | None = None,
        flushes: Flushes | None = None,
        scrubber: Scrubber | None = None,
    ) -> None:
        self._shard = shard
        self._engine = engine
        self._info = info
        self._log = log
        self._feed = feed
        self._checkpoints = checkpoints
        self._restores = restores
        self._sweeper = sweeper
        self._analyses = analyses
        self._scrubber = scrubber
        self._limits = Limits(config, counts, restores)
        self._workers = Workers()
        self._make = Handlers(self._limits, self._workers, checkpoints, connections, guard)
        self._runs = ColdRuns(shard, engine, config.io_threads, counts, flushes)
        self._exchanges = Exchanges(
            shard, engine, self._limits, self._workers, config, log, feed, self._runs
        )
        self._streams = Streams(
            self._exchanges, self._limits, self._make, config.max_inflight_bytes // SHARES
        )

    def open_lanes(self, lanes: Lanes) -> None:
        """Serve the same-host lane, whose socket exists, from now on."""
        lanes.open(self._streams, self._limits)

    def drain(self) -> None:
        """Refuse new requests from now on. Each stream ends after the replies to the requests that
        it has already received.
        """
        self._limits.draining = True
        self._checkpoints.work.stop()
        self._sweeper.stop()
        if self._feed is not None:
            self._feed.drain()
        self._streams.drain()

    async def finished(self) -> None:
        """Wait until no call is running, apart from subscriptions.

        A subscriber that never reads its messages would otherwise block this forever.
        """
        await self._limits.idle()

    def close(self) -> None:
        """Stop the worker threads. Call it when no call is running."""
        self._workers.close()
        self._runs.close(CLOSE_SECONDS)

    def methods(self) -> dict[str, Handler]:
        """Return all gRPC handlers by full name, for example "/ps.v1.RowService/Pull"."""
        services = {
            "TableService": self._table_methods(),
            "RowService": self._row_methods(),
            "LogService": self._log_methods(),
            "CheckpointService": self._checkpoint_methods(),
            "AnalysisService": self._analysis_methods(),
            "InfoService": self._info_methods(),
        }
        return {
            f"/ps.v1.{service}/{name}": handler
            for service, methods in services.items()
            for name, handler in methods.items()
        }

    def _table_methods(self) -> dict[str, Handler]:
        make = self._make
        return {
            "CreateTable": make.message(pb.CreateTableRequest, self.create_table),
            "DescribeTable": make.message(pb.DescribeTableRequest, self.describe_table),
            "ListTables": make.message(pb.ListTablesRequest, self.list_tables, with_actor=True),
            "AlterTable": make.message(pb.AlterTableRequest, self.alter_table),
            "DropTable": make.message(pb.DropTableRequest, self.drop_table),
            "Evict": make.message(pb.EvictRequest, self.evict),
        }

    def _info_methods(self) -> dict[str, Handler]:
        return {
            "GetServerInfo": self._make.message(
                pb.GetServerInfoRequest,
                self.get_server_info,
                during_restore=True,
                with_actor=True,
            ),
            "Diagnose": self._make.blocking(
                pb.DiagnoseRequest,
                self._info.diagnose,
                self._workers.short,
                during_restore=True,
            ),
            "GetStatus": self._make.blocking(
                pb.GetStatusRequest,
                self._info.status,
                self._workers.short,
                during_restore=True,
            ),
        }

    def _checkpoint_methods(self) -> dict[str, Handler]:
        make, work, restore = self._make, self._checkpoints, self._restores
        short, store = self._workers.short, self._workers.store
        return {
            "WriteCheckpoint": make.long(pb.WriteCheckpointRequest, work.write),
            "CompleteCheckpoint": make.blocking(
                pb.CompleteCheckpointRequest, work.completion.complete, store
            ),
            "ListCheckpoints": make.blocking(pb.ListCheckpointsRequest, work.catalog.listed, store),
            "VerifyCheckpoint": make.long(pb.VerifyCheckpointRequest, work.catalog.verify),
            "PrepareRestore": make.long(pb.PrepareRestoreRequest, restore.prepare),
            "Restore": make.blocking(pb.RestoreRequest, restore.step, short, during_restore=True),
            "LoadTable": make.long(pb.LoadTableRequest, work.loader.load),
            "DeleteCheckpoints": make.long(pb.DeleteCheckpointsRequest, work.deletion.delete),
            "Continue": make.blocking(pb.ContinueRequest, self.proceed, short, with_actor=True),
            "ReadRows": make.many(pb.ReadRowsRequest, work.rows.read_rows),
            "WriteRows": make.unary("WriteRows", self.write_rows),
        }

    def _analysis_methods(self) -> dict[str, Handler]:
        make, analyses = self._make, self._analyses
        return {
            "Analyze": make.many(pb.AnalyzeRequest, analyses.analyze),
            "Inspect": make.blocking(pb.InspectRequest, analyses.inspect, self._workers.short),
            "VerifyRows": make.many(pb.VerifyRowsRequest, self.verify_rows),
        }

    def _log_methods(self) -> dict[str, Handler]:
        make = self._make
        return {
            "WaitDurable": make.message(pb.WaitDurableRequest, self.wait_durable),
            "Barrier": make.message(pb.BarrierRequest, self.barrier),
            "Subscribe": grpc.unary_stream_rpc_method_handler(
                make.guarded("Subscribe", make.served("Subscribe", self.subscribe))
            ),
        }

    def _row_methods(self) -> dict[str, Handler]:
        make = self._make
        return {
            "Pull": make.unary("Pull", self._exchanges.pull),
            "Push": make.unary("Push", self._exchanges.push),
            "Exchange": make.unary("Exchange", self._exchanges.exchange),
            "Delete": make.unary("Delete", self._exchanges.delete),
            "Stream": grpc.stream_stream_rpc_method_handler(
                make.guarded("Stream", make.counted("Stream", self._streams.stream))
            ),
        }

    # ---- tables and server

    async def create_table(
        self, request: pb.CreateTableRequest, deadline: float
    ) -> pb.CreateTableResponse:
        schema = read_schema(request.schema)
        # in one call of the engine, so that no other client can drop the table between the two
        made = await self._engine.submit(lambda: self._create(schema), deadline)
        await self._settled(made.version, pb.DURABILITY_LOG)
        return pb.CreateTableResponse(schema=made.schema, stats=made.stats)

    async def describe_table(
        self, request: pb.DescribeTableRequest, deadline: float
    ) -> pb.DescribeTableResponse:
        return await self._engine.submit(lambda: self._describe(request.name), deadline)

    async def list_tables(
        self, request: pb.ListTablesRequest, deadline: float, actor: Actor
    ) -> pb.ListTablesResponse:
        names = await self._engine.submit(self._shard.tables, deadline)
        names = [name for name in names if actor.holds(ANY, name)]
        answer = pb.ListTablesResponse()
        for at in range(0, len(names), LISTED):
            some = partial(self._describe_all, names[at : at + LISTED])
            answer.tables.extend(await self._engine.submit(some, deadline))
        return answer

    async def alter_table(
        self, request: pb.AlterTableRequest, deadline: float
    ) -> pb.AlterTableResponse:
        require_alterable(request)
        name, change = request.schema.name, partial(altered, request=request)

        def alter() -> pb.AlterTableResponse:
            _, dropped = self._shard.alter_table(name, change)
            described = self._describe(name)
            return pb.AlterTableResponse(
                schema=described.schema,
                stats=described.stats,
                version=described.version,
                dropped_counters=dropped,
                epoch=described.epoch,
            )

        done = await self._engine.submit(alter, deadline)
        await self._settled(done.version, pb.DURABILITY_LOG)
        return done

    async def drop_table(
        self, request: pb.DropTableRequest, deadline: float
    ) -> pb.DropTableResponse:
        await self._engine.submit(lambda: self._shard.drop_table(request.name), deadline)
        self._limits.stats.remove_table(request.name)
        await self._settled(self._shard.version, pb.DURABILITY_LOG)
        return pb.DropTableResponse()

    async def get_server_info(
        self, request: pb.GetServerInfoRequest, deadline: float, actor: Actor
    ) -> pb.GetServerInfoResponse:
        return await self._info.read(actor.proof)

    def _describe_all(self, names: Sequence[str]) -> list[pb.DescribeTableResponse]:
        """Return schema and statistics of each table. Skips names without a table, because it was
        dropped meanwhile. Must run on the engine thread.
        """
        described = []
        for name in names:
            with suppress(UnknownTable):
                described.append(self._describe(name))
        return described

    def _create(self, schema: TableSchema) -> pb.DescribeTableResponse:
        """Create a table unless it exists; return its schema and statistics.

        Must run on the engine thread.
        """
        return self._describe(self._shard.create_table(schema).name)

    def _describe(self, name: str) -> pb.DescribeTableResponse:
        """Return schema and statistics of a table. Must run on the engine thread."""
        schema, stats = self._shard.describe(name)
        moves, waits = self._shard.moves(name), self._limits.stats.waits.get(name)
        return pb.DescribeTableResponse(
            schema=write_schema(schema),
            stats=pb.TableStats(
                rows=stats.rows,
                bytes=stats.bytes,
                waiting=stats.waiting,
                counter_bytes=stats.counter_bytes,
                damaged_blocks=stats.damage[0],
                lost_rows=stats.damage[1],
                tiers=[pb.TierStats(**asdict(tier)) for tier in stats.tiers],
                cache=pb.CacheStats(
                    promotions=moves.promotions,
                    demotions=moves.demotions,
                    flushed_rows=moves.flushed,
                    reflushed_blocks=moves.reflushed,
                    gpu_promotions=moves.hbm_promotions,
                    gpu_demotions=moves.hbm_demotions,
                    warm_reads=0 if waits is None else waits.total,
                    warm_seconds=0.0 if waits is None else waits.sum,
                ),
            ),
            version=self._shard.version,
            epoch=self._log.history.epoch if self._log else 0,
        )

    # ---- version log

    async def wait_durable(
        self, request: pb.WaitDurableRequest, deadline: float
    ) -> pb.WaitDurableResponse:
        if self._log is None:
            raise NoLog
        version = request.version or self._shard.version
        if version > self._shard.version:
            raise VersionInFuture(
                f"field 'version' is {version}, but the newest version of shard"
                f" {self._shard.number} is {self._shard.version}"
            )
        await self._settled(version, pb.DURABILITY_FSYNC)
        return pb.WaitDurableResponse(
            durable_version=self._log.durable, epoch=self._log.history.epoch
        )

    async def barrier(self, request: pb.BarrierRequest, deadline: float) -> pb.BarrierResponse:
        if problem := names.problem("barrier", request.name):
            raise BadRequest("INVALID_ARGUMENT", problem)
        version = await self._engine.submit(lambda: self._shard.barrier(request.name), deadline)
        await self._settled(version, pb.DURABILITY_LOG)
        epoch = self._log.history.epoch if self._log else 0
        return pb.BarrierResponse(version=version, epoch=epoch)

    async def subscribe(self, data: bytes, context: Context, actor: Actor) -> None:
        """Serve a subscription until it fails or the subscriber leaves.

        data   the encoded SubscribeRequest
        actor  who calls
        """
        if self._feed is None:
            raise NoLog
        await self._feed.serve(data, context.write, actor.require)

    async def write_rows(
        self, data: bytes, deadline: float, reservation: Reservation, actor: Actor
    ) -> bytes:
        decode = partial(codec.decode_rows, data)  # many fields would block the event loop
        message = await self._workers.run(self._workers.short, decode, deadline, reservation)
        actor.require_right("import", message.table)
        work = partial(self._checkpoints.rows.write_rows, message)
        async with actor.recorded_rows(message.table, len(message.keys) // 8):
            done = await self._workers.run(self._workers.short, work, deadline, reservation)
            await self._settled(done.version, pb.DURABILITY_LOG)
        return bytes(done.SerializeToString())

    def proceed(self, request: pb.ContinueRequest, actor: Actor) -> pb.ContinueResponse:
        return self._checkpoints.calls.proceed(request, actor.name)

    async def evict(self, request: pb.EvictRequest, deadline: float) -> pb.EvictResponse:
        gone = threading.Event()
        try:
            return await self._workers.start_long(self._sweeper.evict, request, gone)
        finally:
            gone.set()  # stops the eviction if the caller was canceled

    def verify_rows(self, request: pb.VerifyRowsRequest) -> Iterator[pb.VerifyRowsResponse]:
        """Verify the rows of a table that are on disk; without a data directory, there are none.

        Raises UnknownTable.
        """
        self._engine.run(lambda: self._shard.number_of(request.table))
        if self._scrubber is not None:
            yield from self._scrubber.verify(request, self._checkpoints.work.progress())

    async def _settled(self, version: int, level: pb.Durability) -> None:
        """Wait until a version has reached a durability level; returns at once without a log.

        level  APPLIED (in memory), LOG (written to the log file) or FSYNC (synced to disk)
        """
        if self._feed is not None:
            await self._feed.settled(version, level)
