"""Every change of a cluster's rows, in order, from any moment on.

    with Subscriber(addresses, tables=["user"]) as changes:
        for change in changes:
            apply(change)
            save(changes.tokens())         # and begin there the next time: tokens=...

One stream a shard; a thread for each reads it, opens it again behind the last change after a
failure, and waits while the application has enough to do: the rest stays on the servers' disks.

Changes of one shard come in their order, those of several in any. A change is delivered at least
once. Apply a row if its version is above that of the one held, and the change's not below the
creation of the table held, and neither repetition nor a snapshot read while pushes go on can do
harm. At ``snapshot`` all that is held of that shard is void: it may be of another history, whose
versions do not compare. Where ``more`` is false, what was applied is a state that the shard was in.
Delta and DeltaHeader in ps.proto say what comes in which order.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import grpc
import numpy as np
from numpy.typing import NDArray

from psclient import checked
from psclient.channel import OPTIONS, Channel
from psclient.choices import WIRES, Wire
from psclient.client import Client
from psclient.errors import (
    InvalidArgument,
    LogDiverged,
    PsError,
    Unavailable,
    VersionCompacted,
    VersionInFuture,
)
from psclient.retry import FIRST_PAUSE, LONGEST_PAUSE, RETRYABLE, rpc_error
from psproto import codec
from psproto import ps_pb2 as pb

Kind = Literal[
    "rows",
    "deletes",
    "created",
    "altered",
    "dropped",
    "barrier",
    "progress",
    "snapshot",
    "snapshot_end",
    "catch_up",
]
Content = Literal["values", "keys", "values_and_state"]
Start = Literal["snapshot", "earliest", "latest"]
WhenLost = Literal["raise", "snapshot"]

KINDS: dict[int, Kind] = {
    pb.DeltaHeader.KIND_ROWS: "rows",
    pb.DeltaHeader.KIND_DELETES: "deletes",
    pb.DeltaHeader.KIND_TABLE_CREATED: "created",
    pb.DeltaHeader.KIND_TABLE_ALTERED: "altered",
    pb.DeltaHeader.KIND_TABLE_DROPPED: "dropped",
    pb.DeltaHeader.KIND_BARRIER: "barrier",
    pb.DeltaHeader.KIND_PROGRESS: "progress",
    pb.DeltaHeader.KIND_SNAPSHOT: "snapshot",
    pb.DeltaHeader.KIND_SNAPSHOT_END: "snapshot_end",
    pb.DeltaHeader.KIND_CATCH_UP: "catch_up",
}
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
LOST = (VersionCompacted, LogDiverged, VersionInFuture)  # the token is of no more use
READY = 4  # changes of each shard that wait for the application
SUBSCRIBE = "/ps.v1.LogService/Subscribe"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Change:
    """One message of a shard: a change, or a part of one, or of a snapshot.

    kind      rows          these rows have these values
              deletes       these rows are gone; ``cause`` says why
              created       there is a table; rows of an older one of its name are gone
              altered       the table has other settings, in ``schema``; its rows stay
              dropped       the table is gone, with its rows
              barrier       the mark ``barrier``
              progress      nothing new up to ``version``
              snapshot      all that is held of this shard is void, its versions too; what is
                            not sent before snapshot_end is not there
              catch_up      what changed since the token; tables that are not sent are gone
              snapshot_end  of a snapshot or catch-up

    Arrays are empty, or None, where a kind has no use for them; they are read-only.
    """

    shard: int
    stream: int  # the how manieth of this shard; what came after a token comes again in the next
    kind: Kind
    table: str
    keys: NDArray[np.uint64]  # [n], distinct
    versions: NDArray[np.uint64]  # [n]
    rows: NDArray[np.float32] | None  # [n, dim]; [n, width] with state; None without values
    steps: NDArray[np.int64] | None  # [n], with state only, and so the next
    frequencies: NDArray[np.uint64] | None
    version: int  # that the shard had after the newest change in here
    more: bool  # the shard was in no such state; the rest of it follows
    token: bytes  # to go on from here; empty inside a change
    head: int  # newest durable version of the shard
    time: float  # seconds since 1970, when the change was applied; 0: none was
    dim: int  # of the table's embeddings
    barrier: str
    cause: str
    schema: pb.TableSchema | None  # of a created or altered table


class Subscriber:
    """Iterates over the changes of all shards. Iterate on one thread; close on any.

    where          "host:port" of every shard, in their order, or a Client
    tables         names; None: all. They need not exist
    content        "values": keys and embeddings; "keys"; "values_and_state": whole rows
    wire           dtype of embeddings on the wire; "values_and_state" is always float32
    tokens         to go on from, one a shard, as ``tokens()`` gave them; b"": from ``start``
    start          "snapshot": every row as it is, then changes; "earliest": the oldest change in
                   the log; "latest": changes from now on
    coalesce_ms    only the newest value of a key within so many milliseconds, and within
    coalesce_rows  so many rows; both 0: every change
    progress_ms    a change of kind "progress" when a shard has sent nothing else for so long
    chunk_bytes    arrays of one change, about; 0: the server's choice
    timeout        seconds without reaching a shard, after which Unavailable is raised
    when_lost      what to do where a shard cannot go on from a token: "raise" VersionCompacted,
                   LogDiverged or VersionInFuture, or take a "snapshot"

    Raises a PsError; NoLog where a shard keeps no log.
    """

    def __init__(
        self,
        where: Sequence[str] | Client,
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
    ) -> None:
        addresses = where._addresses if isinstance(where, Client) else list(where)
        if isinstance(where, str) or not addresses:
            raise InvalidArgument(f"where must be a list of 'host:port', got {where!r}")
        if tokens is not None and len(tokens) != len(addresses):
            raise InvalidArgument(f"{len(tokens)} tokens for {len(addresses)} shards")
        if when_lost not in ("raise", "snapshot"):
            raise InvalidArgument(f"when_lost must be 'raise' or 'snapshot', got {when_lost!r}")
        if isinstance(tables, str):
            raise InvalidArgument(f"tables must be a list of names, got {tables!r}")
        names = list(tables) if tables is not None else None
        if names == []:
            raise InvalidArgument("tables must name one at least; None means all")
        try:
            request = pb.SubscribeRequest(
                start=checked.one_of("start", start, STARTS),  # type: ignore[arg-type]
                tables=names or [],
                content=checked.one_of("content", content, CONTENTS),  # type: ignore[arg-type]
                dtype=checked.one_of("wire", wire, WIRES),  # type: ignore[arg-type]
                coalesce_ms=coalesce_ms,
                coalesce_rows=coalesce_rows,
                progress_ms=progress_ms,
                chunk_bytes=chunk_bytes,
            )
        except InvalidArgument:
            raise
        except (TypeError, ValueError) as error:  # a number that does not fit
            raise InvalidArgument(f"subscription: {error}") from error
        self._changed = threading.Condition()
        self._ready: deque[Change | PsError] = deque()
        self._closed = False
        self._failure: PsError | None = None
        self._tokens = list(tokens) if tokens is not None else [b""] * len(addresses)
        self._streams = [
            _Stream(self, shard, address, request, token, timeout, when_lost)
            for shard, (address, token) in enumerate(zip(addresses, self._tokens, strict=True))
        ]
        self._most = READY * len(addresses)
        self._opened = False

    def __enter__(self) -> Subscriber:
        return self.open()

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Change]:
        return self

    def open(self) -> Subscriber:
        """Open the streams; iterating does it too."""
        with self._changed:
            if not self._opened and not self._closed:
                self._opened = True
                for stream in self._streams:
                    stream.thread.start()
        return self

    def __next__(self) -> Change:
        """The next change of any shard; waits for it. Ends once the subscriber is closed."""
        change = self.next()
        if change is None:
            raise StopIteration
        return change

    def next(self, timeout: float | None = None) -> Change | None:
        """The next change; None if there is none within ``timeout`` seconds, or it is closed."""
        deadline = None if timeout is None else time.monotonic() + timeout
        self.open()
        with self._changed:
            while not self._ready and not self._closed and self._failure is None:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return None
                self._changed.wait(left)
            if self._closed:
                return None
            if not self._ready:
                assert self._failure is not None
                raise self._failure
            change = self._ready.popleft()
            self._changed.notify_all()
            if isinstance(change, PsError):
                self._failure = change
                raise change
            if change.token:
                self._tokens[change.shard] = change.token
            return change

    def tokens(self) -> tuple[bytes, ...]:
        """Where the changes that were returned so far end, by shard; b"" where none has.

        Inside of a change, that is the end of the one before.
        """
        return tuple(self._tokens)

    def close(self) -> None:
        """End the streams; who waits gets the end of the iteration."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        for stream in self._streams:
            stream.close()

    def _put(self, change: Change | PsError) -> bool:
        """Hand a change over, as soon as there is room; False once it is closed."""
        with self._changed:
            while len(self._ready) >= self._most and not self._closed:
                self._changed.wait()
            if not self._closed:
                self._ready.append(change)
                self._changed.notify_all()
            return not self._closed

    def _pause(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed, seconds)


