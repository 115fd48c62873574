"""What can go wrong in storage. Nothing here knows about gRPC.

* StorageError
  - UnknownTable     the table was never created on this shard
  - SchemaMismatch   the table exists with another schema
  - OutOfMemory      the shard's memory budget does not allow the growth a write needs
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


class OutOfMemory(StorageError):
    """The shard's memory budget does not allow the growth a write needs."""

    def __init__(self, budget: int, held: int, wanted: int) -> None:
        super().__init__(
            f"{wanted} bytes wanted, {held} of the budget of {budget} bytes are already held"
        )
        self.budget = budget
