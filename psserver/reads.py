"""What can be read of a shard, without changing it.

Not thread-safe, except where a method says so: the engine thread is the only caller.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from psproto.codec import WIRE
from psserver.afterimages import ImageBuffers
from psserver.requests import Pull, Push
from psserver.sequencer import RECORD, Sequencer
from psserver.tables import TableEntry, Tables
from psserver.tombstones import TombstoneQueue, Tombstones
from psserver.views import (
    Capture,
    KeyView,
    TableList,
    TableView,
    capture_table,
    view_keys,
    view_table,
)
from storage.eviction.contract import FIRST_STEP
from storage.kernels import Keys
from storage.results import TableStats, Tally
from storage.schema import TableSchema
from storage.tiers.base import Scan


class ShardReads:
    """The readable side of a shard. ``Shard`` adds the changes."""

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
        self.sessions = sequencer.sessions

    @property
    def version(self) -> int:
        """Version of the newest change. May be read from any thread."""
        return self._sequencer.version

    @property
    def buffer_bytes(self) -> int:
        """Bytes of after-images that are on their way to the log, or were. From any thread."""
        return self._buffers.bytes

    def describe(self, name: str) -> tuple[TableSchema, TableStats]:
        """Return schema and size of a table."""
        table = self._tables.get(name).table
        return table.schema, table.stats()

    def tables(self) -> list[str]:
        """Return the names of the tables, sorted."""
        return self._tables.names()

    def holds(self, number: int) -> bool:
        """Return whether the table of this number is still there."""
        return self._tables.numbered(number) is not None

    def step(self, name: str) -> int:
        """Return the largest step that was pushed to a table; 0 if none was."""
        step = self._tables.get(name).table.evictor.step
        return step if step > FIRST_STEP else 0

    def tally(self, name: str) -> tuple[Tally, int]:
        """Return what the rules of a table did, and how many counters they discarded."""
        table = self._tables.get(name).table
        return table.tally, table.gate.dropped

    def size(self, parts: Sequence[Push | Pull]) -> int:
        """Return about how many bytes of rows these are about; their records take less.

        A table that does not exist counts nothing. May be called from any thread.
        """
        size = 0
        for part in parts:
            entry = self._tables.find(part.table)
            if entry is not None:
                size += record_bytes(entry, part)
        return size

    def reply_bytes(self, pulls: Sequence[Pull]) -> int:
        """Return the bytes of arrays in the reply to these.

        A table that does not exist counts nothing. May be called from any thread.
        """
        size = 0
        for pull in pulls:
            entry = self._tables.find(pull.table)
            if entry is not None:
                size += pulled_bytes(entry, pull)
        return size

    def scan(self, name: str) -> tuple[TableSchema, int, Scan]:
        """Return schema, version and rows of a table, to be copied by slices on this thread."""
        table = self._tables.get(name).table
        return table.schema, self.version, table.scan()

    def rows_of(self, number: int) -> Scan | None:
        """Return the rows of a table; None once the table of this number is dropped."""
        entry = self._tables.numbered(number)
        return None if entry is None else entry.table.scan()

    def view_table(self, name: str) -> TableView:
        """Return a table, to be read by slices."""
        return view_table(self._tables.get(name), self.version)

    def view_keys(self, name: str, keys: Keys) -> KeyView:
        """Return the facts of distinct keys of this shard."""
        return view_keys(self._tables.get(name), keys, self.version, self._sequencer.now())

    def schema_of(self, number: int) -> TableSchema | None:
        """Return the schema of a table, dropped or not; None for a table dropped long ago.

        May be called from any thread.
        """
        return self._tables.schema_of(number)

    def table_list(self) -> TableList:
        """Return the tables by number."""
        tables = sorted(self._tables, key=lambda entry: entry.number)
        return TableList(
            self.version,
            self.tombstone_horizon,
            tuple((entry.number, entry.schema, entry.created) for entry in tables),
        )

    def capture(self) -> Capture:
        """Return the shard as it is now, to be read through while pushes go on.

        Buffers that wait for the next push are freed: a shard that is flushed regularly and has
        nothing to do keeps none.
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
        """Deletes up to this version may have lost their tombstones."""
        return self._tombstones.horizon

    def tombstones(self, after: int, limit: int) -> Tombstones:
        """Return the oldest tombstones after a version: about ``limit``, and whole versions."""
        return self._tombstones.after(after, limit)

    def dump(self) -> dict[str, Any]:
        """Return copies of all rows, for tests: as large as the shard."""
        return {name: self._tables.get(name).table.dump() for name in self.tables()}


def record_bytes(entry: TableEntry, part: Push | Pull) -> int:
    """Return the bytes of rows that a request is about; its record takes no more."""
    return RECORD + len(part.keys) * (16 + 4 * entry.schema.width)


def pulled_bytes(entry: TableEntry, pull: Pull) -> int:
    """Return the bytes of arrays in the answer to a pull."""
    return len(pull.keys) * (entry.schema.dim * WIRE[pull.dtype].itemsize + 24 * pull.with_metadata)
