"""How many rows of a table have room in host memory.

The memory budget of the shard limits all tables together, and a part of it is set aside for indexes
and counters. Besides, a table may have a limit of its own.
"""

from __future__ import annotations

from storage.arena import Budget
from storage.index import Index
from storage.tiers.base import Writable

LOOK_AHEAD = 64  # ``surely_fits`` looks for room for at most so many times the rows asked for
NEAR_LIMIT = 8 << 20  # bytes


class Room:
    """Tells how many more rows of one table host memory can take.

    host       the tier whose slots the rows take
    index      the index of the table, which grows with new keys
    row_bytes  bytes of memory that a slot takes
    limit      bytes of memory that the table may take
    slack      number of rows for which there is room, as of the last look of ``surely_fits``
    """

    def __init__(self, budget: Budget, host: Writable, index: Index) -> None:
        self._budget, self._host, self._index = budget, host, index
        self.row_bytes = host.row_bytes
        self.limit = budget.limit
        self.slack = 0

    def rows(self) -> int:
        """Return how many slots are free or may be added within the limits."""
        held = self._host.bytes
        own = max(self.limit - self._index.bytes - held, self.limit // 4 - held)
        spare = min(self._budget.spare, own)
        return self._host.room(spare)

    def oversized(self, count: int) -> bool:
        """Return whether ``count`` rows are more than host memory can have at once."""
        return count > self._host.in_host + self.rows()

    @property
    def near_limit(self) -> bool:
        """True if the table must take no more memory than it needs."""
        return self.limit - self._index.bytes - self._host.bytes < NEAR_LIMIT

    def fits(self, count: int, absent: int) -> bool:
        """Return whether there is room for ``count`` more rows.

        absent  how many of them have no entry in the index yet
        """
        free, index = self._host.room(0), self._index
        if count > free and count > self.rows():
            return False
        if count <= free and not absent:
            return True
        left = self._budget.free - self._host.cost(count)
        return index.most_growth(absent) <= left or index.growth(absent) <= left

    def has(self, count: int) -> bool:
        """Return whether the last look of ``surely_fits`` found room for ``count`` more rows."""
        if count > self.slack:
            return False
        self.slack -= count
        return True

    def surely_fits(self, count: int) -> bool:
        """Return whether there is room for ``count`` more rows, whether their keys are new or not.

        Looks only now and then, and does not know what other tables take meanwhile. So the answer
        may be wrong while memory is nearly full.
        """
        if self.has(count):
            return True
        self.slack, many = 0, min(LOOK_AHEAD * count, self.rows())
        if many > count and self.fits(many, many):
            self.slack = many - count
            return True
        return self.fits(count, count)
