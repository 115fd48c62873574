"""Summaries against plain numpy over all rows at once, however the rows are cut into slices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from storage.analysis import (
    AGES,
    FREQUENCIES,
    NORMS,
    Histogram,
    RowColumns,
    Summary,
    _place,
    edges_of,
)
from storage.arena import Budget
from storage.eviction.contract import Now
from storage.eviction.rules import Norm, StepTtl
from storage.eviction.sweep import Sweep
from storage.initializers import make_initializer
from storage.optimizers import make_optimizer
from storage.schema import TableSchema
from storage.table import Table

SEEDS = range(8)
STEP = 1000  # from which ages are counted back
ODD_NORMS = [0.0, 1e-7, 1e-6, 0.5, 1.0, np.nextafter(1.0, 0.0), 7e4, np.inf, np.nan]


def some_rows(seed: int, count: int, tier: str = "host") -> RowColumns:
    """Rows of all kinds: on edges and beside them, ties, steps that come later."""
    rng = np.random.default_rng(seed)
    norms = np.where(
        rng.random(count) < 0.2, rng.choice(ODD_NORMS, count), rng.exponential(1, count)
    )
    frequencies = rng.choice([1, 2, 3, 4, 1000, 2**31 - 1, 2**31, 2**32 - 1], count)
    return RowColumns(
        rng.permutation(np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)),
        rng.integers(1, 50, count).astype(np.uint64),
        rng.choice([STEP + 9, STEP, STEP - 1, STEP - 2, 0, -(2**40)], count),
        frequencies.astype(np.uint64),
        norms,
        tier,
    )


def summed(rows: list[RowColumns], **settings: Any) -> Summary:
    summary = Summary(**settings)
    for each in rows:
        summary.add(each, STEP)
    return summary


def slices(rows: RowColumns, cuts: list[int]) -> list[RowColumns]:
    places = np.arange(len(rows.keys))
    return [rows.take(part) for part in np.split(places, sorted(cuts))]


def histogram_of(values: np.ndarray, edges: np.ndarray, *, upper: bool = False) -> list[int]:
    below = values[:, None] > edges if upper else ~(values[:, None] < edges)
    return np.bincount(below.sum(axis=1), minlength=len(edges) + 1).tolist()


def joined(rows: list[RowColumns]) -> RowColumns:
    columns = zip(*(each[:-1] for each in rows), strict=True)
    return RowColumns._make([*map(np.concatenate, columns), ""])


@pytest.mark.parametrize("seed", SEEDS)
def test_a_summary_is_that_of_all_rows_at_once(seed: int) -> None:
    rows = [some_rows(seed, 300), some_rows(seed + 100, 70, "lmdb")]
    asked = {"frequencies": [3, 1000], "ages": [0, 1, 999], "norms": [0.7, 0.5]}
    summary = summed(rows, **asked, grace=2)
    every = joined(rows)
    ages = np.maximum(STEP - every.steps, 0)
    assert (summary.rows, summary.tiers) == (370, {"host": 300, "lmdb": 70})
    assert summary.occurrences == int(every.frequencies.sum())
    edges = edges_of(FREQUENCIES, [3, 1000])
    buckets = np.searchsorted(edges, every.frequencies, "right")
    sums = [int(every.frequencies[buckets == i].sum()) for i in range(len(edges) + 1)]
    assert_array_equal(summary.frequencies.edges, edges)
    assert summary.frequencies.counts.tolist() == histogram_of(every.frequencies, edges)
    assert summary.frequencies.sums.tolist() == sums
    edges = edges_of(AGES, [0, 1, 999])
    assert summary.ages.counts.tolist() == histogram_of(ages, edges, upper=True)
    edges = edges_of(NORMS, [0.7])
    assert_array_equal(summary.norms.edges, edges)
    assert summary.norms.counts.tolist() == histogram_of(every.norms, edges)
    assert summary.idle_norms.counts.tolist() == histogram_of(every.norms[ages >= 2], edges)


@pytest.mark.parametrize("top", [0, 1, 7, 400])
@pytest.mark.parametrize("seed", SEEDS)
def test_extremes_are_those_of_all_rows_with_ties_by_key(seed: int, top: int) -> None:
    rows = [some_rows(seed, 300), some_rows(seed + 100, 70, "lmdb")]
    rows[1] = rows[1]._replace(keys=rows[1].keys + np.uint64(1))
    summary = summed(rows, top=top)
    every = joined(rows)
    tiers = np.repeat(["host", "lmdb"], [300, 70])
    for extremes, values, sign in (
        (summary.most_frequent, every.frequencies.astype(float), -1.0),
        (summary.least_frequent, every.frequencies.astype(float), 1.0),
        (summary.largest, every.norms, -1.0),
        (summary.smallest, every.norms, 1.0),
    ):
        ranks = np.where(np.isnan(values), np.inf, sign * values).tolist()
        order = sorted(range(370), key=lambda i: (ranks[i], int(every.keys[i])))[:top]
        for found, wanted in zip(extremes.rows[:-1], every[:-1], strict=True):
            assert_array_equal(found, wanted[order])
        assert extremes.tiers.tolist() == tiers[order].tolist()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1000), cuts=st.lists(st.integers(0, 120), max_size=9))
def test_how_rows_are_cut_into_slices_does_not_matter(seed: int, cuts: list[int]) -> None:
    rows = some_rows(seed, 120)
    one, many = (
        summed(parts, norms=[0.3], grace=1, top=5) for parts in ([rows], slices(rows, cuts))
    )
    for name in ("frequencies", "ages", "norms", "idle_norms"):
        first, second = getattr(one, name), getattr(many, name)
        assert first.counts.tolist() == second.counts.tolist()
        assert first.sums.tolist() == second.sums.tolist()
    for name in ("most_frequent", "least_frequent", "largest", "smallest"):
        assert_array_equal(getattr(one, name).rows.keys, getattr(many, name).rows.keys)
    assert (one.rows, one.occurrences) == (many.rows, many.occurrences)


@pytest.mark.parametrize("norm", [np.nan, np.inf, -np.inf, 0.0])
@pytest.mark.parametrize("key", [0, (1 << 64) - 1])
def test_a_list_with_room_takes_any_row(key: int, norm: float) -> None:
    summary = Summary(top=2)
    row = [np.array([key], np.uint64), *(np.array([1], kind) for kind in ("u8", "i8", "u8"))]
    summary.add(RowColumns._make([*row, np.array([norm]), "host"]), 1)
    for name in ("most_frequent", "least_frequent", "largest", "smallest"):
        assert getattr(summary, name).rows.keys.tolist() == [key]


@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 8, 31])
def test_every_value_falls_between_its_edges(count: int, upper: bool) -> None:
    edges = np.arange(count, dtype=np.float64) * 2
    values = np.arange(-2, 2 * count + 3, dtype=np.float64)
    bounds, counts, _ = Histogram(edges, upper=upper).parts
    for value in values:
        counts[_place(bounds, value)] += np.uint64(1)
    assert counts.tolist() == histogram_of(values, edges, upper=upper)


def test_nothing_is_summed_up_to_nothing() -> None:
    summary = summed([some_rows(0, 0)], top=3)
    assert (summary.rows, summary.occurrences, summary.norm_sum, summary.tiers) == (0, 0, 0.0, {})
    assert not summary.frequencies.counts.any()
    assert summary.largest.rows.keys.tolist() == []


# ---- what it says about thresholds is what the rules do


def a_table(seed: int) -> Table:
    schema = TableSchema(
        name="t",
        dim=5,
        optimizer=make_optimizer("sgd", 1.0, {}),
        initializer=make_initializer("normal", {}),
    )
    rng = np.random.default_rng(seed)
    table = Table(schema, Budget(1 << 26))
    for version in range(1, 30):
        keys = np.unique(rng.integers(0, 400, 60)).astype(np.uint64)
        gradients = rng.normal(scale=0.2, size=(len(keys), 5)).astype(np.float32)
        counts = rng.integers(1, 4, len(keys)).astype(np.uint32)
        table.push(keys, gradients, counts, version=version, step=7 * version)
        table.evictor.pushed(version, 7 * version, 0.0)
    table.delete(np.arange(0, 400, 7, dtype=np.uint64))
    return table


def summary_of(table: Table, **settings: Any) -> Summary:
    summary = Summary(**settings)
    scan = table.exact_scan()
    while not scan.done:
        part = scan.next(37, 0, norms=True)()
        meta = part.meta
        columns = meta[:, 0], meta[:, 1], meta[:, 2].view(np.int64), meta[:, 3], part.norms
        summary.add(RowColumns(*columns, part.tier), table.evictor.step)
    return summary


def swept(table: Table, rule: Any) -> int:
    sweep = Sweep([rule], dry=True)
    while not sweep.done:
        sweep.slice(table.contents(), Now(table.evictor.step, 100))
    return sweep.counts[rule.cause]


@pytest.mark.parametrize("seed", range(3))
def test_what_lies_behind_an_age_is_what_a_step_ttl_evicts(seed: int) -> None:
    table = a_table(seed)
    ttls = list(range(1, 210, 3))
    ages = summary_of(table, ages=ttls).ages
    for ttl in ttls:
        behind = int(ages.counts[np.searchsorted(ages.edges, ttl) + 1 :].sum())
        assert behind == swept(table, StepTtl(steps=ttl))
    assert swept(table, StepTtl(steps=1)) > swept(table, StepTtl(steps=100)) > 0


@pytest.mark.parametrize("grace", [0, 7, 50])
def test_what_lies_below_a_norm_is_what_the_norm_rule_evicts(grace: int) -> None:
    table = a_table(grace)
    dump = table.dump()
    own = np.sqrt((dump.rows[:, :5].astype(np.float64) ** 2).sum(axis=1))
    thresholds = np.unique([*own[::9], 0.1, 0.5, 1.0])  # norms of rows themselves among them
    norms = summary_of(table, norms=thresholds, grace=grace).idle_norms
    for threshold in thresholds:
        below = int(norms.counts[: np.searchsorted(norms.edges, threshold) + 1].sum())
        assert below == swept(table, Norm(threshold=float(threshold), grace=grace))
    assert swept(table, Norm(threshold=10.0, grace=grace)) == int(norms.counts.sum())
