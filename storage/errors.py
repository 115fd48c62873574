"""The errors of storage. Nothing here knows about gRPC.

* StorageError
  - UnknownTable     the table was never created on this shard
  - SchemaMismatch   the table exists with a different schema
  - RowOverflow      a push would leave infinity or NaN in a row; it was not applied
  - OutOfMemory      a write needs more memory than the shard's memory budget has left
  - NoRoom           a write needs memory that the next flush can free
  - Corrupt          stored bytes differ from what was written; never retried
  - UnknownFormat    stored bytes are undamaged, but this release cannot read their format
  - DiskFull         the disk has no room for a write; nothing was changed
  - Compacted        the log no longer contains the requested versions
  - LogFailed        the version log could not be written or synced; it accepts no more changes
  - UnknownCheckpoint  no checkpoint has that name, or it was never completed
  - StoreFailed      the checkpoint store does not respond, or denies access
"""

from __future__ import annotations


class StorageError(Exception):
    """Base class of the errors that storage raises."""


class UnknownTable(StorageError):
    """The table was never created on this shard."""

    def __init__(self, table: str) -> None:
        super().__init__(f"no table {table!r} on this shard")
        self.table = table


class SchemaMismatch(StorageError):
    """The table exists with a different schema.

    field      name of the first field that differs
    existing   value of the field in the existing table
    requested  value of the field in the request
    """

    def __init__(self, table: str, field: str, existing: object, requested: object) -> None:
        super().__init__(
            f"table {table!r} exists with {field} {existing!r}, but {requested!r} was requested"
        )
        self.table = table
        self.field = field


class RowOverflow(StorageError):
    """A push would leave infinity or NaN in a row; nothing of the push was applied.

    key       first key whose row would overflow
    gradient  largest magnitude in the gradient of this key
    """

    def __init__(self, table: str, key: int, gradient: float) -> None:
        super().__init__(
            f"table {table!r}: the push would leave infinity or NaN in the row of key {key}"
            f" (largest gradient: {gradient:g}); clip the gradients or lower the learning rate"
        )
        self.table = table
        self.key = key


class OutOfMemory(StorageError):
    """A write needs more memory than the shard's memory budget has left.

    budget  size of the budget, in bytes
    held    bytes of the budget that are in use
    wanted  further bytes that the write needs
    what    prefix of the message: names whatever needs the memory; ends in ": "
    advice  end of the message: what to do; "" or text that begins with ": "
    """

    def __init__(
        self, budget: int, held: int, wanted: int, what: str = "", advice: str = ""
    ) -> None:
        super().__init__(
            f"{what}{wanted} more bytes are needed, but {held} bytes of the memory budget of"
            f" {budget} bytes are in use{advice}"
        )
        self.budget, self.held, self.wanted, self.what = budget, held, wanted, what
        self.advice = advice


class NoRoom(OutOfMemory):
    """A write needs more rows in memory than have room now. A flush makes room, so try it again.

    oversized  True: the write needs more rows than memory can have at once, so a flush alone does
               not help
    """

    def __init__(self, budget: int, held: int, wanted: int, what: str, oversized: bool) -> None:
        super().__init__(budget, held, wanted, what, " by rows that are not on disk yet")
        self.oversized = oversized


class Corrupt(StorageError):
    """Stored bytes differ from what was written. The read is never retried.

    where  the file, and the position in the file if that is known
    what   the damage that was found there
    """

    def __init__(self, where: str, what: str) -> None:
        super().__init__(f"{where}: {what}")
        self.where = where
        self.what = what


class UnknownFormat(StorageError):
    """Stored bytes are undamaged, but this release cannot read their format.

    where  the file, and the position in the file if that is known
    found  format number in the file
    known  format number that this release reads
    """

    def __init__(self, where: str, found: int, known: int) -> None:
        super().__init__(f"{where}: written in format {found}, but this release reads {known}")
        self.where = where
        self.found = found
        self.known = known


class DiskFull(StorageError):
    """The disk has no room for a write; nothing was changed.

    directory  directory that was written to
    wanted     bytes that the write needs; 0: unknown
    limit      the limit that was reached, as text; "": the size of the disk
    """

    def __init__(self, directory: str, wanted: int, limit: str = "") -> None:
        size = f"{wanted} more bytes" if wanted else "more bytes"
        super().__init__(f"no room for {size} in {directory}{limit and ': '}{limit}")
        self.directory = directory
        self.wanted = wanted


class Compacted(StorageError):
    """The log no longer contains the requested versions.

    first  oldest version that the log still contains
    """

    def __init__(self, first: int) -> None:
        super().__init__(f"the log begins at version {first}, but older versions were requested")
        self.first = first


class LogFailed(StorageError):
    """The version log could not be written or synced. It accepts no more changes.

    why  the error of the write or sync
    """

    def __init__(self, why: str) -> None:
        super().__init__(f"the version log has failed: {why}")
        self.why = why


class UnknownCheckpoint(StorageError):
    """No checkpoint has that name, or it was never completed.

    name   name of the checkpoint
    where  URL of the missing MANIFEST.json
    """

    def __init__(self, name: str, where: str) -> None:
        super().__init__(f"no checkpoint {name!r}: {where} is missing")
        self.name = name


class StoreFailed(StorageError):
    """The checkpoint store does not respond, or denies access.

    where  URL of the file
    why    the error of the file system
    """

    def __init__(self, where: str, why: str) -> None:
        super().__init__(f"{where}: {why}")
        self.where = where
        self.why = why
