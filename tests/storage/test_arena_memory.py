"""Where memory comes from and goes to: budgets that loading may exceed, moves, and failures."""

from __future__ import annotations

import gc
import mmap
import resource
import threading
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from alone import alone

from storage import arena as module
from storage.admission.rules import Counter, Sketch
from storage.arena import HUGE, SMALLEST_CHUNK, Arena, Budget
from storage.errors import OutOfMemory
from storage.initializers import make_initializer
from storage.optimizers import make_optimizer
from storage.schema import TableSchema
from storage.slots import EVERY, LOOK
from storage.table import Table

MIB, GIB = 1 << 20, 1 << 30
FEW = 256 * MIB  # bytes of address space: 1/64 of it is less than an arena needs later


def schema(name: str = "t", **changes: Any) -> TableSchema:
    fields: dict[str, Any] = {
        "name": name,
        "dim": 8,
        "optimizer": make_optimizer("adagrad", None, {}),
        "initializer": make_initializer("uniform", {}),
    }
    return TableSchema(**{**fields, **changes})


def fill(table: Table, keys: Any, version: int = 1) -> None:
    keys = np.asarray(keys, np.uint64)
    gradients = np.ones((len(keys), table.schema.dim), np.float32)
    table.push(keys, gradients, np.ones(len(keys), np.uint32), version=version, step=1)


