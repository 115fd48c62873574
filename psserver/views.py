"""Results of reads from a shard: copied values, and scans that stay valid while pushes continue."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from psserver.tables import TableEntry
from storage.kernels import Keys, Rows
from storage.results import TableStats
from storage.schema import TableSchema
from storage.tablescan import ExactScan


@dataclass(frozen=True, slots=True)
class TableView:
    """Access to a table on this shard, for reading its rows in slices while pushes continue.

    A tier is a kind of memory, or the disk, that holds rows.
    """

    schema: TableSchema
    number: int  # number of the table
    version: int  # version of the shard when this object was created
    step: int  # largest training step pushed to the table; FIRST_STEP before the first push
    scan: ExactScan  # reads each row exactly once
    reuse: tuple[NDArray[np.int64], NDArray[np.int64]]  # Reuse.counts: of pushes, and of pulls
    first: int  # Reuse.first
    stats: TableStats


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyView:
    """Row, metadata and admission count of each of n keys of a table.

    Keys without a row have tier "", metadata 0, and the embedding that a serving pull returns.
    """

    version: int  # version of the shard
    number: int  # number of the table
    created: int  # version of the table's creation
    tiers: list[str]  # [n]  name of the tier that holds the row
    versions: NDArray[np.uint64]  # [n]  version of the last change of the row
    steps: NDArray[np.int64]  # [n]  training step of the last push to the row
    frequencies: NDArray[np.uint64]  # [n]  occurrences pushed since the row exists
    embeddings: Rows  # float32[n, dim]
    waiting: NDArray[np.uint32]  # [n]  occurrences counted so far, for a key not admitted yet
    step: int  # largest training step pushed to the table
    schema: TableSchema  # schema of the table
    loss_reason: str  # how a key without row and count may have lost its count; "": it cannot


class TableList(NamedTuple):
    """The tables of a shard at one version, ordered by number."""

    version: int
    horizon: int  # largest version whose tombstones (records of deletes) may be discarded
    tables: tuple[tuple[int, TableSchema, int], ...]  # (number, schema, version of creation)


def view_table(entry: TableEntry, version: int) -> TableView:
    """Return schema, statistics and row scans of a table, for reading it in slices.

    version  version of the shard
    """
    table = entry.table
    return TableView(
        table.schema,
        entry.number,
        version,
        table.evictor.step,
        table.exact_scan(),
        table.reuse.counts,
        table.reuse.first,
        table.stats(),
    )


def view_keys(entry: TableEntry, keys: Keys, version: int, now: float) -> KeyView:
    """Return row, metadata and admission count of each key.

    keys     uint64[n], distinct, owned by this shard
    version  version of the shard
    now      seconds since 1970
    """
    table = entry.table
    embeddings = np.empty((len(keys), table.schema.dim), np.float32)
    locations = table.pull(keys, "serve", embeddings, count=False)
    versions, steps, frequencies = table.metadata(locations)
    waiting = np.where(locations == 0, table.gate.waiting(keys), 0).astype(np.uint32)
    return KeyView(
        version=version,
        number=entry.number,
        created=entry.created,
        tiers=table.tiers_of(locations),
        versions=versions,
        steps=steps,
        frequencies=frequencies,
        embeddings=embeddings,
        waiting=waiting,
        step=table.evictor.step,
        schema=table.schema,
        loss_reason=_loss_reason(entry, now),
    )


def _loss_reason(entry: TableEntry, now: float) -> str:
    """Return how a pushed key can have lost its count, so that it has neither row nor count now.

    now  seconds since 1970

    Returns "" if that cannot have happened: every key without row and count was never pushed.
    """
    table = entry.table
    if entry.counting:
        return f"an alteration at version {entry.counting} dropped the counts made until then"
    if table.gate.loss_reason:
        return table.gate.loss_reason
    stale = table.evictor.stale(now)
    if table.gate.cap and stale > entry.created:
        return f"counters not updated after version {stale} have expired"
    return ""
