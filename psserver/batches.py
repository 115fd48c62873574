"""Collect changes of the version log that are sent to a subscriber together.

A batch contains one change, or several that are merged before they are sent. Of merged changes, the
subscriber gets only the newest value of each row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from psserver.schemas import from_json
from psserver.wanted import Wanted
from storage import records
from storage.records import Kind
from storage.schema import TableSchema

COALESCE_BYTES = 32 << 20  # maximum size of the records in one batch, in bytes


@dataclass(frozen=True, slots=True)
class LoggedChange:
    """One log record of a batch, with the schema of the table that it changes."""

    version: int
    record: records.Record
    schema: TableSchema | None  # None: the record is a barrier, which belongs to no table


@dataclass(slots=True)
class Batch:
    """Changes that are sent to one subscriber together, and acknowledged with one token.

    wanted     tables and contents that the subscriber asked for; other changes are skipped
    most       size of the changes at which the batch is full, in bytes
    schema_of  function of a table's number; returns its schema, or None if the table was dropped
               before the shard started; changes of the rows of such a table are skipped
    """

    wanted: Wanted
    most: int
    schema_of: Callable[[int], TableSchema | None]
    version: int  # version of the newest change read, even if it was skipped
    changes: list[LoggedChange] = field(default_factory=list)
    rows: int = 0  # number of keys in ``changes``
    bytes: int = 0  # approximate size of ``changes``
    full: bool = False  # accepts no further change

    def takes(self, kind: int) -> bool:
        """Return whether a record of this kind may be added.

        A batch that is not empty takes only changes of rows.
        """
        return not self.changes or kind in (Kind.PUSH, Kind.WRITE, Kind.DELETE)

    def take(self, version: int, record: records.Record) -> None:
        """Add the next change of the log, or skip it if the subscriber does not want it."""
        self.version = version
        schema: TableSchema | None = None
        match record:
            case (
                records.PushRecord(table=number, keys=keys)
                | records.DeleteRecord(table=number, keys=keys)
            ):
                schema = self.schema_of(number)
                if schema is None or not self.wanted.wants(schema.name) or not len(keys):
                    return
                self.rows += len(keys)
                width = schema.width if isinstance(record, records.PushRecord) else 0
                self.bytes += len(keys) * (16 + 4 * width)
                most = self.wanted.coalesce_rows or self.rows + 1
                self.full = (
                    not self.wanted.coalesces or self.rows >= most or self.bytes >= self.most
                )
            case records.CreateRecord() | records.AlterRecord() | records.DropRecord():
                schema = from_json(record.schema)
                if not self.wanted.wants(schema.name):
                    return
                self.full = True
            case records.BarrierRecord():
                self.full = True
        self.changes.append(LoggedChange(version, record, schema))

    @property
    def since_us(self) -> int:
        """Microseconds since 1970 when the oldest change of the batch was applied."""
        return self.changes[0].record.origin.time_us
