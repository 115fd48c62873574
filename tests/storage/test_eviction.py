"""Every rule against a reference in plain Python, however the sweep is sliced.

Rows are written down here, packed as a tier packs them, and taken away as a table would do it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.arena import Budget
from storage.eviction.contract import Eviction, Now, RowEviction, TableEviction, View
from storage.eviction.evictor import Evictor
from storage.eviction.rules import (
    EVICTIONS,
    CapacityLfu,
    CapacityLru,
    Norm,
    StepTtl,
    TimeTtl,
    make_eviction,
)
from storage.eviction.sweep import MOST, READ, Sweep, compile_all
from storage.eviction.timeline import PARTS, Timeline
from storage.initializers import make_initializer
from storage.optimizers import OPTIMIZERS, make_optimizer
from storage.records import Cause
from storage.tiers.host import HostTier

MASK = 2**64 - 1
EXTREMES = [0, 1, MASK, MASK - 1, 1 << 63, (1 << 63) - 1, (1 << 63) + 1, 1 << 62]
LAST_STEP = (1 << 47) - 1
FIRST_STEP = -(1 << 47)
NAMES = list(EVICTIONS)
DIM, WIDTH = 3, 5
CAPACITIES = (CapacityLru, CapacityLfu)


@dataclass(frozen=True)
class Row:
    """A row as its push left it."""

    key: int
    version: int
    step: int = 0
    frequency: int = 1
    embedding: tuple[float, ...] = (1.0, 1.0, 1.0)


class Rows:
    """A tier's slots, some of them empty."""

    def __init__(self, rows: Sequence[Row | None], dim: int = DIM, width: int = WIDTH) -> None:
        self.slab = np.full((len(rows) + 1, width), 1e9, np.float32)  # state counts for nothing
        self.meta = np.zeros((len(rows) + 1, 3), np.uint64)
        self.used, self.dim = len(rows), dim
        for slot, row in enumerate(rows):
            if row is not None:
                self.put(slot, row)
            else:
                self.meta[slot] = 7, 0xFFFF, (FIRST_STEP << 16) & MASK  # what an old row left

    def put(self, slot: int, row: Row) -> None:
        frequency = row.frequency
        self.meta[slot, 0] = row.key
        self.meta[slot, 1] = row.version << 16 | frequency >> 16
        self.meta[slot, 2] = (row.step << 16 | frequency & 0xFFFF) & MASK
        self.slab[slot, : self.dim] = row.embedding

    @property
    def rows(self) -> int:
        return int((self.meta[: self.used, 1] >> np.uint64(16) != 0).sum())

    @property
    def view(self) -> View:
        return View(self.slab, self.meta, self.used, self.rows, self.dim)

    def release(self, slots: Any) -> None:
        self.meta[slots, 1] &= np.uint64(0xFFFF)


def run(
    sweep: Sweep, rows: Rows, now: Now, limit: int = 1 << 16, most: int = MOST
) -> list[tuple[int, Cause]]:
    """Sweep to the end, deleting what is found: slots and causes in the order of their leaving."""
    found = []
    for _ in range(100_000):
        if sweep.done:
            return found
        victims = sweep.slice(rows.view, now, limit, most)
        assert len(victims) <= most
        causes = [Cause(cause) for cause in victims.causes.tolist()]
        found += list(zip(victims.slots.tolist(), causes, strict=True))
        rows.release(victims.slots)
    raise AssertionError("the sweep does not end")


# ---- what the rules mean


def step_ttl(rule: Any, rows: Sequence[Row | None], now: Now) -> set[int]:
    return {i for i, row in enumerate(rows) if row and now.step - row.step > rule.steps}


def time_ttl(rule: Any, rows: Sequence[Row | None], now: Now) -> set[int]:
    return {i for i, row in enumerate(rows) if row and row.version <= now.idle}


def norm(rule: Any, rows: Sequence[Row | None], now: Now) -> set[int]:
    return {
        i
        for i, row in enumerate(rows)
        if row
        and now.step - row.step >= rule.grace
        and math.sqrt(math.fsum(float(np.float32(x)) ** 2 for x in row.embedding)) < rule.threshold
    }


