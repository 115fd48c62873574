"""Scans over a table whose rows are pushed, deleted, moved and rewritten meanwhile."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import raised
from tiered import ALL, Tiered

from storage.slots import FREQUENCY
from storage.tablescan import ExactScan, TableScan

both = raised.both

KEYS = 200


@pytest.fixture
def tiered(memory: Path) -> Iterator[Tiered]:
    tiered = Tiered(memory)
    yield tiered
    tiered.close()


class World:
    """A table that changes at random, and all values that its rows ever had."""

    def __init__(self, tiered: Tiered, seed: int) -> None:
        self.tiered, self.random = tiered, random.Random(seed)
        self.pending: list[Callable[[], None]] = []  # flushes that are written, not adopted
        self.values: dict[tuple[int, int], bytes] = {}  # by key and version
        self.deleted: set[int] = set()  # since ``watch``
        self.kinds: Counter[str] = Counter()
        for at in range(0, KEYS, 50):
            tiered.push(range(at, at + 50))
        self.note()
        for _ in range(60):
            self.step()

    def note(self) -> None:
        for key, (version, value) in self.tiered.rows().items():
            assert self.values.setdefault((key, version), value) == value

    def some(self, most: int = 40) -> list[int]:
        count = self.random.randint(1, most)
        if self.random.random() < 0.3:  # neighbours
            start = self.random.randrange(KEYS)
            return [key % KEYS for key in range(start, start + count)]
        return self.random.sample(range(KEYS), count)

    def step(self) -> None:
        """Change something."""
        tiered = self.tiered
        kinds = ["push", "delete", "demote", "promote", "write", "adopt", "rewrite", "collect"]
        kind = self.random.choices(kinds, [6, 2, 5, 2, 4, 5, 3, 3])[0]
        match kind:
            case "push":
                tiered.push(self.some())
            case "delete":
                keys = self.some(10)
                tiered.delete(keys)
                self.deleted |= set(keys)
            case "demote":
                tiered.demote(self.random.randint(1, 100))
            case "promote":
                tiered.promote(self.some())
            case "write" if not self.pending:
                self.pending.append(tiered.write(self.random.choice([7, 40, 200])))
            case "rewrite" if not self.pending:
                extents = tiered.blocks.sparse(self.random.choice([0.5, 1.1]))
                self.pending.append(tiered.rewrite(extents[: self.random.randint(1, 4)]))
            case "adopt" if self.pending:
                self.pending.pop()()
            case "collect" if not self.pending:
                tiered.collect()
            case _:
                return
        self.kinds[kind] += 1
        if kind in ("push", "delete"):
            self.note()

    def steps(self, most: int) -> None:
        for _ in range(self.random.randint(0, most)):
            self.step()


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.rowstore.MARGIN", 0)
    monkeypatch.setattr("storage.visits.LISTED", 50)


def read_all(scan: ExactScan, world: World, limit: int, busy: int) -> dict[int, int]:
    """Read a table exactly; return the version of each key. Each value was once the key's."""
    found: dict[int, int] = {}
    for _ in range(100_000):
        if scan.done:
            return found
        read = scan.next(limit, world.tiered.width)
        world.steps(busy)
        part = read()
        assert len(part.meta) <= limit
        assert part.frequencies.tolist() == part.meta[:, FREQUENCY].tolist()
        for meta, row in zip(part.meta, part.rows, strict=True):
            key, version = int(meta[0]), int(meta[1])
            assert key not in found
            found[key] = version
            assert world.values[key, version] == meta.tobytes() + row.tobytes()
        world.steps(busy)
    raise AssertionError("the scan does not end")


@pytest.mark.quick(10)
@pytest.mark.parametrize("seed", range(25))
def test_an_exact_scan_reads_each_row_once_wherever_it_moves(tiered: Tiered, seed: int) -> None:
    world = World(tiered, seed)
    world.deleted.clear()
    before = tiered.rows()
    found = read_all(tiered.table.exact_scan(), world, world.random.choice([20, 60, 200]), 2)
    after = tiered.rows()
    assert (before.keys() & after.keys()) - world.deleted <= found.keys()
    assert all(before[key][0] <= version for key, version in found.items() if key in before)
    tiered.check()


