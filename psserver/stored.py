"""What a checkpoint contains for a shard: its names, parts, tables and rows."""

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

SLICE_ROWS, SLICE_BYTES = 2048, 512 << 10  # that the engine copies at once: much less than 1 ms


def require_name(name: str) -> str:
    """Return ``name`` if it is a name of a checkpoint, which is never a path; else BadRequest."""
    if problem := names.problem("checkpoint", name):
        raise BadRequest("INVALID_ARGUMENT", problem)
    return name


def require_id(field: str, value: str) -> str:
    """Return ``value`` if it is 16 hexadecimal digits; else BadRequest, which names the field."""
    if not ATTEMPT.fullmatch(value):
        raise BadRequest(
            "INVALID_ARGUMENT", f"{field} must be 16 hexadecimal digits, got {value[:200]!r}"
        )
    return value


def runs(shard: Shard) -> tuple[tuple[int, int], ...]:
    """Return the buckets that a shard owns, as runs (first, last + 1)."""
    mine = shard.shard_map.shard_of_bucket == shard.number
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mine, [False]]).astype(np.int8)))
    return tuple(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def overlapping(checkpoint: Checkpoint, shard: Shard) -> list[int]:
    """Return the parts that may contain rows of a shard."""
    mine = runs(shard)
    return [
        part.shard
        for part in checkpoint.parts
        if any(first < end and start < last for first, last in part.buckets for start, end in mine)
    ]


def own(keys: Keys, shard: Shard) -> Any:
    """Return which keys belong to the shard: positions, or a slice if all do."""
    mine = routing.owners(keys, shard.shard_map) == shard.number
    return slice(None) if mine.all() else np.flatnonzero(mine)


def schema_in(checkpoint: Checkpoint, table: str) -> TableSchema:
    """Return the schema of a table in a checkpoint. Raises UnknownTable."""
    for each in checkpoint.manifest.tables:
        if each.name == table:
            return read_stored(checkpoint.manifest.name, each.name, each.schema)
    raise UnknownTable(table)


def read_stored(checkpoint: str, table: str, text: str) -> TableSchema:
    """Read the schema of a table as a manifest has it.

    Raises CheckpointUnfit if this release cannot read it, Corrupt if it is another table's.
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
            f"checkpoint {checkpoint!r}", f"table {table!r} has the schema of {schema.name!r}"
        )
    return schema


def sessions_in(store: Store, checkpoint: Checkpoint, part: int) -> bytes:
    """Read the sessions of a part. Raises Corrupt if they cannot be unpacked."""
    name = checkpoint.manifest.name
    data = b"".join(read_file(store, name, file) for file in checkpoint.parts[part].sessions)
    try:
        Sessions(1, 1.0, lambda: 0.0).unpack(data)
    except (struct.error, ValueError) as error:
        where = store.where(f"{name}/{checkpoint.parts[part].attempt}/{part:05}")
        raise Corrupt(where, f"cannot read the sessions: {error}") from error
    return data


def number_in(checkpoint: Checkpoint, part: int, table: str) -> int:
    """Return the number that a table has in a part."""
    for each in checkpoint.parts[part].tables:
        if each.name == table:
            return each.number
    raise Corrupt(f"checkpoint {checkpoint.manifest.name!r}", f"part {part} has no table {table!r}")


def require_width(checkpoint: Checkpoint, schema: TableSchema, rows: Rows) -> None:
    """Raise Corrupt unless rows are as wide as their schema says."""
    if rows.shape[1] != schema.width:
        raise Corrupt(
            f"checkpoint {checkpoint.manifest.name!r}",
            f"rows of table {schema.name!r} have {rows.shape[1]} numbers, its schema says"
            f" {schema.width}",
        )


def fits(source: TableSchema, target: TableSchema) -> bool:
    """Return whether rows of one table, with their optimizer state, mean the same in another."""
    return (source.dim, source.optimizer.name, source.width) == (
        target.dim,
        target.optimizer.name,
        target.width,
    )


def with_state(rows: Rows, schema: TableSchema) -> Rows:
    """Return rows with optimizer state: as given, or with the state of new rows appended."""
    if rows.shape[1] == schema.width:
        return rows
    whole = np.empty((len(rows), schema.width), np.float32)
    whole[:, : schema.dim] = rows
    whole[:, schema.dim :] = schema.optimizer.initial_state(schema.dim)
    return whole


def slice_rows(width: int) -> int:
    """Return how many rows of ``width`` numbers the engine copies at once."""
    return max(1, min(SLICE_ROWS, SLICE_BYTES // (4 * width)))
