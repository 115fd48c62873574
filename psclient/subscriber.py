"""Subscriber: receive all changes of a cluster's rows, in order for each shard.

    with Subscriber(addresses, tables=["user"]) as changes:
        for change in changes:
            apply(change)
            save(changes.tokens())         # to continue later: Subscriber(..., tokens=...)

There is one stream per shard, and one thread that reads it. After a failure the thread opens a new
stream, which continues after the last change. While the application is busy the thread waits, and
the servers keep the changes on their disks.

Changes of one shard arrive in order; changes of different shards arrive in any order. Each change
is delivered at least once, so apply it by comparing versions: write a row if its version is newer
than that of the stored row, and ignore changes that are older than the creation of the stored
table. Then repeated changes do no harm, nor does a snapshot that is read while pushes continue. At
a change of kind "snapshot", discard all rows of the shard: after a restore, their versions cannot
be compared with new ones. After a change whose ``more`` is false, the applied changes equal a state
that the shard was in. Delta and DeltaHeader in ps.proto specify the order of messages.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Unpack

from psclient import checked
from psclient.access import Security
from psclient.changes import Change
from psclient.choices import WIRES, Wire
from psclient.client import Client
from psclient.errors import InvalidArgument
from psclient.routes import Route
from psclient.shardstream import ChangeQueue, ShardStream, WhenLost
from psclient.signals import Shield
from psproto import ps_pb2 as pb

Content = Literal["values", "keys", "values_and_state"]
Start = Literal["snapshot", "earliest", "latest"]

CONTENTS: dict[str, int] = {
    "values": pb.CONTENT_VALUES,
    "keys": pb.CONTENT_KEYS,
    "values_and_state": pb.CONTENT_VALUES_AND_STATE,
}
STARTS: dict[str, int] = {
    "snapshot": pb.START_SNAPSHOT,
    "earliest": pb.START_EARLIEST,
    "latest": pb.START_LATEST,
}
READY = 4  # maximum number of changes per shard that wait in the queue


class Subscriber:
    """Iterator over the changes of all shards. One thread may iterate; any thread may close it.

    where          "host:port" of every shard in order, or one "name:port", or a Client, which
                   explains both
    tables         names of tables, which need not exist yet; None: all tables
    content        what to send of changed rows. "values": keys and embeddings. "keys": keys only.
                   "values_and_state": embeddings, optimizer state, steps, frequencies
    wire           dtype of embeddings on the wire; "values_and_state" requires "float32"
    tokens         where to continue: one token per shard, from ``tokens()``. For a shard with the
                   token b"", and for all shards if None, ``start`` applies
    start          where to begin without a token. "snapshot": all current rows, then changes.
                   "earliest": the oldest change in the version log. "latest": changes from now on
    coalesce_ms    servers may hold back changes for this many milliseconds, to send only the newest
                   value of each key
    coalesce_rows  servers may hold back this many rows, for the same purpose. If it and coalesce_ms
                   are 0, every change is sent
    progress_ms    milliseconds without a change after which a shard sends a "progress"
    chunk_bytes    approximate size of the arrays of one Change, in bytes; 0: the server chooses
    timeout        if a shard cannot be reached for this many seconds, Unavailable is raised
    when_lost      what to do if a shard cannot continue from a token. "raise": raise
                   VersionCompacted, LogDiverged or VersionInFuture. "snapshot": begin again with a
                   snapshot
    security       tls, token_file and token_in_plaintext, which Client explains; not with a Client,
                   which has its own

    Creating it only checks the arguments, and raises InvalidArgument if one is invalid. Given one
    DNS name, it also searches for the shards, and may raise Unavailable. ``open``
    connects, or else the first ``next``. Iterating may raise a PsError, such as NoLog if a shard
    has no data directory.

    A subscriber that was opened before a fork cannot be used in the child: every method raises
    InvalidArgument. Pickling keeps addresses, options and tokens, so that the unpickled subscriber
    continues after the last change that this one returned.
    """

    def __init__(
        self,
        where: str | Sequence[str] | Client,
        *,
        tables: Iterable[str] | None = None,
        content: Content = "values",
        wire: Wire = "float32",
        tokens: Sequence[bytes] | None = None,
        start: Start = "snapshot",
        coalesce_ms: int = 0,
        coalesce_rows: int = 0,
        progress_ms: int = 1000,
        chunk_bytes: int = 0,
        timeout: float = 30.0,
        when_lost: WhenLost = "raise",
        **security: Unpack[Security],
    ) -> None:
        self._options: dict[str, Any] = {
            "tables": None if tables is None else checked.names_of("tables", tables),
            "content": content,
            "wire": wire,
            "start": start,
            "coalesce_ms": coalesce_ms,
            "coalesce_rows": coalesce_rows,
            "progress_ms": progress_ms,
            "chunk_bytes": chunk_bytes,
            "timeout": timeout,
            "when_lost": when_lost,
            **security,
        }
        self._request = _request(self._options)
        self._client = client_of(where, security)
        self._where = where if isinstance(where, Client) else self._client._addresses
        self._shards = self._client._shards()
        self._queue = ChangeQueue(_tokens(tokens, self._shards), READY * self._shards)
        self._process: int | None = None  # id of the process that opened it
        self._end: weakref.finalize[..., Subscriber] | None = None

    def __enter__(self) -> Subscriber:
        return self.open()

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Change]:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the addresses, the options and the current tokens."""
        return _load, (self._where, {**self._options, "tokens": self.tokens()})

    def open(self) -> Subscriber:
        """Open a stream to every shard; return this subscriber. Idempotent.

        ``next`` calls this if needed. Raises InvalidArgument if the subscriber was closed.
        """
        self._check_process()
        if self._queue.closed:
            raise InvalidArgument("the subscriber is closed")
        if self._process is None:
            routes = self._client._places.routes(self._client._deadline())
            with Shield():
                self._process = os.getpid()
                streams = [self._stream(shard, route) for shard, route in enumerate(routes)]
                self._end = weakref.finalize(self, _close, self._queue, streams, self._process)
                for stream in streams:
                    stream.open()
        return self

    def __next__(self) -> Change:
        """Wait for the next change of any shard and return it.

        Raises StopIteration when the subscriber is closed, and the PsError that ended a stream.
        """
        change = self.next()
        if change is None:
            raise StopIteration
        return change

    def next(self, timeout: float | None = None) -> Change | None:
        """Return the next change of any shard; wait up to ``timeout`` seconds (None: no limit).

        Returns None if none arrived in time or the subscriber is closed. Raises the PsError that
        ended a stream.
        """
        self._check_process()
        if timeout is not None:
            timeout = checked.number("timeout", timeout)
        if self._queue.closed:
            return None
        self.open()
        return self._queue.take(timeout)

    def tokens(self) -> tuple[bytes, ...]:
        """Return one token per shard: a new Subscriber with these ``tokens`` continues from here.

        It receives the changes after those that ``next`` has returned. If ``next`` has returned
        only some messages of a change (``more``), it receives this change again, as a whole.
        b"": ``next`` has returned no change of that shard.
        """
        self._check_process()
        return tuple(self._queue.tokens)

    def close(self) -> None:
        """End the streams. A thread that waits in ``next`` returns. Idempotent."""
        if self._process not in (None, os.getpid()):
            return  # a child leaves its parent's subscriber alone
        self._queue.close()
        if self._end is not None:
            self._end()

    def _stream(self, shard: int, route: Route) -> ShardStream:
        """Create the ShardStream of one shard, without connecting."""
        request = pb.SubscribeRequest()
        request.CopyFrom(self._request)
        request.token = self._queue.tokens[shard]
        if not route.metadata:  # Places that searched for the shards have set it
            route.expect(shard, self._shards, "")
        options = self._options
        return ShardStream(
            self._queue,
            shard,
            self._client._places.where(shard),
            route,
            request,
            options["timeout"],
            options["when_lost"],
            access=self._client._access,
        )

    def _check_process(self) -> None:
        """Raise InvalidArgument in a process that was forked after the subscriber was opened."""
        if self._process not in (None, os.getpid()):
            raise InvalidArgument(
                f"the subscriber was opened in process {self._process}, before a fork; create"
                f" a new one in process {os.getpid()}"
            )


