"""Changes of a cluster's rows, as a subscriber gets them."""

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
    """One message of a shard: a change, or a part of a change or of a snapshot.

    kind      rows          these rows have these values
              deletes       these rows were deleted; ``cause`` is the reason
              created       the table was created; rows of an older table of its name are gone
              altered       the table has other settings, in ``schema``; its rows stay
              dropped       the table was dropped, with its rows
              barrier       the mark ``barrier``
              progress      nothing new up to ``version``
              snapshot      discard all rows of this shard, whatever their versions. A snapshot
                            follows; what is not sent before snapshot_end does not exist
              catch_up      what changed since the token follows; tables that are not sent are gone
              snapshot_end  ends a snapshot or catch-up

    Arrays are empty, or None, where a kind does not use them. They are read-only.
    """

    shard: int
    stream: int  # ordinal of the stream to the shard; a new stream repeats what followed the token
    kind: Kind
    table: str
    keys: NDArray[np.uint64]  # [n], distinct
    versions: NDArray[np.uint64]  # [n]
    rows: NDArray[np.float32] | None  # [n, dim]; [n, width] with state; None without values
    steps: NDArray[np.int64] | None  # [n], with state only
    frequencies: NDArray[np.uint64] | None  # [n], with state only
    version: int  # of the shard after the newest change in this message
    more: bool  # the rest follows; the shard was not in the state up to here
    token: bytes  # to continue after this message; empty inside a change
    head: int  # newest durable version of the shard
    time: float  # seconds since 1970 when the change was applied; 0 without a change
    dim: int  # length of the table's embeddings
    barrier: str
    cause: str  # request, step_ttl, time_ttl, norm or capacity
    schema: pb.TableSchema | None  # of a created or altered table
    history: History | None = None  # epochs of the shard, in the first messages of a stream


def read_change(delta: codec.Delta, shard: int, stream: int, *, state: bool) -> Change:
    """Return a message of a shard as a Change. Raises Malformed.

    state  whether whole rows were asked for
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
    header, n = delta.header, len(delta.keys)
    rows = codec.from_wire(delta.rows, codec.wire_dtype(header.dtype))
    if rows.size != n * header.width:
        raise codec.Malformed(f"{rows.size} numbers for {n} rows of {header.width}")
    return rows.reshape(n, header.width)


def _history(header: pb.DeltaHeader) -> History | None:
    if not header.HasField("history"):
        return None
    epochs, ends = tuple(header.history.epochs), tuple(header.history.ends)
    if len(epochs) != len(ends) + 1:
        raise codec.Malformed(f"{len(epochs)} epochs with {len(ends)} ends")
    return History(epochs, ends)
