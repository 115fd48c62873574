"""Load a shard from its base (the copy of all rows at one log version) and replay its log."""

from __future__ import annotations

import json

import numpy as np

from psserver.schemas import from_json
from psserver.sequencer import Sequencer
from psserver.tables import TableEntry, Tables
from psserver.tombstonequeue import TombstoneQueue
from psserver.tombstones import Tombstones
from storage import block as blocks
from storage import records
from storage.arena import Budget
from storage.basestate import BaseState
from storage.block import Block
from storage.errors import Corrupt
from storage.kernels import Images


class Recovery:
    """Fills an empty shard with the data of a base and of log records that the caller reads.

    Call order: begin, load_state, load_block for each block, blocks_loaded, replay for each log
    record, finish. Without a base: begin, replay, finish.

    A BaseState is what a base records besides rows: version, tables, sessions. A block has many
    rows, tombstones (records of deletes) or admission counters of one table.
    """

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
        """Begin a recovery. Until ``finish``, the tables may exceed the memory budget.

        excess  bytes by which they may exceed it; None: no limit, so that a shard whose budget was
                lowered can load all acknowledged changes
        """
        self._budget.begin_loading(excess)

    def load_state(self, state: BaseState) -> None:
        """Set version and sessions to those of a base, and create its tables, still empty."""
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
        """Load one block of the base. Blocks must come in the order in which they were written.

        Ignores a block whose table was dropped. Raises Corrupt if a sketch (approximate admission
        counters) does not fit its table.
        """
        entry = self._tables.numbered(block.table)
        if entry is None:  # the table was dropped before the state was committed
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
        """Store the tombstones of a block, and delete the rows of their keys that are older than
        the tombstone.

        entry  table of the block
        """
        tables = np.full(len(block.keys), block.table, np.uint32)
        self._tombstones.load(Tombstones(tables, block.keys, block.versions, block.causes))
        order = np.lexsort((block.versions, block.keys))
        keys, versions = block.keys[order], block.versions[order]
        newest = np.append(keys[1:] != keys[:-1], True)  # of each key, its last delete
        entry.table.delete(keys[newest], before=versions[newest])

    def blocks_loaded(self) -> None:
        """Sort the loaded tombstones. Call after the last block, before the first log record."""
        self._tombstones.settle()

    def replay(self, version: int, record: records.Record) -> None:
        """Apply one log record. Records must come in order of their versions.

        version  version of the change that the record describes

        Raises Corrupt if the record's table does not exist.
        """
        self._sequencer.version = version
        match record:
            case records.CreateRecord():
                self._tables.add(record.table, from_json(record.schema), version)
                return
            case records.BarrierRecord():
                return
        self._replay_on(self._require_table(record.table, version), version, record)
        if (origin := record.origin).client:
            self._sequencer.sessions.record(
                origin.client, origin.incarnation, origin.sequence, origin.acknowledged, version
            )

    def _require_table(self, number: int, version: int) -> TableEntry:
        """Return the table with this number; raise Corrupt if there is none.

        version  version of the log record that names the table, for the message
        """
        entry = self._tables.numbered(number)
        if entry is None:
            raise Corrupt(
                f"log record of version {version}",
                f"the record changes table number {number}, which does not exist",
            )
        return entry

    def _replay_on(self, entry: TableEntry, version: int, record: records.Record) -> None:
        """Apply a log record to the existing table that it changes.

        entry    the table
        version  version of the change
        """
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

    def finish(self) -> None:
        """End the recovery: drop sessions beyond the limit, and enforce the memory budget again.

        Raises Corrupt if a piece of a sketch (approximate admission counters) is missing.
        """
        for entry in self._tables:
            try:
                entry.table.gate.begin(self._sequencer.version)
            except ValueError as error:
                raise Corrupt(
                    f"data directory: admission counters (sketch) of table {entry.schema.name!r}",
                    str(error),
                ) from error
        self._sequencer.sessions.trim()
        self._budget.end_loading()


def _load_rows(entry: TableEntry, block: Block) -> None:
    table = entry.table
    table.put(Images(block.keys, block.versions, block.steps, block.frequencies, block.rows))


def _load_cells(entry: TableEntry, block: Block) -> None:
    """Load a block with a piece of a sketch (approximate admission counters).

    Raises Corrupt if it does not fit the table's sketch.
    """
    try:
        entry.table.gate.load_cells(block.start, block.cells)
    except ValueError as error:
        raise Corrupt(f"sketch of table {entry.schema.name!r}", str(error)) from error


def _replay_push(entry: TableEntry, version: int, record: records.PushRecord) -> None:
    """Store the rows and admission counters that a log record has: those after a push, or rows that
    a client wrote.

    version  version of the change
    """
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