def lowest(rule: Any, rows: Sequence[Row | None], score: Callable[[Row], float]) -> set[int]:
    """Ties leave in the order of slots."""
    there = [(score(row), i) for i, row in enumerate(rows) if row]
    return {i for _, i in sorted(there)[: max(0, len(there) - rule.max_rows)]}


def capacity_lru(rule: Any, rows: Sequence[Row | None], now: Now) -> set[int]:
    return lowest(rule, rows, lambda row: row.version)


def capacity_lfu(rule: Any, rows: Sequence[Row | None], now: Now) -> set[int]:
    def score(row: Row) -> float:
        age = max(0, now.step - row.step)
        return math.floor((1 << 14) * (math.log2(max(1, row.frequency)) - age / rule.half_life))

    return lowest(rule, rows, score)


REFERENCES: dict[str, Callable[[Any, Sequence[Row | None], Now], set[int]]] = {
    "step_ttl": step_ttl,
    "time_ttl": time_ttl,
    "norm": norm,
    "capacity_lru": capacity_lru,
    "capacity_lfu": capacity_lfu,
}
PARAMS: dict[str, list[dict[str, float]]] = {
    "step_ttl": [{"steps": 1}, {"steps": 40}, {"steps": 2**47}],
    "time_ttl": [{"seconds": 5}],
    "norm": [{"threshold": 1.0, "grace": 0}, {"threshold": 2.5, "grace": 30}],
    "capacity_lru": [{"max_rows": n} for n in (1, 50, 199, 1000)],
    "capacity_lfu": [{"max_rows": n, "half_life": h} for n in (1, 50, 199) for h in (1, 20, 1e6)],
}
EVERY = [make_eviction(name, params) for name in NAMES for params in PARAMS[name]]


