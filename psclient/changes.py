"""A Change: one message that a subscriber receives about changed rows or a changed table."""

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

    A large change or snapshot is sent as several messages. A snapshot is a copy of all rows. A
    catch-up contains only the rows that changed since the subscriber's token.

    kind      rows          the rows of ``keys`` now have the values in ``rows``
              deletes       the rows of ``keys`` were deleted; ``cause`` is the reason
              created       the table was created; an older table of that name and its rows are gone
              altered       the table has new settings, in ``schema``; its rows are unchanged
              dropped       the table and its rows were deleted
              barrier       a client wrote a mark with the name ``barrier`` (Client.barrier)
              progress      nothing more has changed up to ``version``
              snapshot      a snapshot begins: discard all rows of this shard, whatever their
                            versions. Rows not sent before snapshot_end do not exist
              catch_up      a catch-up begins. Tables not sent before snapshot_end do not exist
              snapshot_end  a snapshot or catch-up is complete

    Fields that a kind does not use are empty, 0 or None. Arrays are read-only.
    """

    shard: int  # number of the shard that sent the message
    stream: int  # number of earlier streams to the shard; a new one repeats changes after the token
    kind: Kind
    table: str  # name of the table
    keys: NDArray[np.uint64]  # [n], distinct
    versions: NDArray[np.uint64]  # [n] version of the shard after each row's change
    rows: NDArray[np.float32] | None  # [n, dim]; [n, width] with optimizer state; None: no values
    steps: NDArray[np.int64] | None  # [n] step of each row's last push; None: no optimizer state
    frequencies: NDArray[np.uint64] | None  # [n] pushed occurrences; None: no optimizer state
    version: int  # version of the shard after the newest change in this message
    more: bool  # whether the next messages belong to this one; apply them together
    token: bytes  # continues a subscription after this message; b"": not possible at this message
    head: int  # newest durable version of the shard
    time: float  # when the change was applied, in seconds since 1970; 0: not a change
    dim: int  # length of the table's embeddings
    barrier: str  # name of the mark
    cause: str  # why rows were deleted: request, step_ttl, time_ttl, norm or capacity
    schema: pb.TableSchema | None  # schema of the created or altered table
    history: History | None = None  # epochs of the shard, in the first messages of a stream


def read_change(delta: codec.Delta, shard: int, stream: int, *, state: bool) -> Change:
    """Convert a message of a shard to a Change.

    delta   the decoded message
    shard   number of the shard
    stream  number of streams opened to the shard before the one that delivered the message
    state   whether the subscriber asked for optimizer state, steps and frequencies

    Raises codec.Malformed if the kind of the message is unknown or an array has a wrong size.
    """
    header = delta.header
    kind = KINDS.get(header.kind)
    if kind is None:
        raise codec.Malformed(f"unknown kind of Delta: {header.kind}")
    versions, steps, frequencies = _metadata(delta, state and kind == "rows")
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


def _metadata(
    delta: codec.Delta, state: bool
) -> tuple[NDArray[np.uint64], NDArray[np.int64] | None, NDArray[np.uint64] | None]:
    """Return (versions, steps, frequencies) of a message, each with one number per key.

    state  whether the message must have steps and frequencies; if not, they are None

    Raises codec.Malformed if an array does not have one number per key.
    """
    n, versions = len(delta.keys), delta.versions
    if not len(versions) and n:  # all rows have the message's version
        versions = np.broadcast_to(np.uint64(delta.header.version), n)
    steps, frequencies = (delta.steps, delta.frequencies) if state else (None, None)
    for array in (versions, steps, frequencies):
        if array is not None and len(array) != n:
            raise codec.Malformed(f"expected arrays of {n} numbers, one per key, got {len(array)}")
    return versions, steps, frequencies


def _rows(delta: codec.Delta) -> NDArray[np.float32]:
    """Return the rows of a message as float32[n, width].

    Raises codec.Malformed if the message does not have ``n * width`` numbers.
    """
    header, n = delta.header, len(delta.keys)
    rows = codec.from_wire(delta.rows, codec.wire_dtype(header.dtype))
    if rows.size != n * header.width:
        raise codec.Malformed(
            f"expected {n} rows of {header.width} numbers, got {rows.size} numbers"
        )
    return rows.reshape(n, header.width)


def _history(header: pb.DeltaHeader) -> History | None:
    """Return the epochs of the shard, or None if the message does not contain them.

    Raises codec.Malformed if their number is wrong.
    """
    if not header.HasField("history"):
        return None
    epochs, ends = tuple(header.history.epochs), tuple(header.history.ends)
    if len(epochs) != len(ends) + 1:
        raise codec.Malformed(f"expected one more epoch than ends, got {len(epochs)}, {len(ends)}")
    return History(epochs, ends)