def resident() -> int:
    """Bytes of memory that this process has."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE


# ---- budgets


def test_the_garbage_collector_may_free_memory_while_memory_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    budget = Budget(MIB)
    cycle: list[Any] = [Arena(1, np.float32, budget)]
    cycle[0].grow(1)
    cycle.append(cycle)
    del cycle
    refused: list[BaseException] = []

    class Collected(OutOfMemory):
        def __init__(self, *args: Any) -> None:
            gc.collect()  # as may happen whenever an object is made
            super().__init__(*args)

    def take() -> None:
        try:
            budget.take(GIB)
        except OutOfMemory as error:
            refused.append(error)

    monkeypatch.setattr(module, "OutOfMemory", Collected)
    taker = threading.Thread(target=take, daemon=True)
    taker.start()
    taker.join(20)
    assert (len(refused), budget.held, budget.reserved) == (1, 0, 0)


def test_loading_may_exceed_the_budget_and_growth_afterwards_may_not() -> None:
    budget = Budget(100)
    budget.begin_loading()
    budget.take(250)
    budget.end_loading()
    assert (budget.held, budget.free, budget.limit) == (250, -150, 100)
    with pytest.raises(OutOfMemory):
        budget.take(1)
    budget.give(200)
    budget.take(50)
    assert budget.free == 0


def test_loading_may_be_given_a_bound() -> None:
    budget = Budget(100)
    budget.begin_loading(20)
    budget.take(120)
    with pytest.raises(OutOfMemory):
        budget.take(1)
    assert budget.held == 120


def test_an_arena_takes_what_it_needs_and_no_chunk_while_rows_are_loaded() -> None:
    budget = Budget(10 * MIB)
    arena = Arena(1024, np.float32, budget)  # a row is a page
    budget.begin_loading()
    for rows in (1, 2, 700, 701, 10_000):
        arena.grow(rows)
        assert arena.bytes == budget.held == rows * 4096
    arena.array[9_999] = 1
    budget.end_loading()
    with pytest.raises(OutOfMemory):
        arena.grow(10_001)
    assert arena.rows == 10_000


def test_what_threads_give_back_at_once_is_counted() -> None:
    budget = Budget(1 << 40)
    budget.take(8 * 20_000)

    def give() -> None:
        for _ in range(20_000):
            budget.give(1)
            budget.take(1)
            budget.give(1)

    threads = [threading.Thread(target=give) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert budget.held == 0


# ---- address space


def test_thousands_of_arenas_fit_whatever_the_budget() -> None:
    budget = Budget(64 * GIB)
    arenas = [Arena(24, np.float32, budget) for _ in range(6_100)]
    assert budget.reserved < 100 << 40
    for each in (arenas[0], arenas[-1]):
        each.grow(10_000)
        each.array[9_999] = 1
    for each in arenas:
        each.close()
    del each, arenas
    assert (budget.held, budget.reserved) == (0, 0)


def test_few_arenas_reserve_the_whole_budget_and_never_move() -> None:
    budget = Budget(64 * GIB)
    for _ in range(300):
        arena = Arena(24, np.float32, budget)
        assert arena.array.nbytes >= 64 * GIB - 2 * HUGE


def test_an_arena_that_outgrows_its_reservation_keeps_its_rows() -> None:
    budget = Budget(GIB, FEW)
    arena = Arena(256, np.uint64, budget)
    reserved = arena.array.nbytes
    assert reserved < 8 * MIB
    rows = 0
    while arena.bytes < 16 * reserved:
        before, rows = rows, arena.rows
        arena.array[before:rows] = np.arange(before, rows)[:, None]
        arena.grow(rows + 1)
    assert (arena.array[:rows] == np.arange(rows)[:, None]).all()
    assert not arena.array[rows : arena.rows].any()
    assert budget.held == arena.bytes
    assert arena.array.nbytes <= budget.reserved


def test_a_move_waits_for_readers_and_copies_no_page() -> None:
    budget = Budget(GIB, FEW)
    arena = Arena(1024, np.float32, budget)
    arena.grow(1)
    arena.array[0] = 7
    memory, began, go = arena.memory, threading.Event(), threading.Event()
    seen: list[float] = []

    def read() -> None:
        array = memory.array()
        began.set()
        go.wait()
        seen.append(float(array[0, 0]))
        del array
        seen.append(float(memory.array()[0, 0]))

    reader = threading.Thread(target=read)
    reader.start()
    began.wait()
    threading.Timer(0.05, go.set).start()
    arena.grow(20_000)
    reader.join()
    assert seen == [7.0, 7.0]
    arena.array[19_999] = 1


def test_a_move_that_readers_hold_up_for_ever_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOVE_SECONDS", 0.01)
    budget = Budget(GIB, FEW)
    arena = Arena(1024, np.float32, budget)
    arena.grow(1)
    arena.array[0] = 7
    held = arena.memory.array()
    with pytest.raises(OutOfMemory):
        arena.grow(20_000)
    assert (arena.rows, budget.held) == (SMALLEST_CHUNK // 4096, SMALLEST_CHUNK)
    assert arena.array[0, 0] == held[0, 0] == 7
    del held
    arena.grow(20_000)
    assert arena.array[0, 0] == 7


def test_scans_on_another_thread_read_rows_while_the_table_moves() -> None:
    budget = Budget(GIB, FEW)
    table = Table(schema(), budget)
    fill(table, range(1000))
    expected = table.dump()
    scan, stop = table.store.host.scan(), threading.Event()
    counts: list[int] = []

    def read() -> None:
        while not stop.is_set():
            start: int | None = 0
            found = 0
            while start is not None:
                places, start = scan.find(start, 0, 1, 100, EVERY)
                rows = np.empty((len(places), 16), np.float32)
                meta = scan.copy(places, np.empty(len(places), np.uint64), rows)
                found += int((meta[:, 1] == 1).sum())
            counts.append(found)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    for at in range(1000, 300_000, 50_000):
        fill(table, range(at, at + 50_000), version=2)
    stop.set()
    reader.join()
    assert set(counts) == {1000}
    assert np.array_equal(table.dump().rows[:1000], expected.rows)


def test_less_address_space_is_asked_for_where_the_process_has_a_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (4 * GIB, 4 * GIB))
    budget = Budget(64 * GIB)
    arenas = [Arena(8, np.float32, budget) for _ in range(300)]
    assert budget.reserved <= 3 * GIB
    assert len(arenas[0].array) < GIB


def test_a_reservation_that_is_refused_is_made_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    real, asked = mmap.mmap, []

    def refuse(file: int, size: int, **rest: Any) -> Any:
        asked.append(size)
        if size > 100 * MIB:
            raise OSError(12, "Cannot allocate memory")
        return real(file, size, **rest)

    monkeypatch.setattr(mmap, "mmap", refuse)
    budget = Budget(GIB)
    arena = Arena(8, np.float32, budget)
    assert budget.reserved == arena.array.nbytes == asked[-1] <= 100 * MIB
    monkeypatch.undo()
    arena.grow(200 * MIB // 32)
    arena.array[200 * MIB // 32 - 1] = 1


# ---- what is freed, and when


def test_a_dropped_table_takes_memory_until_its_last_scan_is_gone() -> None:
    budget = Budget(GIB)
    table = Table(schema(), budget)
    fill(table, range(100_000))
    scan, held = table.store.host.scan(), table.stats().bytes - table.stats().index_bytes
    table.close()
    assert budget.held == held
    places, _ = scan.find(0, 0, 9, 10)
    rows = np.empty((10, 16), np.float32)
    scan.copy(places, np.empty(10, np.uint64), rows)
    assert rows[:, 8:].all()
    del scan
    assert (budget.held, budget.reserved) == (0, 0)


@pytest.mark.slow
@alone
def test_tables_that_are_dropped_and_filled_again_stay_within_the_budget() -> None:
    fill(Table(schema(), Budget(MIB)), range(1000))  # loads the kernels
    budget = Budget(64 * MIB)
    before = resident()
    scans = []

    def refill(times: int) -> None:
        for _ in range(times):
            table = Table(schema(), budget)
            fill(table, range(250_000))
            scans.append(table.store.host.scan())
            table.close()

    refill(1)
    with pytest.raises(OutOfMemory):
        refill(3)  # the scans have the memory of the tables before
    assert resident() - before < budget.limit + 64 * MIB  # what the last push took for a moment
    scans.clear()
    fill(Table(schema(), budget), range(250_000))


@pytest.mark.slow
@alone
def test_free_slots_take_no_memory() -> None:
    budget = Budget(GIB)
    table = Table(schema(dim=1, optimizer=make_optimizer("sgd", None, {})), budget)
    keys = np.arange(1_000_000, dtype=np.uint64)
    for at in range(0, len(keys), 100_000):
        fill(table, keys[at : at + 100_000])
    held, before = budget.held, resident()
    table.delete(keys)
    assert resident() - before < 24 * MIB  # what finding and deleting them takes for a moment
    assert (len(table), budget.held) == (0, held)
    fill(table, keys + np.uint64(5_000_000))
    assert budget.held - held <= 4 * MIB  # of the index, whose keys are others
    assert sorted(table.dump().keys.tolist()) == (keys + np.uint64(5_000_000)).tolist()


# ---- failures between charge and use


def test_a_kernel_without_huge_pages_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 12345)  # EINVAL
    budget = Budget(GIB)
    table = Table(schema(), budget)
    fill(table, range(200_000))
    assert len(table) == 200_000
    assert budget.held == table.stats().bytes


class Failing(Budget):
    """A budget that fails at one of its calls."""

    def __init__(self, at: int) -> None:
        super().__init__(GIB)
        self.at = at

    def take(self, size: int) -> None:
        self.at -= 1
        if self.at == 0:
            raise MemoryError
        super().take(size)


@pytest.mark.parametrize("at", range(1, 12))
def test_whatever_fails_between_charge_and_use_gives_back(at: int) -> None:
    budget = Failing(at)
    table = None
    with suppress(MemoryError):
        table = Table(schema(admission=Counter(threshold=1)), budget)
    if table is None:
        assert (budget.held, budget.reserved) == (0, 0)
        return
    for start in range(0, 200_000, 50_000):
        held, rows = budget.held, len(table)
        try:
            fill(table, range(start, start + 50_000))
        except MemoryError:
            assert budget.held - held <= 4 * HUGE  # grown, and kept for the next push
            assert len(table) == rows
            fill(table, range(start, start + 50_000))
        assert budget.held == table.stats().bytes
    assert len(table) == 200_000
    table.close()
    assert (budget.held, budget.reserved) == (0, 0)


def test_a_table_that_cannot_be_made_gives_everything_back() -> None:
    budget = Budget(4 * MIB)
    with pytest.raises(OutOfMemory):
        Table(schema(admission=Sketch(threshold=2, expected_keys=10_000_000)), budget)
    assert (budget.held, budget.reserved) == (0, 0)


def test_a_search_through_all_rows_lets_the_rows_move_in_between() -> None:
    table = Table(schema(dim=1), Budget(GIB))
    fill(table, range(3 * LOOK))
    scan, arrays = table.store.host.scan(), []
    memory = scan._entries  # type: ignore[attr-defined]

    class Watched:
        def array(self) -> Any:
            arrays.append(1)
            return memory.array()

    scan._entries = Watched()  # type: ignore[attr-defined]
    places, start = scan.find(0, 0, 1, 3 * LOOK, EVERY)
    assert (places.tolist(), start, len(arrays)) == (list(range(3 * LOOK)), None, 3)
    places, start = scan.find(0, 0, 1, LOOK, EVERY)
    assert (places.tolist(), start) == (list(range(LOOK)), LOOK)
    assert scan.find(LOOK, 1, 2, 10, EVERY)[1] is None