def random_rows(seed: int, count: int = 300) -> list[Row | None]:
    rng = np.random.default_rng(seed)
    keys = [*EXTREMES, *(int(k) for k in rng.integers(0, 2**64, count, np.uint64))]
    rows: list[Row | None] = [
        Row(
            key,
            version=int(rng.integers(1, 100)),
            step=int(rng.integers(-50, 51)),
            frequency=int(min(rng.zipf(1.3), 2**32 - 1)),
            embedding=tuple(rng.normal(0.0, 1.0, DIM).astype(np.float32).tolist()),
        )
        for key in keys[:count]
    ]
    for empty in rng.choice(count, count // 5, replace=False):
        rows[empty] = None
    rows[0], rows[1] = Row(1, (1 << 48) - 1, LAST_STEP, 2**32 - 1), Row(2, 1, FIRST_STEP, 0)
    return rows


def test_every_rule_has_a_reference() -> None:
    assert list(REFERENCES) == list(PARAMS) == NAMES


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rule", EVERY, ids=repr)
def test_what_leaves_is_what_the_rule_says(rule: Eviction, seed: int) -> None:
    given, now = random_rows(seed), Now(50, 100, 60)
    wanted = REFERENCES[rule.name](rule, given, now)
    sweep = Sweep([rule])
    found = run(sweep, Rows(given), now)
    assert sorted(found) == [(slot, rule.cause) for slot in sorted(wanted)]
    assert sweep.counts == {rule.cause: len(wanted)}


@pytest.mark.parametrize("rule", EVERY, ids=repr)
@pytest.mark.parametrize(("limit", "most"), [(1, 1), (7, 3), (1000, 1), (3, 1000), (301, 100)])
def test_slices_make_no_difference(rule: Eviction, limit: int, most: int) -> None:
    given, now = random_rows(9), Now(50, 100, 60)
    wanted = REFERENCES[rule.name](rule, given, now)
    found = run(Sweep([rule]), Rows(given), now, limit, most)
    assert sorted(slot for slot, _ in found) == sorted(wanted)


@pytest.mark.parametrize("rule", EVERY, ids=repr)
def test_a_table_without_rows_has_no_victims(rule: Eviction) -> None:
    for rows in (Rows([]), Rows([None] * 10)):
        assert run(Sweep([rule]), rows, Now(50, 100, 60)) == []


@pytest.mark.parametrize("rule", EVERY, ids=repr)
def test_a_dry_sweep_counts_the_same_and_changes_nothing(rule: Eviction) -> None:
    rows, now = Rows(random_rows(4)), Now(50, 100, 60)
    before = rows.meta.copy(), rows.slab.copy()
    dry, real = Sweep([rule], dry=True), Sweep([rule])
    assert run(dry, rows, now, 100, 1) == []
    assert (rows.meta == before[0]).all()
    assert (rows.slab == before[1]).all()
    run(real, rows, now)
    assert dry.counts == real.counts


def test_no_key_is_a_sentinel() -> None:
    rows = Rows([Row(key, 1) for key in EXTREMES])
    victims = Sweep([TimeTtl()]).slice(rows.view, Now(0, 1, 1))
    keys = victims.keys(rows.view)
    assert {cause: each.tolist() for cause, each in keys.items()} == {Cause.TIME_TTL: EXTREMES}
    assert keys[Cause.TIME_TTL].dtype == np.uint64


def test_all_kernels_compile() -> None:
    compile_all()


# ---- rules as values


@pytest.mark.parametrize("name", NAMES)
def test_rules_are_values_and_made_again_from_floats(name: str) -> None:
    rule = make_eviction(name, {})
    params = {field.name: float(getattr(rule, field.name)) for field in fields(rule)}
    again = make_eviction(name, params)
    assert (again, hash(again), repr(again)) == (rule, hash(rule), repr(rule))
    assert len({make_eviction(each, {}) for each in NAMES}) == len(NAMES)


def test_an_unknown_name_is_answered_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="no eviction 'ttl'; there are: step_ttl, time_ttl, norm"):
        make_eviction("ttl", {})


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_parameter_is_answered_with_those_there_are(name: str) -> None:
    with pytest.raises(ValueError, match=f"eviction '{name}' has no parameter 'size'; it has: "):
        make_eviction(name, {"size": 1.0})


@pytest.mark.parametrize(
    ("name", "param", "value", "rule"),
    [
        ("step_ttl", "steps", 0, "1 or more"),
        ("step_ttl", "steps", 1.5, r"a whole number below 2\^48"),
        ("step_ttl", "steps", 2**48, r"a whole number below 2\^48"),
        ("step_ttl", "steps", math.nan, "a number of size up to"),
        ("time_ttl", "seconds", 0.0, "0.001 or more"),
        ("time_ttl", "seconds", math.inf, "a number of size up to"),
        ("norm", "threshold", 0.0, "above 0"),
        ("norm", "grace", -1, "0 or more"),
        ("capacity_lru", "max_rows", 0, "1 or more"),
        ("capacity_lfu", "max_rows", 0, "1 or more"),
        ("capacity_lfu", "half_life", 0, "1 or more"),
    ],
)
def test_a_refused_parameter_is_named(name: str, param: str, value: float, rule: str) -> None:
    with pytest.raises(ValueError, match=f"eviction '{name}': {param} must be {rule}.*got "):
        make_eviction(name, {param: value})


def test_a_table_takes_one_rule_of_a_kind() -> None:
    with pytest.raises(ValueError, match="'capacity_lru' and 'capacity_lfu' are of one kind"):
        Evictor([CapacityLru(max_rows=5), StepTtl(), CapacityLfu(max_rows=6)])


# ---- rules for rows


@pytest.mark.parametrize("step", [FIRST_STEP + 10, -1, 0, 5, LAST_STEP])
def test_the_step_ttl_is_the_last_step_to_stay(step: int) -> None:
    rows = Rows([Row(i, 1, step - i) for i in range(11)])
    found = run(Sweep([StepTtl(steps=5)]), rows, Now(step, 1))
    assert [slot for slot, _ in found] == [6, 7, 8, 9, 10]


