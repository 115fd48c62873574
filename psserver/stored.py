"""What a checkpoint holds for a shard: its names, its parts, its tables, its rows."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from psproto import names, routing
from psserver.errors import BadRequest, CheckpointUnfit
from psserver.schemas import from_json
from psserver.shard import Shard
from storage.checkpoint import Checkpoint
from storage.errors import Corrupt, UnknownTable
from storage.kernels import Keys, Rows
from storage.manifest import ATTEMPT
from storage.schema import TableSchema

SLICE_ROWS, SLICE_BYTES = 2048, 512 << 10  # for the engine at once: well below a millisecond


# ---- names


def require_name(name: str) -> str:
    """The name of a checkpoint, which is no path; BadRequest otherwise."""
    if problem := names.problem("checkpoint", name):
        raise BadRequest("INVALID_ARGUMENT", problem)
    return name


def require_id(field: str, value: str) -> str:
    """16 hexadecimal digits; BadRequest otherwise."""
    if not ATTEMPT.fullmatch(value):
        raise BadRequest(
            "INVALID_ARGUMENT", f"{field} must be 16 hexadecimal digits, got {value[:200]!r}"
        )
    return value


# ---- what a checkpoint holds for a shard


def runs(shard: Shard) -> tuple[tuple[int, int], ...]:
    """The buckets that a shard owns, as runs: first, last + 1."""
    mine = shard.shard_map.shard_of_bucket == shard.number
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mine, [False]]).astype(np.int8)))
    return tuple(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def overlapping(checkpoint: Checkpoint, shard: Shard) -> list[int]:
    """The parts that may hold rows of this shard."""
    mine = runs(shard)
    return [
        part.shard
        for part in checkpoint.parts
        if any(first < end and start < last for first, last in part.buckets for start, end in mine)
    ]


def own(keys: Keys, shard: Shard) -> Any:
    """Which of the keys belong to the shard: positions, or a slice where all do."""
    mine = routing.owners(keys, shard.shard_map) == shard.number
    return slice(None) if mine.all() else np.flatnonzero(mine)


def schema_in(checkpoint: Checkpoint, table: str) -> TableSchema:
    """The schema of a stored table; UnknownTable."""
    for held in checkpoint.manifest.tables:
        if held.name == table:
            return schema_of(checkpoint, held.schema)
    raise UnknownTable(table)


def schema_of(checkpoint: Checkpoint, text: str) -> TableSchema:
    """A stored schema; CheckpointUnfit if this release does not know it."""
    try:
        return from_json(json.loads(text))
    except (BadRequest, ValueError) as error:
        raise CheckpointUnfit(f"{checkpoint.manifest.name!r}: {error}") from error


def number_in(checkpoint: Checkpoint, part: int, table: str) -> int:
    """The number of a stored table on the shard of a part."""
    return next(each.number for each in checkpoint.parts[part].tables if each.name == table)


def require_width(checkpoint: Checkpoint, schema: TableSchema, rows: Rows) -> None:
    """Corrupt unless rows are as wide as their schema says."""
    if rows.shape[1] != schema.width:
        raise Corrupt(
            f"checkpoint {checkpoint.manifest.name!r}",
            f"rows of table {schema.name!r} have {rows.shape[1]} numbers, not {schema.width}",
        )


def fits(source: TableSchema, target: TableSchema) -> bool:
    """Whether rows of one table, state included, mean the same in another."""
    return (source.dim, source.optimizer.name, source.width) == (
        target.dim,
        target.optimizer.name,
        target.width,
    )


def with_state(rows: Rows, schema: TableSchema) -> Rows:
    """Whole rows: those given, or with the state of new rows behind them."""
    if rows.shape[1] == schema.width:
        return rows
    whole = np.empty((len(rows), schema.width), np.float32)
    whole[:, : schema.dim] = rows
    whole[:, schema.dim :] = schema.optimizer.initial_state(schema.dim)
    return whole


def slice_rows(width: int) -> int:
    """Rows that the engine takes or copies at once."""
    return max(1, min(SLICE_ROWS, SLICE_BYTES // (4 * width)))
