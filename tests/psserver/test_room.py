"""Tables that are larger than their memory: room for rows is made by moving others to disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from stores import Home, change, make_shard, push, schema

from psclient.tools.misses import lru
from psclient.tools.summary import Histogram
from psserver.requests import Pull, Push
from psserver.tablesettings import TableSettings
from storage.errors import DiskFull, NoRoom, OutOfMemory
from storage.optimizers import make_optimizer
from storage.reuse import EDGES, Reuse

MIB = 1 << 20
DIM = 128
BATCH = 1000
ROW = 4 * 2 * DIM + 32  # bytes of a slot: embedding, Adagrad's state, entry

ADAGRAD = make_optimizer("adagrad", 0.1, {})

Open = Callable[..., Home]


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Open]:
    """home(memory): a shard with a table "t" of Adagrad, closed after the test."""
    made: list[Home] = []

    def new(memory: int, *tables: str, **more: Any) -> Home:
        directory = tmp_path / f"home-{len(made)}"
        made.append(Home(directory, memory_bytes=memory, segment_bytes=4 * MIB, **more).open())
        for name in tables or ("t",):
            made[-1].shard.create_table(schema(name=name, dim=DIM, optimizer=ADAGRAD))
        return made[-1]

    yield new
    for each in made:
        each.close()


def batch(keys: np.ndarray, seed: int, table: str = "t", **more: Any) -> Push:
    """A push of random gradients to distinct keys."""
    gradients = np.random.default_rng(seed).normal(size=(len(keys), DIM)).astype(np.float32)
    return push(keys.tolist(), table=table, gradients=gradients, **more)


def apply(home: Home, *items: Push) -> int:
    """Push as the server does: wait for flushes. Returns how many there were."""
    for flushes in range(20):
        try:
            home.shard.exchange(items, [])
            return flushes
        except NoRoom as error:
            home.flusher.flush()
            if flushes and error.oversized:
                home.shard.exchange(items, [], exceed=True)
                return flushes
    raise AssertionError("no room after 20 flushes")


def apply_all(home: Home, items: list[Push]) -> None:
    for item in items:
        apply(home, item)


def store(home: Home, table: str = "t") -> Any:
    return home.shard._tables.get(table).table.store


def rows_of(home: Home, table: str = "t") -> tuple[np.ndarray, np.ndarray]:
    dump = home.shard.dump()[table]
    return dump.rows.view(np.uint32), dump.meta


def zipf(seed: int, keys: int, count: int) -> np.ndarray:
    drawn = np.random.default_rng(seed).zipf(1.2, 4 * count) % keys
    return np.unique(drawn)[:count].astype(np.uint64)


@pytest.mark.parametrize("cache", ["lru", pytest.param("lfu", marks=pytest.mark.slow)])
def test_training_over_ten_times_the_memory_gives_the_rows_of_an_unlimited_twin(
    home: Open, cache: Any
) -> None:
    settings = {"t": TableSettings(cache=cache, half_life=100)}
    small, twin = home(8 * MIB, settings=settings), home(256 * MIB)
    keys = 10 * 8 * MIB // ROW
    budget = small.shard.budget
    for step in range(80):
        new = np.arange(step * keys // 80, (step + 1) * keys // 80, dtype=np.uint64)
        hot = zipf(step, max(1, step * keys // 80), BATCH // 4)
        item = batch(np.union1d(new, hot), step, step=step)
        apply(small, item)
        apply(twin, item)
        small.shard.pushroom.relieve(small.shard.pushroom.tight([item]))
        assert budget.held <= budget.limit
    moves = store(small).moves
    assert moves.demotions > keys // 2
    assert moves.promotions > 0
    assert store(small).host.rows < keys // 5
    assert store(twin).moves.demotions == 0
    for one, other in zip(rows_of(small), rows_of(twin), strict=True):
        assert np.array_equal(one, other)


def test_a_push_larger_than_memory_is_applied_beyond_the_budget_and_shrinks_again(
    home: Open,
) -> None:
    small, twin = home(8 * MIB), home(256 * MIB)
    first, huge = np.arange(1000, dtype=np.uint64), np.arange(500, 20_000, dtype=np.uint64)
    for node in (small, twin):
        for seed, keys in enumerate((first, huge, first)):
            apply(node, batch(keys, seed))
    small.flusher.flush()
    apply(small, batch(first, 9))
    apply(twin, batch(first, 9))
    assert small.shard.budget.held <= small.shard.budget.limit
    for one, other in zip(rows_of(small), rows_of(twin), strict=True):
        assert np.array_equal(one, other)


def test_two_tables_share_the_memory_and_a_new_one_always_gets_rows(home: Open) -> None:
    node = home(16 * MIB, "a", "b")
    for seed in range(20):  # "a" takes all there is
        apply(node, batch(np.arange(seed * BATCH, (seed + 1) * BATCH, dtype=np.uint64), seed, "a"))
    alone = store(node, "a").held
    assert alone > 10 * MIB
    for seed in range(20):
        apply(node, batch(np.arange(seed * BATCH, (seed + 1) * BATCH, dtype=np.uint64), seed, "b"))
        assert node.shard.budget.held <= node.shard.budget.limit
    a, b = store(node, "a").held, store(node, "b").held
    assert b > alone / 3
    assert a < alone * 2 / 3
    for seed in range(20):
        apply(node, batch(np.arange(seed * BATCH, (seed + 1) * BATCH, dtype=np.uint64), seed, "a"))
    assert abs(store(node, "a").held - store(node, "b").held) < alone / 2
    assert len(store(node, "a")) == len(store(node, "b")) == 20 * BATCH


def test_a_table_stays_within_its_own_limit(home: Open) -> None:
    node = home(64 * MIB, settings={"t": TableSettings(host_bytes=8 * MIB)})
    for seed in range(20):
        apply(node, batch(np.arange(seed * BATCH, (seed + 1) * BATCH, dtype=np.uint64), seed))
        assert store(node).memory_bytes <= 8 * MIB
    assert len(store(node)) == 20 * BATCH


def test_nothing_of_an_exchange_is_applied_if_one_of_its_pushes_finds_no_room(home: Open) -> None:
    node = home(8 * MIB, "a", "b")
    apply(node, batch(np.arange(5000, dtype=np.uint64), 0, "a"))
    before = node.shard.version
    few, many = np.arange(5, dtype=np.uint64), np.arange(5000, dtype=np.uint64)
    with pytest.raises(NoRoom, match="'b'"):
        node.shard.exchange([batch(few, 1, "a"), batch(many, 2, "b")], [])
    assert node.shard.version == before


def test_a_push_finds_room_although_another_of_its_exchange_took_what_there_was(
    home: Open,
) -> None:
    small, twin = home(8 * MIB, "a", "b"), home(256 * MIB, "a", "b")
    for node in (small, twin):
        for seed, name in enumerate("ab"):
            for keys in np.split(np.arange(9000, dtype=np.uint64), 6):
                apply(node, batch(keys, seed, name))
        node.flusher.flush()
        node.reopen()  # all rows are on disk
        apply(node, batch(np.arange(10, dtype=np.uint64), 2, "b"))
    most = np.arange(store(small, "a").room() - 20, dtype=np.uint64)
    some = np.arange(10, 2010, dtype=np.uint64)
    for node in (small, twin):
        apply(node, batch(most, 3, "a"), batch(some, 4, "b"))
    for name in "ab":
        for one, other in zip(rows_of(small, name), rows_of(twin, name), strict=True):
            assert np.array_equal(one, other)


def test_pulls_move_nothing(home: Open) -> None:
    node = home(8 * MIB)
    for seed in range(10):
        apply(node, batch(np.arange(seed * BATCH, (seed + 1) * BATCH, dtype=np.uint64), seed))
    moves = store(node).moves
    before = moves.promotions, moves.demotions, moves.hits + moves.misses
    keys = np.arange(10 * BATCH, dtype=np.uint64)
    pull = Pull("t", keys[:1500], 1, "train", with_metadata=True, min_version=0)
    node.shard.exchange([], [pull])
    assert (moves.promotions, moves.demotions) == before[:2]
    assert moves.hits + moves.misses == before[2] + 1500


def test_more_bytes_on_disk_than_allowed_refuse_pushes_until_rows_are_deleted(home: Open) -> None:
    node = home(8 * MIB, disk_bytes=16 * MIB)
    seed, sizes = 0, []
    with suppress(DiskFull):
        for seed in range(40):
            some = np.arange(seed * BATCH, (seed + 1) * BATCH, dtype=np.uint64)
            apply(node, batch(some, seed))
            sizes.append(node.base.bytes)
    assert 10 < len(sizes) < 40
    with pytest.raises(DiskFull, match=r"disk_bytes=16777216"):
        node.shard.exchange([batch(np.arange(BATCH, dtype=np.uint64), 0)], [])
    with pytest.raises(DiskFull, match=r"of which 1/16 is reserved for flushes"):
        node.shard.exchange([batch(np.arange(BATCH, dtype=np.uint64), 0)], [])
    pull = Pull("t", np.arange(100, dtype=np.uint64), 1, "train", False, 0)
    assert node.shard.exchange([], [pull]).pulls[0].embeddings.any()
    node.flusher.flush()
    sizes.append(node.base.bytes)
    assert 12 * MIB < max(sizes) <= 16 * MIB
    node.shard.delete(change(list(range(seed * BATCH))))
    node.flusher.flush()
    assert node.base.bytes < 4 * MIB
    node.shard.exchange([batch(np.arange(BATCH, dtype=np.uint64), 0)], [])


def test_changes_of_rows_never_exceed_the_bytes_allowed_on_disk(home: Open) -> None:
    node = home(8 * MIB, disk_bytes=24 * MIB)
    rng, sizes, refused = np.random.default_rng(3), [], 0
    for seed in range(60):
        some = rng.choice(12 * BATCH, BATCH, replace=False).astype(np.uint64)
        try:
            apply(node, batch(some, seed))
        except DiskFull:
            refused += 1
            node.flusher.flush()
        sizes.append(node.base.bytes)
    assert refused < 30
    assert max(sizes) <= 24 * MIB


def test_without_a_data_directory_the_error_says_so() -> None:
    shard = make_shard(memory_bytes=2 * MIB)
    shard.budget.advice = ": set data_dir"
    shard.create_table(schema(name="t", dim=DIM, optimizer=ADAGRAD))
    with pytest.raises(OutOfMemory, match=r"are in use: set data_dir$"):
        shard.exchange([batch(np.arange(20_000, dtype=np.uint64), 0)], [])
    shard.close()


def test_a_flush_makes_rows_clean_although_no_memory_is_free(home: Open) -> None:
    one = home(8 * MIB)
    apply(one, batch(np.arange(BATCH), 0))
    one.shard.budget.take(one.shard.budget.free)
    one.flusher.flush()
    assert store(one).dirty == 0
    assert store(one).demote(BATCH) == BATCH


def test_a_push_for_which_no_flush_can_make_room_is_refused(home: Open) -> None:
    one = home(8 * MIB)
    apply(one, batch(np.arange(BATCH), 0))
    one.shard.budget.take(one.shard.budget.free)
    with pytest.raises(OutOfMemory) as refused:
        apply_all(one, [batch(np.arange(BATCH) + seed * BATCH, seed) for seed in range(1, 40)])
    assert not isinstance(refused.value, NoRoom)


def test_a_scan_goes_on_while_memory_is_given_back(home: Open) -> None:
    node = home(32 * MIB)
    for seed in range(10):
        apply(node, batch(np.arange(seed * BATCH, (seed + 1) * BATCH, dtype=np.uint64), seed))
    node.flusher.flush()
    host = store(node).host
    scan, rows = host.scan(), np.empty((500, DIM), np.float32)
    frequencies = np.empty(500, np.uint64)
    places, start = scan.find(0, 0, 1 << 47, 500)
    assert store(node).shrink(4 * MIB) > 3 * MIB
    assert host.rows < 10 * BATCH
    seen = set(scan.copy(places, frequencies, rows)[:, 0].tolist())
    while start is not None:
        places, start = scan.find(start, 0, 1 << 47, 500)
        seen |= set(scan.copy(places, frequencies[: len(places)], rows[: len(places)])[:, 0])
    assert len(seen) == host.rows
    assert len(store(node)) == 10 * BATCH
    apply(node, batch(np.arange(10 * BATCH, dtype=np.uint64), 99))
    assert host.rows == 10 * BATCH


@pytest.mark.parametrize("share", [10, pytest.param(4, marks=pytest.mark.slow)])
def test_the_curve_of_an_analysis_predicts_the_misses_of_the_tier(home: Open, share: int) -> None:
    """Training over a Zipf stream, and as many pulls of other keys, with 1/share of the rows."""
    keys, rng = 40_000, np.random.default_rng(0)
    weights = np.cumsum(1 / np.arange(1, keys + 1) ** 1.05)
    order = rng.permutation(keys).astype(np.uint64)

    def draw() -> np.ndarray:
        return np.unique(order[np.searchsorted(weights, weights[-1] * rng.random(600))])

    node = home(keys * (ROW // share + 36) * 16 // 15)
    table = node.shard._tables.get("t").table
    for at in range(0, keys, BATCH):
        apply(node, batch(order[at : at + BATCH], at))
    table.reuse = Reuse()
    hits, misses, held = table.store.moves.hits, table.store.moves.misses, []
    for step in range(400):
        item = batch(draw(), step, step=step)
        apply(node, item)
        node.shard.pushroom.relieve(node.shard.pushroom.tight([item]))
        wanted = draw()
        table.pull(wanted, "train", np.empty((len(wanted), DIM), np.float32))
        held.append(table.store.host.rows)
    moves = table.store.moves
    hits, misses = moves.hits - hits, moves.misses - misses
    pushes, pulls = table.reuse.counts
    assert pushes.sum() + pulls.sum() == pytest.approx(hits + misses, rel=1e-6)
    seen: Any = SimpleNamespace(
        reuses=Histogram(EDGES, pushes),
        pull_reuses=Histogram(EDGES, pulls),
        first_pushes=table.reuse.first,
        rows=len(table),
        shard_rows=(len(table),),
    )
    curve = lru(seen)
    assert curve is not None
    assert 0.1 < misses / (hits + misses) < 0.9
    assert curve.at(np.mean(held)) == pytest.approx(misses / (hits + misses), abs=0.05)


def test_a_key_of_a_pull_or_push_is_a_hit_or_a_miss_by_where_its_row_was(home: Open) -> None:
    node, keys = home(256 * MIB), np.arange(100, dtype=np.uint64)
    apply(node, batch(keys, 0))
    node.flusher.flush()
    table, counted = node.shard._tables.get("t").table, [(0, 0)]

    def more() -> tuple[int, int]:
        """(hits, misses) since the last call, the same in the statistics of both tiers."""
        host, disk = table.store.stats()
        assert (disk.hits, disk.misses) == (host.misses, 0)
        counted.append((host.hits, host.misses))
        (hits, misses), (now_hits, now_misses) = counted[-2:]
        return now_hits - hits, now_misses - misses

    assert table.store.demote(100) == 100
    apply(node, batch(keys[:10], 1))
    assert more() == (0, 10), "rows that the check of a push copied to memory were on disk"
    apply(node, batch(keys[5:20], 2))
    assert more() == (5, 10)
    for hot, cold, absent in ((5, 30, 7), (15, 3, 0), (0, 4, 2), (6, 0, 1)):
        wanted = np.concatenate([keys[:hot], keys[20 : 20 + cold], keys[:absent] + np.uint64(1000)])
        table.pull(wanted, "train", np.empty((len(wanted), DIM), np.float32))
        assert more() == (hot, cold)
