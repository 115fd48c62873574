"""Make room in memory for the rows of pushes, before any of the pushes is applied.

Only the engine thread may call the methods.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

from psproto import ps_pb2 as pb
from psserver.requests import Push
from psserver.sequencer import RECORD
from psserver.tables import TableEntry, Tables
from storage.arena import Budget
from storage.block import disk_bytes
from storage.errors import DiskFull
from storage.kernels import Keys

MOVING = 16  # 1/MOVING of disk_bytes is reserved for the rows that a flush moves
SPARE = 4 << 20  # bytes that a push which exceeds the budget may take beyond its rows


class CheckedPush(NamedTuple):
    """A push that passed all checks against its table, and is ready to be applied."""

    push: Push
    entry: TableEntry
    level: pb.Durability  # durability to reach before the reply
    applied: int | None  # its version if it was applied before (this is a retry), else None


class PushRoom:
    """Makes room for the rows of pushes, in tables of one shard.

    budget      memory budget of the tables
    disk_bytes  refuse pushes that would make the base (the on-disk copy of all rows) take more
                bytes than this; 0: no limit
    narrow      whether little room may be left after the last pushes
    """

    def __init__(self, budget: Budget, tables: Tables, disk_bytes: int) -> None:
        self._budget = budget
        self._tables = tables
        self._disk_bytes = disk_bytes
        self.narrow = False

    def make(self, checked: Sequence[CheckedPush]) -> None:
        """Make room in memory for the rows of pushes.

        Raises NoRoom if that needs a flush, and DiskFull if the rows would exceed the limit of the
        base on disk.
        """
        if self._disk_bytes and checked:
            self._require_disk(checked)
        if len(checked) == 1:
            push, entry, _, applied = checked[0]
            if applied is not None or entry.table.store.space.has(len(push.keys)):
                self.narrow = False
                return
        self.narrow = True
        keys: dict[int, list[Keys]] = {}
        for each in checked:
            if each.applied is None:
                keys.setdefault(each.entry.number, []).append(each.push.keys)
        for number, some in keys.items():
            self._tables.require_number(number).table.make_room(some)

    def _require_disk(self, checked: Sequence[CheckedPush]) -> None:
        """Raise DiskFull if the base has no space for the rows of pushes.

        1/MOVING of the limit is not given to pushes, because a flush needs space for rows that it
        moves, before it can delete their old blocks.
        """
        size = self._tables.disk_bytes
        more = sum(
            len(each.push.keys) * disk_bytes(each.entry.schema.width)
            for each in checked
            if each.applied is None
        )
        if size + more > self._disk_bytes - self._disk_bytes // MOVING:
            raise DiskFull(
                "data_dir",
                more,
                f"the rows on disk take {size} bytes, with those that changed since the last flush,"
                f" but disk_bytes={self._disk_bytes}, of which 1/{MOVING} is reserved for flushes",
            )

    def exceeding(self, checked: Sequence[CheckedPush]) -> AbstractContextManager[None]:
        """Return a context manager: in its block, pushes may exceed the memory budget."""
        size = sum(
            RECORD + len(each.push.keys) * (16 + 4 * each.entry.schema.width) for each in checked
        )
        return self._budget.exceeding(2 * size + max(0, -self._budget.free) + SPARE)

    def tight(self, pushes: Sequence[Push]) -> list[TableEntry]:
        """Return those tables of some pushes that have little room left: ``relieve`` them."""
        tight = []
        for push in pushes:
            entry = self._tables.find(push.table)
            if entry is not None and entry.table.store.tight:
                tight.append(entry)
        return tight

    def relieve(self, entries: Sequence[TableEntry]) -> list[TableEntry]:
        """Make some room in tables, ahead of need, without a flush.

        Returns the tables that need more: call it again for them.
        """
        there = [each for each in entries if self._tables.numbered(each.number) is each]
        return [each for each in there if each.table.store.relieve()]

    def unbalanced(self, names: Collection[str]) -> list[TableEntry]:
        """Return those of some tables that may have rows to move between host and GPU memory."""
        entries = map(self._tables.find, names)
        return [
            each
            for each in entries
            if each is not None and (balance := each.table.store.balance) and balance.due
        ]

    def balance(self, entries: Sequence[TableEntry], *, idle: bool) -> list[TableEntry]:
        """Move some rows of tables between host and GPU memory.

        idle  see Balance.slice

        Returns the tables with more rows to move: call it again for them.
        """
        there = [each for each in entries if self._tables.numbered(each.number) is each]
        balances = [(each, each.table.store.balance) for each in there]
        return [each for each, balance in balances if balance and balance.slice(idle=idle)]

    def trim(self) -> bool:
        """If the budget is exceeded, give some memory back, as far as rows can leave it now.

        Returns whether to call it again, because that helped but did not suffice.
        """
        spare = self._budget.spare
        return spare < 0 and self._budget.reclaim(-spare) > 0 and self._budget.spare < 0
