"""Validate and interpret the contents of a checkpoint for one shard.

A part of a checkpoint is what one shard of the checkpointed cluster wrote. It has rows for some
buckets (fixed ranges of key hashes).
"""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
from google.protobuf import json_format

from psproto import names, routing
from psserver.errors import BadRequest, CheckpointUnfit
from psserver.schemas import from_json
from psserver.sessions import Sessions
from psserver.shard import Shard
from storage.checkpoint import Checkpoint, read_file
from storage.errors import Corrupt, UnknownTable
from storage.kernels import Keys, Rows
from storage.manifest import ATTEMPT
from storage.schema import TableSchema
from storage.store import Store

SLICE_ROWS, SLICE_BYTES = 2048, 512 << 10  # limits per call of the engine thread, well under 1 ms


def require_name(name: str) -> str:
    """Return ``name`` if it is a valid checkpoint name (no path); raise BadRequest otherwise."""
    if problem := names.problem("checkpoint", name):
        raise BadRequest("INVALID_ARGUMENT", problem)
    return name


def require_id(field: str, value: str) -> str:
    """Return ``value`` if it consists of 16 hexadecimal digits; raise BadRequest otherwise.

    field  name of the request's field, for the message
    """
    if not ATTEMPT.fullmatch(value):
        raise BadRequest(
            "INVALID_ARGUMENT", f"{field} must be 16 hexadecimal digits, got {value[:200]!r}"
        )
    return value


def runs(shard: Shard) -> tuple[tuple[int, int], ...]:
    """Return the buckets that a shard owns, as ascending ranges (first, last + 1)."""
    mine = shard.shard_map.shard_of_bucket == shard.number
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mine, [False]]).astype(np.int8)))
    return tuple(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def overlapping(checkpoint: Checkpoint, shard: Shard) -> list[int]:
    """Return the numbers of the checkpoint's parts that share a bucket with a shard."""
    mine = runs(shard)
    return [
        part.shard
        for part in checkpoint.parts
        if any(first < end and start < last for first, last in part.buckets for start, end in mine)
    ]


def own(keys: Keys, shard: Shard) -> Any:
    """Return an index that selects the keys owned by a shard: int64[m], or slice(None) for all.

    keys  uint64[n]
    """
    mine = routing.owners(keys, shard.shard_map) == shard.number
    return slice(None) if mine.all() else np.flatnonzero(mine)


def schema_in(checkpoint: Checkpoint, table: str) -> TableSchema:
    """Return the schema of a table in a checkpoint.

    Raises UnknownTable, and the errors of ``read_stored``.
    """
    for each in checkpoint.manifest.tables:
        if each.name == table:
            return read_stored(checkpoint.manifest.name, each.name, each.schema)
    raise UnknownTable(table)


def read_stored(checkpoint: str, table: str, text: str) -> TableSchema:
    """Parse the schema of a table from a checkpoint's manifest.

    checkpoint, table  their names
    text               JSON of the schema

    Raises CheckpointUnfit if this release cannot read it, Corrupt if it has a different table name.
    """
    try:
        schema = from_json(json.loads(text))
    except (
        BadRequest,
        ValueError,
        TypeError,
        RecursionError,
        AttributeError,
        json_format.Error,
    ) as error:
        raise CheckpointUnfit(
            f"checkpoint {checkpoint!r}: cannot read the schema of table {table!r}: {error}"
        ) from error
    if schema.name != table:
        raise Corrupt(
            f"checkpoint {checkpoint!r}",
            f"the schema of table {table!r} has the name {schema.name!r}",
        )
    return schema


def sessions_in(store: Store, checkpoint: Checkpoint, part: int) -> bytes:
    """Return the packed client sessions of a checkpoint's part, by the part's number.

    Raises Corrupt if they are damaged, StoreFailed if they cannot be read.
    """
    name = checkpoint.manifest.name
    data = b"".join(read_file(store, name, file) for file in checkpoint.parts[part].sessions)
    try:
        Sessions(1, 1.0, lambda: 0.0).unpack(data)
    except (struct.error, ValueError) as error:
        where = store.where(f"{name}/{checkpoint.parts[part].attempt}/{part:05}")
        raise Corrupt(where, f"cannot read the sessions: {error}") from error
    return data


def number_in(checkpoint: Checkpoint, part: int, table: str) -> int:
    """Return the number of a table within a part; Corrupt if the part does not list the table."""
    for each in checkpoint.parts[part].tables:
        if each.name == table:
            return each.number
    raise Corrupt(f"checkpoint {checkpoint.manifest.name!r}", f"part {part} has no table {table!r}")


def require_width(checkpoint: Checkpoint, schema: TableSchema, rows: Rows) -> None:
    """Raise Corrupt unless ``rows`` (float32[n, w]) are as wide as the table's schema requires."""
    if rows.shape[1] != schema.width:
        raise Corrupt(
            f"checkpoint {checkpoint.manifest.name!r}",
            f"rows of table {schema.name!r} have {rows.shape[1]} numbers, but its schema requires"
            f" {schema.width}",
        )


def fits(source: TableSchema, target: TableSchema) -> bool:
    """Return whether whole rows (with optimizer state) of one table can be used in another.

    True if dim, optimizer and row width are equal.
    """
    return (source.dim, source.optimizer.name, source.width) == (
        target.dim,
        target.optimizer.name,
        target.width,
    )


def with_state(rows: Rows, schema: TableSchema) -> Rows:
    """Return float32[n, width] rows with optimizer state.

    rows  float32[n, width], returned unchanged, or float32[n, dim] without optimizer state, to
          which the initial state is appended
    """
    if rows.shape[1] == schema.width:
        return rows
    whole = np.empty((len(rows), schema.width), np.float32)
    whole[:, : schema.dim] = rows
    whole[:, schema.dim :] = schema.optimizer.initial_state(schema.dim)
    return whole


def slice_rows(width: int) -> int:
    """Return how many rows of ``width`` numbers the engine thread copies per call."""
    return max(1, min(SLICE_ROWS, SLICE_BYTES // (4 * width)))