def test_steps_ahead_of_the_table_stay() -> None:
    rows = Rows([Row(1, 1, LAST_STEP), Row(2, 1, 0)])
    assert run(Sweep([StepTtl(steps=1), Norm(threshold=9.0)]), rows, Now(FIRST_STEP, 1)) == []


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@pytest.mark.parametrize("dim", [1, 8, 33, 64])
def test_the_norm_is_that_of_the_embedding_alone(optimizer: str, dim: int) -> None:
    width = dim + make_optimizer(optimizer, None, {}).state_width(dim)
    each = 1 / math.sqrt(dim)
    rows = Rows([Row(i, 1, 0, 1, (i * each,) * dim) for i in range(20)], dim, width)
    found = run(Sweep([Norm(threshold=9.5, grace=1)]), rows, Now(1, 1))
    assert [slot for slot, _ in found] == list(range(10))


def test_norms_are_taken_in_double_precision() -> None:
    beyond = [(3e30, 4e30), (3e-30, 4e-30), (math.nan, 0.0), (math.inf, 0.0), (3.0, 4.0)]
    for threshold, small in ((4.9e30, [1, 4]), (6e30, [0, 1, 4]), (4.9e-30, []), (6e-30, [1])):
        rows = Rows([Row(i, 1, 0, 1, each) for i, each in enumerate(beyond)], 2, 4)
        found = run(Sweep([Norm(threshold=min(threshold, 1e30), grace=0)]), rows, Now(0, 1))
        wanted = [i for i in small if threshold <= 1e30 or i != 0]
        assert [slot for slot, _ in found] == wanted
    rows = Rows([Row(1, 1, 0, 1, (3.0, 4.0))], 2, 4)
    assert run(Sweep([Norm(threshold=5.0, grace=0)]), rows, Now(0, 1)) == []  # not below


def test_a_small_row_has_its_grace_and_each_push_renews_it() -> None:
    rows, sweeps = Rows([Row(1, 1, 10, 1, (0.0,) * DIM)]), []
    for step in range(10, 40):
        if step == 15:
            rows.put(0, Row(1, 2, 15, 2, (0.0,) * DIM))
        sweeps.append(len(run(Sweep([Norm(grace=10)]), rows, Now(step, step))))
    assert sweeps.index(1) == 25 - 10
    assert sum(sweeps) == 1


# ---- rules for tables


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("leave", [1, 1000, 65_537, 99_999])
@pytest.mark.parametrize("kind", CAPACITIES)
def test_the_choice_is_exact_for_large_tables(kind: Any, leave: int, seed: int) -> None:
    """Scores are skewed: most lie in a part of the range that is smaller than a bucket."""
    rng, count = np.random.default_rng(seed), 100_000
    rows = Rows([None] * count)
    versions = ((1 << 40) - rng.zipf(1.2, count) % (1 << 40)).astype(np.uint64)
    steps = (-(rng.zipf(1.3, count) % (1 << 40))).astype(np.int64)
    frequencies = np.minimum(rng.zipf(1.3, count), 2**32 - 1).astype(np.uint64)
    low = np.uint64(0xFFFF)
    rows.meta[:count, 1] = versions << np.uint64(16) | frequencies >> np.uint64(16)
    rows.meta[:count, 2] = steps.view(np.uint64) << np.uint64(16) | frequencies & low
    rule = kind(max_rows=count - leave)
    if kind is CapacityLru:
        scores = versions.astype(np.int64)
    else:
        exact = np.log2(frequencies.astype(float)) + steps / rule.half_life
        scores = np.floor(exact * (1 << 14)).astype(np.int64)
    found = [slot for slot, _ in run(Sweep([rule]), rows, Now(0, 1 << 40))]
    assert sorted(found) == sorted(np.argsort(scores, kind="stable")[:leave].tolist())
    assert rows.rows == rule.max_rows


