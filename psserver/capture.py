"""Access to all data of a shard as of one version, for flushes and checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

from psserver.sessions import SessionsSnapshot
from psserver.tables import TableEntry
from psserver.tombstones import Tombstones
from storage.admission.gates import Gate
from storage.basestate import BaseTable
from storage.eviction.evictor import EvictorState
from storage.table import Table
from storage.tiers.base import DirtyScan


@dataclass(frozen=True, slots=True)
class CapturedTable:
    """A table in a Capture: its settings and sizes, and access to its rows and counters."""

    number: int  # number of the table
    schema: str  # schema as JSON
    created: int  # version of its creation
    counting: int  # version of the last alteration that dropped admission counters; 0: none
    policy: EvictorState  # state of its eviction rules
    table: Table  # the live table, which later pushes change
    width: int  # float32 numbers per row, with optimizer state
    rows: int  # number of rows
    counters: int  # number of exact admission counters; 0 with a sketch
    gate: Gate  # holds the admission counters of this version, even after an alteration
    edits: int  # number that grows with every change of a sketch; see Gate
    step: int  # largest training step pushed to the table
    scan: DirtyScan  # scan over its rows in host memory

    @property
    def base(self) -> BaseTable:
        """The table as recorded in the base (the on-disk copy of all rows at one log version)."""
        return BaseTable(
            number=self.number,
            schema=self.schema,
            created=self.created,
            policy=self.policy.pack(),
            counting=self.counting,
        )


@dataclass(frozen=True, slots=True)
class Capture:
    """Access to all data of a shard as of one version, for reading it while pushes continue."""

    version: int
    next_table: int  # number of the next new table
    tables: tuple[CapturedTable, ...]
    sessions: SessionsSnapshot  # records of applied pushes, by client
    tombstones: list[Tombstones]  # records of deletes, oldest first
    horizon: int  # largest version whose tombstones may have been discarded


def capture_table(entry: TableEntry) -> CapturedTable:
    """Return access to one table as it is now; copies no rows. Must run on the engine thread."""
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
        scan=table.store.host.scan(),
    )
