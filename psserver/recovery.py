"""A shard brought back from its base and its log."""

from __future__ import annotations

import json

import numpy as np

from psserver.schemas import from_json
from psserver.sequencer import Sequencer
from psserver.tables import TableEntry, Tables
from psserver.tombstones import TombstoneQueue, Tombstones
from storage import block as blocks
from storage import records
from storage.arena import Budget
from storage.basestate import BaseState
from storage.block import Block
from storage.errors import Corrupt
from storage.kernels import Images


class Recovery:
    """Loads a base state, its blocks, then the records of the log, into an empty shard."""

    def __init__(
        self,
        budget: Budget,
        tables: Tables,
        sequencer: Sequencer,
        tombstones: TombstoneQueue,
    ) -> None:
        self._budget = budget
        self._tables = tables
        self._sequencer = sequencer
        self._tombstones = tombstones
        self._without_policy: set[int] = set()  # tables whose step is taken from their rows

    def begin(self, excess: int | None = None) -> None:
        """Begin a recovery, during which tables may take more memory than the budget.

        excess  bytes beyond the budget; None: any number, because what a shard has acknowledged
                must load, whatever its budget is now
        """
        self._budget.begin_loading(excess)

    def load_state(self, state: BaseState) -> None:
        """Begin from a base state; its blocks come next."""
        self._sequencer.version = state.version
        self._tables.next_number = state.next_table
        self._tombstones.horizon = state.horizon
        self._sequencer.sessions.unpack(state.sessions)
        for table in state.tables:
            schema = from_json(json.loads(table.schema))
            entry = self._tables.add(table.number, schema, table.created)
            entry.counting = table.counting
            if table.policy:
                entry.table.evictor.load(table.policy)
            else:
                self._without_policy.add(table.number)

    def load_block(self, block: Block) -> None:
        """Load a block of the base; blocks come in the order in which they were made."""
        entry = self._tables.numbered(block.table)
        if entry is None:  # dropped before the state was committed
            return
        match block.kind:
            case blocks.ROWS:
                _load_rows(entry, block)
                if entry.number in self._without_policy and len(block.keys):
                    newest, last = int(block.versions.max()), int(block.steps.max())
                    entry.table.evictor.loaded(newest, last)
            case blocks.COUNTERS:
                kept = block.versions > entry.counting
                arrays = block.keys[kept], block.totals[kept], block.versions[kept]
                entry.table.put_counters(*arrays)
            case blocks.CELLS:
                _load_cells(entry, block)
            case _:
                self._load_tombstones(entry, block)

    def _load_tombstones(self, entry: TableEntry, block: Block) -> None:
        tables = np.full(len(block.keys), block.table, np.uint32)
        self._tombstones.load(Tombstones(tables, block.keys, block.versions, block.causes))
        order = np.lexsort((block.versions, block.keys))
        keys, versions = block.keys[order], block.versions[order]
        newest = np.append(keys[1:] != keys[:-1], True)  # of each key, its last delete
        entry.table.delete(keys[newest], before=versions[newest])

    def blocks_loaded(self) -> None:
        """End the base; records of the log come next."""
        self._tombstones.settle()

    def replay(self, version: int, record: records.Record) -> None:
        """Apply a record of the log again; records come in their order."""
        self._sequencer.version = version
        match record:
            case records.CreateRecord():
                self._tables.add(record.table, from_json(record.schema), version)
                return
            case records.BarrierRecord():
                return
        entry = self._tables.numbered(record.table)
        if entry is None:
            raise Corrupt(f"record of version {version}", f"there is no table {record.table}")
        match record:
            case records.PushRecord():
                _replay_push(entry, version, record)
            case records.DeleteRecord(_, number, cause, keys):
                entry.table.delete(keys)
                self._tombstones.add(number, keys, version, cause)
            case records.AlterRecord(origin, _, schema):
                self._tables.alter(entry, from_json(schema), version, origin.time_us / 1e6)
            case records.DropRecord():
                self._tables.remove(entry)
        if (origin := record.origin).client:
            self._sequencer.sessions.record(
                origin.client, origin.incarnation, origin.sequence, origin.acknowledged, version
            )

    def finish(self) -> None:
        """End the recovery; raises Corrupt if a sketch was loaded in part."""
        for entry in self._tables:
            try:
                entry.table.gate.begin(self._sequencer.version)
            except ValueError as error:
                raise Corrupt(f"sketch of table {entry.schema.name!r}", str(error)) from error
        self._sequencer.sessions.trim()
        self._budget.end_loading()


def _load_rows(entry: TableEntry, block: Block) -> None:
    table = entry.table
    table.put(Images(block.keys, block.versions, block.steps, block.frequencies, block.rows))


def _load_cells(entry: TableEntry, block: Block) -> None:
    try:
        entry.table.gate.load_cells(block.start, block.cells)
    except ValueError as error:
        raise Corrupt(f"sketch of table {entry.schema.name!r}", str(error)) from error


def _replay_push(entry: TableEntry, version: int, record: records.PushRecord) -> None:
    origin, keys, waiting = record.origin, record.keys, record.waiting
    versions = np.full(len(keys), version, np.uint64)
    steps = np.full(len(keys), origin.step, np.int64)
    entry.table.put(Images(keys, versions, steps, record.frequencies, record.rows))
    since = np.full(len(waiting), version, np.uint64)
    entry.table.put_counters(waiting, record.totals, since)
    evictor, seconds = entry.table.evictor, origin.time_us / 1e6
    if record.imported:
        evictor.written(version, seconds)
    else:
        evictor.pushed(version, origin.step, seconds)
