"""The client: tables, pulls and pushes over all shards, blocking.

One batch of keys takes one straight line: find the distinct keys and their shards, send each shard
one message, scatter its reply into the result. Several tables travel in the same messages. A shard
that does not own a key refuses its message; the shard map is fetched and the message sent again.

A push is atomic for each shard. Gradients are checked here before the first message leaves, so that
a bad one is applied nowhere. A request over a server's message limit is sent as several.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from psclient import checked
from psclient.alteration import STEPS
from psclient.choices import DURABILITIES, Durability
from psclient.errors import TableNotFound
from psclient.fanout import Ask, ask_all
from psclient.rowclient import RowClient
from psclient.schema import MAX_DIM, TableInfo, rule, table_info
from psclient.table import Table
from psclient.versions import Versions
from psproto import ps_pb2 as pb


class Client(RowClient):
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
        max_step_ahead: int | None = None,
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
        max_step_ahead   steps that a push may be ahead of the largest step pushed before; a push
                         beyond is refused (InvalidArgument, reason STEP_TOO_FAR). 100,000,000 where
                         None; 0: no bound

        Raises SchemaMismatch if it exists with another schema, InvalidArgument for a bad value.
        """
        at = f"table {checked.text('name', name)!r}: "
        dim = checked.integer(f"{at}dim", dim, 1, MAX_DIM + 1)
        rates = {} if lr is None else {"lr": lr}
        schema = pb.TableSchema(
            name=name,
            dim=dim,
            optimizer=rule(f"{at}optimizer", optimizer, optimizer_args, rates),
            initializer=rule(f"{at}initializer", initializer, initializer_args),
            seed=checked.integer(f"{at}seed", seed, 0, 1 << 64),
            serving_default=checked.number(f"{at}serving_default", serving_default),
            durability=checked.one_of("durability", durability, DURABILITIES),  # type: ignore[arg-type]
            admission=rule(f"{at}admission", admission, admission_args),
            evictions=[
                rule(f"{at}eviction", kind, args)
                for kind, args in checked.mapping(f"{at}eviction", eviction).items()
            ],
        )
        if max_step_ahead is not None:
            ahead = checked.integer(f"{at}max_step_ahead", max_step_ahead, 0, STEPS)
            schema.max_step_ahead = ahead
        request = pb.CreateTableRequest(schema=schema)
        self._on_all("TableService/CreateTable", request, pb.CreateTableResponse, first=True)
        self._dims[name] = dim
        return Table(self, name, dim)

    def table(self, name: str) -> Table:
        """A table that exists; TableNotFound if it does not."""
        self._require_open()
        return Table(self, name, self._dim(name, self._deadline()))

    def list_tables(self) -> list[TableInfo]:
        """All tables that exist on every shard, by name."""
        lists = self._on_all(
            "TableService/ListTables", pb.ListTablesRequest(), pb.ListTablesResponse
        )
        shards = [{item.schema.name: item for item in answer.tables} for answer in lists]
        names = sorted(set.intersection(*(set(shard) for shard in shards)))
        return [table_info([shard[name] for shard in shards]) for name in names]

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
        deadline = time.monotonic() + checked.seconds("timeout", timeout)
        evicted: dict[str, int] = {}
        method, answer = "TableService/Evict", pb.EvictResponse
        for shard in self._on_all(method, request, answer, deadline=deadline):
            for cause, rows in shard.evicted.items():
                evicted[cause] = evicted.get(cause, 0) + rows
        return evicted

    def drop_table(self, name: str) -> None:
        """Drop a table and its rows on every shard; TableNotFound if no shard has it."""
        request = pb.DropTableRequest(name=checked.text("name of a table", name))
        deadline = self._deadline()
        cluster = self._connect(deadline)
        self._dims.pop(name, None)
        message = request.SerializeToString()
        asks = [Ask(link, "TableService/DropTable", message) for link in cluster.links]
        for some in (asks[1:], asks[:1]):  # the first to have a table is the last
            ask_all(some, deadline)
            for ask in some:  # not found: never there, or dropped by an attempt without a reply
                if ask.error is not None and not isinstance(ask.error, TableNotFound):
                    raise ask.error
        if all(ask.error is not None for ask in asks):
            raise TableNotFound(f"no table {name!r} on any shard")

    def wait_durable(self) -> Versions:
        """Return once all that was answered so far is on the disks of the shards.

        Returns the versions on disk, by shard. Raises NoLog where a shard keeps no log.
        """
        request = pb.WaitDurableRequest()
        answers = self._on_all("LogService/WaitDurable", request, pb.WaitDurableResponse)
        return Versions(
            (answer.durable_version for answer in answers), (answer.epoch for answer in answers)
        )

    def barrier(self, name: str) -> Versions:
        """Put a mark into the log of every shard, for subscribers; its versions, by shard.

        Pushes answered before are in front of it on every shard, pushes started after behind it.
        """
        request = pb.BarrierRequest(name=checked.text("name of a barrier", name))
        answers = self._on_all("LogService/Barrier", request, pb.BarrierResponse)
        return Versions(
            (answer.version for answer in answers), (answer.epoch for answer in answers)
        )
