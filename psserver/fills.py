"""Hidden tables: LoadTable fills them, and publishes them to clients only when they are complete.

All functions must run on the engine thread. A hidden table has a number and a record in the log
from the beginning, but clients cannot pull, push, create or drop under its name until it is
complete.

Before a hidden table is created, the shard waits until the other shards accept the load. During
this time the name is claimed: an old table of this name can be pulled and pushed, but not created,
altered or dropped. So the new table gets the current settings of the old one, and a restart cannot
mistake a different table for the hidden one.
"""

from __future__ import annotations

from psserver.errors import NotEmpty
from psserver.schemas import to_json
from psserver.sequencer import RECORD, Sequencer
from psserver.tables import TableEntry, Tables
from storage import records
from storage.records import Kind
from storage.schema import TableSchema


class Fills:
    """Creates, publishes and cancels the hidden tables of one shard, and claims their names."""

    def __init__(self, tables: Tables, sequencer: Sequencer) -> None:
        self._tables = tables
        self._sequencer = sequencer

    def claim(self, name: str) -> None:
        """Forbid all clients to create, alter or drop a table of this name, until ``release``."""
        self._tables.claimed.add(name)

    def release(self, name: str) -> None:
        """Allow clients to create, alter and drop a table of this name again."""
        self._tables.claimed.discard(name)

    def require_replaceable(self, name: str, *, replace: bool) -> TableEntry | None:
        """Return the table ``name``, which a hidden table may replace; None if it does not exist.

        replace  allow this even if the table has rows or admission counters

        Raises NotEmpty if the table has any and ``replace`` is False, TableLoading if a table of
        this name is hidden.
        """
        self._tables.require_not_hidden(name)
        entry = self._tables.find(name)
        if entry is not None and not replace:
            stats = entry.table.stats()
            if stats.rows or stats.waiting:
                raise NotEmpty(
                    f"table {name!r} has {stats.rows} rows and {stats.waiting} admission counters;"
                    " to delete them and fill the table, set 'replace'"
                )
        return entry

    def begin(self, schema: TableSchema, number: int, *, replace: bool) -> bool:
        """Create a hidden table without rows; if a table ``schema.name`` exists, drop it first.

        schema   schema of the hidden table
        number   number of the hidden table, from ``next_number``
        replace  allow this even if the old table has rows or admission counters

        Returns False, with nothing changed, if a different table has taken the number meanwhile.
        Raises NotEmpty or TableLoading, with nothing changed.
        """
        if number != self._tables.next_number:
            return False
        old = self.require_replaceable(schema.name, replace=replace)
        create = records.encode_create(self._sequencer.origin(), number, to_json(schema))
        if old is None:
            self._sequencer.reserve([RECORD + len(create[1])])
            self._tables.add(number, schema, self._sequencer.version + 1, hidden=True)
        else:
            drop = records.encode_drop(self._sequencer.origin(), old.number, to_json(old.schema))
            self._sequencer.reserve([RECORD + len(drop[1]), RECORD + len(create[1])])
            self._tables.add(number, schema, self._sequencer.version + 2, hidden=True)
            self._tables.remove(old)
            self._sequencer.append(Kind.DROP, drop)
        self._sequencer.append(Kind.CREATE, create)
        return True

    def next_number(self) -> int:
        """Return the number that the next created table gets."""
        return self._tables.next_number

    def finish(self, number: int) -> None:
        """Publish the filled table with this number: clients can use it from now on."""
        self._tables.reveal(self._tables.require_number(number))

    def cancel(self, name: str, number: int, schema: TableSchema | None) -> None:
        """Drop the hidden table with this name and number, if it exists.

        schema  then create an empty table with this schema, unless a table of its name exists;
                None: create no table

        If this is called again after a crash, steps that were completed before are skipped.
        """
        entry = self._tables.numbered(number)
        if entry is not None and entry.schema.name == name:
            drop = records.encode_drop(self._sequencer.origin(), number, to_json(entry.schema))
            self._sequencer.reserve([RECORD + len(drop[1])])
            self._tables.remove(entry)
            self._sequencer.append(Kind.DROP, drop)
        if schema is not None and self._tables.find(name) is None:
            number = self._tables.next_number
            create = records.encode_create(self._sequencer.origin(), number, to_json(schema))
            self._sequencer.reserve([RECORD + len(create[1])])
            self._tables.add(number, schema, self._sequencer.version + 1)
            self._sequencer.append(Kind.CREATE, create)
