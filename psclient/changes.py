"""Messages that a subscriber receives about changed rows and tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from psclient.versions import History
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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Change:
    """One message of a shard to a subscriber.

    A large change or snapshot is sent as several messages. A snapshot is a copy of all rows; a
    catch-up contains only the rows that changed since the token.

    kind      rows          these rows have these values
              deletes       these rows were deleted; ``cause`` is the reason
              created       the table was created; rows of an older table of its name are gone
              altered       the table has other settings, in ``schema``; its rows stay
              dropped       the table was dropped, with its rows
              barrier       a client wrote the mark ``barrier`` (Client.barrier)
              progress      nothing changed up to ``version``
              snapshot      a snapshot begins: discard all rows of this shard, whatever their
                            versions. Rows not sent before snapshot_end do not exist
              catch_up      a catch-up begins. Tables not sent before snapshot_end do not exist
              snapshot_end  ends a snapshot or catch-up

    Fields that a kind does not use are empty, 0 or None. Arrays are read-only.
    """

    shard: int
    stream: int  # counts the streams opened to the shard; a new one repeats changes after the token
    kind: Kind
    table: str
    keys: NDArray[np.uint64]  # [n], distinct
    versions: NDArray[np.uint64]  # [n] version of the shard after each row's change
    rows: NDArray[np.float32] | None  # [n, dim]; [n, width] with optimizer state; None: no values
    steps: NDArray[np.int64] | None  # [n] of each row's last push; None without optimizer state
    frequencies: NDArray[np.uint64] | None  # [n] pushed occurrences; None without optimizer state
    version: int  # of the shard after the newest change in this message
    more: bool  # further messages belong to this one; apply them together
    token: bytes  # continues a subscription after this message; b"": that is not possible here
    head: int  # newest durable version of the shard
    time: float  # when the change was applied, in seconds since 1970; 0: not a change
    dim: int  # length of the table's embeddings
    barrier: str  # name of the mark
    cause: str  # why rows were deleted: request, step_ttl, time_ttl, norm or capacity
    schema: pb.TableSchema | None  # of the created or altered table
    history: History | None = None  # epochs of the shard, in the first messages of a stream


def read_change(delta: codec.Delta, shard: int, stream: int, *, state: bool) -> Change:
    """Convert a message of a shard to a Change. Raises codec.Malformed.

    shard   number of the shard
    stream  number of streams opened to the shard before this one
    state   whether the subscriber asked for optimizer state, steps and frequencies
    """
    header, n = delta.header, len(delta.keys)
    kind = KINDS.get(header.kind)
    if kind is None:
        raise codec.Malformed(f"a Delta of kind {header.kind}")
    versions = delta.versions
    if not len(versions) and n:
        versions = np.broadcast_to(np.uint64(header.version), n)
    steps, frequencies = (delta.steps, delta.frequencies) if state else (None, None)
    if kind != "rows":
        steps = frequencies = None
    arrays = (versions, versions if steps is None else steps, frequencies)
    if any(array is not None and len(array) != n for array in arrays):
        raise codec.Malformed(f"arrays of different lengths for {n} keys")
    return Change(
        shard=shard,
        stream=stream,
        kind=kind,
        table=header.table,
        keys=delta.keys,
        versions=versions,
        rows=_rows(delta) if kind == "rows" and header.width else None,
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
        history=_history(header),
    )


def _rows(delta: codec.Delta) -> NDArray[np.float32]:
    """Return the rows of a message as float32[n, width].

    Raises Malformed if their size is wrong.
    """
    header, n = delta.header, len(delta.keys)
    rows = codec.from_wire(delta.rows, codec.wire_dtype(header.dtype))
    if rows.size != n * header.width:
        raise codec.Malformed(f"{rows.size} numbers for {n} rows of {header.width}")
    return rows.reshape(n, header.width)


def _history(header: pb.DeltaHeader) -> History | None:
    """Return the shard's epochs in a message, or None if it has none. Raises Malformed."""
    if not header.HasField("history"):
        return None
    epochs, ends = tuple(header.history.epochs), tuple(header.history.ends)
    if len(epochs) != len(ends) + 1:
        raise codec.Malformed(f"{len(epochs)} epochs with {len(ends)} ends")
    return History(epochs, ends)