@pytest.mark.parametrize("seed", range(3))
def test_an_exact_scan_of_a_quiet_table_reads_all_of_it(tiered: Tiered, seed: int) -> None:
    world = World(tiered, seed)
    found = read_all(tiered.table.exact_scan(), world, 37, 0)
    assert found == {key: version for key, (version, _) in tiered.rows().items()}


def test_the_random_world_does_everything(tiered: Tiered) -> None:
    world = World(tiered, 1)
    for _ in range(300):
        world.step()
    assert len(world.kinds) == 8
    tiered.check()
    assert tiered.blocks.rows > 0
    assert tiered.store.host.rows > 0


def find_all(world: World, make: Callable[[], TableScan], after: int, busy: int) -> dict[int, int]:
    """Read the rows of versions after+1 up to now; return the version of each key."""
    tiered, start, found = world.tiered, 0, dict[int, int]()
    upto, limit = tiered.version, world.random.choice([20, 60, 200])
    at: int | None = start
    while at is not None:
        scan = make()  # as after a pause
        places, following = scan.find(at, after, upto, limit)
        assert following is None or following > at
        at = following
        world.steps(busy)
        frequencies = np.empty(len(places), np.uint64)
        rows = np.empty((len(places), tiered.width), np.float32)
        meta = scan.copy(places, frequencies, rows)
        for each, row in zip(meta, rows, strict=True):
            key, version = int(each[0]), int(each[1])
            if after < version <= upto:
                assert world.values[key, version] == each.tobytes() + row.tobytes()
                assert found.setdefault(key, version) == version
        world.steps(busy)
    return found


@pytest.mark.quick(10)
@pytest.mark.parametrize("seed", range(25))
def test_a_scan_of_versions_misses_no_row_that_keeps_its_version(tiered: Tiered, seed: int) -> None:
    world = World(tiered, seed)
    after = world.random.choice([0, 0, tiered.version // 2, tiered.version])
    before = tiered.rows()
    upto = tiered.version
    found = find_all(world, tiered.table.scan, after, 2)
    now = tiered.rows()
    stays = {key: value[0] for key, value in before.items() if now.get(key) == value}
    wanted = {key: version for key, version in stays.items() if after < version <= upto}
    assert wanted.items() <= found.items()
    assert all(before[key][0] == version for key, version in found.items())


def test_blocks_of_old_versions_are_skipped_unread(tiered: Tiered) -> None:
    tiered.push(range(40))
    tiered.cool()
    [(extent, _)] = list(tiered.blocks.extents())[:1]
    zones = tiered.blocks.zones(extent)
    scan = tiered.table.scan()
    reads: list[Any] = []
    scan._scans[1][1]._search = lambda *args: reads.append(args) or (0, args[3])  # type: ignore[attr-defined]
    assert scan.find(1 << 56, zones.greatest_version, ALL, 10)[0].tolist() == []
    assert reads == []
    scan.find(1 << 56, zones.greatest_version - 1, ALL, 10)
    assert len(reads) == 1


def test_a_start_beyond_the_end_ends_a_scan(tiered: Tiered) -> None:
    tiered.push(range(10))
    for start in (1 << 39, 1 << 56 | 5 << 39, 2 << 56, 99 << 56):
        at: int | None = start
        while at is not None:
            places, at = tiered.table.scan().find(at, 0, ALL, 10)
            assert len(places) == 0


def test_rows_in_memory_must_be_copied_by_the_engine_others_not(tiered: Tiered) -> None:
    tiered.push(range(10))
    tiered.cool()
    tiered.push(range(3))
    scan = tiered.table.scan()
    host, at = scan.find(0, 0, ALL, 100)
    assert at == 1 << 56
    cold, _ = scan.find(at, 0, ALL, 100)
    assert (len(host), scan.changes(host)) == (3, True)
    assert (len(cold), scan.changes(cold)) == (7, False)
    assert not scan.changes(cold[:0])


def test_a_block_stays_while_a_scan_reads_it(tiered: Tiered) -> None:
    tiered.push(range(10))
    tiered.cool()
    scan = tiered.table.exact_scan()
    reads = [scan.next(100, tiered.width) for _ in range(2)]
    tiered.delete(range(10))
    assert tiered.collect() == 0
    assert sorted(reads[1]().meta[:, 0].tolist()) == list(range(10))
    del scan, reads
    assert tiered.collect() == 1
