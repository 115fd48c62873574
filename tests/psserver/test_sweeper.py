"""Eviction as the shard does it: slices between pushes, and what a restart must not change."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from homes import Homes
from stores import Direct, Home, contents, make_shard, push, schema

from psproto import ps_pb2 as pb
from psserver import sweeper as module
from psserver.errors import Draining, Overloaded
from psserver.service import Service
from psserver.shard import Shard
from psserver.sweeper import FULL_SECONDS, IDLE_SECONDS, SHORTEST, Sweeper
from psserver.sweeps import SWEEPING, URGENT
from psserver.workers import Workers
from storage.admission.rules import Counter, Probability, Sketch
from storage.errors import DiskFull, UnknownTable
from storage.eviction.rules import CapacityLru, Norm, StepTtl, TimeTtl
from storage.records import Cause
from storage.sgd import Sgd


def rows(shard: Shard, table: str = "t") -> int:
    return shard.describe(table)[1].rows


def give(shard: Shard, keys: Any, **changes: Any) -> None:
    shard.exchange([push(keys, **changes)], [])


def steps(shard: Shard, table: str = "t") -> dict[int, int]:
    return {key: step for key, _, step, _ in shard.dump()[table].meta.tolist()}


def counters(shard: Shard) -> dict[int, int]:
    return {key: total for key, total, _ in shard.dump()["t"].counters.tolist()}


def ticks(shard: Shard, most: int = 100) -> float:
    """Tick until nothing is to be done; the largest share that was asked for."""
    asked = [shard.sweeps.tick()]
    while asked[-1]:
        assert len(asked) < most
        asked.append(shard.sweeps.tick())
    return max(asked)


def test_without_rules_nothing_is_looked_at() -> None:
    shard = make_shard()
    shard.create_table(schema())
    give(shard, range(100))
    shard._tables.require_number(1).table.view = None  # type: ignore[assignment]
    assert shard.sweeps.tick() == 0.0


def test_tables_take_turns_and_a_dropped_one_none() -> None:
    shard = make_shard()
    for name in "abc":
        shard.create_table(schema(name, evictions=(StepTtl(steps=2),)))
        give(shard, range(10), table=name, step=0)
        give(shard, range(4), table=name, step=9)
    shard.drop_table("b")
    assert ticks(shard) == SWEEPING
    assert (rows(shard, "a"), rows(shard, "c")) == (4, 4)


def test_a_table_far_above_its_rows_is_urgent() -> None:
    shard = make_shard()
    shard.create_table(schema(evictions=(CapacityLru(max_rows=10),)))
    give(shard, range(1000))
    assert shard.sweeps.tick() == URGENT
    ticks(shard)
    assert rows(shard) == 10


@pytest.mark.parametrize("checkpoint", [True, False])
def test_a_client_that_is_behind_or_tells_no_step_makes_no_row_idle(
    tmp_path: Path, checkpoint: bool
) -> None:
    with Home(tmp_path / "home") as home:
        home.shard.create_table(schema(evictions=(StepTtl(steps=100),)))
        for step in range(0, 1000, 50):
            give(home.shard, [1], step=step)
            give(home.shard, [2], step=0)
            give(home.shard, [3], step=max(0, step - 500))
            ticks(home.shard)
        assert steps(home.shard) == {1: 950, 2: 950, 3: 950}
        if checkpoint:
            home.flush()
        before = contents(home.shard)
        home.reopen()
        assert contents(home.shard) == before
        give(home.shard, [2], step=0)
        give(home.shard, [3], step=1051)
        ticks(home.shard)
        assert steps(home.shard) == {3: 1051}


def test_the_optimizer_takes_the_step_of_the_push_whatever_the_table_has() -> None:
    seen: list[int] = []

    class Spy(Sgd):
        def step(self, slab: Any, slots: Any, grads: Any, lr: float, step: int) -> None:
            seen.append(step)

    shard = make_shard()
    shard.create_table(schema(optimizer=Spy(lr=1.0)))
    for step in (7, 3, 0, 9):
        give(shard, [1], step=step)
    assert seen == [7, 3, 0, 9]
    assert steps(shard) == {1: 9}


@pytest.mark.parametrize("rule", [StepTtl(steps=2), TimeTtl(seconds=5.0), Norm(grace=1)])
def test_rows_that_stay_for_want_of_room_leave_once_there_is_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: Any
) -> None:
    now = [100.0]
    with Home(tmp_path / "home", now=lambda: now[0]) as home:
        shard = home.shard
        shard.create_table(schema(evictions=(rule,)))
        give(shard, range(100), value=0.0, step=0)
        now[0] = 200.0
        give(shard, [1000], value=5.0, step=9)

        def full(*sizes: int) -> None:
            raise DiskFull("here", sum(sizes))

        with monkeypatch.context() as patch:
            patch.setattr(home.log, "reserve", full)
            for _ in range(3):
                with pytest.raises(DiskFull):
                    shard.sweeps.tick()
            with pytest.raises(DiskFull):
                shard.sweeps.take_slice(*shard.sweeps.begin("t", dry=False))
            assert rows(shard) == 101
        ticks(shard)
        assert rows(shard) == 1


@pytest.mark.parametrize("rule", [StepTtl(steps=100), TimeTtl(seconds=100.0)])
def test_counters_that_outlive_a_ttl_go_and_are_counted(rule: Any) -> None:
    now = [0.0]
    shard = make_shard(now=lambda: now[0])
    shard.create_table(schema(admission=Counter(threshold=9), evictions=(rule,)))
    give(shard, range(50), step=0)
    now[0] = 60.0
    give(shard, range(40, 60), step=60)
    ticks(shard)
    younger = dict.fromkeys(range(40, 50), 2) | dict.fromkeys(range(50, 60), 1)
    assert counters(shard) == dict.fromkeys(range(40), 1) | younger
    assert shard.tally("t")[1] == 0
    now[0] = 120.0
    give(shard, [1000], step=120)
    ticks(shard)
    assert counters(shard) == younger | {1000: 1}
    assert shard.tally("t")[1] == 40


@pytest.mark.parametrize("rule", [StepTtl(steps=100), TimeTtl(seconds=100.0)])
def test_a_sketch_ages_once_in_a_ttl(rule: Any) -> None:
    now = [0.0]
    shard = make_shard(now=lambda: now[0])
    shard.create_table(
        schema(admission=Sketch(threshold=20, expected_keys=1000), evictions=(rule,))
    )
    gate = shard._tables.require_number(1).table.gate
    eight = np.array([8], np.uint32)
    found = []
    for key, at in enumerate((0, 60, 120, 130, 190, 300)):
        now[0] = float(at)
        give(shard, [key], step=at, counts=eight)
        for _ in range(20):
            shard.sweeps.tick()
        found.append(gate.waiting(np.arange(6, dtype=np.uint64)).tolist())
    assert found == [
        [8, 0, 0, 0, 0, 0],
        [8, 8, 0, 0, 0, 0],
        [4, 4, 4, 0, 0, 0],
        [4, 4, 4, 8, 0, 0],
        [4, 4, 4, 8, 8, 0],
        [2, 2, 2, 4, 4, 4],
    ]


def test_a_sketch_that_nobody_pushes_to_is_empty_in_the_end() -> None:
    now = [0.0]
    shard = make_shard(now=lambda: now[0])
    rules = {"admission": Sketch(expected_keys=1000), "evictions": (TimeTtl(seconds=100.0),)}
    shard.create_table(schema(**rules))
    give(shard, range(500))
    now[0] = 101.0
    for _ in range(10):
        shard.sweeps.tick()
    assert shard.describe("t")[1].waiting == 0


@pytest.mark.parametrize("checkpoint", [True, False])
def test_a_restart_ages_no_sketch(tmp_path: Path, checkpoint: bool) -> None:
    now = [100.0]
    rules = {"admission": Sketch(threshold=8), "evictions": (TimeTtl(seconds=10.0),)}
    with Home(tmp_path / "home", now=lambda: now[0]) as home:
        home.shard.create_table(schema(**rules))
        give(home.shard, [7], counts=np.array([1], np.uint32))
        now[0] = 150.0  # so that something is stale
        give(home.shard, [1, 2, 3], counts=np.array([5, 5, 5], np.uint32))
        if checkpoint:
            home.flush()
        home.reopen()
        for _ in range(5):
            home.shard.sweeps.tick()
        gate = home.shard._tables.require_number(1).table.gate
        assert gate.waiting(np.array([1, 2, 3], np.uint64)).tolist() == [5, 5, 5]


def test_a_sketch_that_is_replayed_is_no_fuller_than_it_was(tmp_path: Path) -> None:
    rule = Sketch(threshold=2, expected_keys=2000)
    with Home(tmp_path / "home") as home:
        home.shard.create_table(schema(admission=rule))
        for start in range(0, 20_000, 500):
            give(home.shard, range(start, start + 500))
        home.reopen()
        before = rows(home.shard)
        give(home.shard, range(1 << 40, (1 << 40) + 500))
        assert rows(home.shard) - before <= 10


def test_a_part_of_a_sketch_is_damage(tmp_path: Path) -> None:
    shard = make_shard()
    shard.create_table(schema(admission=Sketch(expected_keys=100)))
    gate = shard._tables.require_number(1).table.gate
    gate.load_cells(0, np.ones(8, np.uint8))
    with pytest.raises(
        Exception, match=r"sketch\) of table 't': expected .* bytes of a sketch, but 8 were loaded"
    ):
        shard.recovery.finish()


def test_keys_without_counters_are_no_part_of_a_record(tmp_path: Path) -> None:
    with Home(tmp_path / "home") as home:
        home.shard.create_table(schema(admission=Probability(p=1e-9)))
        pushed = home.shard._tables.require_number(1).table.push(
            np.arange(9, dtype=np.uint64),
            np.ones((9, 2), np.float32),
            np.ones(9, np.uint32),
            version=1,
            step=0,
        )
        assert (len(pushed.keys), len(pushed.waiting), len(pushed.totals)) == (0, 0, 0)


def test_saving_and_exporting_evict_nothing(tmp_path: Path) -> None:
    rules = CapacityLru(max_rows=5), StepTtl(steps=2)
    with Homes(tmp_path / "home", 1, f"file://{tmp_path}/checkpoints") as homes:
        homes.create(schema(admission=Counter(threshold=2), evictions=rules))
        for keys, step in ((range(20), 0), (range(20), 0), (range(15, 30), 9)):
            homes.push(keys, step=step)
        [node] = homes.nodes
        number, sweep = node.shard.sweeps.begin("t", True)
        while not sweep.done:
            node.shard.sweeps.take_slice(number, sweep)
        assert sweep.counts[Cause.STEP_TTL] == 15
        before = contents(node.shard)
        homes.checkpoint("a")
        homes.checkpoint("b", base="a")
        homes.verify("b")
        node.home.flush()
        exported = [
            sorted(np.frombuffer(message.keys, "<u8").tolist())
            for stored in ("", "a", "b")
            for message in node.checkpoints.rows.read_rows(
                pb.ReadRowsRequest(table="t", checkpoint=stored)
            )
            if message.keys
        ]
        assert exported == [list(range(20))] * 3
        assert contents(node.shard) == before
        node.reopen()
        assert contents(node.shard) == before


# ---- pace


class Clock:
    """Time that passes while a shard ticks, and in pauses, which it writes down."""

    def __init__(self, ticks: list[Any]) -> None:
        self.now = 7.0
        self.pauses: list[float] = []
        self._ticks = ticks  # seconds and share, or the error, of each

    def monotonic(self) -> float:
        return self.now

    def tick(self) -> float:
        seconds, told = self._ticks[len(self.pauses) - 1]
        self.now += seconds
        if isinstance(told, Exception):
            raise told
        return float(told)

    def is_set(self) -> bool:
        return False

    def wait(self, seconds: float) -> bool:
        """The event that ends the thread: after the last tick."""
        self.pauses.append(round(seconds, 6))
        self.now += seconds
        return len(self.pauses) > len(self._ticks)


def test_the_pause_after_a_slice_leaves_eviction_its_share_of_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    busy = [(0.003, SWEEPING), (0.003, URGENT), (0.0, SWEEPING), (1e-5, URGENT), (0.5, 0.0)]
    clock = Clock([*busy, (0.0, DiskFull("here", 1)), (0.0, ValueError()), (0.0, 0.0)])
    shard: Any = make_shard()
    monkeypatch.setattr(shard.sweeps, "tick", clock.tick)
    monkeypatch.setattr(module, "time", clock)
    sweeper = Sweeper(shard, Direct())  # type: ignore[arg-type]
    monkeypatch.setattr(sweeper, "_stop", clock)
    sweeper._run()
    first, *slices = clock.pauses
    assert first == IDLE_SECONDS
    assert slices[:2] == [0.097, 0.003]  # 3 % and half of the time
    assert slices[2:] == [SHORTEST, SHORTEST, IDLE_SECONDS, FULL_SECONDS, FULL_SECONDS, 0.1]


def test_a_sweep_on_demand_leaves_pushes_half_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock([])
    shard: Any = make_shard()
    idle(shard)
    do = shard.sweeps.take_slice

    def slice(number: int, sweep: Any) -> None:
        do(number, sweep)
        clock.now += 0.25

    monkeypatch.setattr(shard.sweeps, "take_slice", slice)
    monkeypatch.setattr(module, "time", clock)
    sweeper = Sweeper(shard, Direct())  # type: ignore[arg-type]
    monkeypatch.setattr(sweeper, "_stop", clock)
    sweeper.evict(pb.EvictRequest(table="t"))
    assert clock.pauses == [0.25]


# ---- on demand


class Slow(Direct):
    """An engine that does something before its n-th call."""

    def __init__(self, call: int, then: Callable[[], None]) -> None:
        self._left, self._then = call, then

    def run(self, call: Callable[[], Any]) -> Any:
        self._left -= 1
        if not self._left:
            self._then()
        return call()


def idle(shard: Shard) -> None:
    shard.create_table(schema(evictions=(StepTtl(steps=2),)))
    give(shard, range(100), step=0)
    give(shard, [1000], step=9)


def test_a_sweep_on_demand_tells_what_it_did() -> None:
    shard = make_shard()
    idle(shard)
    sweeper = Sweeper(shard, Direct())  # type: ignore[arg-type]
    told = sweeper.evict(pb.EvictRequest(table="t", dry_run=True))
    assert (dict(told.evicted), told.rows, told.version) == ({"step_ttl": 100}, 101, 3)
    told = sweeper.evict(pb.EvictRequest(table="t"))
    assert (dict(told.evicted), told.rows, told.version) == ({"step_ttl": 100}, 101, 4)
    assert rows(shard) == 1
    with pytest.raises(UnknownTable):
        sweeper.evict(pb.EvictRequest(table="u"))


def test_a_stop_ends_a_sweep_that_is_not_done() -> None:
    shard = make_shard()
    idle(shard)
    sweeper = Sweeper(shard, Direct())  # type: ignore[arg-type]
    sweeper.stop()
    with pytest.raises(Draining):
        sweeper.evict(pb.EvictRequest(table="t"))
    assert rows(shard) == 101


def test_a_sweep_ends_when_nobody_waits_for_it_and_another_may_begin() -> None:
    shard = make_shard()
    idle(shard)
    gone = threading.Event()
    sweeper = Sweeper(shard, Slow(3, gone.set))  # type: ignore[arg-type]
    shard.create_table(schema("b", evictions=(CapacityLru(max_rows=1),)))
    give(shard, range(100), table="b")
    with pytest.raises(Draining, match="the caller is gone"):
        sweeper.evict(pb.EvictRequest(table="b"), gone)
    assert rows(shard, "b") == 100
    assert sweeper.evict(pb.EvictRequest(table="t")).evicted == {"step_ttl": 100}


def test_a_call_that_is_given_up_ends_its_sweep() -> None:
    begun, seen = threading.Event(), []

    class Endless:
        def evict(self, request: pb.EvictRequest, gone: threading.Event) -> None:
            begun.set()
            seen.append(gone.wait(60.0))

    async def call() -> None:
        workers = Workers()
        service: Any = SimpleNamespace(_sweeper=Endless(), _workers=workers)
        task = asyncio.create_task(Service.evict(service, pb.EvictRequest(), float("inf")))
        while not begun.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        workers.close()

    asyncio.run(call())
    assert seen == [True]


def test_a_shard_does_one_sweep_on_demand_at_a_time() -> None:
    shard = make_shard()
    idle(shard)
    refused: list[Exception] = []

    def another() -> None:
        def ask() -> None:
            try:
                sweeper.evict(pb.EvictRequest(table="t"))
            except Overloaded as error:
                refused.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()

    sweeper = Sweeper(shard, Slow(2, another))  # type: ignore[arg-type]
    sweeper.evict(pb.EvictRequest(table="t"))
    assert len(refused) == 1
    assert rows(shard) == 1


def test_a_table_dropped_during_a_sweep_is_told() -> None:
    shard = make_shard()
    idle(shard)
    sweeper = Sweeper(shard, Slow(3, lambda: shard.drop_table("t")))  # type: ignore[arg-type]
    with pytest.raises(UnknownTable, match="'t'"):
        sweeper.evict(pb.EvictRequest(table="t"))