class _Stream:
    """The subscription to one shard, and the thread that reads it."""

    def __init__(
        self,
        owner: Subscriber,
        shard: int,
        address: str,
        request: pb.SubscribeRequest,
        token: bytes,
        timeout: float,
        when_lost: WhenLost,
    ) -> None:
        self.shard = shard
        self.where = f"shard {shard} at {address}"
        self.thread = threading.Thread(target=self._run, name=f"subscriber {shard}", daemon=True)
        self._owner = owner
        self._request = pb.SubscribeRequest()
        self._request.CopyFrom(request)
        self._request.token = token
        self._timeout = timeout
        self._when_lost = when_lost
        self._channel = Channel(address, OPTIONS)
        self._call: Any = None
        self._count = 0
        self._came = False  # anything, by the stream that was opened last
        self._met = False  # the server, ever

    def close(self) -> None:
        """End it; its thread follows."""
        call = self._call
        if call is not None:
            self._channel.cancel(call)
        self._channel.close()

    def _run(self) -> None:
        owner = self._owner
        failures, failing = 0, time.monotonic()
        while not owner._closed:
            try:
                self._read()
                return
            except PsError as error:
                failure = error
            except ValueError as error:  # the channel was closed
                failure = Unavailable(f"{self.where}: {error}")
            if self._came:
                failures, failing = 0, time.monotonic()
            failures += 1
            self._count += 1
            if isinstance(failure, LOST) and self._when_lost == "snapshot" and self._request.token:
                self._request.token = b""
                self._request.start = pb.START_SNAPSHOT
                continue
            pause = failure.retry_after
            crowded = self._met and failure.reason == "TOO_MANY_SUBSCRIBERS"  # perhaps by itself
            if crowded or isinstance(failure, Unavailable):
                pause = min(FIRST_PAUSE * 2 ** min(failures, 8), LONGEST_PAUSE)
            if pause is None or time.monotonic() + pause - failing > self._timeout:
                owner._put(failure)
                return
            owner._pause(pause)

    def _read(self) -> None:
        """Hand changes over until the owner is closed, or the stream breaks, as a PsError."""
        self._came = False
        request = self._request.SerializeToString()
        call = self._call = self._channel.open_stream(SUBSCRIBE, iter((request,)))
        try:
            for data in call:
                change = self._change(codec.decode_delta(data))
                self._came = self._met = True
                if not self._owner._put(change):
                    self._channel.cancel(call)
                    return
                if change.token:
                    self._request.token = change.token
        except grpc.RpcError as error:
            failure = rpc_error(error, self.where)
            if error.code() in RETRYABLE and not isinstance(failure, Unavailable):
                failure = Unavailable(f"{self.where}: {error.code().name}: {error.details()}")
            raise failure from error
        except codec.Malformed as error:
            self._channel.cancel(call)
            raise Unavailable(f"{self.where}: {error}") from error
        raise Unavailable(f"{self.where}: the stream ended")

    def _change(self, delta: codec.Delta) -> Change:
        header, n = delta.header, len(delta.keys)
        kind = KINDS.get(header.kind)
        if kind is None:
            raise codec.Malformed(f"a Delta of kind {header.kind}")
        versions = delta.versions
        if not len(versions) and n:
            versions = np.broadcast_to(np.uint64(header.version), n)
        rows = steps = frequencies = None
        if kind == "rows":
            if header.width:
                dtype = codec.wire_dtype(header.dtype)
                rows = codec.from_wire(delta.rows, dtype)
                if rows.size != n * header.width:
                    raise codec.Malformed(f"{rows.size} numbers for {n} rows of {header.width}")
                rows = rows.reshape(n, header.width)
            if self._request.content == pb.CONTENT_VALUES_AND_STATE:
                steps, frequencies = delta.steps, delta.frequencies
        arrays = (versions, versions if steps is None else steps, frequencies)
        if any(array is not None and len(array) != n for array in arrays):
            raise codec.Malformed(f"arrays of different lengths for {n} keys")
        return Change(
            shard=self.shard,
            stream=self._count,
            kind=kind,
            table=header.table,
            keys=delta.keys,
            versions=versions,
            rows=rows,
            steps=steps,
            frequencies=frequencies,
            version=header.version,
            more=header.more,
            token=header.token,
            head=header.head,
            time=header.time_us / 1e6,
            dim=header.dim,
            barrier=header.barrier,
            cause=header.cause,
            schema=header.schema if header.HasField("schema") else None,
        )
