"""Tables with rows in GPU memory, host memory and on disk at once, on the fake device."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import CASES, DIMS, agree, exact
from cold import ColdTable
from fakedevice import FakeDevice
from lifted import NONE, PIECE, make_gpu
from raised import RestlessTier, needs_compiler

from storage import balance, rowstore
from storage.arena import Budget
from storage.eviction.contract import Now
from storage.eviction.rules import Norm
from storage.eviction.sweep import Sweep
from storage.initializers import make_initializer
from storage.kernels import Images
from storage.optimizers import make_optimizer
from storage.schema import TableSchema
from storage.table import Table
from storage.tiers.hbm import HbmTier

EXACT = [(name, p) for name, p in CASES if exact(make_optimizer(name, None, p))]
SUMMED = [each for each in CASES if each not in EXACT]  # their steps add squares of a row
KEYS = 600
pytestmark = needs_compiler


def schema(dim: int, optimizer: Any = None) -> TableSchema:
    optimizer = optimizer or make_optimizer("adagrad", 0.1, {})
    uniform = make_initializer("uniform", {})
    return TableSchema(name="t", dim=dim, optimizer=optimizer, initializer=uniform)


class SmallPieces(HbmTier):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args, PIECE)


class Twins:
    """The same random operations on a table in three tiers, and on one in host memory alone."""

    def __init__(self, asked: TableSchema, directory: Path, device: FakeDevice, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.schema, self.version, self.evicted = asked, 0, 0
        gpu = make_gpu(device, part=1 << 12)
        self.cold = ColdTable(asked, directory, 1 << 26, gpu)
        self.tables = self.cold.table, Table(asked, Budget(1 << 28))
        self.keys = self.rng.integers(0, 1 << 63, KEYS).astype(np.uint64) * np.uint64(2)

    def some(self) -> Any:
        return np.unique(self.keys[self.rng.zipf(1.2, int(self.rng.integers(0, 90))) % KEYS])

    def push(self) -> None:
        some, self.version = self.some(), self.version + 1
        size = 10.0 ** float(self.rng.integers(-20, 2))
        gradients = (self.rng.standard_normal((len(some), self.schema.dim)) * size).astype("f4")
        counts, logged = (
            self.rng.integers(1, 9, len(some)).astype(np.uint32),
            self.rng.random() < 0.5,
        )
        found = []
        for table in self.tables:
            more = {"version": self.version, "step": self.version, "copied": logged}
            pushed = table.push(some, gradients.copy(), counts, **more)
            rows, frequencies = self.room(len(some))
            if logged:
                table.images(pushed.slots, frequencies, rows)
                found.append((pushed.keys.tobytes(), frequencies.tobytes(), rows.tobytes()))
        assert not found or found[0] == found[1]

    def room(self, n: int) -> tuple[Any, Any]:
        return np.zeros((n, self.schema.width), np.float32), np.zeros(n, np.uint64)

    def pull(self) -> None:
        some, found = np.append(self.some(), np.uint64(1)), []
        for mode in ("train", "serve"):
            for table in self.tables:
                out = np.empty((len(some), self.schema.dim), np.float32)
                meta = table.metadata(table.pull(some, mode, out))  # type: ignore[arg-type]
                found.append((out.tobytes(), *(column.tobytes() for column in meta)))
            assert found[-2] == found[-1]

    def put(self) -> None:
        some = self.some()
        rows = abs(self.rng.standard_normal((len(some), self.schema.width))).astype(np.float32)
        versions = self.rng.integers(1, self.version + 2, len(some)).astype(np.uint64)
        steps = self.rng.integers(0, 99, len(some))
        for table in self.tables:
            table.put(Images(some, versions, steps, steps.astype(np.uint64) + 1, rows.copy()))

    def check(self) -> None:
        some = self.some()
        gradients = np.ones((len(some), self.schema.dim), np.float32)
        for table in self.tables:
            table.check_push(some, gradients, step=self.version)

    def delete(self) -> None:
        some = self.some()[:9]
        assert len({table.delete(some)[0].tobytes() for table in self.tables}) == 1

    def evict(self) -> None:
        """Delete the rows with the smallest embeddings, as the norm rule judges them."""
        found = []
        for table in self.tables:
            sweep, gone = Sweep([Norm(threshold=0.02 * self.schema.dim**0.5, grace=2)]), list[int]()
            while not sweep.done:
                victims = sweep.slice(table.contents(), Now(self.version, self.version))
                gone += victims.keys.tolist()
                table.delete(victims.keys)
            found.append(sorted(gone))
        assert found[0] == found[1]
        self.evicted += len(found[0])

    def scan(self) -> None:
        """Every row is read once by an exact scan, although rows move between its slices."""
        one, other = (table.dump() for table in self.tables)
        scan, found = self.cold.table.exact_scan(), dict[int, bytes]()
        while not scan.done:
            part = scan.next(50, self.schema.width)()
            assert part.tier in ("hbm", "host", "lmdb")
            for key, row in zip(part.meta[:, 0].tolist(), part.rows, strict=True):
                assert key not in found
                found[key] = row.tobytes()
        keys = other.keys.tolist()
        assert found == dict(zip(keys, (row.tobytes() for row in other.rows), strict=True))
        assert one.rows.tobytes() == other.rows.tobytes()

    def flush(self) -> None:
        self.cold.flush()
        if self.rng.random() < 0.7:
            self.cold.table.store.demote(int(self.rng.integers(1, KEYS)))
        if self.rng.random() < 0.3:
            self.cold.reflush(float(self.rng.uniform(0.2, 1.01)))

    def run(self, rounds: int) -> set[str]:
        verbs = (self.push, self.push, self.push, self.push, self.pull, self.pull, self.put)
        every = (*verbs, self.check, self.delete, self.evict, self.scan, self.flush, self.flush)
        used = set[str]()
        for choice in self.rng.integers(0, len(every), rounds):
            every[choice]()
            store = self.cold.table.store
            used |= {tier.tier for tier in store.stats() if tier.rows}
            assert sum(tier.rows for tier in store.stats()) == len(self.tables[1])
        self.scan()
        one, other = (table.dump() for table in self.tables)
        assert one.meta.tobytes() == other.meta.tobytes()
        self.cold.close()
        return used


@pytest.mark.quick(6)
@pytest.mark.parametrize("mode", ["late", "random"])
@pytest.mark.parametrize(("name", "parameters"), EXACT)
def test_random_operations_in_three_tiers_give_the_bits_of_host_memory(
    name: str, parameters: dict[str, float], mode: str, memory: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(rowstore, "HbmTier", RestlessTier)
    optimizer, used, evicted = make_optimizer(name, None, parameters), set[str](), 0
    for dim in DIMS:
        device = FakeDevice(mode, seed=dim)
        twins = Twins(schema(dim, optimizer), memory / str(dim), device, seed=dim + len(name))
        used |= twins.run(60)
        evicted += twins.evicted
    assert evicted > 20
    assert used == {"hbm", "host", "lmdb"}


@pytest.mark.parametrize("mode", ["late", "random"])
@pytest.mark.parametrize(("name", "parameters"), SUMMED)
def test_an_optimizer_that_sums_over_a_row_agrees_in_three_tiers(
    name: str, parameters: dict[str, float], mode: str, memory: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(rowstore, "HbmTier", RestlessTier)
    optimizer, used = make_optimizer(name, None, parameters), set[str]()
    for dim in (3, 33):
        device = FakeDevice(mode, seed=dim)
        twins = Twins(schema(dim, optimizer), memory / str(dim), device, seed=dim)
        for version in range(1, 41):
            some, step = twins.some(), {"version": version, "step": version}
            gradients = twins.rng.standard_normal((len(some), dim)).astype(np.float32)
            counts = np.ones(len(some), np.uint32)
            for table in twins.tables:
                table.push(some, gradients.copy(), counts, **step)
            if version % 5 == 0:
                twins.flush()
            used |= {tier.tier for tier in twins.cold.table.store.stats() if tier.rows}
        one, other = (table.dump() for table in twins.tables)
        assert one.meta.tobytes() == other.meta.tobytes()
        assert agree(optimizer, one.rows, other.rows)
        twins.cold.close()
    assert used == {"hbm", "host", "lmdb"}


def filled(rows: int, limit: int, monkeypatch: pytest.MonkeyPatch, **more: Any) -> Table:
    """A table of dim 8 on a fake device with small pieces, whose keys 0.. were pushed once."""
    monkeypatch.setattr(rowstore, "HbmTier", SmallPieces)
    monkeypatch.setattr(balance, "LEAST_MOVED", 16)
    table = Table(schema(8), Budget(1 << 28))
    table.attach_gpu(make_gpu(FakeDevice("early"), limit, **more))
    push(table, np.arange(rows), 1)
    return table


def push(table: Table, keys: Any, version: int) -> None:
    gradients, counts = np.ones((len(keys), 8), np.float32), np.ones(len(keys), np.uint32)
    table.push(np.asarray(keys, np.uint64), gradients, counts, version=version, step=version)


def settle(table: Table) -> int:
    """Move rows until none is to be moved; return the number of slices."""
    assert table.store.balance is not None
    slices = 1
    while table.store.balance.slice():
        slices += 1
    return slices


def in_hbm(table: Table) -> set[int]:
    keys = table.store.keys()
    names = table.tiers_of(table.store.find(keys)[0])
    return {key for key, name in zip(keys.tolist(), names, strict=True) if name == "hbm"}


ROWS = PIECE // 64  # rows of a piece


class TestBalance:
    def test_all_rows_are_in_the_gpu_if_it_has_room(self, monkeypatch: Any) -> None:
        table = filled(5000, 1 << 30, monkeypatch)
        settle(table)
        hbm, host = table.stats().tiers
        assert (hbm.tier, hbm.rows, host.tier, host.rows) == ("hbm", 5000, "host", 0)
        assert table.store.moves.hbm_promotions == 5000

    @pytest.mark.parametrize("cache", ["lru", "lfu"])
    def test_the_rows_with_the_highest_scores_are_in_the_gpu(
        self, cache: Any, monkeypatch: Any
    ) -> None:
        table = filled(5000, 2 * PIECE, monkeypatch)
        table.store.configure(None, cache, 1e5)
        hot = np.arange(3000, 4500)
        for version in range(2, 9):
            push(table, hot, version)
        settle(table)
        assert set(hot.tolist()) <= in_hbm(table)
        hot = np.arange(500, 2000)
        for version in range(9, 20):
            push(table, hot, version)
            settle(table)
        assert set(hot.tolist()) <= in_hbm(table)
        assert table.stats().tiers[0].bytes == 2 * PIECE
        assert table.store.moves.hbm_demotions >= 900

    def test_rows_do_not_move_back_and_forth(self, monkeypatch: Any) -> None:
        table = filled(5000, 2 * PIECE, monkeypatch)
        rng = np.random.default_rng(1)
        for version in range(2, 60):
            push(table, rng.choice(5000, 400, replace=False), version)  # all rows are alike
            settle(table)
        moves, pushed = table.store.moves, 58 * 400
        assert 0 < moves.hbm_demotions <= (5000 + pushed) // balance.SWAPPED

    def test_a_slice_beside_pushes_is_small(self, monkeypatch: Any) -> None:
        table = filled(100_000, 1 << 30, monkeypatch)
        mover, moves, before = table.store.balance, table.store.moves, 0
        assert mover is not None
        push(table, np.arange(20_000), 2)
        assert mover.due
        while mover.slice(idle=False):
            assert (moves.hbm_promotions - before) * 64 <= balance.MOVED
            before = moves.hbm_promotions
        assert moves.hbm_promotions == 100_000

    def test_a_full_device_pauses_promotion_and_rows_still_change_places(
        self, monkeypatch: Any
    ) -> None:
        said: list[str] = []
        table = filled(5000, 1 << 30, monkeypatch, on_pause=said.append)
        device = table.store.host.gpu.device  # type: ignore[attr-defined]
        device.limit = device.held + 2 * PIECE + 2048
        hot = np.arange(3000, 4500)
        for version in range(2, 9):
            push(table, hot, version)
            settle(table)
        assert len(said) == 1
        assert not table.store.host.gpu.promotes  # type: ignore[attr-defined]
        assert table.stats().tiers[0].rows == 2 * ROWS
        assert set(hot.tolist()) <= in_hbm(table)
        device.limit = 1 << 30
        table.store.host.gpu._again = 0.0  # type: ignore[attr-defined]
        push(table, np.arange(5000), 9)
        settle(table)
        assert len(in_hbm(table)) == 5000

    def test_memory_of_deleted_rows_is_given_back_to_other_tables(self, monkeypatch: Any) -> None:
        table = filled(8 * ROWS, 8 * PIECE, monkeypatch)
        settle(table)
        gpu = table.store.host.gpu  # type: ignore[attr-defined]
        assert gpu.budget.free == 0
        table.delete(np.arange(7 * ROWS, dtype=np.uint64))
        for version in range(2, 12):
            push(table, np.arange(7 * ROWS, 8 * ROWS), version)
            settle(table)
        assert gpu.budget.free >= 6 * PIECE
        other = Table(schema(8), Budget(1 << 28))
        other.attach_gpu(gpu)
        push(other, np.arange(2000), 1)
        settle(other)
        assert len(in_hbm(other)) == 2000

    @pytest.mark.parametrize("limit", [0, 2 * PIECE, None])
    def test_a_table_may_have_a_limit_of_its_own(self, limit: int | None, monkeypatch: Any) -> None:
        monkeypatch.setattr(rowstore, "HbmTier", SmallPieces)
        table = Table(schema(8), Budget(1 << 28))
        table.attach_gpu(make_gpu(FakeDevice("early"), 1 << 30), limit)
        push(table, np.arange(5000), 1)
        if limit == 0:
            assert table.store.balance is None
            assert [tier.tier for tier in table.stats().tiers] == ["host"]
            return
        settle(table)
        assert len(in_hbm(table)) == (5000 if limit is None else 2 * ROWS)

    def test_hits_are_counted_by_tier(self, monkeypatch: Any) -> None:
        table = filled(2000, 1 << 30, monkeypatch)
        settle(table)
        push(table, np.arange(2000, 2010), 2)  # in host memory
        push(table, np.arange(1000, 2005), 3)
        out = np.empty((30, 8), np.float32)
        table.pull(np.arange(1990, 2020, dtype=np.uint64), "train", out)
        hbm, host = table.stats().tiers
        assert (hbm.hits, host.hits) == (1000 + 10, 5 + 10)


def test_serving_alone_takes_no_more_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    table = filled(5000, 2 * PIECE, monkeypatch)
    settle(table)
    device = table.store.host.gpu.device  # type: ignore[attr-defined]
    keys, rng = np.arange(5000, dtype=np.uint64), np.random.default_rng(1)

    def serve(count: int) -> tuple[int, int, int]:
        for _ in range(count):
            some = rng.choice(keys, 300)
            table.pull(some, "serve", np.empty((300, 8), np.float32))
            scan, read = table.scan(), table.store.host.scan()
            places, _ = scan.find(0, 0, 9, 100)
            rows, frequencies = np.empty((100, 16), np.float32), np.empty(100, np.uint64)
            scan.copy(places, frequencies, rows)
            read.copy(read.find(0, 0, 9, 100)[0], frequencies, rows)
            settle(table)
        gc.collect()
        return device.held, device.pinned_bytes, table.stats().bytes

    first = serve(20)
    assert serve(200) == first


def test_no_rows_are_no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    table = filled(100, 1 << 30, monkeypatch)
    settle(table)
    tier, nothing = table.store.host, np.empty(0, np.uint64)
    assert isinstance(tier, HbmTier)
    given = tier.gpu.device.launches  # type: ignore[attr-defined]
    push(table, nothing, 2)
    table.pull(nothing, "train", np.empty((0, 8), np.float32))
    table.delete(nothing)
    rows = np.empty((0, 16), np.float32)
    table.put(Images(nothing, nothing, nothing.view(np.int64), nothing, rows))
    assert tier.move(NONE, NONE)
    assert tier.largest(NONE) == 0
    assert not len(tier.norms(NONE))
    tier.scan().read(NONE, rows)
    assert tier.gpu.device.launches == given  # type: ignore[attr-defined]
