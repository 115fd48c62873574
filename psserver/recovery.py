"""Load a shard from its base (the copy of all rows at one log version) and replay its log.

Rows stay in the base: only their keys are read, and put into the index. The base's directory tells
which rows are current. A base that an older release wrote has no directory. Of such a base, the row
with the largest version is the current one of its key.
"""

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
from storage.directory import BlockEntry, Zones
from storage.errors import Corrupt
from storage.kernels import Images


class Recovery:
    """Fills an empty shard with the data of a base and of log records that the caller reads.

    Call order: begin, load_state, adopt for each block in the directory, load_block for each other
    block, blocks_loaded, replay for each log record, finish. Without a base: begin, replay, finish.

    A BaseState is what a base records besides rows: version, tables, sessions. A block has many
    rows, tombstones (records of deletes) or admission counters of one table.

    pressed  True if memory is nearly full of rows that a flush would allow to leave it; the caller
             sets it to False after a flush
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
        self._distinct = False  # the base has a directory
        self.pressed = False

    def begin(self, excess: int | None = None) -> None:
        """Begin a recovery. Until ``finish``, the tables may exceed the memory budget.

        excess  bytes by which they may exceed it; None: no limit, so that a shard whose budget was
                lowered can load all acknowledged changes
        """
        self._budget.begin_loading(excess)
        self._tables.pressed = self._press

    def _press(self) -> None:
        self.pressed = True

    def load_state(self, state: BaseState) -> None:
        """Set version and sessions to those of a base, and create its tables, still empty."""
        self._distinct = state.distinct
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

    def adopt(self, listed: BlockEntry, offset: int) -> None:
        """Make the live rows of a block of the base known to its table. Reads only their keys.

        listed  the block's entry in the directory
        offset  offset of the block in the base's file

        Raises Corrupt if the block does not fit the entry or its keys are damaged, and OutOfMemory.
        """
        entry = self._tables.numbered(listed.table)
        if entry is None or entry.table.store.blocks is None:
            return
        store, tier = entry.table.store, entry.table.store.blocks
        extent = tier.add(listed.number, offset, listed.count, listed.zones, verified=False)
        positions = np.flatnonzero(listed.live)
        keys = tier.keys(extent)
        if len(keys) != listed.count or store.width != listed.width:
            raise Corrupt(
                f"block {listed.number} of the base", "it differs from its directory entry"
            )
        store.place_cold(keys[positions], tier.locations(extent, positions))
        tier.revive(extent, positions, cached=False)
        self._note_newest(entry, listed.zones)

    def _note_newest(self, entry: TableEntry, zones: Zones) -> None:
        """Update the newest step of a table whose eviction state the base lacks.

        zones  bounds of the metadata of some of its rows
        """
        if entry.number in self._without_policy:
            entry.table.evictor.loaded(zones.greatest_version, zones.greatest_step)

    def load_block(self, block: Block, number: int = 0, offset: int | None = None) -> None:
        """Load one block of the base. Blocks must come in the order in which they were written.

        number, offset  number of the block, and where it is in the base's file; None: its rows
                        cannot stay there, and are copied to memory

        Ignores a block whose table was dropped, and rows if the base has a directory: then they are
        outdated. Raises Corrupt if a sketch (approximate admission counters) does not fit its
        table.
        """
        entry = self._tables.numbered(block.table)
        if entry is None:  # the table was dropped before the state was committed
            return
        match block.kind:
            case blocks.ROWS:
                if self._distinct or not len(block.keys):
                    return
                zones, tier = Zones.of(block), entry.table.store.blocks
                if offset is None or tier is None:
                    _load_rows(entry, block)
                else:
                    extent = tier.add(number, offset, len(block), zones, verified=True)
                    entry.table.place_newest(extent, block.keys, block.versions)
                self._note_newest(entry, zones)
            case blocks.COUNTERS:
                kept = block.versions > entry.counting
                arrays = block.keys[kept], block.totals[kept], block.versions[kept]
                entry.table.put_counters(*arrays)
            case blocks.CELLS:
                _load_cells(entry, block)
            case blocks.TOMBSTONES:
                self._load_tombstones(entry, block)

    def _load_tombstones(self, entry: TableEntry, block: Block) -> None:
        """Store the tombstones of a block, and delete the counters and rows of their keys.

        Rows that are newer than the tombstone stay.

        entry  table of the block
        """
        tables = np.full(len(block.keys), block.table, np.uint32)
        self._tombstones.load(Tombstones(tables, block.keys, block.versions, block.causes))
        if self._distinct:  # the deleted rows were not adopted
            entry.table.discard_counters(np.unique(block.keys))
            return
        order = np.lexsort((block.versions, block.keys))
        keys, versions = block.keys[order], block.versions[order]
        newest = np.append(keys[1:] != keys[:-1], True)  # of each key, its last delete
        entry.table.delete(keys[newest], before=versions[newest])

    def blocks_loaded(self) -> None:
        """Sort the loaded tombstones. Call after the last block, before the first log record.

        Raises Corrupt if a piece of a sketch (approximate admission counters) is missing.
        """
        self._tombstones.settle()
        self._begin_gates()

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

        ``pressed`` has no meaning any more.
        """
        self._begin_gates()
        self._sequencer.sessions.trim()
        self._budget.end_loading()

    def _begin_gates(self) -> None:
        """Tell the admission gates the current version.

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
