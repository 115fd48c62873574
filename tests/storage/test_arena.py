"""Memory by chunks, and the budget that it comes from."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import pytest

from storage.arena import HUGE, LARGEST_CHUNK, SMALLEST_CHUNK, Arena, Budget
from storage.errors import OutOfMemory

GIB = 1 << 30


def test_a_budget_gives_all_it_has_and_not_a_byte_more() -> None:
    budget = Budget(100)
    budget.take(60)
    budget.take(40)
    assert budget.held == 100
    with pytest.raises(OutOfMemory) as caught:
        budget.take(1)
    assert str(caught.value) == (
        "1 more bytes are needed, but 100 bytes of the memory budget of 100 bytes are in use"
    )
    assert (caught.value.budget, budget.held) == (100, 100)
    budget.give(60)
    budget.take(1)
    assert (budget.held, budget.limit) == (41, 100)


def test_a_new_arena_has_an_address_for_every_row_and_takes_nothing() -> None:
    budget = Budget(GIB)
    arena = Arena(4, np.float32, budget)
    assert (arena.rows, arena.bytes, budget.held) == (0, 0, 0)
    assert arena.array.shape[0] * 16 >= GIB
    assert (arena.array.shape[1], arena.array.dtype) == (4, np.float32)


@pytest.mark.parametrize(
    ("width", "dtype"), [(1, np.float32), (3, np.float32), (4, np.uint64), (16_385, np.float32)]
)
@pytest.mark.parametrize("rows", [1, 100, 10_000])
def test_rows_are_usable_zero_and_paid_for_once_they_are_grown(
    width: int, dtype: type, rows: int
) -> None:
    budget = Budget(4 * GIB)
    arena = Arena(width, dtype, budget)
    arena.grow(rows)
    row_bytes = width * np.dtype(dtype).itemsize
    assert arena.rows >= rows
    assert arena.rows == arena.bytes // row_bytes <= len(arena.array)
    unit = SMALLEST_CHUNK if rows * row_bytes <= HUGE else HUGE
    assert arena.bytes == budget.held == -(-rows * row_bytes // unit) * unit
    ends = arena.array[[0, rows - 1, arena.rows - 1]]
    assert not ends.any()
    arena.array[arena.rows - 1] = 1


def test_growth_keeps_what_was_written_where_it_was() -> None:
    arena = Arena(8, np.uint64, Budget(GIB))
    arena.grow(1)
    address, array = arena.array.ctypes.data, arena.array
    arena.array[: arena.rows] = 7
    before = arena.rows
    arena.grow(500_000)
    assert arena.array is array
    assert arena.array.ctypes.data == address
    assert (arena.array[:before] == 7).all()
    assert not arena.array[before : arena.rows].any()


def test_growing_to_less_than_there_is_does_nothing() -> None:
    budget = Budget(GIB)
    arena = Arena(1, np.float32, budget)
    arena.grow(10)
    for rows in (0, 1, 10, arena.rows):
        arena.grow(rows)
    assert budget.held == arena.bytes == SMALLEST_CHUNK


def test_chunks_are_a_64th_of_what_is_held_within_bounds() -> None:
    budget = Budget(64 * GIB)
    arena = Arena(1 << 14, np.float32, budget)  # a row is 64 KiB, and none is touched
    chunks = []
    while arena.bytes < 4 * GIB:
        before, wanted = arena.bytes, (arena.rows + 1) << 16
        arena.grow(arena.rows + 1)
        unit = SMALLEST_CHUNK if wanted <= HUGE else HUGE
        chunks.append(arena.bytes - before)
        assert arena.bytes % unit == 0
        least = min(max(before // 64, unit), LARGEST_CHUNK)
        assert least <= chunks[-1] < least + unit
    assert chunks[0] == SMALLEST_CHUNK
    assert chunks[-1] == LARGEST_CHUNK
    assert budget.held == arena.bytes == sum(chunks)


def test_growth_that_the_budget_forbids_changes_nothing() -> None:
    budget = Budget(3 * SMALLEST_CHUNK)
    arena = Arena(1, np.float32, budget)
    arena.grow(1)
    arena.array[0] = 5
    rows = arena.rows
    with pytest.raises(OutOfMemory):
        arena.grow(4 * rows)
    assert (arena.rows, arena.bytes, budget.held) == (rows, SMALLEST_CHUNK, SMALLEST_CHUNK)
    assert arena.array[0].tolist() == [5]
    arena.grow(3 * rows)
    assert budget.held == 3 * SMALLEST_CHUNK


def test_arenas_share_their_budget() -> None:
    budget = Budget(2 * SMALLEST_CHUNK)
    first, second = Arena(1, np.float32, budget), Arena(1, np.uint64, budget)
    first.grow(1)
    second.grow(1)
    with pytest.raises(OutOfMemory):
        second.grow(second.rows + 1)
    first.close()
    second.grow(second.rows + 1)
    assert budget.held == second.bytes == 2 * SMALLEST_CHUNK


def test_close_returns_everything_once() -> None:
    budget = Budget(GIB)
    arena = Arena(4, np.float32, budget)
    arena.grow(1_000_000)
    arena.close()
    arena.close()
    assert (budget.held, arena.bytes, arena.rows, len(arena.array)) == (0, 0, 0, 0)


def test_an_address_space_that_is_refused_is_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    budget = Budget(GIB)
    with pytest.raises(OutOfMemory) as caught:
        Arena(4, np.float32, budget)
    assert (caught.value.budget, budget.held) == (GIB, 0)
