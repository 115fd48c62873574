"""Every eviction rule against a reference in plain Python, however the sweep is sliced."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from slots import (
    CAPACITIES,
    DIM,
    EXTREMES,
    FIRST_STEP,
    LAST_STEP,
    NAMES,
    Row,
    Rows,
    run,
)

from storage.eviction.contract import Eviction, Now
from storage.eviction.evictor import Evictor
from storage.eviction.rules import (
    CapacityLfu,
    CapacityLru,
    Norm,
    StepTtl,
    TimeTtl,
    make_eviction,
)
from storage.eviction.sweep import Sweep, compile_all
from storage.optimizers import OPTIMIZERS, make_optimizer
from storage.records import Cause


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


@pytest.mark.quick(20)
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
    before = rows.entries.copy(), rows.slab.copy()
    dry, real = Sweep([rule], dry=True), Sweep([rule])
    assert run(dry, rows, now, 100, 1) == []
    assert (rows.entries == before[0]).all()
    assert (rows.slab == before[1]).all()
    run(real, rows, now)
    assert dry.counts == real.counts


def test_no_key_is_a_sentinel() -> None:
    rows = Rows([Row(key, 1) for key in EXTREMES])
    victims = Sweep([TimeTtl()]).slice(rows.contents, Now(0, 1, 1))
    keys = victims.by_cause()
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
        ("step_ttl", "steps", math.nan, "a number of magnitude up to"),
        ("time_ttl", "seconds", 0.0, "0.001 or more"),
        ("time_ttl", "seconds", math.inf, "a number of magnitude up to"),
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
    with pytest.raises(ValueError, match="'capacity_lru' and 'capacity_lfu' both have the cause"):
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


@pytest.mark.slow
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
    rows.entries[:count, 1] = versions << np.uint64(16) | frequencies >> np.uint64(16)
    rows.entries[:count, 2] = steps.view(np.uint64) << np.uint64(16) | frequencies & low
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
        victims = sweep.slice(rows.contents, Now(count, count), 97, 10)
        assert not pushed & set(victims.slots.tolist())
        rows.release(victims.slots)
        gone += victims.slots.tolist()
        slot = int(rng.integers(0, 600))
        step += 1
        if rows.entries[slot, 1] >> np.uint64(16):
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
        victims = sweep.slice(rows.contents, now, 40, 2)
        rows.release(victims.slots)
        taken += len(victims)
    rows.release(np.arange(100 - left))
    assert run(sweep, rows, now) == []
    assert taken <= 2
