"""The client: tables, pulls and pushes over all shards, blocking.

One batch of keys takes one straight line: find the distinct keys and their shards, send each shard
one message, scatter its reply into the result. Several tables travel in the same messages. A shard
that does not own a key refuses its message; the shard map is fetched and the message sent again.

A push is atomic for each shard. Gradients are checked here before the first message leaves, so that
a bad one is applied nowhere. A request over a server's message limit is sent as several.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from psclient import checked
from psclient.batch import Batch, Rows, pool
from psclient.channels import WATCH, Call, Link, Session, UnaryLink, delete, retry
from psclient.errors import InvalidArgument, SchemaMismatch, TableNotFound, WrongShard
from psclient.moved import resend
from psproto import codec, routing
from psproto import ps_pb2 as pb

Mode = Literal["train", "serve"]
Wire = Literal["float32", "bfloat16", "float16"]
Transport = Literal["stream", "unary"]
Durability = Literal["applied", "log", "fsync"]

WIRES: dict[str, int] = {
    "float32": pb.DTYPE_FLOAT32,
    "bfloat16": pb.DTYPE_BFLOAT16,
    "float16": pb.DTYPE_FLOAT16,
}
LARGEST: dict[int, float | None] = {  # finite number; None: no float32 is larger
    pb.DTYPE_FLOAT32: None,
    pb.DTYPE_BFLOAT16: float.fromhex("0x1.fep127"),
    pb.DTYPE_FLOAT16: 65504.0,
}
DURABILITIES: dict[str, int] = {
    "applied": pb.DURABILITY_APPLIED,
    "log": pb.DURABILITY_LOG,
    "fsync": pb.DURABILITY_FSYNC,
}
MODES: dict[str, int] = {"train": pb.MODE_TRAIN, "serve": pb.MODE_SERVE}
MAX_DIM = 8192
ROOM = 4096  # bytes of a message left for headers


@dataclass(frozen=True, slots=True)
class TableInfo:
    """A table over all shards."""

    name: str
    dim: int
    optimizer: str
    optimizer_args: dict[str, float]  # all of them, "lr" too
    initializer: str
    initializer_args: dict[str, float]
    seed: int
    serving_default: float
    durability: str
    admission: str
    admission_args: dict[str, float]
    eviction: dict[str, dict[str, float]]  # by rule
    rows: int
    bytes: int  # of server memory: rows, metadata, index, counters, unused room
    waiting: int  # keys that are counted and have no row; an estimate with a sketch
    counter_bytes: int  # of their counters, part of ``bytes``
    shard_rows: tuple[int, ...]
    shard_bytes: tuple[int, ...]
    versions: tuple[int, ...]  # of the shards


@dataclass(frozen=True, slots=True)
class PulledRows:
    """Embeddings with what the servers know about each key, in the order of the keys."""

    embeddings: Rows  # float32[*shape, dim]
    found: NDArray[np.bool_]  # [*shape]: whether the key has a row
    versions: NDArray[np.uint64]  # of the row's last push, on its shard
    steps: NDArray[np.int64]  # of the row's last push
    frequencies: NDArray[np.uint64]  # occurrences pushed


@dataclass(slots=True)
class _PullPart:
    """One pull of a request, and where its result goes."""

    table: str
    dim: int
    batch: Batch
    dtype: int
    mode: int
    metadata: bool
    distinct: bool  # results for the distinct keys, not for the whole batch
    min_version: Sequence[int]
    out: Rows  # embeddings: [n, dim], or [distinct, dim]
    history: NDArray[np.uint64]  # [3, distinct]: versions, steps, frequencies; [3, 0] without


@dataclass(slots=True)
class _PushPart:
    """One push of a request: a gradient for each distinct key of the batch."""

    table: str
    batch: Batch
    gradients: Rows  # float32[distinct, dim]
    dtype: int
    counts: NDArray[np.uint32]


@dataclass(slots=True)
class _Sent:
    """A call under way, and which distinct keys its pulls are about."""

    link: Link | UnaryLink
    call: Call
    pulls: list[tuple[_PullPart, int, int]]  # part, first and last + 1 distinct key
    moved: bool = False  # its keys, and they were sent again


@dataclass(slots=True)
class _Rest:
    """What a request under way may have to do besides waiting."""

    client: Client
    cluster: _Cluster
    tables: tuple[str, ...]
    deadline: float  # monotonic seconds
    late: bool  # nobody need wait before the deadline
    later: list[_Sent]  # pulls that leave once all pushes are answered

    def submit(self) -> list[_Sent]:
        """Send what was to wait."""
        for item in self.later:
            item.call.deadline = self._until()
            item.link.submit(item.call)
        sent, self.later = self.later, []
        return sent

    def note(self, error: Exception) -> None:
        """Forget the dims of tables that were dropped, and perhaps created anew."""
        if isinstance(error, SchemaMismatch | TableNotFound):
            for name in self.tables:
                self.client._dims.pop(name, None)

    def resend(self, item: _Sent) -> codec.Exchanged:
        """Send what a shard refused to those that the newest shard map names."""
        deadline = self._until()
        self.cluster.refresh(deadline)
        least = [part.min_version for part, _, _ in item.pulls]
        return resend(
            self.cluster.links, self.cluster.shard_map, item.call.exchange, least, deadline
        )

    def _until(self) -> float:
        if self.late:
            return max(self.deadline, time.monotonic() + self.client._timeout)
        return self.deadline


class Pending:
    """A request under way. ``result()`` waits for it; call it once or often, from any thread of the
    process that started it.
    """

    def __init__(self, sent: list[_Sent], finish: Any, rest: _Rest | None = None) -> None:
        self._process = os.getpid()
        self._sent = sent
        self._finish = finish
        self._rest = rest
        self._lock = threading.Lock()
        self._result: Any = None

    def result(self) -> Any:
        """What the blocking method of the same name returns, or its error."""
        if self._process != os.getpid():
            raise InvalidArgument("the request was started by another process, before a fork")
        with self._lock:
            if self._sent is not None:
                self._wait()
                if self._rest is not None and self._rest.later:
                    self._sent = self._rest.submit()
                    self._wait()
                self._result = self._finish()
                self._sent = None  # type: ignore[assignment]
            return self._result

    def _wait(self) -> None:
        """Take all answers; raise the first error once all are there."""
        failure = None
        for item in self._sent:
            try:
                _take(self._answer(item), item.pulls, item.link.where)
            except Exception as error:
                failure = failure or error
                if self._rest is not None:
                    self._rest.note(error)
        if failure is not None:
            raise failure

    def _answer(self, item: _Sent) -> codec.Exchanged:
        try:
            return item.link.wait(item.call)
        except WrongShard:
            if self._rest is None or item.moved:
                raise
            item.moved = True
            return self._rest.resend(item)


class _Cluster:
    """The shards as one process sees them; made again after a fork."""

    def __init__(self, client: Client, deadline: float) -> None:
        self.process = os.getpid()
        self.links: list[Link | UnaryLink] = []
        kind = Link if client._transport == "stream" else UnaryLink
        for shard, address in enumerate(client._addresses):
            session = Session(client._client_id or secrets.randbits(63) + 1, client._incarnation)
            self.links.append(kind(f"shard {shard} at {address}", address, session))
        self.pool = ThreadPoolExecutor(len(self.links), "psclient")
        try:
            infos = self.refresh(deadline)
        except BaseException:
            self.close()
            raise
        self.message_bytes = min(int(info.limits.message_bytes) for info in infos) - ROOM
        self.keys = min(int(info.limits.keys) for info in infos)
        self._closed = threading.Event()
        threading.Thread(target=self._watch, args=(self.links,), daemon=True).start()

    def refresh(self, deadline: float) -> list[pb.GetServerInfoResponse]:
        """Ask the shards for their map, and what else they tell of themselves."""
        request = pb.GetServerInfoRequest()
        infos = self.on_all(
            "InfoService/GetServerInfo", request, pb.GetServerInfoResponse, deadline
        )
        self.shard_map = self._check(infos)
        return infos

    def on_all(
        self, method: str, request: Any, answer: Any, deadline: float, *, first: bool = False
    ) -> list[Any]:
        """Call a unary method on every shard at once; answers in the order of the shards.

        first  on shard 0 before the others: of several clients that do not agree, one is ahead
        """
        message = request.SerializeToString()

        def call(link: Link | UnaryLink) -> Any:
            def attempt(left: float) -> bytes:
                return link.channel.call(f"/ps.v1.{method}", message, left)

            return answer.FromString(retry(attempt, link.where, deadline, count()))

        done = [call(self.links[0])] if first else []
        return done + list(self.pool.map(call, self.links[len(done) :]))

    def close(self) -> None:
        for link in self.links:
            link.close()
        self.pool.shutdown(wait=False)
        if hasattr(self, "_closed"):
            self._closed.set()

    def _check(self, infos: list[pb.GetServerInfoResponse]) -> routing.ShardMap:
        """The shard map, if the servers are the shards of one cluster in their order."""
        for shard, (link, info) in enumerate(zip(self.links, infos, strict=True)):
            if info.shard_map.shards != len(self.links):
                raise InvalidArgument(
                    f"addresses: {link.where} is one of {info.shard_map.shards} shards,"
                    f" {len(self.links)} addresses were given"
                )
            if info.shard != shard:
                raise InvalidArgument(f"addresses: {link.where} serves shard {info.shard}")
        newest = max(infos, key=lambda info: info.shard_map.epoch).shard_map
        table = np.frombuffer(newest.shard_of_bucket, "<u2")
        return routing.ShardMap(newest.epoch, newest.shards, table)

    def _watch(self, links: list[Link | UnaryLink]) -> None:
        while not self._closed.wait(WATCH):
            now = time.monotonic()
            for link in links:
                link.watch(now)


class Client:
    """A trainer's view of a cluster. Thread-safe; usable in forked processes.

    addresses    "host:port" of every shard, in the order of the shards
    wire         dtype of embeddings and gradients on the wire: "float32", "bfloat16", "float16"
    timeout      seconds that an operation may take, retries included
    transport    "stream" (fast), or "unary" (one RPC a message)
    client_id    1..2^64-1, where the identity must outlive the process; 0: random
    incarnation  0..2^63-1; must grow with each use of the same client_id, or its pushes are refused
                 (SessionExpired); nanoseconds since 1970 where None

    Connects at the first use. What can go wrong is a PsError, values that no server was asked about
    included; see psclient.errors.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        wire: Wire = "float32",
        timeout: float = 30.0,
        transport: Transport = "stream",
        client_id: int = 0,
        incarnation: int | None = None,
    ) -> None:
        if (
            isinstance(addresses, str)
            or not addresses
            or not all(isinstance(each, str) for each in addresses)
        ):
            raise InvalidArgument(f"addresses must be a list of 'host:port', got {addresses!r}")
        if transport not in ("stream", "unary"):
            raise InvalidArgument(f"transport must be 'stream' or 'unary', got {transport!r}")
        if not 0 < checked.number("timeout", timeout) <= threading.TIMEOUT_MAX:
            raise InvalidArgument(f"timeout must be positive seconds, got {timeout}")
        self._addresses = list(addresses)
        self._dtype = _known("wire", wire, WIRES)
        self._timeout = timeout
        self._transport = transport
        self._client_id = checked.integer("client_id", client_id, 0, 1 << 64)
        if incarnation is None:
            incarnation = time.time_ns()
        self._incarnation = checked.integer("incarnation", incarnation, 0, 1 << 63)
        self._cluster: _Cluster | None = None
        self._connecting = threading.Lock()
        self._dims: dict[str, int] = {}
        self._closed = False
        _clients.add(self)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; calls that wait fail. The client cannot be used again."""
        self._closed = True
        if self._cluster is not None:
            self._cluster.close()
            self._cluster = None

    # ---- tables

    def create_table(
        self,
        name: str,
        dim: int,
        *,
        optimizer: str = "adagrad",
        lr: float | None = None,
        optimizer_args: Mapping[str, float] | None = None,
        initializer: str = "uniform",
        initializer_args: Mapping[str, float] | None = None,
        seed: int = 0,
        serving_default: float = 0.0,
        durability: Durability = "log",
        admission: str = "always",
        admission_args: Mapping[str, float] | None = None,
        eviction: Mapping[str, Mapping[str, float]] | None = None,
    ) -> Table:
        """Create a table on every shard, or find it there with an equal schema.

        dim              length of the embeddings
        optimizer        of the server: sgd, momentum, adagrad, rowwise_adagrad, adagrad_decay,
                         adam, adamw, adam_async, ftrl, group_ftrl
        lr               learning rate; the optimizer's default where None
        optimizer_args   its further parameters
        initializer      zeros, constant, uniform, normal, truncated_normal
        seed             of the initial values
        serving_default  what serving pulls return for keys without a row
        durability       of pushes that ask for none; see ``push``
        admission        which keys may have a row: always, counter, sketch, probability
        admission_args   its parameters
        eviction         which rows leave, any of these with their parameters: step_ttl, time_ttl,
                         norm, and one of capacity_lru, capacity_lfu; docs/policies.md has them all

        Raises SchemaMismatch if it exists with another schema, InvalidArgument for a bad value.
        """
        at = f"table {checked.text('name', name)!r}: "
        dim = checked.integer(f"{at}dim", dim, 1, MAX_DIM + 1)
        rates = {} if lr is None else {"lr": lr}
        schema = pb.TableSchema(
            name=name,
            dim=dim,
            optimizer=_rule(f"{at}optimizer", optimizer, optimizer_args, rates),
            initializer=_rule(f"{at}initializer", initializer, initializer_args),
            seed=checked.integer(f"{at}seed", seed, 0, 1 << 64),
            serving_default=checked.number(f"{at}serving_default", serving_default),
            durability=_known("durability", durability, DURABILITIES),  # type: ignore[arg-type]
            admission=_rule(f"{at}admission", admission, admission_args),
            evictions=[
                _rule(f"{at}eviction", rule, args)
                for rule, args in checked.mapping(f"{at}eviction", eviction).items()
            ],
        )
        request = pb.CreateTableRequest(schema=schema)
        self._on_all("TableService/CreateTable", request, pb.CreateTableResponse, first=True)
        self._dims[name] = dim
        return Table(self, name, dim)

    def table(self, name: str) -> Table:
        """A table that exists; TableNotFound if it does not."""
        return Table(self, name, self._dim(name))

    def describe_table(self, name: str) -> TableInfo:
        """Schema and size of a table over all shards.

        Raises TableNotFound if there is none, SchemaMismatch if it is not the same on all shards:
        it was dropped on some of them and created anew meanwhile.
        """
        request = pb.DescribeTableRequest(name=checked.text("name of a table", name))
        return _info(self._on_all("TableService/DescribeTable", request, pb.DescribeTableResponse))

    def list_tables(self) -> list[TableInfo]:
        """All tables that exist on every shard, by name."""
        lists = self._on_all(
            "TableService/ListTables", pb.ListTablesRequest(), pb.ListTablesResponse
        )
        shards = [{item.schema.name: item for item in answer.tables} for answer in lists]
        names = sorted(set.intersection(*(set(shard) for shard in shards)))
        return [_info([shard[name] for shard in shards]) for name in names]

    def evict(self, name: str, *, dry_run: bool = False, timeout: float = 3600.0) -> dict[str, int]:
        """Evict the rows that are to leave by the table's rules now; how many did, by cause.

        dry_run  only count them
        timeout  seconds that it may take, instead of the client's; then the shards give it up, and
                 the rows evicted until then stay so

        By the first rule that holds for a row. The background finds the same rows by and by; those
        that it evicts meanwhile, or that a call did which failed, are not counted.
        """
        request = pb.EvictRequest(
            table=checked.text("name of a table", name), dry_run=bool(dry_run)
        )
        evicted: dict[str, int] = {}
        method, deadline = "TableService/Evict", time.monotonic() + timeout
        for answer in self._connect().on_all(method, request, pb.EvictResponse, deadline):
            for cause, rows in answer.evicted.items():
                evicted[cause] = evicted.get(cause, 0) + rows
        return evicted

    def drop_table(self, name: str) -> None:
        """Drop a table and its rows on every shard; TableNotFound if no shard has it."""
        request = pb.DropTableRequest(name=checked.text("name of a table", name))
        message = request.SerializeToString()
        self._dims.pop(name, None)
        cluster = self._connect()
        deadline = time.monotonic() + self._timeout

        def drop(link: Link | UnaryLink) -> bool:
            def attempt(left: float) -> bytes:
                return link.channel.call("/ps.v1.TableService/DropTable", message, left)

            try:
                retry(attempt, link.where, deadline, count())
            except TableNotFound:  # never there, or dropped by an attempt whose reply was lost
                return False
            return True

        others = list(cluster.pool.map(drop, cluster.links[1:]))
        if not any([drop(cluster.links[0]), *others]):  # the first to have it is the last
            raise TableNotFound(f"no table {name!r} on any shard")

    def wait_durable(self) -> tuple[int, ...]:
        """Return once all that was answered so far is on the disks of the shards.

        Returns the versions on disk, by shard. Raises NoLog where a shard keeps no log.
        """
        request = pb.WaitDurableRequest()
        answers = self._on_all("LogService/WaitDurable", request, pb.WaitDurableResponse)
        return tuple(answer.durable_version for answer in answers)

    def barrier(self, name: str) -> tuple[int, ...]:
        """Put a mark into the log of every shard, for subscribers; its versions, by shard.

        Pushes answered before are in front of it on every shard, pushes started after behind it.
        """
        request = pb.BarrierRequest(name=checked.text("name of a barrier", name))
        answers = self._on_all("LogService/Barrier", request, pb.BarrierResponse)
        return tuple(answer.version for answer in answers)

    # ---- rows

    def batch(self, keys: Any) -> Batch:
        """The distinct keys of ``keys`` (any shape), for use in several calls."""
        return keys if isinstance(keys, Batch) else Batch(keys, self._connect().shard_map)

    def pull(
        self, keys: Mapping[str, Any], *, mode: Mode = "train", wire: Wire | None = None
    ) -> dict[str, Rows]:
        """Embeddings of keys of several tables, in one round trip: float32[*shape, dim] each.

        keys  by table: int64 or uint64 of any shape, duplicates welcome, or a Batch
        mode  for keys without a row: "train" returns the value that the row will start from,
              "serve" the table's serving default
        """
        return self._start({}, keys, mode=mode, wire=wire).result()[1]  # type: ignore[no-any-return]

    def start_pull(
        self, keys: Mapping[str, Any], *, mode: Mode = "train", wire: Wire | None = None
    ) -> Pending:
        """``pull``, started now and awaited later by ``result()``."""
        pending = self._start({}, keys, mode=mode, wire=wire, background=True)
        return Pending([], lambda: pending.result()[1])

    def push(
        self,
        gradients: Mapping[str, tuple[Any, Any]],
        *,
        step: int = 0,
        lr: float | None = None,
        wire: Wire | None = None,
        durability: Durability | None = None,
    ) -> None:
        """Apply gradients to rows of several tables, in one round trip.

        gradients  by table: (keys, gradients float[*shape of keys, dim]); those of equal keys are
                   summed, and the server's optimizer takes one step for each distinct key
        step       the trainer's global step, in -2^47..2^47-1; rows are of the largest that any
                   client has pushed to the table
        lr         learning rate of this push; the table's where None
        durability  what is true once this returns: "applied", the servers have it in memory;
                   "log", it outlives their processes; "fsync", it is on their disks; the table's
                   where None
        """
        self._start(gradients, {}, step=step, lr=lr, wire=wire, durability=durability).result()

    def exchange(
        self,
        push: Mapping[str, tuple[Any, Any]],
        pull: Mapping[str, Any],
        *,
        step: int = 0,
        lr: float | None = None,
        mode: Mode = "train",
        wire: Wire | None = None,
        durability: Durability | None = None,
    ) -> dict[str, Rows]:
        """Push the last step's gradients and pull the next step's rows in one message a shard.

        The pull sees the push. What is larger than a message travels in several, and what is pulled
        after all that is pushed.
        """
        pending = self._start(
            push, pull, step=step, lr=lr, mode=mode, wire=wire, durability=durability
        )
        return pending.result()[1]  # type: ignore[no-any-return]

    def start_exchange(
        self,
        push: Mapping[str, tuple[Any, Any]],
        pull: Mapping[str, Any],
        *,
        step: int = 0,
        lr: float | None = None,
        mode: Mode = "train",
        wire: Wire | None = None,
        durability: Durability | None = None,
    ) -> Pending:
        """``exchange``, started now and awaited later by ``result()``.

        Exchanges under way together take effect in the order of their start, but for those that
        the server asks to send again (OVERLOADED, DISK_FULL): others may overtake them. One that is
        larger than a message begins to pull when ``result()`` is called.
        """
        pending = self._start(
            push,
            pull,
            step=step,
            lr=lr,
            mode=mode,
            wire=wire,
            durability=durability,
            background=True,
        )
        return Pending([], lambda: pending.result()[1])

    def pull_distinct(
        self, keys: Mapping[str, Any], *, mode: Mode = "train", wire: Wire | None = None
    ) -> dict[str, Rows]:
        """Embeddings of the distinct keys of each batch, in their order: float32[distinct, dim].

        keys  by table: a Batch, whose ``keys`` they are and whose ``split.inverse`` leads back
        """
        pending = self._start({}, keys, mode=mode, wire=wire, distinct=True)
        return pending.result()[1]  # type: ignore[no-any-return]

    def push_distinct(
        self,
        gradients: Mapping[str, tuple[Batch, Any]],
        *,
        step: int = 0,
        lr: float | None = None,
        wire: Wire | None = None,
        durability: Durability | None = None,
    ) -> None:
        """``push`` of gradients summed already: float32[distinct, dim], in the batch's order."""
        self._start(
            gradients, {}, step=step, lr=lr, wire=wire, durability=durability, distinct=True
        ).result()

    # ---- the line from keys to shards and back

    def _start(
        self,
        push: Mapping[str, tuple[Any, Any]],
        pull: Mapping[str, Any],
        *,
        step: int = 0,
        lr: float | None = None,
        mode: str = "train",
        wire: str | None = None,
        durability: str | None = None,
        metadata: bool = False,
        distinct: bool = False,
        min_version: Sequence[int] = (),
        background: bool = False,
    ) -> Pending:
        """Send a request; the pending result is (parts, embeddings by table)."""
        dtype = self._dtype if wire is None else _known("wire", wire, WIRES)
        wanted = _known("mode", mode, MODES)
        level = 0 if durability is None else _known("durability", durability, DURABILITIES)
        step = checked.integer("step", step, -codec.STEPS, codec.STEPS)
        lr = None if lr is None else checked.number("lr", lr)
        cluster = self._connect()
        if min_version and len(min_version) != len(cluster.links):
            raise InvalidArgument(
                f"min_version must name a version for each of {len(cluster.links)} shards, got"
                f" {len(min_version)}"
            )
        min_version = [checked.integer("min_version", each, 0, 1 << 64) for each in min_version]
        pushes = [
            self._push_part(name, keys, gradients, dtype, distinct)
            for name, (keys, gradients) in push.items()
        ]
        pulls = []
        for name, keys in pull.items():
            dim, batch = self._dim(name), self.batch(keys)
            u = len(batch.keys)
            out = np.empty((u if distinct else len(batch), dim), np.float32)
            history = np.empty((3, u if metadata else 0), np.uint64)
            pulls.append(
                _PullPart(
                    name, dim, batch, dtype, wanted, metadata, distinct, min_version, out, history
                )
            )
        deadline = time.monotonic() + self._timeout
        sent: list[_Sent] = []
        later: list[_Sent] = []
        for shard, link in enumerate(cluster.links):
            messages = _messages(cluster, shard, pushes, pulls, step, lr, level)
            for exchange, ranges in messages:
                call = Call(exchange, deadline)
                if pushes and len(messages) > 1 and not exchange.pushes:
                    later.append(_Sent(link, call, ranges))  # a push may have to be sent again
                    continue
                link.submit(call, background=background)
                sent.append(_Sent(link, call, ranges))

        def finish() -> tuple[list[_PullPart], dict[str, Rows]]:
            results = {}
            for part in pulls:
                shape = (-1,) if part.distinct else part.batch.shape
                results[part.table] = part.out.reshape(*shape, part.dim)
            return pulls, results

        rest = _Rest(self, cluster, (*push, *pull), deadline, background, later)
        return Pending(sent, finish, rest)

    def _push_part(
        self, name: str, keys: Any, gradients: Any, dtype: int, distinct: bool
    ) -> _PushPart:
        batch, dim = self.batch(keys), self._dim(name)
        sums = batch.check(gradients, name, dim) if distinct else batch.sum(gradients, name, dim)
        largest = LARGEST[dtype]
        if largest is not None and sums.size and max(sums.max(), -sums.min()) > largest:
            row, column = np.argwhere(np.abs(sums) > largest)[0]
            raise InvalidArgument(
                f"table {name!r}: the gradient of key {batch.keys[row]} is {sums[row, column]} at"
                f" position {column}; the wire carries up to {largest:g}"
            )
        return _PushPart(name, batch, sums, dtype, batch.split.counts)

    def _dim(self, name: str) -> int:
        dim = self._dims.get(name)
        if dim is None:
            dim = self._dims[name] = self.describe_table(name).dim
        return dim

    def _on_all(self, method: str, request: Any, answer: Any, *, first: bool = False) -> list[Any]:
        deadline = time.monotonic() + self._timeout
        return self._connect().on_all(method, request, answer, deadline, first=first)

    def _connect(self) -> _Cluster:
        cluster = self._cluster
        if cluster is not None and cluster.process == os.getpid():
            return cluster
        with self._connecting:
            if self._closed:
                raise InvalidArgument("the client is closed")
            if self._cluster is None or self._cluster.process != os.getpid():
                self._cluster = _Cluster(self, time.monotonic() + self._timeout)
            return self._cluster


