"""RowClient: pull, push, exchange and delete rows, and alter tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from psclient import checked
from psclient.alteration import Alteration, alter_request, alteration_of, incomplete
from psclient.arguments import by_table, check_range, pair, push_header, versions_of
from psclient.arrays import Rows
from psclient.batch import Batch
from psclient.choices import MODES, WIRES, Durability, Mode, Wire
from psclient.cluster import Cluster
from psclient.connection import Connection
from psclient.deletes import delete_rows
from psclient.errors import InvalidArgument, PsError
from psclient.inflight import Request
from psclient.outputs import check_apart, output_of, outputs_of
from psclient.pending import Pending
from psclient.request import NO_HEADER, Header, PullPart, PushPart
from psclient.schema import TableInfo, table_info
from psclient.versions import NO_VERSIONS, Versions
from psproto import ps_pb2 as pb


class RowClient(Connection):
    """Base class of Client: its methods for rows, in which tables are given by name."""

    def describe_table(self, name: str) -> TableInfo:
        """Return the settings of a table, and its size over all shards.

        Raises TableNotFound if a shard does not have the table. Raises SchemaMismatch if the
        settings differ between two shards: an alteration failed midway, or another client is just
        dropping the table and creating it anew.
        """
        return self._describe(name, self._deadline())

    def alter_table(
        self,
        name: str,
        *,
        lr: float | None = None,
        serving_default: float | None = None,
        durability: Durability | None = None,
        admission: str | None = None,
        admission_args: Mapping[str, float] | None = None,
        eviction: Mapping[str, Mapping[str, float]] | None = None,
        max_step_ahead: int | None = None,
    ) -> Alteration:
        """Change settings of a table on every shard. Settings that are None, and rows, stay.

        ``create_table`` explains the arguments. Other settings cannot be altered.

        admission  new admission rule. If the table already has this rule with other parameters, the
                   counts of keys that wait for admission are kept (for a sketch, only if its size
                   stays the same). Otherwise they are dropped, and
                   ``Alteration.dropped_counters`` is their number
        eviction   replaces all eviction rules of the table; {}: no row is evicted any more

        Idempotent. If a shard fails, the error names it, and other shards may already have the new
        settings: repeat the same call to complete it. Raises TableNotFound, InvalidArgument for an
        invalid value, and ResourceExhausted if a new sketch does not fit into the memory budget.
        """
        request = alter_request(
            name,
            lr=lr,
            serving_default=serving_default,
            durability=durability,
            admission=admission,
            admission_args=admission_args,
            eviction=eviction,
            max_step_ahead=max_step_ahead,
        )
        return self._alter(request)

    def _alter(self, request: pb.AlterTableRequest) -> Alteration:
        """Send an alteration to shard 0, then to the other shards; combine their answers."""
        method, answer = "TableService/AlterTable", pb.AlterTableResponse
        try:
            shards = self._on_all(method, request, answer, first=True)
        except InvalidArgument:  # by shard 0, which is asked before the others
            raise
        except PsError as error:
            raise incomplete(request.schema.name, error) from error
        return alteration_of(shards)

    def batch(self, keys: Any) -> Batch:
        """Find the distinct keys among ``keys``, integers of any shape, to use them in many calls.

        Pass the Batch in place of keys: the calls then need not find the distinct keys again.
        """
        self._require_open()
        return self._batch(keys, self._deadline())

    def pull(
        self,
        keys: Mapping[str, Any],
        *,
        mode: Mode = "train",
        wire: Wire | None = None,
        out: Mapping[str, Any] | None = None,
    ) -> dict[str, Rows]:
        """Return embeddings of keys of several tables: {table: float32[*shape of its keys, dim]}.

        keys  {table: keys}; keys are integers of any shape, with or without duplicates, or a Batch
        mode  embedding of a key without a row. "train": the initial embedding that the key's row
              will have; "serve": all numbers are the table's serving_default
        wire  dtype of the embeddings on the wire; None: the client's
        out   {table: float32[*shape of its keys, dim]}: contiguous arrays that the embeddings are
              written to, and that are returned; of NumPy, of PyTorch or CuPy, also on a GPU, or
              in host memory with support for DLPack. If the pull fails, they may contain anything.
              Tables that are left out, and None: new arrays

        Takes one round trip. A pull never creates a row. Raises TableNotFound if a table does not
        exist, and InvalidArgument for keys that are not integers.
        """
        return _results(*self._begin({}, keys, mode=mode, wire=wire, out=out))

    def start_pull(
        self,
        keys: Mapping[str, Any],
        *,
        mode: Mode = "train",
        wire: Wire | None = None,
        out: Mapping[str, Any] | None = None,
    ) -> Pending:
        """Start a ``pull`` with these arguments and return at once.

        ``result()`` of the returned Pending waits for the embeddings and returns them. Only then
        are they written to the arrays of ``out``.
        """
        return _pending(*self._begin({}, keys, mode=mode, wire=wire, background=True, out=out))

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

        gradients   {table: (keys, gradients float[*shape of keys, dim])}. Gradients of equal keys
                    are summed; the optimizer updates the row of each distinct key once
        step        training step, in -2^47..2^47-1. The rows' ``step`` becomes the largest training
                    step that any client has pushed to the table
        lr          learning rate for this push; None: the table's
        wire        dtype of the gradients on the wire; None: the client's
        durability  when to return: "applied", once the servers have applied the push in memory;
                    "log", once it survives a crash of their processes; "fsync", once it is on their
                    disks; None: the table's durability

        Each shard applies a message exactly once, whole or not at all. A request that is larger
        than a server's message limit is sent in several messages. Raises InvalidArgument, and
        applies nothing, if gradients have a wrong shape, or a sum that is infinite or NaN.
        """
        header = push_header(step, lr, durability)
        self._begin(gradients, {}, header, wire=wire)[0].complete()

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
        out: Mapping[str, Any] | None = None,
    ) -> dict[str, Rows]:
        """Push gradients and pull rows in one round trip; return {table: embeddings}.

        push  gradients by table, as in ``push``
        pull  keys by table, as in ``pull``

        ``push`` and ``pull`` explain the other arguments and the errors. The pull reads rows as
        they are after the push. A request that is larger than a server's message limit is sent in
        several messages: first all pushes, then the pulls.
        """
        header = push_header(step, lr, durability)
        return _results(*self._begin(push, pull, header, mode=mode, wire=wire, out=out))

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
        out: Mapping[str, Any] | None = None,
    ) -> Pending:
        """Start an ``exchange`` with these arguments and return at once.

        ``result()`` of the returned Pending waits for the embeddings and returns them. Exchanges
        in flight take effect in the order in which they were started, with one exception: if a
        server refuses an exchange for the moment (OVERLOADED, DISK_FULL), later exchanges may take
        effect before it is sent again. If an exchange needs several messages, its pulls are sent
        only when ``result()`` is called.
        """
        header = push_header(step, lr, durability)
        begun = self._begin(push, pull, header, mode=mode, wire=wire, background=True, out=out)
        return _pending(*begun)

    def pull_distinct(
        self,
        keys: Mapping[str, Any],
        *,
        mode: Mode = "train",
        wire: Wire | None = None,
        out: Mapping[str, Any] | None = None,
    ) -> dict[str, Rows]:
        """Return one embedding for each distinct key: {table: float32[distinct, dim]}.

        keys  {table: Batch}. Row i of the result belongs to ``batch.keys[i]``;
              ``batch.spread(rows)`` returns one row for each key of the batch
        out   {table: float32[distinct, dim]}, see ``pull``

        ``pull`` explains the other arguments.
        """
        return _results(*self._begin({}, keys, mode=mode, wire=wire, distinct=True, out=out))

    def push_distinct(
        self,
        gradients: Mapping[str, tuple[Batch, Any]],
        *,
        step: int = 0,
        lr: float | None = None,
        wire: Wire | None = None,
        durability: Durability | None = None,
    ) -> None:
        """Push gradients that are already summed over equal keys: one per distinct key.

        gradients  {table: (Batch, float[distinct, dim])}; row i belongs to ``batch.keys[i]``

        ``push`` explains the other arguments.
        """
        header = push_header(step, lr, durability)
        self._begin(gradients, {}, header, wire=wire, distinct=True)[0].complete()

    def prefetch(self, keys: Mapping[str, Any]) -> Pending:
        """Ask the shards to read the rows of keys from disk into memory; return at once.

        keys  {table: keys}; keys are integers of any shape, or a Batch

        A pull or push of these keys that follows soon then need not wait for the disk. Changes no
        row, and has no effect on rows that are in memory. It need not be waited for: ``result()``
        of the returned Pending waits until the shards have accepted the request, not until they
        have read the rows, and returns None.
        """
        deadline = self._deadline()
        cluster = self._connect(deadline)
        parts = [
            self._pull_part(name, each, self._dtype, MODES["train"], deadline, prefetch=True)
            for name, each in by_table("keys", keys).items()
        ]
        request = self._send(cluster, Header(), [], parts, deadline, background=True)
        return Pending(request, lambda: None)

    # ---- from keys to messages

    def _begin(
        self,
        push: Mapping[str, tuple[Any, Any]],
        pull: Mapping[str, Any],
        header: Header = NO_HEADER,
        *,
        mode: str = "train",
        wire: str | None = None,
        distinct: bool = False,
        background: bool = False,
        out: Mapping[str, Any] | None = None,
    ) -> tuple[Request, list[PullPart]]:
        """Send a request and return at once, with the PullParts that will contain its result.

        header      options of the pushes
        distinct    whether keys are Batches, and gradients and embeddings have one row per
                    distinct key
        background  whether a background thread reads the replies before anybody waits for them

        ``exchange`` explains the other arguments.
        """
        deadline = self._deadline()
        dtype = self._dtype if wire is None else checked.one_of("wire", wire, WIRES)
        wanted = checked.one_of("mode", mode, MODES)
        cluster = self._connect(deadline)
        pushes = [
            self._push_part(name, *pair(name, each), dtype, distinct, deadline)
            for name, each in by_table("gradients", push).items()
        ]
        given = outputs_of(out, by_table("keys", pull))
        pulls = [
            self._pull_part(
                name, keys, dtype, wanted, deadline, distinct=distinct, out=given.get(name)
            )
            for name, keys in pull.items()
        ]
        if len(given) > 1:
            check_apart({each.table: each.output for each in pulls if each.output is not None})
        return self._send(cluster, header, pushes, pulls, deadline, background=background), pulls

    def _pull_rows(self, name: str, keys: Any, mode: str, min_version: Sequence[int]) -> PullPart:
        """Pull rows of one table with their versions, steps and frequencies, and wait for them.

        name         name of the table
        keys         integers of any shape, or a Batch
        mode         "train" or "serve", see ``pull``
        min_version  oldest version at which each shard may be read; (): any version

        Returns the PullPart with the result.
        """
        deadline = self._deadline()
        wanted = checked.one_of("mode", mode, MODES)
        cluster = self._connect(deadline)
        least = versions_of(min_version, len(cluster.links))
        part = self._pull_part(
            name, keys, self._dtype, wanted, deadline, metadata=True, min_version=least
        )
        self._send(cluster, NO_HEADER, [], [part], deadline).complete()
        return part

    def _send(
        self,
        cluster: Cluster,
        header: Header,
        pushes: Sequence[PushPart],
        pulls: Sequence[PullPart],
        deadline: float,
        *,
        background: bool = False,
    ) -> Request:
        """Send the messages of a request, without waiting for answers; return the Request.

        cluster     connections to the shards
        header      options of the pushes
        pushes      at most one per table
        pulls       at most one per table
        deadline    monotonic seconds
        background  whether a background thread reads the replies
        """
        request = Request(
            owner=self,
            dims=self._dims,
            timeout=self._timeout,
            cluster=cluster,
            deadline=deadline,
            late=background,
        )
        request.send(header, pushes, pulls)
        return request

    def _batch(self, keys: Any, deadline: float) -> Batch:
        """Return ``keys``, integers or a Batch, as a Batch; connect first if needed.

        deadline  monotonic seconds
        """
        if isinstance(keys, Batch):
            return keys
        cluster = self._cluster or self._connect(deadline)  # that of another process will do, too
        return Batch(keys, cluster.shard_map)

    def _pull_part(
        self,
        name: str,
        keys: Any,
        dtype: int,
        mode: int,
        deadline: float,
        *,
        metadata: bool = False,
        distinct: bool = False,
        min_version: Versions = NO_VERSIONS,
        prefetch: bool = False,
        out: Any = None,
    ) -> PullPart:
        """Prepare the pull of one table: find the distinct keys, allocate the result.

        name         name of the table
        keys         integers of any shape, or a Batch
        dtype        dtype of the embeddings on the wire, a number in ps.proto
        mode         "train" or "serve" as a number in ps.proto
        deadline     monotonic seconds
        metadata     whether to pull versions, steps and frequencies too
        distinct     whether the result has one row per distinct key
        min_version  oldest version at which each shard may be read
        prefetch     whether the shards only read the rows into memory, and return none
        out          array of the caller for the result; None: a new one
        """
        dim, batch = self._dim(name, deadline), self._batch(keys, deadline)
        u = len(batch.keys)
        count = 0 if prefetch else u if distinct else len(batch)
        history = np.empty((3, u if metadata else 0), np.uint64)
        shape = (count, dim) if distinct else (*batch.shape, dim)
        output = None if out is None else output_of(out, shape, name)
        rows = np.empty((count, dim), np.float32) if output is None else output.rows
        return PullPart(
            name, dim, batch, dtype, mode, metadata, distinct, min_version,
            rows.reshape(count, dim), history, prefetch, output,
        )  # fmt: skip

    def _push_part(
        self, name: str, keys: Any, gradients: Any, dtype: int, distinct: bool, deadline: float
    ) -> PushPart:
        """Prepare the push to one table: sum its gradients and check the sums.

        name       name of the table
        keys       integers of any shape, or a Batch
        gradients  one gradient per key, or per distinct key if ``distinct``
        dtype      dtype of the gradients on the wire, a number in ps.proto
        distinct   whether the gradients are already summed over equal keys
        deadline   monotonic seconds
        """
        dim, batch = self._dim(name, deadline), self._batch(keys, deadline)
        sums = batch.check(gradients, name, dim) if distinct else batch.sum(gradients, name, dim)
        check_range(name, batch, sums, dtype)
        return PushPart(name, batch, sums, dtype, batch.split.counts)

    def _dim(self, name: str, deadline: float) -> int:
        """Return the dim of a table; ask the shards, until ``deadline``, if it is not cached."""
        dim = self._dims.get(name)
        if dim is None:
            dim = self._dims[name] = self._describe(name, deadline).dim
        return dim

    def _describe(self, name: str, deadline: float) -> TableInfo:
        """Do what ``describe_table`` does, until ``deadline`` (monotonic seconds)."""
        request = pb.DescribeTableRequest(name=checked.text("name of a table", name))
        method, answer = "TableService/DescribeTable", pb.DescribeTableResponse
        return table_info(self._on_all(method, request, answer, deadline=deadline))

    def _delete(self, name: str, keys: Any, durability: Durability | None) -> int:
        """Delete the rows of keys in one table; return the number of rows deleted.

        name        name of the table
        keys        integers of any shape, or a Batch
        durability  see ``push``; None: the table's
        """
        deadline = self._deadline()
        header = push_header(0, None, durability)
        cluster = self._connect(deadline)
        return delete_rows(cluster, name, self._batch(keys, deadline), header.durability, deadline)


def _results(request: Request, pulls: Sequence[PullPart]) -> dict[str, Rows]:
    """Wait for the answers to a request, and return the result of each of its pulls by table."""
    request.complete()
    return {part.table: part.shaped() for part in pulls}


def _pending(request: Request, pulls: Sequence[PullPart]) -> Pending:
    """Return a Pending whose ``result()`` is the result of each pull of a request, by table."""
    return Pending(request, lambda: {part.table: part.shaped() for part in pulls})
