"""The blocking client of a cluster.

For each request the client finds the distinct keys and the shard of each, sends one message to each
shard, and scatters the replies into the result. Several tables share the messages. A shard refuses
keys that it does not own; the client then fetches the newest shard map and sends the keys again.

A push is atomic per shard, unless it exceeds a server's message limit: such a request is sent in
several messages, and each is atomic. The client checks all gradients before it sends the first
message: if a gradient is invalid, no shard applies any of them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from psclient import checked
from psclient.choices import Durability
from psclient.errors import TableNotFound
from psclient.fanout import Ask, ask_all
from psclient.rowclient import RowClient
from psclient.schema import TableInfo, table_info, table_schema
from psclient.status import ShardStatus, status
from psclient.table import Table
from psclient.versions import Versions
from psproto import ps_pb2 as pb


class Client(RowClient):
    """Client of a cluster of shards. Thread-safe; usable in forked processes; can be pickled.

    addresses    list with "host:port" of every shard, in the order of the shards; or one string
                 "name:port", in which the DNS name leads to all shards, in any order
    wire         dtype of embeddings and gradients on the wire: "float32", "bfloat16", "float16"
    timeout      seconds that an operation may take, connecting and retries included
    transport    "stream" (fast), or "unary" (one RPC per message)
    lane         "auto": send requests to shards on this machine through shared memory, if they
                 offer a same-host lane, and all others through gRPC; "never": only gRPC;
                 "require": raise NoLane if a shard's lane cannot be used (docs/lane.md)
    client_id    identity of the client in 1..2^64-1, to keep it over restarts of the process; 0:
                 random
    incarnation  number in 0..2^63-1 that must grow with each use of the same client_id; else pushes
                 raise SessionExpired. None: nanoseconds since 1970
    renew        what to do if a shard does not know the client's numbers any more. True: number
                 the pushes anew, under the next incarnation. False: raise SessionExpired, so that
                 a process whose client_id another process has taken over cannot push again
    retry_refused  what to do if a shard refuses a pull, push or exchange for now, and says when to
                 try again (OVERLOADED, DISK_FULL, STARTING). True: send it again then, until the
                 timeout. False: raise the error at once; its ``retry_after`` has the seconds
    proxy        whether to use the HTTP proxy that the environment variables (http_proxy etc.) name
    tls          psclient.Tls with the files for TLS. None: those of the environment variables
                 PSCLIENT_TLS_CA, PSCLIENT_TLS_CERTIFICATE, PSCLIENT_TLS_KEY and PSCLIENT_TLS_NAME,
                 and no TLS if they are not set. False: no TLS
    token_file   path of a file with the token that tells the servers who this client is; it is read
                 again when it changes. None: that of the environment variable PSCLIENT_TOKEN_FILE,
                 if it is set; "": no token
    token_in_plaintext  whether to send the token without TLS to other machines or through a proxy;
                 otherwise a call that would do so raises InvalidArgument

    The client connects at the first use. Its methods raise subclasses of PsError (psclient.errors).
    Given one DNS name, it looks up all addresses of the name, and waits until all shards of the
    cluster have answered there. It follows shards whose addresses change.

    It closes itself once it is no longer referenced. Pickling keeps addresses and options, but not
    client_id, incarnation and renew: the unpickled client opens its own connections, under a random
    client_id. copy.copy and copy.deepcopy return the same client.

    If a signal handler raises (for example KeyboardInterrupt), the running call ends at once. Its
    push has then taken effect once or not at all, and the client remains usable.
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
        """Create a table on every shard and return it; if an equal table exists, return that.

        name             name of the table
        dim              length of the embeddings, in 1..8192
        optimizer        optimizer that the servers apply to pushed gradients: sgd, momentum,
                         adagrad, rowwise_adagrad, adagrad_decay, adam, adamw, adam_async, ftrl,
                         group_ftrl
        lr               learning rate; None: the optimizer's default
        optimizer_args   further parameters of the optimizer, {parameter: number}
        initializer      distribution of the initial embeddings: zeros, constant, uniform, normal,
                         truncated_normal
        initializer_args  parameters of the initializer, {parameter: number}
        seed             seed of the initial values, in 0..2^64-1
        serving_default  number that fills the embeddings that pulls with mode="serve" return for
                         keys without a row
        durability       durability of pushes that do not choose one: "applied", "log" or "fsync";
                         ``push`` explains them
        admission        rule for which keys may have a row: always, counter, sketch, probability
        admission_args   parameters of the admission rule, {parameter: number}
        eviction         rules that choose rows to evict, as {rule: {parameter: number}}; rules are
                         step_ttl, time_ttl, norm, and one of capacity_lru, capacity_lfu
                         (docs/policies.md)
        max_step_ahead   by how much the step of a push may exceed the largest step pushed to the
                         table before. A push with a larger step raises InvalidArgument with reason
                         STEP_TOO_FAR. None: 100,000,000; 0: no limit

        Raises SchemaMismatch if the table exists with a different schema, InvalidArgument for an
        invalid value.
        """
        schema = table_schema(
            name,
            dim,
            optimizer=(optimizer, optimizer_args, lr),
            initializer=(initializer, initializer_args),
            seed=seed,
            serving_default=serving_default,
            durability=durability,
            admission=(admission, admission_args),
            eviction=eviction,
            max_step_ahead=max_step_ahead,
        )
        request = pb.CreateTableRequest(schema=schema)
        self._on_all("TableService/CreateTable", request, pb.CreateTableResponse, first=True)
        self._dims[name] = schema.dim
        return Table(self, name, schema.dim)

    def table(self, name: str) -> Table:
        """Return an existing table. Raises TableNotFound if it does not exist."""
        self._require_open()
        return Table(self, name, self._dim(name, self._deadline()))

    def list_tables(self) -> list[TableInfo]:
        """Return the settings and sizes of all tables that exist on every shard, sorted by name."""
        shards = self._listed()
        names = sorted(set.intersection(*(set(shard) for shard in shards)))
        return [table_info([shard[name] for shard in shards]) for name in names]

    def incomplete_tables(self) -> dict[str, list[int]]:
        """Return the tables that only some shards have: {name: numbers of these shards}.

        An interrupted create, drop or warm start leaves such a table. Repeat that call to complete
        it (a warm start with ``replace=True``), or drop the table.
        """
        shards = self._listed()
        names = sorted(set.union(*(set(shard) for shard in shards)))
        having = {
            name: [number for number, shard in enumerate(shards) if name in shard] for name in names
        }
        return {name: some for name, some in having.items() if len(some) < len(shards)}

    def status(self, *, timeout: float = 5.0) -> list[ShardStatus]:
        """Return the state and the live figures of every shard, in order, even if some are down.

        timeout  seconds to wait for each shard

        A shard that does not answer is in the list with the state "unreachable". This opens
        connections of its own, so that it works before the client has connected to all shards.
        """
        self._require_open()
        seconds = checked.seconds("timeout", timeout)
        return status(self._addresses, timeout=seconds, access=self._access)

    def _listed(self) -> list[dict[str, pb.DescribeTableResponse]]:
        """Return for each shard {name of a table: the shard's description of it}."""
        lists = self._on_all(
            "TableService/ListTables", pb.ListTablesRequest(), pb.ListTablesResponse
        )
        return [{item.schema.name: item for item in answer.tables} for answer in lists]

    def evict(self, name: str, *, dry_run: bool = False, timeout: float = 3600.0) -> dict[str, int]:
        """Apply a table's eviction rules now; return {rule: number of rows evicted}.

        name     name of the table
        dry_run  count the rows that the rules would evict, but evict none
        timeout  maximum duration of this call in seconds, instead of the client's timeout. After it
                 the call raises DeadlineExceeded and the shards stop; the rows evicted by then stay
                 evicted

        A row that several rules would evict counts for the first of them. The result does not count
        rows that the servers' background sweep evicts at the same time, nor rows evicted by an
        attempt that failed and was repeated.
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
        """Delete a table and its rows on every shard.

        Raises TableNotFound if no shard has the table.
        """
        request = pb.DropTableRequest(name=checked.text("name of a table", name))
        deadline = self._deadline()
        cluster = self._connect(deadline)
        self._dims.pop(name, None)
        message = request.SerializeToString()
        asks = [Ask(link, "TableService/DropTable", message) for link in cluster.links]
        for some in (asks[1:], asks[:1]):  # shard 0 creates a table first and drops it last
            ask_all(some, deadline)
            for ask in some:  # not found: never existed, or an earlier attempt dropped it
                if ask.error is not None and not isinstance(ask.error, TableNotFound):
                    raise ask.error
        if all(ask.error is not None for ask in asks):
            raise TableNotFound(f"no table {name!r} on any shard")

    def wait_durable(self) -> Versions:
        """Wait until all changes that the shards have acknowledged so far are on their disks.

        Returns the newest version of each shard that is on its disk, with its epoch. Raises NoLog
        if a shard has no data directory.
        """
        request = pb.WaitDurableRequest()
        answers = self._on_all("LogService/WaitDurable", request, pb.WaitDurableResponse)
        return Versions(
            (answer.durable_version for answer in answers), (answer.epoch for answer in answers)
        )

    def barrier(self, name: str) -> Versions:
        """Write a mark (a Change of kind "barrier") into the version log of every shard.

        name  name of the mark; it need not be unique

        Subscribers receive the mark after all pushes that were acknowledged before this call, and
        before all pushes that start after it returns. Returns the version of the mark on each
        shard. Raises NoLog if a shard has no data directory.
        """
        request = pb.BarrierRequest(name=checked.name("barrier", name))
        answers = self._on_all("LogService/Barrier", request, pb.BarrierResponse)
        return Versions(
            (answer.version for answer in answers), (answer.epoch for answer in answers)
        )
