"""Validate and interpret the contents of a checkpoint for one shard.

A part of a checkpoint is what one shard of the checkpointed cluster wrote. It has the rows of the
keys in some buckets. A bucket is one of 4096 fixed ranges of key hashes; shards own whole buckets.
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
    """Return the buckets (ranges of key hashes) that a shard owns, as pairs (first, last + 1) in
    ascending order.
    """
    mine = shard.shard_map.shard_of_bucket == shard.number
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mine, [False]]).astype(np.int8)))
    return tuple(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def overlapping(checkpoint: Checkpoint, shard: Shard) -> list[int]:
    """Return the numbers of the checkpoint's parts that can contain keys of ``shard``, because they
    have a bucket (range of key hashes) that it owns.
    """
    mine = runs(shard)
    return [
        part.shard
        for part in checkpoint.parts
        if any(first < end and start < last for first, last in part.buckets for start, end in mine)
    ]


def own(keys: Keys, shard: Shard) -> Any:
    """Return an index into ``keys`` (uint64[n]) that selects the keys owned by ``shard``.

    The index is an array int64[m], or slice(None) if the shard owns all of them.
    """
    mine = routing.owners(keys, shard.shard_map) == shard.number
    return slice(None) if mine.all() else np.flatnonzero(mine)


def schema_in(checkpoint: Checkpoint, table: str) -> TableSchema:
    """Return the schema of a table in a checkpoint.

    table  name of the table

    Raises UnknownTable, and the errors of ``read_stored``.
    """
    for each in checkpoint.manifest.tables:
        if each.name == table:
            return read_stored(checkpoint.manifest.name, each.name, each.schema)
    raise UnknownTable(table)


def read_stored(checkpoint: str, table: str, text: str) -> TableSchema:
    """Parse the schema of a table from a checkpoint's manifest.

    checkpoint  name of the checkpoint, for messages
    table       name of the table
    text        JSON of the schema

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
            f"checkpoint {checkpoint!r}: this release cannot read the schema of table {table!r}:"
            f" {error}"
        ) from error
    if schema.name != table:
        raise Corrupt(
            f"checkpoint {checkpoint!r}",
            f"the manifest lists a table {table!r}, but its schema has the name {schema.name!r}",
        )
    return schema


def sessions_in(store: Store, checkpoint: Checkpoint, part: int) -> bytes:
    """Return the packed client sessions (records of applied pushes) in one part of a checkpoint.

    part  number of the part

    Raises Corrupt if they are damaged, StoreFailed if they cannot be read.
    """
    name = checkpoint.manifest.name
    data = b"".join(read_file(store, name, file) for file in checkpoint.parts[part].sessions)
    try:
        Sessions(1, 1.0, lambda: 0.0).unpack(data)
    except (struct.error, ValueError) as error:
        where = store.where(f"{name}/{checkpoint.parts[part].attempt}/{part:05}")
        raise Corrupt(where, f"cannot read the client sessions: {error}") from error
    return data


def number_in(checkpoint: Checkpoint, part: int, table: str) -> int:
    """Return the number that a table has within one part of a checkpoint.

    part   number of the part
    table  name of the table

    Raises Corrupt if the part does not list the table.
    """
    for each in checkpoint.parts[part].tables:
        if each.name == table:
            return each.number
    raise Corrupt(
        f"checkpoint {checkpoint.manifest.name!r}",
        f"the manifest of part {part} does not list the table {table!r}, unlike that of the"
        " checkpoint",
    )


def require_width(checkpoint: Checkpoint, schema: TableSchema, rows: Rows) -> None:
    """Raise Corrupt unless ``rows``, read from a checkpoint, have the width of the table's schema.

    rows  float32[n, any width]
    """
    if rows.shape[1] != schema.width:
        raise Corrupt(
            f"checkpoint {checkpoint.manifest.name!r}",
            f"expected {schema.width} numbers per row in table {schema.name!r}, as its schema"
            f" requires, got {rows.shape[1]}",
        )


def fits(source: TableSchema, target: TableSchema) -> bool:
    """Return whether rows with optimizer state of one table can be stored in another table.

    True if the tables have the same dim, optimizer and row width.
    """
    return (source.dim, source.optimizer.name, source.width) == (
        target.dim,
        target.optimizer.name,
        target.width,
    )