def test_a_row_counts_for_less_by_half_with_every_half_life() -> None:
    rule = CapacityLfu(max_rows=1, half_life=10)
    for age, stays in ((19, 0), (21, 1)):  # 4 = 1 * 2^2
        rows = Rows([Row(1, 1, 100 - age, 4), Row(2, 2, 100, 1)])
        found = run(Sweep([rule]), rows, Now(100, 2))
        assert [slot for slot, _ in found] == [1 - stays]


@pytest.mark.parametrize("kind", CAPACITIES)
def test_rows_that_are_pushed_or_born_during_a_sweep_stay(kind: Any) -> None:
    rng = np.random.default_rng(0)
    count, cap = 2000, 1500
    rows = Rows([Row(i, 1 + i, i, 1 + i) for i in range(count)] + [None] * 100)
    rows.used, step = count, count
    of = {"half_life": 1} if kind is CapacityLfu else {}
    sweep, pushed = Sweep([kind(max_rows=cap, **of)]), set()
    gone: list[int] = []
    while not sweep.done:
        victims = sweep.slice(rows.view, Now(count, count), 97, 10)
        assert not pushed & set(victims.slots.tolist())
        rows.release(victims.slots)
        gone += victims.slots.tolist()
        slot = int(rng.integers(0, 600))
        step += 1
        if rows.meta[slot, 1] >> np.uint64(16):
            rows.put(slot, Row(slot, step, step, 3000))
            pushed.add(slot)
        if rows.used < count + 100 and step % 3 == 0:
            rows.put(rows.used, Row(step, step, step, 3000))
            rows.used += 1
        assert rows.rows >= cap
    assert len(gone) >= 500 - len(pushed)
    assert max(gone) < 500 + len(pushed)
    assert pushed


@pytest.mark.parametrize("kind", CAPACITIES)
@pytest.mark.parametrize("slices", range(7))
@pytest.mark.parametrize("left", [0, 5, 90])
def test_a_choice_that_others_made_needless_takes_nobody(kind: Any, slices: int, left: int) -> None:
    rows = Rows([Row(i, 1 + i, i, 1 + i) for i in range(100)])
    sweep, now, taken = Sweep([kind(max_rows=90)]), Now(100, 100), 0
    for _ in range(slices):
        victims = sweep.slice(rows.view, now, 40, 2)
        rows.release(victims.slots)
        taken += len(victims)
    rows.release(np.arange(100 - left))
    assert run(sweep, rows, now) == []
    assert taken <= 2


# ---- sweeps of several rules


def test_the_first_rule_that_holds_names_the_cause_and_capacity_takes_the_rest() -> None:
    small = (0.0,) * DIM
    rows = Rows(
        [
            Row(0, 1, 0, 1, small),  # idle by steps and by time, and small
            Row(1, 1, 90, 1, small),  # idle by time, and small
            Row(2, 9, 80, 1, small),  # small
            *(Row(i, 10 + i, 100) for i in range(3, 10)),
        ]
    )
    rules = [StepTtl(steps=50), TimeTtl(), Norm(grace=5), CapacityLru(max_rows=5)]
    dry, sweep, now = Sweep(rules, dry=True), Sweep(rules), Now(100, 30, 5)
    run(dry, rows, now)
    assert run(sweep, rows, now, 4, 1) == [
        (0, Cause.STEP_TTL),
        (1, Cause.TIME_TTL),
        (2, Cause.NORM),
        (3, Cause.CAPACITY),
        (4, Cause.CAPACITY),
    ]
    assert dry.counts == sweep.counts
    assert sweep.counts == {
        Cause.STEP_TTL: 1,
        Cause.TIME_TTL: 1,
        Cause.NORM: 1,
        Cause.CAPACITY: 2,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Spy(RowEviction):
    """Remembers which slots it was shown; nobody leaves."""

    name = "spy"
    cause = Cause.REQUEST
    seen: Any = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "seen", [])

    def _check(self) -> None: ...

    def due(self, rows: int, last: Now, now: Now) -> bool:
        return True

    def mark(self, view: View, start: int, stop: int, now: Now, causes: Any) -> None:
        assert len(causes) == stop - start
        self.seen.append((start, stop))


