"""Flushes of rows that are partly on disk alone: at every step a kill loses and revives nothing."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stores import Home, change, contents, copy_of, push, schema, stored

from psserver import basewriter, compaction, packing
from storage.admission.rules import Counter
from storage.arena import Budget
from storage.base import Base
from storage.basestate import BaseState
from storage.block import DIRECTORY
from storage.errors import DiskFull
from storage.tiers.host import SlotScan

KEYS = 60
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 10))]


class World:
    """A shard whose rows leave memory at random, and what its rows should be."""

    def __init__(self, home: Home, seed: int) -> None:
        self.home = home
        self.rng = random.Random(seed)
        self.rows: dict[str, dict[int, tuple[float, int, int]]] = {}

    def act(self) -> None:
        """Do one thing that a client or the shard might do."""
        some = self.rng.sample(range(KEYS), self.rng.randrange(1, 12))
        kind = self.rng.choices(
            ["push", "write", "delete", "demote", "promote", "drop", "create"],
            [8, 2, 3, 6, 2, 0.4, 1],
        )[0]
        names = sorted(self.rows)
        if kind == "create" or not names:
            self._create()
            return
        getattr(self, f"_{kind}")(self.rng.choice(names), some)

    def _create(self) -> None:
        name = self.rng.choice("ab")
        if name not in self.rows:
            self.home.shard.create_table(schema(name))
            self.rows[name] = {}

    def _push(self, name: str, some: list[int]) -> None:
        value = float(self.rng.randrange(1, 9))
        self.home.shard.exchange([push(some, value, table=name)], [])
        rows, version = self.rows[name], self.home.shard.version
        for key in some:
            old, _, count = rows.get(key, (0.0, 0, 0))
            rows[key] = (old - value, version, count + 1)

    def _write(self, name: str, some: list[int]) -> None:
        value, n = float(self.rng.randrange(100, 999)), len(some)
        number = self.home.shard.number_of(name)
        keys, counts = np.array(some, np.uint64), np.full(n, 7, np.uint64)
        rows = np.full((n, 2), value, np.float32)
        version = self.home.shard.write_rows(number, 3, keys, counts, rows)
        self.rows[name].update(dict.fromkeys(some, (value, version, 7)))

    def _delete(self, name: str, some: list[int]) -> None:
        self.home.shard.delete(change(some, table=name))
        for key in some:
            self.rows[name].pop(key, None)

    def _demote(self, name: str, _: list[int]) -> None:
        self.home.shard._tables.get(name).table.store.demote(100)

    def _promote(self, name: str, some: list[int]) -> None:
        """Do what a push does that is refused because a row would overflow."""
        self.home.shard._tables.get(name).table._locate(np.array(some, np.uint64))

    def _drop(self, name: str, _: list[int]) -> None:
        self.home.shard.drop_table(name)
        del self.rows[name]

    def check(self, home: Home) -> None:
        """Compare all rows of a shard with what they should be."""
        assert {
            name: {
                int(key): (float(row[0]), int(meta[1]), int(meta[3]))
                for key, row, meta in zip(dump.keys, dump.rows, dump.meta, strict=True)
            }
            for name, dump in home.shard.dump().items()
        } == self.rows
        for name in self.rows:
            require_sound(home.shard._tables.get(name).table.store)

    def kill(self, target: Path) -> None:
        """Check that a shard killed now has everything after it started again."""
        self.home.written()
        before = contents(self.home.shard)
        with Home(copy_of(self.home.directory, target)) as other:
            assert contents(other.shard) == before
            self.check(other)


def require_sound(store: Any) -> None:
    """Check the bits of all blocks against index and slots."""
    blocks, slots = store.blocks, store.host.slots
    keys = store.keys()
    locations, _ = store.find(keys)
    hosted = store.slots(locations)
    at = dict(zip(keys.tolist(), locations.tolist(), strict=True))
    homes = dict(
        zip(keys.tolist(), np.where(hosted >= 0, slots.array[hosted, 3], 0).tolist(), strict=True)
    )
    cold = cached = 0
    for extent, _ in blocks.extents():
        live, alone = blocks.live(extent), blocks.cold(extent)
        places = blocks.locations(extent, np.arange(len(live))).tolist()
        for key, place, is_live, is_cold in zip(
            blocks.keys(extent).tolist(), places, live.tolist(), alone.tolist(), strict=True
        ):
            if is_cold:
                assert at[key] == place
            elif is_live:
                assert homes[key] == place
        cold, cached = cold + int(alone.sum()), cached + int((live & ~alone).sum())
    assert (blocks.rows, blocks.live_rows) == (cold, cold + cached)
    assert len(store) == slots.rows + cold
    assert (
        store.dirty == slots.rows - cached == int((slots.array[hosted[hosted >= 0], 3] == 0).sum())
    )


@contextmanager
def steps(home: Home, hook: Callable[[], None]) -> Iterator[None]:
    """Call ``hook`` before and after each thing that a flush does to the shard, base and log."""

    def hooked(call: Callable[..., Any]) -> Callable[..., Any]:
        def made(*args: Any, **more: Any) -> Any:
            hook()
            result = call(*args, **more)
            hook()
            return result

        return made

    class Steps:
        def run(self, call: Callable[[], Any]) -> Any:
            return hooked(call)()

    with pytest.MonkeyPatch.context() as patch:
        for name in ("add", "commit", "block"):
            patch.setattr(home.base, name, hooked(getattr(home.base, name)))
        patch.setattr(home.log, "sync", hooked(home.log.sync))
        patch.setattr(SlotScan, "copy", hooked(SlotScan.copy))
        patch.setattr(home.flusher, "_engine", Steps())
        yield


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 8 rows, of which few may be small."""
    for module in (packing, compaction, basewriter):
        monkeypatch.setattr(module, "rows_per_block", lambda _: 8)
    monkeypatch.setattr(compaction, "MOST_SMALL", 3)
    monkeypatch.setattr(compaction, "SMALL_BYTES", 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.usefixtures("small")
def test_a_kill_at_any_step_of_a_flush_loses_and_revives_nothing(tmp_path: Path, seed: int) -> None:
    with Home(tmp_path / "shard", segment_bytes=1 << 20) as home:
        world, copies = World(home, seed), 0
        world._create()

        def hook() -> None:
            nonlocal copies
            hooks[0].__exit__(None, None, None)  # what happens here is not part of the flush
            for _ in range(world.rng.choice((0, 0, 1, 1, 2))):
                world.act()
            if world.rng.random() < 0.25:
                copies += 1
                world.kill(tmp_path / f"copy{copies}")
            hooks[0] = steps(home, hook)
            hooks[0].__enter__()

        hooks: list[Any] = [None]
        for _ in range(5):
            for _ in range(world.rng.randrange(12)):
                world.act()
            hooks[0] = steps(home, hook)
            hooks[0].__enter__()
            home.flush()
            hooks[0].__exit__(None, None, None)
            world.check(home)
            if world.rng.random() < 0.4:
                world.home.reopen()
                world.check(home)
        assert copies > 5


def test_a_slot_that_gets_an_older_row_while_it_is_copied_does_not_make_it_twofold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Home(tmp_path / "shard") as home:
        home.shard.create_table(schema())
        home.shard.exchange([push([1, 2])], [])
        home.flush()
        table = home.shard._tables.get("t").table
        table.store.demote(2)
        home.shard.exchange([push([3])], [])
        kind = type(table.store.host.scan())
        real = kind.copy

        def copy(*args: Any) -> Any:
            """Key 3 leaves its slot, and key 1, which is older, comes there from the disk."""
            monkeypatch.setattr(kind, "copy", real)
            home.shard.delete(change([3]))
            table._locate(np.array([1], np.uint64))
            return real(*args)

        monkeypatch.setattr(kind, "copy", copy)
        home.flush()
        assert [keys for _, keys, _ in stored(home.base)] == [[1, 2]]
        before = contents(home.shard)
        home.reopen()
        assert contents(home.shard) == before


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.usefixtures("small")
def test_flushes_and_restarts_of_rows_on_disk_keep_every_row(tmp_path: Path, seed: int) -> None:
    with Home(tmp_path / "shard", max_tombstones=30) as home:
        world = World(home, 100 + seed)
        for at in range(300):
            world.act()
            if at % 7 == 0:
                home.flush()
            if at % 50 == 0:
                world.check(home)
                home.reopen()
                world.check(home)
            if at % 20 == 0:
                home.written()
        home.reopen()
        world.check(home)


# ---- recovery


def fill(home: Home, rows: int, dim: int, seed: int = 1) -> None:
    """Push to random ones of ``rows`` keys, without a flush."""
    rng = np.random.default_rng(seed)
    for _ in range(2 * rows // 1000):
        keys = rng.choice(rows, 1000, replace=False).tolist()
        gradients = rng.normal(size=(1000, dim)).astype(np.float32)
        home.shard.exchange([push(keys, gradients=gradients)], [])
        home.written()


@pytest.mark.parametrize("flushes", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_log_with_more_rows_than_fit_into_memory_is_replayed_in_it(
    tmp_path: Path, flushes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, made = tmp_path / "shard", schema(dim=64, admission=Counter(threshold=2))
    with Home(directory, segment_bytes=8 << 20) as home:
        home.shard.create_table(made)
        fill(home, 20_000, 64)
        for _ in range(flushes):
            home.flush()
            fill(home, 20_000, 64, seed=2)
        before = contents(home.shard)
        held, limit = home.shard.budget.held, 4 << 20
    assert held > limit
    most, real = [0], Budget.take

    def take(self: Budget, size: int) -> None:
        real(self, size)
        most[0] = max(most[0], self.held)

    monkeypatch.setattr(Budget, "take", take)
    with Home(directory, segment_bytes=8 << 20, memory_bytes=limit) as home:
        assert contents(home.shard) == before
        assert home.shard._tables.get("t").table.store.blocks.rows > 0
    assert most[0] <= limit + (1 << 20), "more than the next push needs was taken"
    for _ in range(2):
        with Home(directory, segment_bytes=8 << 20, memory_bytes=limit) as home:
            assert contents(home.shard) == before


def test_a_full_disk_during_the_replay_is_no_hindrance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "shard"
    with Home(directory, segment_bytes=8 << 20) as home:
        home.shard.create_table(schema(dim=64))
        fill(home, 20_000, 64)
        before = contents(home.shard)

    def refuse(*_: Any) -> int:
        raise DiskFull("base", 1)

    monkeypatch.setattr(Base, "add", refuse)
    with Home(directory, segment_bytes=8 << 20, memory_bytes=2 << 20) as home:
        assert contents(home.shard) == before


@pytest.mark.parametrize("kills", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_kill_during_the_replay_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kills: int
) -> None:
    directory, options = tmp_path / "shard", {"segment_bytes": 8 << 20}
    with Home(directory, **options) as home:
        home.shard.create_table(schema(dim=64))
        fill(home, 20_000, 64)
        before = contents(home.shard)
    copies, real = list[Path](), Base.commit

    def commit(self: Base, state: BaseState) -> None:
        real(self, state)
        if self.directory == directory / "base" and len(copies) < kills:
            copies.append(copy_of(directory, tmp_path / f"copy{len(copies)}"))

    monkeypatch.setattr(Base, "commit", commit)
    with Home(directory, memory_bytes=2 << 20, **options):
        pass
    assert len(copies) == kills
    for path in copies:
        with Home(path, memory_bytes=2 << 20, **options) as home:
            assert contents(home.shard) == before


def test_a_restart_reads_keys_and_no_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Home(tmp_path / "shard") as home:
        home.shard.create_table(schema(dim=64))
        fill(home, 5000, 64)
        home.flush()
        before = contents(home.shard)
        read = list[int]()
        real = Base.block

        def block(self: Base, number: int, *more: Any) -> Any:
            found = real(self, number, *more)
            read.append(found.kind)
            return found

        monkeypatch.setattr(Base, "block", block)
        home.reopen()
        assert read == [DIRECTORY]
        assert contents(home.shard) == before
