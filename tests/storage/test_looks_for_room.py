"""How often pushes look for room in host memory while few slots are free."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiered import Tiered

from storage.arena import Budget
from storage.index import Index
from storage.room import Room
from storage.rowstore import AHEAD

MIB = 1 << 20
COUNT = 1000


class Slots:
    """A full tier whose released slots are free."""

    def __init__(self, free: int) -> None:
        self.slots, self.capacity = self, 100_000
        self.free, self.used = free, self.capacity
        self.row_bytes, self.bytes = 64, 64 * self.capacity

    def room(self, spare: int) -> int:
        return self.free + max(0, spare) // self.row_bytes

    def cost(self, count: int) -> int:
        return max(0, count - self.free) * self.row_bytes


def full_room(free: int) -> tuple[Room, list[int]]:
    """A room with ``free`` free slots and no memory for more; and the rows it has looked for."""
    budget = Budget(64 * MIB)
    index = Index(budget)
    index.insert(np.arange(100_000, dtype=np.uint64), np.ones(100_000, np.uint64))
    host: Any = Slots(free)
    room = Room(budget, host, index)
    room.limit = host.bytes + index.bytes
    looked: list[int] = []
    fits = room.fits

    def counted(count: int, absent: int) -> bool:
        looked.append(count)
        return fits(count, absent)

    room.fits = counted  # type: ignore[method-assign]
    return room, looked


def test_few_free_slots_are_looked_for_once_for_several_pushes() -> None:
    room, looked = full_room(free=10 * COUNT)
    for _ in range(10):
        assert room.surely_fits(COUNT)
        room._host.slots.free -= COUNT  # type: ignore[misc]
    assert looked == [10 * COUNT]
    assert not room.surely_fits(COUNT)


@pytest.mark.parametrize("rows", [1, 10, 31, 32, 3200])
def test_a_table_is_tight_if_fewer_slots_are_free_than_are_kept_free(
    tmp_path: Path, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cold = Tiered(tmp_path)
    cold.push(np.arange(rows))
    cold.flush()
    space, kept = cold.store.space, -(-rows // AHEAD)
    for free in (0, kept - 1, kept):
        monkeypatch.setattr(space, "rows", lambda free=free: free)
        for slack in (0, free // 2, free):  # what is left of the last look
            space.slack = slack
            assert cold.store.tight == (free < kept)
    monkeypatch.setattr(space, "rows", lambda: 0)
    space.slack = 0
    cold.store.relieve()
    assert cold.store.host.rows <= rows - kept
    cold.push(np.arange(rows))
    assert not cold.store.tight, "changed rows cannot leave"
    cold.table.close()
    cold.base.close()
