"""Eviction sweeps over rows in memory and in blocks find what they find in a table in memory."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import raised
from tiered import DIM, Tiered

from storage.arena import Budget
from storage.block import FORMATS, ROWS
from storage.eviction.contract import Eviction, TableEviction
from storage.eviction.rules import CapacityLfu, CapacityLru, Norm, StepTtl, TimeTtl
from storage.initializers import make_initializer
from storage.records import Cause
from storage.table import Table

both = raised.both

KEYS = 600
RULES: dict[str, tuple[Eviction, ...]] = {
    "step": (StepTtl(steps=25),),
    "time": (TimeTtl(seconds=12.0),),
    "norm": (Norm(threshold=0.2, grace=4),),
    "norm alone": (Norm(threshold=0.15, grace=0),),
    "lru": (CapacityLru(max_rows=333),),
    "lfu": (CapacityLfu(max_rows=333, half_life=5),),
    "all": (StepTtl(steps=30), Norm(threshold=0.1, grace=2), CapacityLru(max_rows=250)),
}


def sweep(table: Table, seconds: float, between: Callable[[], Any] = lambda: None) -> Any:
    """A whole sweep, as the shard does it: the keys that leave, by cause."""
    found: dict[Cause, list[int]] = {}
    sweeping = table.evictor.sweep()
    for _ in range(100_000):
        if sweeping.done:
            return {cause: sorted(keys) for cause, keys in found.items()}
        victims = sweeping.slice(table.contents(), table.evictor.now(seconds), 64, 17)
        assert len(victims) <= 17
        for cause, keys in victims.by_cause().items():
            found.setdefault(cause, []).extend(keys.tolist())
            assert table.delete(keys)[1] == len(keys)
        if sweeping.wanted is not None:
            sweeping.wanted()
        between()
    raise AssertionError("the sweep does not end")


def fill(tiered: Tiered, twin: Table, seed: int) -> None:
    """Push the same to both tables; move the rows of the first to blocks and back meanwhile."""
    rng = random.Random(seed)

    def push(keys: Any, scale: float) -> None:
        array = np.array(sorted(set(keys)), np.uint64)
        tiered.push(array, scale=scale)
        version = tiered.version
        values = (array % np.uint64(97) + np.uint64(version)).astype(np.float32) * scale
        gradients = np.repeat(values[:, None], DIM, axis=1)
        counts = np.ones(len(array), np.uint32)
        twin.push(array, gradients, counts, version=version, step=version)
        twin.evictor.pushed(version, version, float(version))

    for _ in range(40):
        push(rng.sample(range(KEYS), rng.randint(1, 120)), rng.choice([1.0, 1e-6, 0.0]))
        match rng.randrange(5):
            case 0:
                tiered.flush(rng.choice([7, 50, 300]))
            case 1:
                tiered.demote(rng.randint(1, 300))
            case 2:
                tiered.rewrite(tiered.blocks.sparse(0.9)[:3])()
            case 3:
                tiered.collect()
    assert tiered.blocks.rows > 0


def scores_of(table: Table) -> dict[int, int]:
    """The score of each key by the capacity rule of the table; 0 without one."""
    rules = [rule for rule in table.schema.evictions if isinstance(rule, TableEviction)]
    view = table.contents().host
    out = np.zeros(view.used, np.int64)
    for rule in rules:
        rule.score(view, 0, view.used, table.evictor.now(0.0), out)
    return dict(zip(view.entries[: view.used, 0].tolist(), out.tolist(), strict=True))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.rowstore.MARGIN", 0)
    monkeypatch.setattr("storage.coldrows.LISTED", 3)


@pytest.mark.quick(14)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", RULES)
def test_a_sweep_finds_the_same_rows_wherever_they_are(name: str, seed: int, memory: Path) -> None:
    tiered = Tiered(memory, evictions=RULES[name], initializer=make_initializer("zeros", {}))
    twin = Table(tiered.table.schema, Budget(1 << 30))
    fill(tiered, twin, seed)
    seconds = float(tiered.version)
    dry = tiered.table.evictor.sweep(dry=True)
    while not dry.done:
        assert len(dry.slice(tiered.table.contents(), tiered.table.evictor.now(seconds))) == 0
    scores, before = scores_of(twin), twin.dump()
    want, found = sweep(twin, seconds), sweep(tiered.table, seconds)
    if Cause.CAPACITY in want:  # rows with equal scores leave in the order of their places
        mine, theirs = (sorted(scores[k] for k in each[Cause.CAPACITY]) for each in (found, want))
        assert mine == theirs
    assert found.keys() == want.keys()
    assert all(found[cause] == want[cause] for cause in want.keys() - {Cause.CAPACITY})
    assert {cause: count for cause, count in dry.counts.items() if count} == {
        cause: len(keys) for cause, keys in want.items()
    }
    assert want
    kept = {
        key: (int(meta[1]), meta.tobytes() + row.tobytes())
        for key, meta, row in zip(before.keys.tolist(), before.meta, before.rows, strict=True)
        if not any(key in keys for keys in found.values())
    }
    assert tiered.rows() == kept
    tiered.close()
    twin.close()


def test_cold_rows_leave_without_being_read(memory: Path, monkeypatch: Any) -> None:
    tiered = Tiered(memory, evictions=(StepTtl(steps=5), CapacityLru(max_rows=100)))
    for start in range(0, 500, 50):
        tiered.push(range(start, start + 50))
    tiered.cool()
    for name in ("gather", "rows_of"):
        monkeypatch.setattr(tiered.blocks, name, lambda *_: pytest.fail("a row was read"))
    found = sweep(tiered.table, 0.0)
    assert {cause: len(keys) for cause, keys in found.items()} == {
        Cause.STEP_TTL: 200,
        Cause.CAPACITY: 200,
    }
    assert max(found[Cause.CAPACITY]) == 399


def test_norms_of_cold_rows_are_known_without_reading_the_rows(
    memory: Path, monkeypatch: Any
) -> None:
    tiered = Tiered(memory)
    for start in range(0, 500, 50):
        tiered.push(range(start, start + 50))
    rows = tiered.table.dump()
    norms = np.sqrt((rows.rows[:, :DIM].astype(np.float64) ** 2).sum(axis=1)).astype(np.float32)
    threshold = float(np.sort(norms)[200])
    rule = Norm(threshold=threshold, grace=0)
    tiered.table.evictor = tiered.table.evictor.altered([rule], tiered.version, 0.0)
    tiered.cool()
    for name in ("gather", "rows_of"):
        monkeypatch.setattr(tiered.blocks, name, lambda *_: pytest.fail("a row was read"))
    assert sweep(tiered.table, 0.0) == {Cause.NORM: rows.keys[norms < threshold].tolist()}
    assert len(tiered.table) == 300


@pytest.mark.parametrize("version", [1, 2, 3])
def test_a_row_has_the_same_norm_in_memory_and_in_a_block_of_any_format(
    version: int, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiered = Tiered(memory)
    monkeypatch.setitem(FORMATS, ROWS, version)  # that is written
    for start in range(0, 3000, 500):
        tiered.push(range(start, start + 500), scale=10.0 ** (start // 500 - 3))
    view = tiered.table.contents().host
    slots = np.arange(view.used)
    norms = dict(zip(view.entries[: view.used, 0].tolist(), view.norms(slots), strict=True))
    tiered.cool()
    cold = tiered.table.contents().cold
    assert cold is not None
    found: dict[int, float] = {}
    for _, number in tiered.blocks.extents():
        block = cold.view(number)
        assert block is not None
        keys = block.entries[: block.used, 0].tolist()
        found |= dict(zip(keys, block.norms(np.arange(block.used)), strict=True))
    assert found == norms
    assert len(found) == 3000


def reads_of(tiered: Tiered, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note the blocks whose metadata is read."""
    reads: list[int] = []
    columns = tiered.blocks.columns

    def noted(extent: int) -> Any:
        reads.append(extent)
        return columns(extent)

    monkeypatch.setattr(tiered.blocks, "columns", noted)
    return reads


