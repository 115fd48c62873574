"""Admission and eviction in a table: who has a row, from which value on, and who leaves."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from storage.admission.rules import ADMISSIONS, Always, Counter, Probability, Sketch
from storage.arena import Budget
from storage.errors import OutOfMemory
from storage.eviction.rules import CapacityLfu, CapacityLru, Norm, StepTtl, TimeTtl
from storage.initializers import make_initializer
from storage.kernels import Images
from storage.optimizers import OPTIMIZERS, make_optimizer
from storage.records import Cause
from storage.schema import TableSchema
from storage.slots import FREQUENCY, STEP
from storage.table import Table

DIM = 3
ROOM = 1 << 30
MASK = 2**64 - 1
OPTIMIZER = list(OPTIMIZERS)
# every way in which a key may occur in up to four pushes, up to three times in each
WAYS = [way for n in range(1, 5) for way in itertools.product(range(4), repeat=n) if any(way)]


def make(optimizer: str = "sgd", room: int = ROOM, share: float = 1.0, **rules: Any) -> Table:
    schema = TableSchema(
        name="t",
        dim=DIM,
        optimizer=make_optimizer(optimizer, None, {}),
        initializer=make_initializer("uniform", {}),
        seed=7,
        serving_default=-2.5,
        **rules,
    )
    return Table(schema, Budget(room), share)


def u64(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.uint64)


def push(
    table: Table, keys: np.ndarray, counts: Any = 1, *, version: int = 1, step: int = 0
) -> None:
    gradients = np.outer(keys % np.uint64(7) + np.uint64(1), [1.0, -2.0, 0.5]).astype(np.float32)
    many = np.broadcast_to(np.asarray(counts, np.uint32), len(keys)).copy()
    table.push(keys, gradients, many, version=version, step=step)
    table.evictor.pushed(version, step, float(version))


def pulled(table: Table, keys: np.ndarray, mode: Any) -> list[list[float]]:
    out = np.empty((len(keys), DIM), np.float32)
    table.pull(keys, mode, out)
    rows: list[list[float]] = out.tolist()
    return rows


def evict(table: Table, seconds: float = 0.0) -> dict[Cause, int]:
    """A whole sweep, as the shard does it."""
    sweep = table.evictor.sweep()
    while not sweep.done:
        found = sweep.slice(table.contents(), table.evictor.now(seconds))
        for keys in found.by_cause().values():
            table.delete(keys)
    return {cause: count for cause, count in sweep.counts.items() if count}


# ---- admission


@pytest.mark.parametrize("threshold", [1, 2, 3, 5])
@pytest.mark.parametrize("optimizer", OPTIMIZER)
def test_the_nth_occurrence_admits_however_occurrences_are_split(
    optimizer: str, threshold: int
) -> None:
    """Key i occurs in the i-th way; the oracle is a table without rules, told of rows only."""
    table = make(optimizer, admission=Counter(threshold=threshold))
    oracle = make(optimizer)
    every = np.arange(len(WAYS), dtype=np.uint64) + np.uint64(MASK - 50)  # around the end, too
    seen = np.zeros(len(WAYS), np.int64)
    for round in range(4):
        counts = np.array([way[round] if round < len(way) else 0 for way in WAYS])
        at = np.flatnonzero(counts)
        push(table, every[at], counts[at], version=round + 1, step=round)
        seen += counts
        rows = at[seen[at] >= threshold]
        push(oracle, every[rows], counts[rows], version=round + 1, step=round)
        held, want = table.dump(), oracle.dump()
        assert held.keys.tolist() == want.keys.tolist()
        assert held.rows.tobytes() == want.rows.tobytes()
        assert held.meta[:, :3].tobytes() == want.meta[:, :3].tobytes()
        order = np.argsort(every)
        present = seen[order] >= threshold
        assert held.meta[:, FREQUENCY].tolist() == seen[order][present].tolist()
        waiting = (seen[order] > 0) & ~present
        assert held.counters[:, :2].tolist() == [
            [int(key), int(count)]
            for key, count in zip(every[order][waiting], seen[order][waiting], strict=True)
        ]
    table.close()
    oracle.close()


@pytest.mark.quick(5)
@pytest.mark.parametrize(
    "rule", [Counter(threshold=3), Sketch(threshold=3, expected_keys=10_000, error_rate=1e-6)]
)
@pytest.mark.parametrize("optimizer", OPTIMIZER)
def test_random_pushes_and_evictions_are_those_of_a_dict(optimizer: str, rule: Any) -> None:
    """And rows are those of an oracle without rules. In the sketch no two keys share all cells."""
    table, oracle = make(optimizer, admission=rule, evictions=(StepTtl(steps=4),)), make(optimizer)
    every = np.arange(200, dtype=np.uint64) - np.uint64(100)
    rng, last, waiting = np.random.default_rng(11), dict[int, int](), dict[int, int]()
    for step in range(1, 120):
        keys = rng.choice(every, 20, replace=False)
        counts = rng.integers(1, 3, 20)
        push(table, keys, counts, version=step, step=step)
        totals = [waiting.get(key, 0) + n for key, n in zip(keys.tolist(), counts, strict=True)]
        admitted = np.array([key in last for key in keys.tolist()]) | (np.array(totals) >= 3)
        push(oracle, keys[admitted], counts[admitted], version=step, step=step)
        for key, count in zip(keys.tolist(), counts.tolist(), strict=True):
            if key in last:
                last[key] = step
            elif waiting.get(key, 0) + count >= 3:
                waiting.pop(key, None)
                last[key] = step
            else:
                waiting[key] = waiting.get(key, 0) + count
        if step % 3 == 0:
            dead = [key for key, at in last.items() if step - at > 4]
            assert evict(table) == ({Cause.STEP_TTL: len(dead)} if dead else {})
            for key in dead:
                del last[key]
            oracle.delete(np.array(dead, np.uint64))
        held = table.dump()
        assert dict(zip(held.keys.tolist(), held.meta[:, STEP].tolist(), strict=True)) == last
        assert held.rows.tobytes() == oracle.dump().rows.tobytes()
        counted = zip(every.tolist(), table.gate.waiting(every).tolist(), strict=True)
        assert {key: count for key, count in counted if count} == waiting
    table.close()
    oracle.close()


@pytest.mark.parametrize("rule", [Counter(threshold=2), Sketch(threshold=2, expected_keys=100)])
@pytest.mark.parametrize("optimizer", OPTIMIZER)
def test_a_first_row_is_the_initial_value_with_one_step(optimizer: str, rule: Any) -> None:
    table, other, keys = make(optimizer, admission=rule), make(optimizer), u64(5, MASK, 1 << 63)
    initial = pulled(table, keys, "train")
    push(table, keys)
    assert len(table) == 0
    assert pulled(table, keys, "train") == initial
    assert pulled(table, keys, "serve") == [[-2.5] * DIM] * 3
    push(table, keys, version=2)
    push(other, keys, version=2)
    assert table.dump().rows.tobytes() == other.dump().rows.tobytes()
    assert table.dump().meta[:, FREQUENCY].tolist() == [2, 2, 2]
    assert pulled(table, keys, "serve") == pulled(table, keys, "train") != initial
    table.close()
    other.close()


@pytest.mark.parametrize("name", ADMISSIONS)
def test_a_pull_counts_nothing(name: str) -> None:
    rules = {"always": Always(), "counter": Counter(threshold=3), "probability": Probability(p=0.5)}
    table = make(admission=rules.get(name, Sketch(threshold=3, expected_keys=10)))
    push(table, u64(1, 2, 3))
    before = table.dump()
    for mode in ("train", "serve"):
        pulled(table, u64(1, 2, 3, 4), mode)
    after = table.dump()
    assert all(
        getattr(before, part).tobytes() == getattr(after, part).tobytes()
        for part in ("keys", "rows", "meta", "counters", "cells")
    )
    table.close()


def test_gradients_of_those_that_wait_are_counted_as_dropped() -> None:
    table = make(admission=Counter(threshold=4))
    push(table, u64(1, 2), [3, 4])
    push(table, u64(1, 2, 3), [1, 1, 2], version=2)
    tally, stats = table.tally, table.stats()
    assert (tally.admitted, tally.refused, tally.dropped) == (2, 2, 5)
    assert (stats.rows, stats.waiting) == (2, 1)
    assert stats.bytes > stats.index_bytes + stats.counter_bytes > stats.counter_bytes > 0
    table.close()


def test_a_sketch_takes_the_bytes_that_its_rule_reports() -> None:
    rule = Sketch(threshold=3, expected_keys=1_000_000, error_rate=0.01)
    table = make(admission=rule)
    assert rule.bytes <= table.stats().counter_bytes <= rule.bytes + (2 << 20)
    table.close()


def test_a_sketch_admits_few_keys_early_and_none_late() -> None:
    table = make(admission=Sketch(threshold=3, expected_keys=20_000, error_rate=0.01))
    keys = np.arange(20_000, dtype=np.uint64)
    push(table, keys, 2)
    assert len(table) <= 0.01 * 20_000
    push(table, keys, version=2)
    assert len(table) == 20_000
    table.close()


@pytest.mark.parametrize("rule", [Counter(threshold=3), Sketch(threshold=3, expected_keys=100)])
def test_an_evicted_key_earns_admission_again(rule: Any) -> None:
    table, keys = make(admission=rule, evictions=(StepTtl(steps=5),)), u64(1, MASK)
    push(table, keys, 3, step=1)
    push(table, u64(9), 3, version=2, step=7)
    assert evict(table) == {Cause.STEP_TTL: 2}
    assert table.dump().keys.tolist() == [9]
    for version in (3, 4):
        push(table, keys, version=version, step=8)
        assert table.dump().keys.tolist() == [9]
    push(table, keys, version=5, step=8)
    assert table.dump().keys.tolist() == [1, 9, MASK]
    table.close()


def test_a_delete_forgets_what_was_counted() -> None:
    table = make(admission=Counter(threshold=3))
    push(table, u64(1, 2, 3), [3, 2, 1])
    gone, rows = table.delete(u64(7, 2, 1))
    assert (gone.tolist(), rows) == ([2, 1], 1)
    push(table, u64(1, 2, 3), 2, version=2)
    assert table.dump().keys.tolist() == [3]
    table.close()


def test_a_table_s_share_of_keys_is_its_share_of_the_rules() -> None:
    rules = {"admission": Counter(max_keys=1000), "evictions": (CapacityLru(max_rows=101),)}
    table = make(share=0.25, **rules)
    assert table.gate.cap == 250
    assert table.evictor.excess(100) == 100 - 26
    table.close()


def test_a_push_without_room_for_its_counters_changes_nothing() -> None:
    table = make(room=3 << 20, admission=Counter(threshold=2))
    push(table, np.arange(1000, dtype=np.uint64), 2)
    before, held = table.dump(), table.stats()
    many = np.arange(500, 200_000, dtype=np.uint64)
    with pytest.raises(OutOfMemory):
        push(table, many, np.where(many < 2000, 2, 1), version=2)
    after = table.dump()
    assert table.stats().rows == held.rows
    assert all(
        getattr(before, part).tobytes() == getattr(after, part).tobytes()
        for part in ("keys", "rows", "meta", "counters")
    )
    table.close()


# ---- eviction


@pytest.mark.parametrize("optimizer", OPTIMIZER)
def test_a_row_pushed_each_step_stays_and_an_idle_one_leaves(optimizer: str) -> None:
    ttl = 3
    table = make(optimizer, evictions=(StepTtl(steps=ttl),))
    push(table, u64(1, 2, MASK, MASK - 1), version=1, step=0)
    left: dict[int, int] = {}
    for step in range(1, 10 * ttl):
        push(table, u64(1, MASK), version=step + 1, step=step)
        before = set(table.dump().keys.tolist())
        evict(table)
        left |= {key: step for key in before - set(table.dump().keys.tolist())}
    assert left == {2: ttl + 1, MASK - 1: ttl + 1}
    assert table.dump().keys.tolist() == [1, MASK]
    table.close()


def test_the_norm_is_that_of_the_embedding_alone() -> None:
    """Adagrad's state is large; the norm of (3, 4, 0) / 5 is 1, on neither side of itself."""
    below, above = np.nextafter(np.float32(1), np.float32(0)), np.float32(1)
    table = make("adagrad", evictions=(Norm(threshold=1.0, grace=0),))
    rows = np.full((3, 6), 9.0, np.float32)
    rows[:, :3] = [[0.6, 0.8, 0.0], [0.0, 0.0, below], [0.0, -above, 0.0]]
    rows[0, :3] *= np.float32(1.001)
    keys, ones = u64(1, 2, 3), np.ones(3, np.uint64)
    table.put(Images(keys, ones, np.zeros(3, np.int64), ones, rows))
    table.evictor.pushed(1, 0, 0.0)
    assert evict(table) == {Cause.NORM: 1}
    assert table.dump().keys.tolist() == [1, 3]
    table.close()


