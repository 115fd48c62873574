"""What can go wrong in storage. Nothing here knows about gRPC.

* StorageError
  - UnknownTable     the table was never created on this shard
  - SchemaMismatch   the table exists with another schema
  - RowOverflow      a push would leave infinity or NaN in a row; it was not applied
  - OutOfMemory      the shard's memory budget does not allow the growth a write needs
  - Corrupt          stored bytes are not what was written; never retried
  - UnknownFormat    stored bytes are whole, but in a format that this release does not read
  - DiskFull         the disk has no room for what a write needs; nothing was changed
  - Compacted        the log no longer holds the versions asked for
  - LogFailed        the log could not be written or synced, and acknowledges nothing more
  - UnknownCheckpoint  there is no checkpoint of that name, or it was never completed
  - StoreFailed      the place of the checkpoints does not answer, or refuses
"""

from __future__ import annotations


class StorageError(Exception):
    """Root of everything that storage raises on purpose."""


class UnknownTable(StorageError):
    """The table was never created on this shard."""

    def __init__(self, table: str) -> None:
        super().__init__(f"no table {table!r} on this shard")
        self.table = table


class SchemaMismatch(StorageError):
    """The table exists with another schema."""

    def __init__(self, table: str, field: str, held: object, asked: object) -> None:
        super().__init__(f"table {table!r} exists with {field} {held!r}, asked for {asked!r}")
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
    """Stored bytes are not what was written; never retried.

    where  the file, and the place in it where that is known
    what   what is wrong there
    """

    def __init__(self, where: str, what: str) -> None:
        super().__init__(f"{where}: {what}")
        self.where = where
        self.what = what


class UnknownFormat(StorageError):
    """Stored bytes are whole, but in a format that this release does not read."""

    def __init__(self, where: str, held: int, known: int) -> None:
        super().__init__(f"{where}: written in format {held}, this release reads {known}")
        self.where = where
        self.held = held
        self.known = known


class DiskFull(StorageError):
    """The disk has no room for what a write needs; nothing was changed."""

    def __init__(self, directory: str, wanted: int) -> None:
        super().__init__(f"no room for {wanted} more bytes in {directory}")
        self.directory = directory
        self.wanted = wanted


class Compacted(StorageError):
    """The log no longer holds the versions asked for; ``first`` is the oldest it still has."""

    def __init__(self, first: int) -> None:
        super().__init__(f"the log begins at version {first}, older ones were asked for")
        self.first = first


class LogFailed(StorageError):
    """The log could not be written or synced, and acknowledges nothing more."""

    def __init__(self, why: str) -> None:
        super().__init__(f"the version log has failed: {why}")
        self.why = why


class UnknownCheckpoint(StorageError):
    """There is no checkpoint of that name, or it was never completed."""

    def __init__(self, name: str, where: str) -> None:
        super().__init__(f"no checkpoint {name!r}: {where} is missing")
        self.name = name


class StoreFailed(StorageError):
    """The place of the checkpoints does not answer, or refuses."""

    def __init__(self, where: str, why: str) -> None:
        super().__init__(f"{where}: {why}")
        self.where = where
        self.why = why
