"""The methods of a shard that read its tables and change nothing.

Only the engine thread may call them, except where a docstring allows any thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from psproto import lanes
from psproto.codec import WIRE
from psserver.afterimages import ImageBuffers
from psserver.blockchecks import BlockChecks
from psserver.capture import Capture, capture_table
from psserver.requests import Pull, Push
from psserver.sequencer import RECORD, Sequencer
from psserver.tables import TableEntry, Tables
from psserver.tombstonequeue import TombstoneQueue
from psserver.tombstones import Tombstones
from psserver.views import (
    KeyView,
    TableList,
    TableView,
    view_keys,
    view_table,
)
from storage.blockscan import ColdPages
from storage.eviction.contract import FIRST_STEP
from storage.gpu.gpu import Gpu
from storage.gpupull import pull_to_gpu
from storage.kernels import Keys, Rows
from storage.results import Moves, TableStats, Tally
from storage.schema import TableSchema
from storage.table import Table
from storage.tablescan import ExactScan, TableScan


class ColdRead(NamedTuple):
    """Pieces of the disk that a request needs, because they hold rows of one table.

    If all of them are in memory already, ``pages`` is empty.
    """

    table: str  # name of the table
    entry: TableEntry
    pages: ColdPages


class ShardReads:
    """Base class of ``Shard`` with the methods that read; ``Shard`` adds those that change it.

    tombstones  records of deletes
    buffers     buffers for copies of pushed rows on their way to the log
    """

    def __init__(
        self,
        tables: Tables,
        sequencer: Sequencer,
        tombstones: TombstoneQueue,
        buffers: ImageBuffers,
    ) -> None:
        self._tables = tables
        self._sequencer = sequencer
        self._tombstones = tombstones
        self._buffers = buffers
        self.checks = BlockChecks(tables)
        self.sessions = sequencer.sessions

    @property
    def version(self) -> int:
        """Version of the newest change; 0 before the first one. May be read from any thread."""
        return self._sequencer.version

    @property
    def buffer_bytes(self) -> int:
        """Total size of the buffers for copies of pushed rows on their way to the log, in bytes.

        Includes buffers that are not in use. May be read from any thread.
        """
        return self._buffers.bytes

    def describe(self, name: str) -> tuple[TableSchema, TableStats]:
        """Return the schema of a table, and its numbers of rows, counters and bytes.

        Raises UnknownTable, or TableLoading while the table is being filled.
        """
        table = self._tables.get(name).table
        return table.schema, table.stats()

    @property
    def base_bytes(self) -> int:
        """Bytes on disk that the base (the on-disk copy of all rows) takes. Any thread may read."""
        file = self._tables.file
        return 0 if file is None else file.allocated

    @property
    def disk_bytes(self) -> int:
        """Bytes that count against the setting disk_bytes: those of the base, and those that the
        next flush adds. Any thread may read.
        """
        return self._tables.disk_bytes

    def rows(self, name: str) -> int:
        """Return the number of rows of a table; 0 if there is no such table.

        May be called from any thread.
        """
        entry = self._tables.find(name)
        return 0 if entry is None else len(entry.table)

    def tables(self) -> list[str]:
        """Return the table names, sorted, without tables that are still being filled."""
        return self._tables.names()

    def number_of(self, name: str) -> int:
        """Return the number of a table. A table that is created again gets a different number."""
        return self._tables.get(name).number

    def holds(self, number: int) -> bool:
        """Return whether the table with this number exists, that is, has not been dropped."""
        return self._tables.numbered(number) is not None

    def suspect(self, number: int, block: int) -> None:
        """Note that a block of the table with this number is damaged, so that it is examined soon.

        Any thread may call this.
        """
        self._tables.suspect(number, block)

    def held_blocks(self) -> list[int]:
        """Return the numbers of blocks of dropped tables that scans are still reading."""
        return self._tables.held()

    def step(self, name: str) -> int:
        """Return the largest training step pushed to a table; 0 before the first push."""
        step = self._tables.get(name).table.evictor.step
        return step if step > FIRST_STEP else 0

    def moves(self, name: str) -> Moves:
        """Return what happened between the tiers of a table since the server started."""
        return self._tables.get(name).table.store.moves

    def tally(self, name: str) -> tuple[Tally, int]:
        """Return what the admission and eviction rules of a table did since the server started.

        The result is (keys admitted and refused, and rows evicted; number of admission counters
        that were discarded by age, for lack of room, or by an alteration).
        """
        table = self._tables.get(name).table
        return table.tally, table.gate.dropped

    def size(self, parts: Sequence[Push | Pull]) -> int:
        """Return an upper bound for the total size of the log records of some requests, in bytes.

        Requests for a table that does not exist count 0. May be called from any thread.
        """
        size = 0
        for part in parts:
            entry = self._tables.find(part.table)
            if entry is not None:
                size += record_bytes(entry, part)
        return size

    def reply_bytes(self, pulls: Sequence[Pull]) -> int:
        """Return the total size of the arrays in the replies to some pulls, in bytes.

        Pulls from a table that does not exist count 0. May be called from any thread.
        """
        size = 0
        for pull in pulls:
            entry = self._tables.find(pull.table)
            if entry is not None:
                size += pulled_bytes(entry, pull)
        return size

    def cold_reads(
        self, pushes: Sequence[Push], pulls: Sequence[Pull], *, prefetch: bool = False
    ) -> list[ColdRead]:
        """Return the pieces of the disk that some requests need; [] if no row is on disk only.

        prefetch  return those of prefetches, instead of those of all other requests

        Requests for tables that do not exist need nothing.
        """
        reads: list[ColdRead] = []
        for push in pushes:
            entry = self._tables.find(push.table)
            if entry is not None and entry.table.cold_rows:
                _add_read(reads, entry, push, whole=True, meta=True)
        for pull in pulls:
            entry = self._tables.find(pull.table)
            if entry is not None and entry.table.cold_rows and pull.prefetch is prefetch:
                meta = prefetch or pull.with_metadata  # a push probably follows a prefetch
                _add_read(reads, entry, pull, whole=prefetch, meta=meta)
        return reads

    def cold_read(self, number: int, keys: Keys) -> ColdRead | None:
        """Return the pieces of the disk that hold rows of ``keys`` in the table with this number.

        None: no row of them is on disk only, all pieces are in memory, or the table was dropped.
        """
        entry = self._tables.numbered(number)
        if entry is None or not entry.table.cold_rows:
            return None
        pages = entry.table.store.pages(keys, whole=True, meta=True)
        if pages is None or pages.empty:
            return None
        return ColdRead(entry.schema.name, entry, pages)

    def settle(self, reads: Sequence[ColdRead]) -> None:
        """Remember what was verified while the pieces of ``reads`` were read.

        Raises Corrupt if a piece that is still in use is damaged.
        """
        for read in reads:
            table = read.entry.table
            if table.store.blocks is not None and self.holds(read.entry.number):
                table.store.blocks.settle(read.pages)

    def scan(self, name: str) -> tuple[TableSchema, int, int, ExactScan]:
        """Return (schema of a table, its number, version of the shard, scan of the table's rows).

        The scan stays valid while pushes continue, until the table is dropped. It reads each row
        exactly once.
        """
        entry = self._tables.get(name)
        return entry.schema, entry.number, self.version, entry.table.exact_scan()

    def rows_of(self, number: int) -> TableScan | None:
        """Return a scan over the rows of the table with this number; None if it was dropped."""
        entry = self._tables.numbered(number)
        return None if entry is None else entry.table.scan()

    def view_table(self, name: str) -> TableView:
        """Return schema, statistics and row scans of a table, for reading it in slices."""
        return view_table(self._tables.get(name), self.version)

    def view_keys(self, name: str, keys: Keys) -> KeyView:
        """Return row, metadata and admission count of each key.

        keys  uint64[n], distinct, owned by this shard
        """
        return view_keys(self._tables.get(name), keys, self.version, self._sequencer.now())

    def schema_of(self, number: int) -> TableSchema | None:
        """Return the schema of the table with this number.

        Dropped tables have one too, but only the last 4096 of them; None for older ones. May be
        called from any thread.
        """
        return self._tables.schema_of(number)

    def table_list(self) -> TableList:
        """Return the shard's version, and all tables, ordered by number, with schema and version of
        creation.
        """
        tables = sorted(self._tables, key=lambda entry: entry.number)
        return TableList(
            self.version,
            self.tombstone_horizon,
            tuple((entry.number, entry.schema, entry.created) for entry in tables),
        )

    def capture(self) -> Capture:
        """Return access to all data of the shard as of the present version, while pushes continue.

        Also frees the buffers for log records that are not in use. Each flush calls this, so an
        idle shard does not keep them.
        """
        if self._sequencer.log is not None:
            self._buffers.drain(self._sequencer.log.written)
        return Capture(
            self.version,
            self._tables.next_number,
            tuple(map(capture_table, self._tables)),
            self.sessions.snapshot(),
            self._tombstones.all(),
            self.tombstone_horizon,
        )

    @property
    def tombstone_horizon(self) -> int:
        """Largest version whose tombstones (records of deletes) may have been discarded."""
        return self._tombstones.horizon

    def tombstones(self, after: int, limit: int) -> Tombstones:
        """Return about ``limit`` tombstones newer than version ``after``, oldest first.

        Never splits the tombstones of one version, so the result may exceed ``limit``.
        """
        return self._tombstones.after(after, limit)

    def dump(self) -> dict[str, Any]:
        """Return copies of all rows, by table name. Only for tests: takes much memory."""
        return {name: self._tables.get(name).table.dump() for name in self.tables()}


def _add_read(
    reads: list[ColdRead], entry: TableEntry, part: Push | Pull, *, whole: bool, meta: bool
) -> None:
    """Append the pages of the disk that one request needs to ``reads``, if it needs any.

    whole, meta  see RowStore.pages
    """
    pages = entry.table.store.pages(part.keys, whole=whole, meta=meta)
    if pages is not None:
        reads.append(ColdRead(part.table, entry, pages))


def record_bytes(entry: TableEntry, part: Push | Pull) -> int:
    """Return an upper bound for the size of a request's log record, in bytes.

    The record has a header and, for each key, 16 bytes and the row.
    """
    return RECORD + len(part.keys) * (16 + 4 * entry.width)


def pulled_bytes(entry: TableEntry, pull: Pull) -> int:
    """Return the size of the arrays in the reply to a pull, in bytes."""
    if pull.prefetch:
        return 0
    return len(pull.keys) * (entry.schema.dim * WIRE[pull.dtype].itemsize + 24 * pull.with_metadata)


def rows_for(pull: Pull, dim: int) -> Rows | None:
    """Return memory for the embeddings of a pull, float32[n, dim]: in its room, if it has one.

    Returns None if the size of the room is not that of the reply's arrays, because the client
    expects a different dim.
    """
    n, room = len(pull.keys), pull.room
    if room is None or (not n and not len(room)):
        return np.empty((n, dim), np.float32)
    if len(room) != lanes.room_bytes(n, dim, pull.dtype, pull.with_metadata):
        return None
    if WIRE[pull.dtype] != np.float32:
        return np.empty((n, dim), np.float32)
    return lanes.rows_in(room, n, dim)


def pull_to_room(gpu: Gpu | None, table: Table, pull: Pull) -> None:
    """Write the rows of a pull to its room in GPU memory, and wait until they are there.

    Writes nothing if the room has another size than the rows, because the client expects a
    different dim.
    """
    room = pull.gpu_room
    assert gpu is not None
    assert room is not None
    if len(pull.keys) and room.size == 4 * len(pull.keys) * table.schema.dim:
        pull_to_gpu(gpu, table, pull.keys, pull.mode, room.address)