def test_a_slice_is_bounded_and_a_sweep_ends_though_slots_are_added() -> None:
    rows, spy = Rows([None] * 1000), Spy()
    rows.used = 10
    sweep = Sweep([spy])
    while not sweep.done:
        sweep.slice(rows.view, Now(0, 0), 4)
        rows.used += 4
    assert spy.seen == [(0, 4), (4, 8), (8, 10)]


def test_a_slice_that_reads_rows_is_bounded_in_bytes() -> None:
    dim, spy = 8192, Spy()
    rows = Rows([Row(i, 1, 0, 1, (0.0,) * dim) for i in range(600)], dim, dim)
    run(Sweep([spy, Norm(threshold=1.0, grace=1)]), rows, Now(0, 1))
    assert max(stop - start for start, stop in spy.seen) == READ // (4 * dim) < 600
    assert spy.seen[-1][1] == 600


# ---- time


@given(
    pauses=st.lists(
        st.sampled_from([0.0, 0.01, 0.1, 0.3, 0.4, 1.0, 7.0, 60.0, 250.0]), min_size=1, max_size=400
    ),
    asked=st.lists(st.floats(0.0, 400.0), max_size=20),
)
@settings(max_examples=100, deadline=None)
def test_idle_rows_are_found_in_time_and_never_too_early(
    pauses: list[float], asked: list[float]
) -> None:
    ttl = 100.0
    timeline, times = Timeline(ttl), np.cumsum(pauses)
    for version, seconds in enumerate(times, 1):
        timeline.add(version, float(seconds))
        for now in (float(seconds), *(float(seconds) + each for each in asked[: 20 // len(times)])):
            found = timeline.version_before(now)
            assert found <= np.count_nonzero(now - times[:version] > ttl)
            assert found >= np.count_nonzero(now - times[:version] > ttl + ttl / PARTS)
        assert len(timeline) <= PARTS + 3


def test_a_busy_timeline_stays_small_and_exact() -> None:
    timeline, ttl = Timeline(100.0), 100.0
    for version in range(1, 100_001):
        timeline.add(version, version / 100)
        assert len(timeline) <= PARTS + 3
    assert len(timeline) > 0.9 * PARTS
    for seconds in np.arange(1000.0, 1100.0, 0.37):
        exact = (seconds - ttl) * 100
        assert exact - 100 * ttl / PARTS - 1 <= timeline.version_before(seconds) <= exact
    assert timeline.version_before(1100.1) == 100_000  # the very last push, exactly
    assert timeline.version_before(1099.9) < 100_000


def test_a_clock_that_goes_back_a_little_stands_still() -> None:
    timeline = Timeline(10.0)
    timeline.add(1, 100.0)
    timeline.add(2, 100.0 - 10.0 / PARTS)
    assert [timeline.version_before(t) for t in (99.0, 109.9, 110.1)] == [0, 0, 2]


TTL = 100.0
AHEAD, BEHIND = [0.3, 1.0, 30.0, 150.0, 1e5, 1e9], [-1e5, -1e9]


@given(
    pauses=st.lists(st.sampled_from([0.3, 1.0, 7.0, 40.0, 130.0]), min_size=1, max_size=60),
    errors=st.sampled_from([AHEAD, BEHIND]).flatmap(
        lambda wrong: st.lists(st.sampled_from([0.0] * 7 + wrong), min_size=60, max_size=60)
    ),
)
@settings(max_examples=200, deadline=None)
def test_no_row_seems_more_idle_than_it_is_once_a_clock_that_was_wrong_is_right(
    pauses: list[float], errors: list[float]
) -> None:
    """Each push has its own error of the clock, but for the first."""
    timeline, now, times = Timeline(TTL), 2e9, [2e9]
    timeline.add(1, now)
    for version, (pause, error) in enumerate(zip(pauses, errors, strict=False), 2):
        now += pause
        times.append(now)
        timeline.add(version, now + error)
        assert len(timeline) <= PARTS + 3
        for later in (0.0, 50.0, 101.0, 250.0):
            found = timeline.version_before(now + later)
            assert found <= np.count_nonzero(now + later - np.array(times) > TTL)


@pytest.mark.parametrize("error", [1e9, 1e4, -1e9, -1e4])
def test_a_ttl_holds_again_when_a_clock_that_was_wrong_is_right(error: float) -> None:
    timeline, times = Timeline(TTL), 2e9 + np.arange(5000.0)
    for version, seconds in enumerate(times, 1):
        timeline.add(version, seconds + error * (version == 50))
    found = [timeline.version_before(float(times[-1]) + later) for later in (0.0, 50.0, 1e3)]
    assert found == [4899, 4949, 5000]


def test_a_timeline_survives_and_replay_adds_nothing_twice() -> None:
    timeline, again = Timeline(10.0), Timeline(10.0)
    for version in range(1, 1000):
        timeline.add(version, version * 0.1)
    again.load(timeline.pack())
    for version in range(900, 1000):
        again.add(version, version * 0.1)
        assert again.pack() == timeline.pack()
    for version in range(1000, 1100):
        for each in (timeline, again):
            each.add(version, version * 0.1)
    assert again.pack() == timeline.pack()
    assert len(again) == len(timeline) > 10
    Timeline(10.0).load(Timeline(10.0).pack())
    for size in (0, 7, 8, 24, 33):
        with pytest.raises(ValueError, match=f"multiple of 16 bytes, got {size} bytes"):
            again.load(bytes(size))


# ---- evictors


def tick(evictor: Evictor, rows: Rows, seconds: float, **of: int) -> list[tuple[Cause, int]]:
    """One tick, and the deletes that it asks for."""
    found = evictor.tick(rows.view, seconds, **of)
    slots = {int(rows.meta[slot, 0]): slot for slot in range(rows.used)}
    for keys in found.values():
        rows.release([slots[key] for key in keys.tolist()])
    return [(cause, key) for cause, keys in found.items() for key in keys.tolist()]


def test_an_evictor_without_rules_or_rows_has_nothing_to_do() -> None:
    assert Evictor([]).tick(Rows([Row(1, 1)]).view, 5.0) == {}
    evictor = Evictor([make_eviction(name, {}) for name in NAMES[:4]])
    assert tick(evictor, Rows([]), 5.0) == []
    evictor.pushed(1, 10, 1.0)
    assert tick(evictor, Rows([None] * 5), 5.0) == []


@pytest.mark.parametrize("ttl", [1, 10, 640])
def test_idle_rows_leave_soon_after_their_ttl(ttl: int) -> None:
    rows, evictor, gone = Rows([Row(7, 1, 0), Row(8, 2, 0)]), Evictor([StepTtl(steps=ttl)]), {}
    evictor.pushed(1, 0, 0.0)
    for step in range(2 * ttl + 10):
        rows.put(1, Row(8, step + 2, step))
        evictor.pushed(step + 2, step, 0.0)
        for _, key in tick(evictor, rows, 0.0):
            gone[key] = step
    assert list(gone) == [7]
    assert ttl < gone[7] <= ttl + max(1, ttl // 64)


def test_idle_time_counts_while_nothing_is_pushed_and_over_a_restart() -> None:
    rules = [TimeTtl(seconds=60.0)]
    rows, evictor = Rows([Row(MASK, 1), Row(8, 2)]), Evictor(rules)
    evictor.pushed(1, 0, 1000.0)
    evictor.pushed(2, 0, 1030.0)
    assert tick(evictor, rows, 1060.0) == []
    assert tick(evictor, rows, 1061.0) == [(Cause.TIME_TTL, MASK)]
    after = Evictor(rules)
    after.load(evictor.pack())
    assert after.now(1061.0) == evictor.now(1061.0)
    assert tick(after, rows, 1090.0) == []
    assert tick(after, rows, 1090.1) == [(Cause.TIME_TTL, 8)]


def test_a_full_table_comes_back_to_its_size_in_bounded_ticks() -> None:
    rows = Rows([Row(i, 1 + i, i) for i in range(100)])
    evictor = Evictor([CapacityLru(max_rows=60)])
    evictor.pushed(100, 99, 0.0)
    gone: list[int] = []
    for _ in range(40):
        found = tick(evictor, rows, 0.0, limit=30, most=7)
        assert len(found) <= 7
        gone += [key for _, key in found]
    assert gone == list(range(40))
    rows.put(0, Row(500, 500))
    evictor.pushed(500, 100, 0.0)
    gone = [key for _ in range(10) for _, key in tick(evictor, rows, 0.0)]
    assert gone == [40]


def test_what_has_not_changed_is_not_swept_again() -> None:
    spied = StepTtl(steps=6400)
    evictor, rows = Evictor([spied]), Rows([Row(1, 1)])
    sweeps = 0
    for step in range(1000):
        evictor.pushed(step + 1, step, 0.0)
        before = evictor._last
        tick(evictor, rows, 0.0)
        sweeps += evictor._last is not before
    assert sweeps == 10


def test_a_sweep_on_demand_does_not_wait_until_it_is_worth_it() -> None:
    evictor, rows = Evictor([StepTtl(steps=6400)]), Rows([Row(1, 1, -10_000), Row(2, 2, 0)])
    evictor.pushed(2, 0, 0.0)
    sweep, dry = evictor.sweep(), evictor.sweep(dry=True)
    assert run(dry, rows, evictor.now(0.0)) == []
    assert run(sweep, rows, evictor.now(0.0)) == [(0, Cause.STEP_TTL)]
    assert dry.counts == sweep.counts == {Cause.STEP_TTL: 1}


def test_state_of_other_rules_is_refused() -> None:
    timed, plain = Evictor([TimeTtl()]), Evictor([StepTtl()])
    timed.pushed(1, 5, 0.0)
    plain.pushed(7, -3, 0.0)
    again = Evictor([StepTtl()])
    again.load(plain.pack())
    assert again.now(0.0) == Now(-3, 7)
    for evictor, data in ((plain, timed.pack()), (plain, b"123"), (timed, plain.pack())):
        with pytest.raises(ValueError, match="bytes"):
            evictor.load(data)


# ---- a real tier


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_the_metadata_is_that_of_a_tier(optimizer: str) -> None:
    made = make_optimizer(optimizer, None, {})
    width = 4 + made.state_width(4)
    tier = HostTier(4, width, Budget(1 << 30))
    keys = np.array(EXTREMES, np.uint64)
    places = tier.allocate(len(keys))
    state, zeros = made.initial_state(4), make_initializer("zeros", {})
    tier.create(keys, places, zeros, 0, state)
    evictor = Evictor([StepTtl(steps=5), Norm(threshold=1e-9, grace=2)])
    for version in range(1, 9):  # the first key at every step, another one with it
        slots = places[[0, version - 1]] if version > 1 else places[:1]
        grads = np.full((len(slots), 4), version != 5, np.float32)
        counts = np.ones(len(slots), np.uint32)
        tier.push(slots, grads, counts, made, 0.1, version - 20, version)
        evictor.pushed(version, version - 20, 0.0)
    used = len(keys)
    view = View(tier._slab.array, tier._meta.array, used, tier.rows, 4)
    found = {cause: each.tolist() for cause, each in evictor.tick(view, 0.0).items()}
    assert found == {Cause.STEP_TTL: [EXTREMES[1]], Cause.NORM: [EXTREMES[4]]}
    tier.release(places[[1, 4]])
    view = View(view.slab, view.meta, used, tier.rows, 4)
    assert len(evictor.sweep().slice(view, evictor.now(0.0))) == 0
    tier.close()


def test_kinds_of_rules_are_all_there_is() -> None:
    assert all(issubclass(rule, RowEviction | TableEviction) for rule in EVICTIONS.values())