def client_of(where: str | Sequence[str] | Client, security: Security) -> Client:
    """Return ``where`` if it is a Client; else a new Client of these addresses.

    Raises InvalidArgument if arguments of ``security`` are given with a Client.
    """
    if not isinstance(where, Client):
        return Client(where, **security)
    if security:
        raise InvalidArgument(f"{', '.join(security)}: pass this to the Client instead")
    return where


def _request(options: Mapping[str, Any]) -> pb.SubscribeRequest:
    """Build the request of a Subscriber, without a token, from its arguments by name.

    Raises InvalidArgument if an argument is invalid.
    """
    if options["when_lost"] not in ("raise", "snapshot"):
        raise InvalidArgument(
            f"when_lost must be 'raise' or 'snapshot', got {options['when_lost']!r}"
        )
    if not checked.number("timeout", options["timeout"]) > 0:
        raise InvalidArgument(f"timeout must be positive seconds, got {options['timeout']}")
    if options["tables"] == []:
        raise InvalidArgument("tables must name at least one table; None means all tables")
    fields: dict[str, Any] = {
        "tables": options["tables"] or [],
        "start": checked.one_of("start", options["start"], STARTS),
        "content": checked.one_of("content", options["content"], CONTENTS),
        "dtype": checked.one_of("wire", options["wire"], WIRES),
    }
    for name in ("coalesce_ms", "coalesce_rows", "progress_ms", "chunk_bytes"):
        fields[name] = checked.integer(name, options[name], 0, 1 << 32)
    return pb.SubscribeRequest(**fields)


def _tokens(tokens: Any, shards: int) -> list[bytes]:
    """Return the argument ``tokens`` of a Subscriber as a list; b"" for each shard if it is None.

    Raises InvalidArgument unless it has one token for each of ``shards`` shards.
    """
    if tokens is None:
        return [b""] * shards
    if not isinstance(tokens, Sequence) or not all(isinstance(each, bytes) for each in tokens):
        raise InvalidArgument(f"tokens must be a list of bytes, got {tokens!r}")
    if len(tokens) != shards:
        raise InvalidArgument(
            f"tokens must have one token for each of {shards} shards, got {len(tokens)}"
        )
    return list(tokens)


def _close(queue: ChangeQueue, streams: list[ShardStream], process: int) -> None:
    """Close the queue and the streams of a Subscriber that was closed or garbage-collected.

    process  id of the process that opened the streams; in any other process, nothing is done
    """
    if process == os.getpid():
        queue.close()
        for stream in streams:
            stream.close()


def _load(where: str | Sequence[str] | Client, options: dict[str, Any]) -> Subscriber:
    """Recreate a pickled subscriber."""
    return Subscriber(where, **options)
