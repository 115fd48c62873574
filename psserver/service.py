"""The gRPC methods: decode, check, hand to the engine, encode.

All that a request can get wrong by itself is found here, before the engine sees it: shapes,
dtypes, finite gradients, keys that belong elsewhere, limits. What depends on the state of the
shard (tables, sessions, versions) the shard checks.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
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
from psserver.config import ServerConfig
from psserver.engine import Engine
from psserver.errors import (
    BadRequest,
    DeadlinePassed,
    Draining,
    Overloaded,
    Refused,
    SessionExpired,
    TooLarge,
    VersionInFuture,
    WrongShard,
)
from psserver.metrics import Counts
from psserver.schemas import read_schema, write_schema
from psserver.shard import Pull, Push, Shard
from storage.errors import OutOfMemory, SchemaMismatch, UnknownTable
from storage.table import Mode

PIPELINE = 64  # requests of one stream that may be at work

Code = grpc.StatusCode
CODES: dict[type[Exception], tuple[grpc.StatusCode, str]] = {
    codec.Malformed: (Code.INVALID_ARGUMENT, "MALFORMED_MESSAGE"),
    BadRequest: (Code.INVALID_ARGUMENT, ""),  # an empty reason: the error has its own
    UnknownTable: (Code.NOT_FOUND, "TABLE_NOT_FOUND"),
    SchemaMismatch: (Code.FAILED_PRECONDITION, "SCHEMA_MISMATCH"),
    WrongShard: (Code.FAILED_PRECONDITION, ""),
    SessionExpired: (Code.FAILED_PRECONDITION, ""),
    VersionInFuture: (Code.OUT_OF_RANGE, ""),
    TooLarge: (Code.RESOURCE_EXHAUSTED, ""),
    OutOfMemory: (Code.RESOURCE_EXHAUSTED, "OUT_OF_MEMORY"),
    Overloaded: (Code.RESOURCE_EXHAUSTED, ""),
    DeadlinePassed: (Code.DEADLINE_EXCEEDED, ""),
    Draining: (Code.UNAVAILABLE, ""),
}
MODES: dict[int, Mode] = {
    pb.MODE_UNSPECIFIED: "train",
    pb.MODE_TRAIN: "train",
    pb.MODE_SERVE: "serve",
}

_Work = tuple[float, "asyncio.Future[codec.Exchanged] | Exception"]  # its start, and how it goes
_Answer = tuple[int, codec.Exchange, _Work]  # what a stream owes for the request of an id


def status_of(error: Exception) -> Status:
    """The google.rpc.Status that tells a client about an error."""
    code, reason = next(
        (found for kind in type(error).__mro__ if (found := CODES.get(kind))),
        (Code.INTERNAL, "INTERNAL"),
    )
    message = str(error) if reason != "INTERNAL" else f"internal error: {type(error).__name__}"
    info = ErrorInfo(reason=reason, domain="ps.v1")
    status = Status(code=code.value[0], message=message)
    if isinstance(error, Refused):
        info.reason = reason or error.reason
        info.metadata.update(error.metadata)
    status.details.append(_detail(info))
    if isinstance(error, Refused) and error.retry_after is not None:
        delay = Duration(nanos=round(error.retry_after % 1 * 1e9), seconds=int(error.retry_after))
        status.details.append(_detail(RetryInfo(retry_delay=delay)))
    return status


def _detail(message: Message) -> Detail:
    detail = Detail()
    detail.Pack(message)
    return detail


class Service:
    """The methods of TableService, RowService and InfoService over one shard."""

    def __init__(
        self, shard: Shard, engine: Engine, counts: Counts, config: ServerConfig, release: str
    ) -> None:
        self._shard = shard
        self._engine = engine
        self._counts = counts
        self._config = config
        self._release = release
        self._draining = False
        self._streams: dict[asyncio.Task[Any], bool] = {}  # True while it waits for a message

    def drain(self) -> None:
        """Refuse new work; streams finish what they have accepted and end."""
        self._draining = True
        for stream, waits in self._streams.items():
            if waits:
                stream.cancel()

    def handlers(self) -> tuple[grpc.GenericRpcHandler, ...]:
        """The methods under their names, for a server."""
        tables = {
            "CreateTable": self._message(pb.CreateTableRequest, self.create_table),
            "DescribeTable": self._message(pb.DescribeTableRequest, self.describe_table),
            "ListTables": self._message(pb.ListTablesRequest, self.list_tables),
            "DropTable": self._message(pb.DropTableRequest, self.drop_table),
        }
        info = {"GetServerInfo": self._message(pb.GetServerInfoRequest, self.get_server_info)}
        rows = {
            "Pull": self._unary("Pull", self.pull),
            "Push": self._unary("Push", self.push),
            "Exchange": self._unary("Exchange", self.exchange),
            "Stream": grpc.stream_stream_rpc_method_handler(self.stream),
        }
        return tuple(
            grpc.method_handlers_generic_handler(f"ps.v1.{name}", methods)
            for name, methods in (
                ("TableService", tables),
                ("RowService", rows),
                ("InfoService", info),
            )
        )

    # ---- tables and server

    async def create_table(self, request: pb.CreateTableRequest) -> pb.CreateTableResponse:
        schema = read_schema(request.schema)
        held = await self._engine.submit(lambda: self._shard.create_table(schema))
        return pb.CreateTableResponse(schema=write_schema(held))

    async def describe_table(self, request: pb.DescribeTableRequest) -> pb.DescribeTableResponse:
        return await self._engine.submit(lambda: self._describe(request.name))

    async def list_tables(self, request: pb.ListTablesRequest) -> pb.ListTablesResponse:
        return await self._engine.submit(
            lambda: pb.ListTablesResponse(
                tables=[self._describe(name) for name in self._shard.tables()]
            )
        )

    async def drop_table(self, request: pb.DropTableRequest) -> pb.DropTableResponse:
        await self._engine.submit(lambda: self._shard.drop_table(request.name))
        return pb.DropTableResponse()

    async def get_server_info(self, request: pb.GetServerInfoRequest) -> pb.GetServerInfoResponse:
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
        )

    def _describe(self, name: str) -> pb.DescribeTableResponse:
        schema, stats = self._shard.describe(name)
        return pb.DescribeTableResponse(
            schema=write_schema(schema),
            stats=pb.TableStats(rows=stats.rows, bytes=stats.bytes),
            version=self._shard.version,
        )

    # ---- rows

    async def pull(self, data: bytes, deadline: float) -> bytes:
        exchange = codec.Exchange([], [codec.decode_pull(data)])
        return codec.encode_pulled((await self._exchange(exchange, len(data), deadline)).pulls[0])

    async def push(self, data: bytes, deadline: float) -> bytes:
        exchange = codec.Exchange([codec.decode_push(data)], [])
        done = await self._exchange(exchange, len(data), deadline)
        return bytes(done.pushes[0].SerializeToString())

    async def exchange(self, data: bytes, deadline: float) -> bytes:
        exchange = codec.decode_exchange(data)
        return codec.encode_exchanged(await self._exchange(exchange, len(data), deadline))

    async def stream(self, _: Any, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        """Answer requests in the order in which they come, several of them at work at a time."""
        task = asyncio.current_task()
        assert task is not None
        answers: asyncio.Queue[_Answer | None] = asyncio.Queue(PIPELINE)
        writer = asyncio.create_task(self._write(answers, context))
        broken: Exception | None = None
        self._counts.streams += 1
        try:
            while not self._draining:
                self._streams[task] = True
                data = await context.read()
                self._streams[task] = False
                if data is grpc.aio.EOF:
                    break
                try:
                    header, exchange = codec.decode_stream_request(data)
                except codec.Malformed as error:
                    broken = error
                    break
                wait = header.timeout_ms / 1000 if header.timeout_ms else math.inf
                answer = self._begin(exchange, len(data), time.monotonic() + wait)
                await answers.put((header.id, exchange, answer))
        except asyncio.CancelledError:
            if not self._draining:
                writer.cancel()
                raise
        finally:
            self._counts.streams -= 1
            self._streams.pop(task, None)
        await answers.put(None)
        await writer
        if broken is None and self._draining:
            broken = Draining("the server is stopping")
        if broken is not None:
            self._count_error("Stream", status_of(broken))
            await _abort(context, broken)

    async def _write(
        self,
        answers: asyncio.Queue[_Answer | None],
        context: grpc.aio.ServicerContext[bytes, bytes],
    ) -> None:
        """Write answers in their order until the queue says None."""
        while (answer := await answers.get()) is not None:
            id, exchange, work = answer
            try:
                data = codec.encode_stream_response(id, await self._finish(exchange, work))
            except Exception as error:
                status = status_of(error)
                self._count_error("Stream", status)
                mirrored = pb.Status.FromString(status.SerializeToString())
                data = codec.encode_stream_response(id, mirrored)
            await context.write(data)

    async def _exchange(
        self, exchange: codec.Exchange, size: int, deadline: float
    ) -> codec.Exchanged:
        """Have an exchange done. size: of the request, in bytes."""
        return await self._finish(exchange, self._begin(exchange, size, deadline))

    def _begin(self, exchange: codec.Exchange, size: int, deadline: float) -> _Work:
        """Check an exchange and hand it to the engine."""
        start = time.perf_counter()
        try:
            self._admit(size)
            pushes = [self._check_push(push) for push in exchange.pushes]
            pulls = [self._check_pull(pull) for pull in exchange.pulls]
        except Exception as error:
            return start, error
        self._counts.inflight_bytes += size
        work = self._engine.submit(lambda: self._shard.exchange(pushes, pulls), deadline)
        work.add_done_callback(lambda _: self._free(size))
        return start, work

    async def _finish(self, exchange: codec.Exchange, begun: _Work) -> codec.Exchanged:
        """Wait for the engine, and count what was served."""
        start, work = begun
        if isinstance(work, Exception):
            raise work
        done = await work
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
        if self._draining:
            raise Draining("the server is stopping")
        if size > config.max_message_bytes:
            raise TooLarge(
                "MESSAGE_TOO_LARGE",
                f"the message has {size} bytes, the limit is {config.max_message_bytes}",
            )
        if inflight + size > config.max_inflight_bytes:
            raise Overloaded(
                f"{inflight} bytes are being worked on, the limit is {config.max_inflight_bytes}"
            )

    def _free(self, size: int) -> None:
        self._counts.inflight_bytes -= size

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

    def _check_pull(self, pull: codec.Pull) -> Pull:
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

    def _check_push(self, push: codec.Push) -> Push:
        header, keys, counts, n = push.header, push.keys, push.counts, len(push.keys)
        self._check_keys(header.table, keys)
        lr = header.lr if header.HasField("lr") else None
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
        )

    # ---- gRPC

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
                return await method(data, deadline)
            except Exception as error:
                self._count_error(name, status_of(error))
                await _abort(context, error)
                raise AssertionError("abort returned") from None

        return grpc.unary_unary_rpc_method_handler(call)

    def _message(
        self, kind: type[Message], method: Callable[[Any], Awaitable[Message]]
    ) -> grpc.RpcMethodHandler[bytes, bytes]:
        async def call(data: bytes, deadline: float) -> bytes:
            if self._draining:
                raise Draining("the server is stopping")
            try:
                request = kind.FromString(data)
            except DecodeError as error:
                raise codec.Malformed(f"{kind.DESCRIPTOR.name}: {error}") from error
            return bytes((await method(request)).SerializeToString())

        return self._unary(kind.DESCRIPTOR.name.removesuffix("Request"), call)


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
