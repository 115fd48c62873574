"""The errors of storage. Nothing here knows about gRPC.

* StorageError
  - UnknownTable     the table was never created on this shard
  - SchemaMismatch   the table exists with another schema
  - RowOverflow      a push would leave infinity or NaN in a row; it was not applied
  - OutOfMemory      the shard's memory budget does not allow the growth that a write needs
  - Corrupt          stored bytes differ from what was written; never retried
  - UnknownFormat    stored bytes are undamaged, but this release cannot read their format
  - DiskFull         the disk has no room for what a write needs; nothing was changed
  - Compacted        the log no longer contains the requested versions
  - LogFailed        the log could not be written or synced; no further change is acknowledged
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
    """The table exists with another schema."""

    def __init__(self, table: str, field: str, existing: object, requested: object) -> None:
        super().__init__(
            f"table {table!r} exists with {field} {existing!r}, requested was {requested!r}"
        )
        self.table = table
        self.field = field


class RowOverflow(StorageError):
    """A push would leave infinity or NaN in a row; nothing of it was applied."""

    def __init__(self, table: str, key: int, gradient: float) -> None:
        super().__init__(
            f"table {table!r}: the push would leave infinity or NaN in the row of key {key}, whose"
            f" gradient reaches {gradient:g}; clip the gradients or lower the learning rate"
        )
        self.table = table
        self.key = key


class OutOfMemory(StorageError):
    """The shard's memory budget does not allow the growth that a write needs.

    what  prefix of the message: what needs the memory
    """

    def __init__(self, budget: int, held: int, wanted: int, what: str = "") -> None:
        super().__init__(
            f"{what}{wanted} more bytes needed, {held} of the memory budget of {budget} bytes in"
            " use"
        )
        self.budget, self.held, self.wanted, self.what = budget, held, wanted, what


class Corrupt(StorageError):
    """Stored bytes differ from what was written; never retried.

    where  the file, and the position in it if that is known
    what   what is wrong there
    """

    def __init__(self, where: str, what: str) -> None:
        super().__init__(f"{where}: {what}")
        self.where = where
        self.what = what


class UnknownFormat(StorageError):
    """Stored bytes are undamaged, but this release cannot read their format."""

    def __init__(self, where: str, found: int, known: int) -> None:
        super().__init__(f"{where}: written in format {found}, this release reads {known}")
        self.where = where
        self.found = found
        self.known = known


class DiskFull(StorageError):
    """The disk has no room for what a write needs; nothing was changed."""

    def __init__(self, directory: str, wanted: int) -> None:
        super().__init__(f"no room for {wanted} more bytes in {directory}")
        self.directory = directory
        self.wanted = wanted


class Compacted(StorageError):
    """The log no longer contains the requested versions; ``first`` is its oldest version."""

    def __init__(self, first: int) -> None:
        super().__init__(f"the log begins at version {first}; older versions were requested")
        self.first = first


class LogFailed(StorageError):
    """The log could not be written or synced; no further change is acknowledged."""

    def __init__(self, why: str) -> None:
        super().__init__(f"the version log has failed: {why}")
        self.why = why


class UnknownCheckpoint(StorageError):
    """No checkpoint has that name, or it was never completed."""

    def __init__(self, name: str, where: str) -> None:
        super().__init__(f"no checkpoint {name!r}: {where} is missing")
        self.name = name


class StoreFailed(StorageError):
    """The checkpoint store does not respond, or denies access."""

    def __init__(self, where: str, why: str) -> None:
        super().__init__(f"{where}: {why}")
        self.where = where
        self.why = why