def test_time_is_told_by_versions() -> None:
    table = make(evictions=(TimeTtl(seconds=10.0),))
    for version in range(1, 30):
        push(table, u64(version, 1000), version=version)  # at that second
    assert evict(table, seconds=29.0) == {Cause.TIME_TTL: 18}
    assert table.dump().keys.tolist() == [*range(19, 30), 1000]
    table.close()


@pytest.mark.parametrize("rule", [CapacityLru(max_rows=10), CapacityLfu(max_rows=10)])
def test_a_table_that_is_too_large_loses_its_lowest_rows(rule: Any) -> None:
    table = make(evictions=(rule,))
    for version in range(1, 31):
        push(table, u64(version), version, version=version, step=version)
    assert table.evictor.excess(len(table)) == 20
    assert evict(table) == {Cause.CAPACITY: 20}
    assert table.dump().keys.tolist() == list(range(21, 31))
    table.close()


def test_counters_outlive_no_ttl() -> None:
    rules = {"admission": Counter(threshold=9), "evictions": (StepTtl(steps=10),)}
    table = make(**rules)
    push(table, u64(1), version=1, step=0)
    push(table, u64(2), version=2, step=9)
    assert table.evictor.stale(0.0) == 0
    push(table, u64(3), version=3, step=11)
    assert table.evictor.stale(0.0) == 1
    table.gate.expire(2)
    assert table.dump().counters[:, 0].tolist() == [2, 3]
    again = make(**rules)
    again.evictor.load(table.evictor.pack())
    assert again.evictor.stale(0.0) == 1
    table.close()
    again.close()
