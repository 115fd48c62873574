"""What readers of a shard get: copies of facts, and scans that go on while pushes do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from psserver.sessions import SessionsSnapshot
from psserver.tables import TableEntry
from psserver.tombstones import Tombstones
from storage.admission.gates import Gate
from storage.basestate import BaseTable
from storage.eviction.evictor import EvictorState
from storage.kernels import Keys, Rows
from storage.results import TableStats
from storage.schema import TableSchema
from storage.table import Table
from storage.tiers.base import Scan


@dataclass(frozen=True, slots=True)
class TableView:
    """A table on this shard, for a reader that goes through its rows while pushes go on."""

    schema: TableSchema
    number: int
    version: int  # of the shard
    step: int  # largest step that was pushed to the table
    tiers: list[tuple[str, Scan, int]]  # name, rows, bytes
    stats: TableStats


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyView:
    """The facts of some keys of a table; 0 and empty for keys without a row."""

    version: int  # of the shard
    number: int  # of the table
    created: int  # version of the table's creation
    tiers: list[str]
    versions: NDArray[np.uint64]  # [n]
    steps: NDArray[np.int64]  # [n]
    frequencies: NDArray[np.uint64]  # [n]
    embeddings: Rows  # float32[n, dim]
    waiting: NDArray[np.uint32]  # [n]  occurrences that are counted towards admission
    step: int  # largest step that was pushed to the table
    schema: TableSchema
    loss_reason: str  # why keys without row and counter may have been pushed; empty: they were not


class TableList(NamedTuple):
    """The tables of a shard at one version."""

    version: int
    horizon: int  # deletes up to this version may have lost their tombstones
    tables: tuple[tuple[int, TableSchema, int], ...]  # number, schema, version of the creation


@dataclass(frozen=True, slots=True)
class CapturedTable:
    """A table of a captured shard."""

    number: int  # given at creation
    schema: str  # JSON
    created: int  # version of its creation
    counting: int  # counters of versions up to this one were dropped by an alteration
    policy: EvictorState
    table: Table
    width: int
    rows: int
    counters: int  # exact ones
    gate: Gate  # that counted at this version: an alteration may replace the table's
    edits: int  # of a sketch; see Gate
    step: int  # of the table
    scan: Scan

    @property
    def base(self) -> BaseTable:
        """The table as the base of a data directory lists it."""
        return BaseTable(
            number=self.number,
            schema=self.schema,
            created=self.created,
            policy=self.policy.pack(),
            counting=self.counting,
        )


@dataclass(frozen=True, slots=True)
class Capture:
    """A shard at one version, for a reader that goes through the rows while pushes go on."""

    version: int
    next_table: int
    tables: tuple[CapturedTable, ...]
    sessions: SessionsSnapshot
    tombstones: list[Tombstones]  # in parts, oldest first
    horizon: int  # deletes up to this version may have lost their tombstones


def capture_table(entry: TableEntry) -> CapturedTable:
    """Return a table as it is now."""
    table = entry.table
    gate, width = table.gate, table.schema.width
    counters = 0 if len(gate.cells()) else gate.entries
    return CapturedTable(
        number=entry.number,
        schema=entry.text,
        created=entry.created,
        counting=entry.counting,
        policy=table.evictor.snapshot(),
        table=table,
        width=width,
        rows=len(table),
        counters=counters,
        gate=gate,
        edits=gate.edits,
        step=table.evictor.step,
        scan=table.scan(),
    )


def view_table(entry: TableEntry, version: int) -> TableView:
    """Return a table, to be read by slices."""
    table = entry.table
    return TableView(
        table.schema,
        entry.number,
        version,
        table.evictor.step,
        table.tiers(),
        table.stats(),
    )


def view_keys(entry: TableEntry, keys: Keys, version: int, now: float) -> KeyView:
    """Return the facts of distinct keys of this shard.

    now  seconds since 1970
    """
    table = entry.table
    embeddings = np.empty((len(keys), table.schema.dim), np.float32)
    locations = table.pull(keys, "serve", embeddings)
    versions, steps, frequencies = table.metadata(locations)
    waiting = np.where(locations == 0, table.gate.waiting(keys), 0).astype(np.uint32)
    loss_reason, stale = table.gate.loss_reason, table.evictor.stale(now)
    if entry.counting:
        loss_reason = (
            f"what was counted up to version {entry.counting} was dropped by an alteration"
        )
    if not loss_reason and table.gate.cap and stale > entry.created:
        loss_reason = f"counters last touched up to version {stale} have expired"
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
        loss_reason=loss_reason,
    )