@pytest.mark.parametrize(
    ("rule", "read"),
    [
        (StepTtl(steps=1000), 0),
        (StepTtl(steps=17), 2),
        (Norm(threshold=1e-9, grace=18), 0),
        (Norm(threshold=9e9, grace=18), 2),
        (CapacityLru(max_rows=1000), 0),
        (CapacityLru(max_rows=950), 1),
    ],
    ids=repr,
)
def test_blocks_without_victims_are_not_read(
    rule: Eviction, read: int, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 blocks of 50 rows, each of one step."""
    tiered = Tiered(memory, evictions=(rule,))
    for start in range(0, 1000, 50):
        tiered.push(range(start, start + 50))
        tiered.flush(50)
    tiered.cool()
    reads = reads_of(tiered, monkeypatch)
    sweep(tiered.table, 0.0)
    assert len(set(reads)) == read


def test_a_damaged_block_is_skipped_and_the_others_are_swept(memory: Path) -> None:
    tiered = Tiered(memory, evictions=(StepTtl(steps=1),))
    for start in range(0, 300, 100):
        tiered.push(range(start, start + 100))
        tiered.flush(100)
    tiered.cool()
    tiered.push([1000], step=50)
    records = tiered.blocks.records
    [first, *_] = [extent for extent, _ in tiered.blocks.extents()]
    records.records[first, records.seen_at :] = 0  # nothing of it was verified yet
    with open(tiered.file.path, "r+b") as file:
        file.seek(records.field(first, 1) + 200)
        file.write(b"damage")
    assert {cause: len(keys) for cause, keys in sweep(tiered.table, 0.0).items()} == {
        Cause.STEP_TTL: 200
    }
    assert len(tiered.table) == 101


@pytest.mark.quick(6)
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", ["step", "lru", "lfu"])
def test_rows_that_move_during_a_sweep_are_evicted_rightly(
    name: str, seed: int, memory: Path
) -> None:
    """A row that moves may escape this sweep, but no row leaves that should stay."""
    tiered = Tiered(memory, evictions=RULES[name], initializer=make_initializer("zeros", {}))
    twin = Table(tiered.table.schema, Budget(1 << 30))
    fill(tiered, twin, seed)
    seconds, rng = float(tiered.version), random.Random(seed)

    def move() -> None:
        match rng.randrange(4):
            case 0:
                tiered.flush(30)
            case 1:
                tiered.demote(50)
            case 2:
                tiered.rewrite(tiered.blocks.sparse(0.9)[:3])()
            case 3:
                tiered.promote(rng.sample(range(KEYS), 30))

    want: Any = sweep(twin, seconds)
    gone: set[int] = set()
    for _ in range(20):
        found = sweep(tiered.table, seconds, move)
        gone |= {key for keys in found.values() for key in keys}
        if not found:
            break
    every = {key for keys in want.values() for key in keys}
    if name == "step":
        assert gone == every
    assert len(tiered.table) == len(twin)
