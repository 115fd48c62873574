"""The gRPC methods: decode, check, hand to the engine, encode.

All that a request can get wrong by itself is found here, before the engine sees it: shapes,
dtypes, finite gradients, keys that belong elsewhere, limits. What depends on the state of the
shard (tables, sessions, versions) the shard checks.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

import grpc
import numpy as np
from google.protobuf.any_pb2 import Any as Detail
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from numpy.typing import NDArray

from psproto import codec, routing
from psproto import ps_pb2 as pb
from psserver.analysis import Analyses
from psserver.checkpoints import Checkpoints
from psserver.config import ServerConfig
from psserver.engine import Engine
from psserver.errors import (
    BadRequest,
    CheckpointBusy,
    CheckpointExists,
    CheckpointUnfit,
    DeadlinePassed,
    Draining,
    LogDiverged,
    NoCheckpointUrl,
    NoLog,
    NotEmpty,
    Overloaded,
    Refused,
    RestoreConflict,
    Restoring,
    SessionExpired,
    Starting,
    TooLarge,
    VersionCompacted,
    VersionInFuture,
    WrongShard,
)
from psserver.feed import Feed
from psserver.restore import Restores
from psserver.schemas import LEVELS, read_schema, write_schema
from psserver.shard import Change, Pull, Push, Shard
from psserver.stats import ServiceStats
from psserver.sweeper import Sweeper
from psserver.work import Progress
from storage.errors import (
    Compacted,
    Corrupt,
    DiskFull,
    LogFailed,
    OutOfMemory,
    SchemaMismatch,
    StoreFailed,
    UnknownCheckpoint,
    UnknownFormat,
    UnknownTable,
)
from storage.schema import NAME, Durability
from storage.table import Mode
from storage.versionlog import VersionLog

PIPELINE = 64  # requests of one stream that may be at work
SHARES = 8  # a stream is not read while it has this part of max_inflight_bytes in memory
AT_ONCE = 4 << 20  # bytes of rows, a millisecond's work: the loop does no more itself
WORKERS = 4  # threads for checkpoints and sweeps
MESSAGE = 1024  # bytes of an error's; as a trailer, twice, it must stay below gRPC's 8 KiB
TELL_SECONDS = 0.2  # between two messages about a long piece of work

Code = grpc.StatusCode
CODES: dict[type[Exception], tuple[grpc.StatusCode, str]] = {
    codec.Malformed: (Code.INVALID_ARGUMENT, "MALFORMED_MESSAGE"),
    BadRequest: (Code.INVALID_ARGUMENT, ""),  # an empty reason: the error has its own
    UnknownTable: (Code.NOT_FOUND, "TABLE_NOT_FOUND"),
    SchemaMismatch: (Code.FAILED_PRECONDITION, "SCHEMA_MISMATCH"),
    WrongShard: (Code.FAILED_PRECONDITION, ""),
    SessionExpired: (Code.FAILED_PRECONDITION, ""),
    NoLog: (Code.FAILED_PRECONDITION, ""),
    LogDiverged: (Code.FAILED_PRECONDITION, ""),
    UnknownCheckpoint: (Code.NOT_FOUND, "CHECKPOINT_NOT_FOUND"),
    CheckpointExists: (Code.ALREADY_EXISTS, ""),
    NoCheckpointUrl: (Code.FAILED_PRECONDITION, ""),
    CheckpointUnfit: (Code.FAILED_PRECONDITION, ""),
    NotEmpty: (Code.FAILED_PRECONDITION, ""),
    RestoreConflict: (Code.FAILED_PRECONDITION, ""),
    VersionInFuture: (Code.OUT_OF_RANGE, ""),
    VersionCompacted: (Code.OUT_OF_RANGE, ""),
    Compacted: (Code.OUT_OF_RANGE, "VERSION_COMPACTED"),
    TooLarge: (Code.RESOURCE_EXHAUSTED, ""),
    OutOfMemory: (Code.RESOURCE_EXHAUSTED, "OUT_OF_MEMORY"),
    DiskFull: (Code.RESOURCE_EXHAUSTED, "DISK_FULL"),
    Overloaded: (Code.RESOURCE_EXHAUSTED, ""),
    CheckpointBusy: (Code.RESOURCE_EXHAUSTED, ""),
    DeadlinePassed: (Code.DEADLINE_EXCEEDED, ""),
    Corrupt: (Code.DATA_LOSS, "DATA_LOSS"),
    UnknownFormat: (Code.DATA_LOSS, "DATA_LOSS"),
    Starting: (Code.UNAVAILABLE, ""),
    Draining: (Code.UNAVAILABLE, ""),
    Restoring: (Code.UNAVAILABLE, ""),
    StoreFailed: (Code.UNAVAILABLE, "STORE_FAILED"),
    LogFailed: (Code.UNAVAILABLE, "DRAINING"),  # the process is about to end
}
RETRY_AFTER: dict[type[Exception], float] = {DiskFull: 1.0, LogFailed: 1.0}  # seconds
MODES: dict[int, Mode] = {
    pb.MODE_UNSPECIFIED: "train",
    pb.MODE_TRAIN: "train",
    pb.MODE_SERVE: "serve",
}

# its start, the bytes that it and its reply may take, what was asked for, and how it goes
_Begun = tuple[float, int, codec.Exchange | None, "asyncio.Future[codec.Exchanged] | Exception"]


class _Flow:
    """What one stream has at work.

    answers  what it is owed, in order, by the ids of its requests; None: no more will come
    held     bytes of requests and replies in them
    room     set whenever there is less
    gone     nobody reads any more
    """

    __slots__ = ("answers", "gone", "held", "room")

    def __init__(self) -> None:
        self.answers: asyncio.Queue[tuple[int, _Begun] | None] = asyncio.Queue()
        self.held = 0
        self.room = asyncio.Event()
        self.gone = False


def status_of(error: Exception) -> Status:
    """The google.rpc.Status that tells a client about an error."""
    code, reason = next(
        (found for kind in type(error).__mro__ if (found := CODES.get(kind))),
        (Code.INTERNAL, "INTERNAL"),
    )
    message = str(error) if reason != "INTERNAL" else f"internal error: {type(error).__name__}"
    if len(text := message.encode(errors="replace")) > MESSAGE:
        message = text[: MESSAGE - 3].decode(errors="ignore") + "..."
    info = ErrorInfo(reason=reason, domain="ps.v1")
    status = Status(code=code.value[0], message=message)
    if isinstance(error, Refused):
        info.reason = reason or error.reason
        info.metadata.update(error.metadata)
    status.details.append(_detail(info))
    again = error.retry_after if isinstance(error, Refused) else RETRY_AFTER.get(type(error))
    if again is not None:
        delay = Duration(nanos=round(again % 1 * 1e9), seconds=int(again))
        status.details.append(_detail(RetryInfo(retry_delay=delay)))
    return status


def _detail(message: Message) -> Detail:
    detail = Detail()
    detail.Pack(message)
    return detail


class Door:
    """The way to the methods, a grpc.GenericRpcHandler: refused until there is a service."""

    def __init__(self) -> None:
        self._handlers: tuple[grpc.GenericRpcHandler, ...] = ()
        self._closed = grpc.stream_stream_rpc_method_handler(_refuse)  # fits all four kinds

    def open(self, service: Service) -> None:
        """Let calls in from now on."""
        self._handlers = service.handlers()

    def service(
        self, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        if not self._handlers and handler_call_details.method.startswith("/ps.v1."):
            return self._closed
        found = (each.service(handler_call_details) for each in self._handlers)
        return next((each for each in found if each is not None), None)


async def _refuse(_: Any, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
    await _abort(context, Starting())


class Service:
    """The methods of all services over one shard."""

    def __init__(
        self,
        shard: Shard,
        engine: Engine,
        counts: ServiceStats,
        config: ServerConfig,
        release: str,
        checkpoints: Checkpoints,
        restores: Restores,
        sweeper: Sweeper,
        analyses: Analyses,
        log: VersionLog | None = None,
        feed: Feed | None = None,
    ) -> None:
        self._shard = shard
        self._engine = engine
        self._counts = counts
        self._config = config
        self._release = release
        self._log = log
        self._feed = feed
        self._checkpoints = checkpoints
        self._restores = restores
        self._sweeper = sweeper
        self._workers = ThreadPoolExecutor(WORKERS, "worker")
        self._analyses = analyses
        self._draining = False
        self._share = config.max_inflight_bytes // SHARES
        self._streams: dict[asyncio.Task[Any], bool] = {}  # True while it waits for a message
        self._writers: set[asyncio.Task[None]] = set()  # the loop holds tasks weakly
        self._working = 0  # calls being served, subscriptions not counted
        self._idle = asyncio.Event()  # set when none is
        self._idle.set()

    def drain(self) -> None:
        """Refuse new work; streams finish what they have accepted and end."""
        self._draining = True
        self._checkpoints.work.stop()
        self._sweeper.stop()
        if self._feed is not None:
            self._feed.drain()
        for stream, waits in self._streams.items():
            if waits:
                stream.cancel()

    async def finished(self) -> None:
        """Return once nobody is being served but subscribers, who may never read what they have."""
        await self._idle.wait()

    def close(self) -> None:
        """Wait for the threads; nobody is served any more."""
        self._workers.shutdown()

    def handlers(self) -> tuple[grpc.GenericRpcHandler, ...]:
        """The methods under their names, for a server."""
        tables = {
            "CreateTable": self._message(pb.CreateTableRequest, self.create_table),
            "DescribeTable": self._message(pb.DescribeTableRequest, self.describe_table),
            "ListTables": self._message(pb.ListTablesRequest, self.list_tables),
            "DropTable": self._message(pb.DropTableRequest, self.drop_table),
            "Evict": self._message(pb.EvictRequest, self.evict),
        }
        info = {
            "GetServerInfo": self._message(
                pb.GetServerInfoRequest, self.get_server_info, though_held=True
            )
        }
        work, restore = self._checkpoints, self._restores
        checkpoints = {
            "WriteCheckpoint": self._long(pb.WriteCheckpointRequest, work.write),
            "CompleteCheckpoint": self._blocking(pb.CompleteCheckpointRequest, work.complete),
            "ListCheckpoints": self._blocking(pb.ListCheckpointsRequest, work.catalog.listed),
            "VerifyCheckpoint": self._long(pb.VerifyCheckpointRequest, work.catalog.verify),
            "PrepareRestore": self._long(pb.PrepareRestoreRequest, restore.prepare),
            "Restore": self._blocking(pb.RestoreRequest, restore.step, though_held=True),
            "LoadTable": self._long(pb.LoadTableRequest, work.rows.load_table),
            "ReadRows": self._many(pb.ReadRowsRequest, work.rows.read_rows),
            "WriteRows": self._message(pb.WriteRowsRequest, self.write_rows),
        }
        analyses = {
            "Analyze": self._many(pb.AnalyzeRequest, self._analyses.analyze),
            "Inspect": self._blocking(pb.InspectRequest, self._analyses.inspect),
        }
        log = {
            "WaitDurable": self._message(pb.WaitDurableRequest, self.wait_durable),
            "Barrier": self._message(pb.BarrierRequest, self.barrier),
            "Subscribe": grpc.unary_stream_rpc_method_handler(self.subscribe),
        }
        rows = {
            "Pull": self._unary("Pull", self.pull),
            "Push": self._unary("Push", self.push),
            "Exchange": self._unary("Exchange", self.exchange),
            "Delete": self._unary("Delete", self.delete),
            "Stream": grpc.stream_stream_rpc_method_handler(self._at_work(self.stream)),
        }
        return tuple(
            grpc.method_handlers_generic_handler(f"ps.v1.{name}", methods)
            for name, methods in (
                ("TableService", tables),
                ("RowService", rows),
                ("LogService", log),
                ("CheckpointService", checkpoints),
                ("AnalysisService", analyses),
                ("InfoService", info),
            )
        )

    # ---- tables and server

    async def create_table(
        self, request: pb.CreateTableRequest, deadline: float
    ) -> pb.CreateTableResponse:
        schema = read_schema(request.schema)
        held = await self._engine.submit(lambda: self._shard.create_table(schema), deadline)
        await self._reached(self._shard.version, pb.DURABILITY_LOG)
        told = await self._engine.submit(lambda: self._describe(held.name))
        return pb.CreateTableResponse(schema=told.schema, stats=told.stats)

    async def describe_table(
        self, request: pb.DescribeTableRequest, deadline: float
    ) -> pb.DescribeTableResponse:
        return await self._engine.submit(lambda: self._describe(request.name), deadline)

    async def list_tables(
        self, request: pb.ListTablesRequest, deadline: float
    ) -> pb.ListTablesResponse:
        return await self._engine.submit(
            lambda: pb.ListTablesResponse(
                tables=[self._describe(name) for name in self._shard.tables()]
            ),
            deadline,
        )

    async def drop_table(
        self, request: pb.DropTableRequest, deadline: float
    ) -> pb.DropTableResponse:
        await self._engine.submit(lambda: self._shard.drop_table(request.name), deadline)
        self._counts.forget(request.name)
        await self._reached(self._shard.version, pb.DURABILITY_LOG)
        return pb.DropTableResponse()

    async def get_server_info(
        self, request: pb.GetServerInfoRequest, deadline: float
    ) -> pb.GetServerInfoResponse:
        shard, limits = self._shard, self._config
        return pb.GetServerInfoResponse(
            release=self._release,
            shard=shard.number,
            shard_map=pb.ShardMap(
                epoch=shard.shard_map.epoch,
                shards=shard.shard_map.shards,
                shard_of_bucket=shard.shard_map.shard_of_bucket.astype("<u2").tobytes(),
            ),
            limits=pb.Limits(message_bytes=limits.max_message_bytes, keys=limits.max_keys),
            version=shard.version,
            memory_bytes=shard.budget.held,
            memory_budget_bytes=shard.budget.limit,
            lineage=self._log.lineage if self._log else b"",
            durable_version=self._log.durable if self._log else 0,
        )

    def _describe(self, name: str) -> pb.DescribeTableResponse:
        schema, stats = self._shard.describe(name)
        return pb.DescribeTableResponse(
            schema=write_schema(schema),
            stats=pb.TableStats(
                rows=stats.rows,
                bytes=stats.bytes,
                waiting=stats.waiting,
                counter_bytes=stats.counter_bytes,
            ),
            version=self._shard.version,
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
                f"version {version} asked for, shard {self._shard.number} is at"
                f" {self._shard.version}"
            )
        await self._reached(version, pb.DURABILITY_FSYNC)
        return pb.WaitDurableResponse(durable_version=self._log.durable)

    async def barrier(self, request: pb.BarrierRequest, deadline: float) -> pb.BarrierResponse:
        if not NAME.fullmatch(request.name):
            raise BadRequest(
                "INVALID_ARGUMENT",
                "the name of a barrier must be 1..128 letters, digits or any of _ . / - and start"
                f" with a letter, a digit or _, got {request.name[:200]!r}",
            )
        version = await self._engine.submit(lambda: self._shard.barrier(request.name), deadline)
        await self._reached(version, pb.DURABILITY_LOG)
        return pb.BarrierResponse(version=version)

    async def subscribe(self, data: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        """Send changes until the subscriber is gone or something is wrong."""
        try:
            if self._feed is None:
                raise NoLog
            await self._feed.serve(data, context.write)
        except Exception as error:
            self._count_error("Subscribe", status_of(error))
            await _abort(context, error)

    async def write_rows(
        self, request: pb.WriteRowsRequest, deadline: float
    ) -> pb.WriteRowsResponse:
        done: pb.WriteRowsResponse = await self._on_worker(
            self._checkpoints.rows.write_rows, request, deadline
        )
        await self._reached(done.version, pb.DURABILITY_LOG)
        return done

    async def evict(self, request: pb.EvictRequest, deadline: float) -> pb.EvictResponse:
        gone = threading.Event()
        work = partial(self._sweeper.evict, gone=gone)
        try:
            return await self._on_worker(work, request, deadline)  # type: ignore[no-any-return]
        finally:
            gone.set()  # the caller, perhaps

    async def _reached(self, version: int, level: int) -> int:
        """Wait until a version is written or, for FSYNC, on disk; returns the newest on disk."""
        log = self._log
        if log is None or level == pb.DURABILITY_APPLIED:
            return log.durable if log else 0
        durable = level == pb.DURABILITY_FSYNC
        if version > (log.durable if durable else log.written):
            loop = asyncio.get_running_loop()
            reached = asyncio.Event()
            log.wait(version, durable, lambda: _tell(loop, reached))
            await reached.wait()
        return log.durable

    # ---- rows

    async def pull(self, data: bytes, deadline: float) -> bytes:
        exchange = codec.Exchange([], [codec.decode_pull(data)])
        return codec.encode_pulled((await self._exchange(exchange, len(data), deadline)).pulls[0])

    async def push(self, data: bytes, deadline: float) -> bytes:
        exchange = codec.Exchange([codec.decode_push(data)], [])
        done = await self._exchange(exchange, len(data), deadline)
        return bytes(done.pushes[0].SerializeToString())

    async def delete(self, data: bytes, deadline: float) -> bytes:
        start, size = time.perf_counter(), len(data)
        self._admit(size)
        change = self._check_delete(codec.decode_delete(data))
        self._counts.inflight_bytes += size
        try:
            done = await self._engine.submit(lambda: self._shard.delete(change), deadline)
        except asyncio.CancelledError:
            size = self._leave(size)
            raise
        finally:
            self._counts.inflight_bytes -= size
        done.durable_version = await self._reached(done.version, done.achieved)
        seconds, keys = time.perf_counter() - start, change.keys
        self._counts.served("Delete", change.table, len(keys), keys.nbytes, seconds)
        return bytes(done.SerializeToString())

    async def exchange(self, data: bytes, deadline: float) -> bytes:
        exchange = codec.decode_exchange(data)
        return codec.encode_exchanged(await self._exchange(exchange, len(data), deadline))

    async def stream(self, _: Any, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        """Answer requests in the order in which they come, several of them at work at a time."""
        flow = _Flow()
        writer = asyncio.create_task(self._write(flow, context))
        self._writers.add(writer)
        writer.add_done_callback(self._writers.discard)
        self._counts.streams += 1
        try:
            broken = await self._read(flow, context)
            flow.answers.put_nowait(None)
            await asyncio.shield(writer)
        except BaseException:
            flow.gone = True
            flow.answers.put_nowait(None)
            raise
        finally:
            self._counts.streams -= 1
        if broken is not None:
            self._count_error("Stream", status_of(broken))
            await _abort(context, broken)

    async def _read(
        self, flow: _Flow, context: grpc.aio.ServicerContext[bytes, bytes]
    ) -> Exception | None:
        """Begin requests as they come and there is room; why that ends, if it was not the client.

        Nothing keeps a message here once it is begun: no local, no error's traceback. The task is
        not kept either: it would hold itself, by the error that ends it.
        """
        task = asyncio.current_task()
        assert task is not None
        try:
            while not self._draining:
                self._streams[task] = True
                data = await context.read()
                self._streams[task] = False
                if data is grpc.aio.EOF or flow.gone:
                    return None
                self._accept(flow, data)
                del data
                while flow.held >= self._share or flow.answers.qsize() >= PIPELINE:
                    flow.room.clear()
                    await flow.room.wait()
        except asyncio.CancelledError:
            if not self._draining:
                raise
        except codec.Malformed as error:
            return error.with_traceback(None)
        finally:
            self._streams.pop(task, None)
            del task
        return Draining("the server is stopping")

    def _accept(self, flow: _Flow, data: bytes) -> None:
        """Begin a request of a stream."""
        header, exchange = codec.decode_stream_request(data)
        wait = header.timeout_ms / 1000 if header.timeout_ms else math.inf
        begun = self._begin(exchange, len(data), time.monotonic() + wait)
        flow.held += begun[1]
        flow.answers.put_nowait((header.id, begun))

    async def _write(self, flow: _Flow, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        """Write answers in their order until the queue says None; none once the client is gone."""
        while (answer := await flow.answers.get()) is not None:
            id, begun = answer
            try:
                done = await self._finish(begun)
                data = b"" if flow.gone else codec.encode_stream_response(id, done)
                del done
            except Exception as error:
                status = status_of(error)
                self._count_error("Stream", status)
                mirrored = pb.Status.FromString(status.SerializeToString())
                data = codec.encode_stream_response(id, mirrored)
            if not flow.gone:
                try:
                    await context.write(data)
                except Exception:  # gRPC has several, and they say that the call is over
                    flow.gone = True
            held = begun[1]
            flow.held -= held
            self._counts.inflight_bytes -= held
            del answer, begun, data
            flow.room.set()

    async def _exchange(
        self, exchange: codec.Exchange, size: int, deadline: float
    ) -> codec.Exchanged:
        """Have an exchange done. size: of the request, in bytes."""
        begun = self._begin(exchange, size, deadline)
        held = begun[1]
        try:
            return await self._finish(begun)
        except asyncio.CancelledError:
            held = self._leave(held)
            raise
        finally:
            del begun
            self._counts.inflight_bytes -= held

    def _begin(self, exchange: codec.Exchange, size: int, deadline: float) -> _Begun:
        """Check an exchange and hand it to the engine; whoever called gives its bytes back."""
        start = time.perf_counter()
        try:
            self._admit(size)
            pushes = [self._check_push(push) for push in exchange.pushes]
            pulls = [self._check_pull(pull) for pull in exchange.pulls]
            reply = min(self._shard.reply_bytes(pulls), self._config.max_message_bytes)
            self._require_room(size + reply)
        except Exception as error:  # without the frames, which have the request
            return start, 0, None, error.with_traceback(None)
        self._counts.inflight_bytes += size + reply
        work = self._engine.submit(
            lambda: self._shard.exchange(pushes, pulls),
            deadline,
            at_once=self._is_small([*pushes, *pulls]),
        )
        return start, size + reply, exchange, work

    def _is_small(self, parts: Sequence[Push | Pull]) -> bool:
        """Whether the loop may do this itself: it is soon done, and waits for no disk."""
        size = self._shard.size(parts)
        return size <= AT_ONCE and (self._log is None or self._log.room > 2 * size)

    async def _finish(self, begun: _Begun) -> codec.Exchanged:
        """Wait for the engine, and count what was served."""
        start, _, exchange, work = begun
        try:
            if isinstance(work, Exception):
                raise work
            done = await work
        finally:
            del begun, work  # an error has this frame, which must not have the error
        assert exchange is not None
        for pushed in done.pushes:
            pushed.durable_version = await self._reached(pushed.version, pushed.achieved)
        seconds = time.perf_counter() - start
        for push in exchange.pushes:
            arrays = push.keys.nbytes + push.gradients.nbytes
            self._counts.served("Push", push.header.table, len(push.keys), arrays, seconds)
        for pull, pulled in zip(exchange.pulls, done.pulls, strict=True):
            arrays = pull.keys.nbytes + pulled.embeddings.nbytes
            self._counts.served("Pull", pull.header.table, len(pull.keys), arrays, seconds)
        return done

    def _admit(self, size: int) -> None:
        """Refuse a request of so many bytes if it is too large, or comes at a bad time."""
        config, inflight = self._config, self._counts.inflight_bytes
        self._require_open()
        if size > config.max_message_bytes:
            raise TooLarge(
                "MESSAGE_TOO_LARGE",
                f"the message has {size} bytes, the limit is {config.max_message_bytes}",
            )
        if inflight + size > config.max_inflight_bytes:
            raise Overloaded(
                f"requests and replies of {inflight} bytes are in memory, this one has {size}, the"
                f" limit is {config.max_inflight_bytes}"
            )

    def _require_room(self, size: int) -> None:
        """Refuse a request that with its reply takes so many bytes, if others take too many."""
        inflight, limit = self._counts.inflight_bytes, self._config.max_inflight_bytes
        if inflight and inflight + size > limit:
            raise Overloaded(
                f"requests and replies of {inflight} bytes are in memory, this one takes {size},"
                f" the limit is {limit}"
            )

    def _check_keys(self, table: str, keys: NDArray[np.uint64]) -> None:
        if len(keys) > self._config.max_keys:
            raise TooLarge(
                "TOO_MANY_KEYS",
                f"table {table[:200]!r}: {len(keys)} keys, the limit is {self._config.max_keys}",
            )

    def _stray(self, table: str, key: np.uint64) -> WrongShard:
        """The error for a key of another shard."""
        shard_map = self._shard.shard_map
        bucket = int(routing.mix64(key)) >> 52
        belongs = int(shard_map.shard_of_bucket[bucket])
        return WrongShard(table, int(key), belongs, self._shard.number, shard_map.epoch)

    def _check_pull(self, pull: codec.PullMessage) -> Pull:
        header = pull.header
        self._check_keys(header.table, pull.keys)
        if header.mode not in MODES:
            raise BadRequest("INVALID_ARGUMENT", f"mode {header.mode} is not one of {list(MODES)}")
        stray = routing.stray(pull.keys, self._shard.shard_map, self._shard.number)
        if stray >= 0:
            raise self._stray(header.table, pull.keys[stray])
        return Pull(
            table=header.table,
            keys=pull.keys,
            dtype=codec.wire_dtype(header.dtype),
            mode=MODES[header.mode],
            with_metadata=header.with_metadata,
            min_version=header.min_version,
        )

    def _check_push(self, push: codec.PushMessage) -> Push:
        header, keys, counts, n = push.header, push.keys, push.counts, len(push.keys)
        self._check_keys(header.table, keys)
        lr = header.lr if header.HasField("lr") else None
        if not -codec.STEPS <= header.step < codec.STEPS:
            raise BadRequest(
                "INVALID_ARGUMENT",
                f"table {header.table!r}: step must be in -2^47..2^47-1, got {header.step}",
            )
        if counts is not None and len(counts) != n:
            raise BadRequest(
                "INVALID_ARGUMENT",
                f"table {header.table!r}: {len(counts)} counts for {n} keys",
            )
        if push.gradients.size % n if n else push.gradients.size:
            raise BadRequest(
                "DIM_MISMATCH",
                f"table {header.table!r}: {push.gradients.size} gradient numbers for {n} keys",
            )
        dtype = codec.wire_dtype(header.dtype)
        gradients = codec.from_wire(push.gradients, dtype).reshape(n, -1 if n else 0)
        repeated, stray = routing.check(keys, self._shard.shard_map, self._shard.number)
        if stray >= 0:
            raise self._stray(header.table, keys[stray])
        counts = np.ones(n, np.uint32) if counts is None else counts
        if repeated:
            keys, counts, gradients = _sum_repeated(keys, counts, gradients, self._shard.shard_map)
        if not routing.all_finite(gradients.reshape(-1).view(np.uint32)):
            row, column = np.argwhere(~np.isfinite(gradients))[0]
            raise BadRequest(
                "NON_FINITE",
                f"table {header.table!r}: the gradient of key {keys[row]} is"
                f" {gradients[row, column]} at position {column}; all must be finite",
            )
        return Push(
            table=header.table,
            keys=keys,
            counts=counts,
            gradients=gradients,
            step=header.step,
            lr=lr,
            client=header.client_id,
            incarnation=header.incarnation,
            sequence=header.sequence,
            acknowledged=header.acknowledged,
            durability=_level(header),
        )

    def _check_delete(self, push: codec.PushMessage) -> Change:
        header = push.header
        self._check_keys(header.table, push.keys)
        repeated, stray = routing.check(push.keys, self._shard.shard_map, self._shard.number)
        if stray >= 0:
            raise self._stray(header.table, push.keys[stray])
        return Change(
            table=header.table,
            keys=np.unique(push.keys) if repeated else push.keys,
            client=header.client_id,
            incarnation=header.incarnation,
            sequence=header.sequence,
            acknowledged=header.acknowledged,
            durability=_level(header),
        )

    # ---- gRPC

    def _at_work(self, call: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        """The same call, counted while it lasts."""

        async def counted(data: Any, context: grpc.aio.ServicerContext[bytes, bytes]) -> Any:
            self._working += 1
            self._idle.clear()
            try:
                return await call(data, context)
            finally:
                self._working -= 1
                if not self._working:
                    self._idle.set()

        return counted

    def _count_error(self, method: str, status: Status) -> None:
        info = ErrorInfo.FromString(status.details[0].value)
        code = next(code for code in Code if code.value[0] == status.code)
        self._counts.failed(method, code.name, info.reason)

    def _unary(
        self, name: str, method: Callable[[bytes, float], Awaitable[bytes]]
    ) -> grpc.RpcMethodHandler[bytes, bytes]:
        async def call(data: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
            remaining = context.time_remaining()
            deadline = math.inf if remaining is None else time.monotonic() + remaining
            try:
                answer = await method(data, deadline)
                size = len(answer)
                self._counts.inflight_bytes += size
                task = asyncio.current_task()  # it ends once the answer is sent
                assert task is not None
                task.add_done_callback(lambda _: self._sent(size))
                del task
                return answer
            except Exception as error:
                self._count_error(name, status_of(error))
                await _abort(context, error)
                raise AssertionError("abort returned") from None

        return grpc.unary_unary_rpc_method_handler(self._at_work(call))

    def _sent(self, size: int) -> None:
        self._counts.inflight_bytes -= size

    def _leave(self, size: int) -> int:
        """Give so many bytes back once the engine is through with all that it has; returns 0."""
        self._engine.submit(lambda: None).add_done_callback(lambda _: self._sent(size))
        return 0

    def _message(
        self,
        kind: type[Message],
        method: Callable[[Any, float], Awaitable[Message]],
        *,
        though_held: bool = False,
    ) -> grpc.RpcMethodHandler[bytes, bytes]:
        async def call(data: bytes, deadline: float) -> bytes:
            self._require_open(though_held=though_held)
            return bytes((await method(_parse(kind, data), deadline)).SerializeToString())

        return self._unary(_name_of(kind), call)

    def _require_open(self, *, though_held: bool = False) -> None:
        """Refuse work at a bad time."""
        if self._draining:
            raise Draining("the server is stopping")
        if self._restores.held and not though_held:
            raise Restoring

    # ---- gRPC: what blocks, on threads of its own

    def _blocking(
        self, kind: type[Message], method: Callable[[Any], Message], *, though_held: bool = False
    ) -> grpc.RpcMethodHandler[bytes, bytes]:
        async def call(request: Any, deadline: float) -> Message:
            return await self._on_worker(method, request, deadline)

        return self._message(kind, call, though_held=though_held)

    async def _on_worker(self, method: Callable[[Any], Any], request: Any, deadline: float) -> Any:
        def work() -> Any:
            if time.monotonic() > deadline:
                raise DeadlinePassed("the deadline passed before the work began")
            return method(request)

        return await asyncio.get_running_loop().run_in_executor(self._workers, work)

    def _long(
        self, kind: type[Message], method: Callable[[Any, Progress], Message]
    ) -> grpc.RpcMethodHandler[bytes, bytes]:
        """Messages about the progress of a long piece of work, then its result."""

        async def answers(request: Any) -> AsyncIterator[Message]:
            loop = asyncio.get_running_loop()
            progress = self._checkpoints.work.progress()
            work = loop.run_in_executor(self._workers, method, request, progress)
            try:
                while not (await asyncio.wait([work], timeout=TELL_SECONDS))[0]:
                    yield pb.CheckpointProgress(bytes=progress.bytes, total=progress.total)
                yield work.result()
            finally:
                progress.given_up = True
                if not work.done():
                    work.add_done_callback(lambda ended: ended.cancelled() or ended.exception())

        return self._stream_out(kind, answers)

    def _many(
        self, kind: type[Message], method: Callable[[Any], Iterator[Message]]
    ) -> grpc.RpcMethodHandler[bytes, bytes]:
        """As many messages as there are, each made when the one before is on its way."""

        async def answers(request: Any) -> AsyncIterator[Message]:
            loop = asyncio.get_running_loop()
            found = await loop.run_in_executor(self._workers, method, request)
            try:
                while True:
                    following = loop.run_in_executor(self._workers, next, found, None)
                    item = await asyncio.shield(following)
                    if item is None:
                        return
                    yield item
            finally:
                await asyncio.wait([following])
                await loop.run_in_executor(self._workers, found.close)  # type: ignore[attr-defined]

        return self._stream_out(kind, answers)

    def _stream_out(
        self, kind: type[Message], method: Callable[[Any], AsyncIterator[Message]]
    ) -> grpc.RpcMethodHandler[bytes, bytes]:
        async def call(data: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
            try:
                self._require_open()
                async for message in method(_parse(kind, data)):
                    await context.write(bytes(message.SerializeToString()))
            except Exception as error:
                self._count_error(_name_of(kind), status_of(error))
                await _abort(context, error)

        return grpc.unary_stream_rpc_method_handler(self._at_work(call))


def _parse(kind: type[Message], data: bytes) -> Message:
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise codec.Malformed(f"{kind.DESCRIPTOR.name}: {error}") from error


def _name_of(kind: type[Message]) -> str:
    """The method that takes such messages."""
    return str(kind.DESCRIPTOR.name).removesuffix("Request")


def _tell(loop: asyncio.AbstractEventLoop, reached: asyncio.Event) -> None:
    """Set an event from another thread."""
    with suppress(RuntimeError):  # the loop is gone, and with it who waits
        loop.call_soon_threadsafe(reached.set)


def _level(header: pb.PushHeader) -> Durability | None:
    """What a push asks for; None: nothing, so the table's."""
    if not header.durability:
        return None
    if header.durability not in LEVELS:
        raise BadRequest(
            "INVALID_ARGUMENT", f"table {header.table!r}: durability {header.durability} is unknown"
        )
    return LEVELS[header.durability]


def _sum_repeated(
    keys: NDArray[np.uint64],
    counts: NDArray[np.uint32],
    gradients: NDArray[np.float32],
    shard_map: routing.ShardMap,
) -> tuple[NDArray[np.uint64], NDArray[np.uint32], NDArray[np.float32]]:
    """Sum gradients and counts of repeated keys, for clients that did not."""
    split = routing.split(keys, shard_map)
    sums = np.zeros((len(split.keys), gradients.shape[1]), np.float32)
    routing.sum_rows(gradients, split.inverse, sums)
    total = np.bincount(split.inverse, weights=counts, minlength=len(split.keys))
    return split.keys, np.minimum(total, 2**32 - 1).astype(np.uint32), sums


async def _abort(context: grpc.aio.ServicerContext[bytes, bytes], error: Exception) -> None:
    status = status_of(error)
    context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
    code = next(code for code in Code if code.value[0] == status.code)
    await context.abort(code, status.message)
