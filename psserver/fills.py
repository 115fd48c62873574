"""Tables that are filled while they are hidden, on the engine thread.

A table that LoadTable fills takes its number and its place in the log at once, and its name when
it is complete. Until then nobody can pull, push, create or drop under the name.

Before, while a shard waits for the other shards to accept the load, the name is claimed: the table
that will be replaced can be pulled and pushed, but not created, altered or dropped. So the new
table gets its present settings, and a restart takes no other table for the one that was filled.
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
    """The hidden tables of one shard."""

    def __init__(self, tables: Tables, sequencer: Sequencer) -> None:
        self._tables = tables
        self._sequencer = sequencer

    def claim(self, name: str) -> None:
        """Let nobody else create, alter or drop a table of this name, until ``release``."""
        self._tables.claimed.add(name)

    def release(self, name: str) -> None:
        """End what ``claim`` began."""
        self._tables.claimed.discard(name)

    def require_replaceable(self, name: str, *, replace: bool) -> TableEntry | None:
        """Return the table that a new one may replace; None if there is none.

        Raises NotEmpty if it has rows or counters and ``replace`` is not set, and TableLoading.
        """
        self._tables.require_not_hidden(name)
        entry = self._tables.find(name)
        if entry is not None and not replace:
            stats = entry.table.stats()
            if stats.rows or stats.waiting:
                raise NotEmpty(
                    f"table {name!r} has {stats.rows} rows and {stats.waiting} counters; it is"
                    " filled only if it is empty, or with replace"
                )
        return entry

    def begin(self, schema: TableSchema, number: int, *, replace: bool) -> bool:
        """Replace the table of this name by a hidden one without rows, or change nothing.

        number  of the new table, as ``next_number`` returned it

        Returns False if another table has taken the number since.
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
        """Return the number that the next table gets."""
        return self._tables.next_number

    def finish(self, number: int) -> None:
        """Let the table be used under its name."""
        self._tables.reveal(self._tables.require_number(number))

    def cancel(self, name: str, number: int, schema: TableSchema | None) -> None:
        """Drop the table of this number; create an empty one if ``schema`` is given.

        Does nothing that was done before: a restart may repeat it.
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