class Table:
    """One table of a client. Its methods are those of the client for one table.

    dim  of its embeddings when this was made; SchemaMismatch tells that the table was created anew
         with another one: then ask the client for it again
    """

    def __init__(self, client: Client, name: str, dim: int) -> None:
        self.client = client
        self.name = name
        self.dim = dim

    def pull(self, keys: Any, *, mode: Mode = "train", wire: Wire | None = None) -> Rows:
        """Embeddings float32[*shape, dim] of keys[*shape]. See Client.pull."""
        return self.client.pull({self.name: keys}, mode=mode, wire=wire)[self.name]

    def start_pull(self, keys: Any, *, mode: Mode = "train", wire: Wire | None = None) -> Pending:
        """``pull``, started now and awaited later by ``result()``."""
        pending = self.client.start_pull({self.name: keys}, mode=mode, wire=wire)
        return Pending([], lambda: pending.result()[self.name])

    def pull_rows(
        self, keys: Any, *, mode: Mode = "train", min_version: Sequence[int] = ()
    ) -> PulledRows:
        """Embeddings of keys with what the servers know about them.

        min_version  by shard: refuse (VersionInFuture) to read from an older state; as given by
                     describe_table().versions
        """
        batch = self.client.batch(keys)
        pending = self.client._start(
            {}, {self.name: batch}, mode=mode, metadata=True, min_version=min_version
        )
        (part,), rows = pending.result()
        versions, steps, frequencies = (batch.spread(column) for column in part.history)
        return PulledRows(
            rows[self.name], versions > 0, versions, steps.view(np.int64), frequencies
        )

    def pull_distinct(
        self, keys: Any, *, mode: Mode = "train", wire: Wire | None = None
    ) -> tuple[Batch, Rows]:
        """The batch of ``keys`` and one embedding for each of its distinct keys.

        rows[batch.split.inverse] are the embeddings of ``keys``; gradients of the distinct rows go
        back by push_distinct.
        """
        batch = self.client.batch(keys)
        rows = self.client.pull_distinct({self.name: batch}, mode=mode, wire=wire)
        return batch, rows[self.name]

    def pull_pooled(
        self,
        keys: Any,
        offsets: Any,
        *,
        pooling: str = "sum",
        weights: Any = None,
        mode: Mode = "train",
        wire: Wire | None = None,
    ) -> Rows:
        """One combined embedding for each bag of keys: float32[bags, dim].

        keys     int[n]
        offsets  int[bags + 1]: bag b is keys[offsets[b]:offsets[b + 1]]; an empty bag is 0
        pooling  "sum"; "mean", by the sum of the weights; "sqrtn", by the root of the sum of
                 their squares
        weights  float[n]; ones where None
        """
        batch, rows = self.pull_distinct(keys, mode=mode, wire=wire)
        return pool(rows, batch, offsets, weights, pooling)

    def push(
        self,
        keys: Any,
        gradients: Any,
        *,
        step: int = 0,
        lr: float | None = None,
        wire: Wire | None = None,
        durability: Durability | None = None,
    ) -> None:
        """Apply gradients float[*shape, dim] to the rows of keys[*shape]. See Client.push."""
        self.client.push(
            {self.name: (keys, gradients)}, step=step, lr=lr, wire=wire, durability=durability
        )

    def exchange(
        self,
        keys: Any,
        push: tuple[Any, Any],
        *,
        step: int = 0,
        lr: float | None = None,
        mode: Mode = "train",
        wire: Wire | None = None,
        durability: Durability | None = None,
    ) -> Rows:
        """Push (keys, gradients) of the last step and pull ``keys`` of the next in one message."""
        tables = self.client.exchange(
            {self.name: push},
            {self.name: keys},
            step=step,
            lr=lr,
            mode=mode,
            wire=wire,
            durability=durability,
        )
        return tables[self.name]

    def delete(self, keys: Any, *, durability: Durability | None = None) -> int:
        """Delete the rows of keys, state and history too; keys without a row are left alone.

        Returns how many rows went, or fewer if a reply was lost on the way. A shard deletes all of
        its part or nothing.
        """
        client = self.client
        level = 0 if durability is None else _known("durability", durability, DURABILITIES)
        cluster, batch = client._connect(), client.batch(keys)
        deadline = time.monotonic() + client._timeout

        def part(batch: Batch, shard: int, moved: list[codec.Keys] | None) -> int:
            deleted = 0
            first, last = batch.split.bounds[shard : shard + 2].tolist()
            most = min(cluster.keys, cluster.message_bytes // 8)
            for low in range(first, last, most):
                header = pb.PushHeader(table=self.name, durability=level)  # type: ignore[arg-type]
                some = batch.keys[low : min(low + most, last)]
                try:
                    deleted += delete(cluster.links[shard], header, some, deadline).deleted
                except WrongShard:
                    if moved is None:
                        raise
                    moved.append(some)
            return deleted

        def parts(batch: Batch, moved: list[codec.Keys] | None = None) -> int:
            shards = range(len(cluster.links))
            return sum(cluster.pool.map(lambda shard: part(batch, shard, moved), shards))

        moved: list[codec.Keys] = []
        deleted = parts(batch, moved)
        if moved:
            cluster.refresh(deadline)
            deleted += parts(Batch(np.concatenate(moved), cluster.shard_map))
        return deleted

    def describe(self) -> TableInfo:
        """Schema and size over all shards."""
        return self.client.describe_table(self.name)

    def __repr__(self) -> str:
        return f"Table({self.name!r}, dim={self.dim})"


def _rule(
    field: str,
    name: str,
    parameters: Mapping[str, float] | None,
    more: Mapping[str, float] | None = None,
) -> pb.Rule:
    numbers = {
        checked.text(f"parameter of {field}", key): checked.number(f"{field} {key}", value)
        for key, value in {**checked.mapping(field, parameters), **(more or {})}.items()
    }
    return pb.Rule(name=checked.text(field, name), parameters=numbers)


def _known(field: str, value: str, known: Mapping[str, int]) -> int:
    if not isinstance(value, str) or value not in known:
        raise InvalidArgument(f"{field} must be one of {', '.join(known)}, got {value!r}")
    return known[value]


def _info(shards: Sequence[pb.DescribeTableResponse]) -> TableInfo:
    schema = shards[0].schema
    for number, shard in enumerate(shards):
        if shard.schema != schema:
            fields = [f.name for f in schema.DESCRIPTOR.fields]
            field = next(f for f in fields if getattr(shard.schema, f) != getattr(schema, f))
            raise SchemaMismatch(
                f"table {schema.name!r} has another {field} on shard {number} than on shard 0;"
                " drop it and create it anew"
            )
    return TableInfo(
        name=schema.name,
        dim=schema.dim,
        optimizer=schema.optimizer.name,
        optimizer_args=dict(schema.optimizer.parameters),
        initializer=schema.initializer.name,
        initializer_args=dict(schema.initializer.parameters),
        seed=schema.seed,
        serving_default=schema.serving_default,
        durability=next(k for k, v in DURABILITIES.items() if v == schema.durability),
        admission=schema.admission.name,
        admission_args=dict(schema.admission.parameters),
        eviction={rule.name: dict(rule.parameters) for rule in schema.evictions},
        rows=sum(shard.stats.rows for shard in shards),
        bytes=sum(shard.stats.bytes for shard in shards),
        waiting=sum(shard.stats.waiting for shard in shards),
        counter_bytes=sum(shard.stats.counter_bytes for shard in shards),
        shard_rows=tuple(shard.stats.rows for shard in shards),
        shard_bytes=tuple(shard.stats.bytes for shard in shards),
        versions=tuple(shard.version for shard in shards),
    )


def _messages(
    cluster: _Cluster,
    shard: int,
    pushes: Sequence[_PushPart],
    pulls: Sequence[_PullPart],
    step: int,
    lr: float | None,
    durability: int,
) -> list[tuple[codec.Exchange, list[tuple[_PullPart, int, int]]]]:
    """The messages of a request for one shard: one, or several where that would be too large."""
    asked = size = most = widest = 0
    for push in pushes:
        first, last = push.batch.split.bounds[shard : shard + 2].tolist()
        row = 12 + push.gradients.shape[1] * codec.WIRE[push.dtype].itemsize
        size += (last - first) * row
        widest = max(widest, row)
        most = max(most, last - first)
    for pull in pulls:
        first, last = pull.batch.split.bounds[shard : shard + 2].tolist()
        row = pull.dim * codec.WIRE[pull.dtype].itemsize + 24 * pull.metadata
        size += (last - first) * 8
        asked += (last - first) * row
        widest = max(widest, row)
        most = max(most, last - first)
    size = max(size, asked)
    pieces = 1
    if size > cluster.message_bytes or most > cluster.keys:  # a piece is rounded up to whole rows
        pieces = max(-(-size // (cluster.message_bytes - widest)), -(-most // cluster.keys))
    built_pushes, built_pulls = [], []
    for push in pushes:
        first, last = push.batch.split.bounds[shard : shard + 2].tolist()
        for low, high in _ranges(first, last, pieces):
            header = pb.PushHeader(
                table=push.table,
                dtype=push.dtype,  # type: ignore[arg-type]
                step=step,
                lr=lr,
                durability=durability,  # type: ignore[arg-type]
            )
            built_pushes.append(
                codec.PushMessage(
                    header,
                    push.batch.keys[low:high],
                    push.counts[low:high],
                    codec.to_wire(push.gradients[low:high], push.dtype),
                )
            )
    for pull in pulls:
        first, last = pull.batch.split.bounds[shard : shard + 2].tolist()
        for low, high in _ranges(first, last, pieces):
            head = pb.PullHeader(
                table=pull.table,
                dtype=pull.dtype,  # type: ignore[arg-type]
                mode=pull.mode,  # type: ignore[arg-type]
                with_metadata=pull.metadata,
                min_version=pull.min_version[shard] if pull.min_version else 0,
            )
            built_pulls.append(
                (codec.PullMessage(head, pull.batch.keys[low:high]), (pull, low, high))
            )
    if pieces == 1:
        if not built_pushes and not built_pulls:
            return []
        requests, targets = [p for p, _ in built_pulls], [t for _, t in built_pulls]
        return [(codec.Exchange(built_pushes, requests), targets)]
    each: list[tuple[codec.Exchange, list[tuple[_PullPart, int, int]]]] = []
    each += [(codec.Exchange([push], []), []) for push in built_pushes]
    each += [(codec.Exchange([], [pull]), [target]) for pull, target in built_pulls]
    return each


def _ranges(first: int, last: int, pieces: int) -> list[tuple[int, int]]:
    """first..last in about equal, non-empty pieces."""
    if first == last:
        return []
    step = -(-(last - first) // pieces)
    return [(low, min(low + step, last)) for low in range(first, last, step)]


def _take(answer: codec.Exchanged, pulls: list[tuple[_PullPart, int, int]], where: str) -> None:
    """Write the embeddings of one reply where they belong."""
    for pulled, (part, first, last) in zip(answer.pulls, pulls, strict=True):
        if pulled.header.dim != part.dim:
            raise SchemaMismatch(
                f"{where}: table {part.table!r} has dim {pulled.header.dim}, not {part.dim} as this"
                " client was told before: it was dropped and created anew"
            )
        rows = codec.from_wire(pulled.embeddings, part.dtype).reshape(last - first, part.dim)
        if part.distinct:
            part.out[first:last] = rows
        else:
            routing.scatter(rows, first, part.batch.split.inverse, part.out)
        if part.metadata:
            part.history[0, first:last] = pulled.versions
            part.history[1, first:last] = pulled.steps.view(np.uint64)
            part.history[2, first:last] = pulled.frequencies


_clients: weakref.WeakSet[Client] = weakref.WeakSet()


def _after_fork() -> None:
    """A child connects anew, under identities of its own."""
    for client in list(_clients):
        client._cluster = None
        client._connecting = threading.Lock()
        client._client_id = 0


os.register_at_fork(after_in_child=_after_fork)
