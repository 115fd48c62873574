"""Gates against dicts: every way to split few occurrences over calls, and random operations.

What a sketch may get wrong is counted over fixed seeds and held to the bound that the rule promises
plus five standard deviations, which chance exceeds once in some millions of seeds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from storage.admission.counter import LAST_VERSION, MOST, CounterGate
from storage.admission.gates import LARGEST, Gate
from storage.admission.rules import (
    ADMISSIONS,
    PLANNED,
    Admission,
    Counter,
    Probability,
    Sketch,
    compile_all,
    make_admission,
)
from storage.admission.sketch import HALVED, SketchGate
from storage.arena import Budget
from storage.errors import OutOfMemory
from storage.index import SEGMENT

MASK = 2**64 - 1
EXTREMES = [0, 1, 2, MASK, MASK - 1, 1 << 63, (1 << 63) - 1, (1 << 63) + 1, 1 << 62]
SEED = 0x0123456789ABCDEF
NAMES = list(ADMISSIONS)
SMALL: dict[str, dict[str, float]] = {  # parameters for a few keys
    "counter": {"threshold": 3, "max_keys": 1000},
    "sketch": {"threshold": 3, "expected_keys": 1000},
}
COUNTING = list(SMALL)


def u64(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.uint64)


def u32(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.uint32)


def ones(keys: np.ndarray) -> np.ndarray:
    return np.ones(len(keys), np.uint32)


def spread(start: int, stop: int) -> np.ndarray:
    """Distinct keys all over the range."""
    return np.arange(start, stop, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)


def gate_of(admission: Admission, limit: int = 1 << 30) -> Any:
    return admission.gate(Budget(limit), SEED)


def held(gate: Gate, after: int = 0) -> dict[int, tuple[int, int]]:
    """Every counter: total and version by key. Asserts that no key comes twice."""
    found: dict[int, tuple[int, int]] = {}
    for keys, totals, versions in gate.changed(after):
        assert (keys.dtype, totals.dtype, versions.dtype) == (np.uint64, np.uint32, np.uint64)
        columns = keys.tolist(), totals.tolist(), versions.tolist()
        for key, total, version in zip(*columns, strict=True):
            assert key not in found
            found[key] = total, version
    return found


def five_sigma(rate: float, trials: int) -> float:
    """A share of ``trials`` that is not exceeded by chance if each succeeds with ``rate``."""
    return rate + 5 * math.sqrt(rate * (1 - rate) / trials)


# ---- rules


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def small(name: str) -> Admission:
    return make_admission(name, SMALL.get(name, {}))


@pytest.fixture(params=COUNTING)
def counting(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A gate of threshold 3 that counts."""
    gate = gate_of(make_admission(request.param, SMALL[request.param]))
    yield gate
    gate.close()


def test_rules_are_values(name: str) -> None:
    one, other = make_admission(name, {}), make_admission(name, {})
    assert (one, hash(one)) == (other, hash(other))
    assert len({make_admission(each, {}) for each in NAMES}) == len(NAMES)


def test_a_rule_is_made_again_from_its_name_and_parameters_as_floats(small: Admission) -> None:
    params = {field.name: float(getattr(small, field.name)) for field in fields(small)}
    again = make_admission(small.name, params)
    assert (again, repr(again)) == (small, repr(small))


def test_an_unknown_name_is_answered_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="no admission 'bloom'; there are: always, counter"):
        make_admission("bloom", {})


def test_an_unknown_parameter_is_answered_with_those_there_are(name: str) -> None:
    with pytest.raises(ValueError, match=f"admission '{name}' has no parameter 'size'; it has: "):
        make_admission(name, {"size": 1.0})


@pytest.mark.parametrize(
    ("name", "param", "value", "rule"),
    [
        ("counter", "threshold", 0, "in 1..16777215"),
        ("counter", "threshold", 2**24, "in 1..16777215"),
        ("counter", "threshold", 2.5, "a whole number"),
        ("counter", "threshold", math.nan, "a whole number"),
        ("counter", "max_keys", 0, r"in 1..2\^36"),
        ("counter", "max_keys", math.inf, "a whole number"),
        ("sketch", "threshold", 8193, "in 1..8192"),
        ("sketch", "expected_keys", 0, r"in 1..2\^32"),
        ("sketch", "expected_keys", 2**31, r"such that 2\^32 cells are enough"),
        ("sketch", "error_rate", 0.0, "in 1e-6..0.5"),
        ("sketch", "error_rate", 0.6, "in 1e-6..0.5"),
        ("sketch", "error_rate", math.nan, "in 1e-6..0.5"),
        ("probability", "p", 0.0, "above 0 and at most 1"),
        ("probability", "p", 1.01, "above 0 and at most 1"),
        ("probability", "p", math.nan, "above 0 and at most 1"),
    ],
)
def test_a_refused_parameter_is_named(name: str, param: str, value: float, rule: str) -> None:
    with pytest.raises(ValueError, match=f"admission '{name}': {param} must be {rule}.*got "):
        make_admission(name, {param: value})


# ---- every gate


def test_all_kernels_compile() -> None:
    compile_all()


def test_memory_is_taken_from_the_budget_and_returned(small: Admission) -> None:
    budget = Budget(1 << 30)
    gate = small.gate(budget, SEED)
    keys = spread(0, 900)
    gate.admit(keys, ones(keys), 1)
    assert gate.bytes == budget.held
    gate.close()
    assert budget.held == 0


def test_calls_without_keys_do_nothing(small: Admission) -> None:
    gate = gate_of(small)
    none, nothing = u64(), u32()
    admitted, totals = gate.admit(none, nothing, 1)
    assert (admitted.dtype, totals.dtype) == (np.bool_, np.uint32)
    assert (len(admitted), len(totals), len(gate.waiting(none))) == (0, 0, 0)
    gate.discard(none)
    gate.put(none, nothing, none)
    assert (gate.entries, held(gate)) == (0, {})
    gate.close()


def test_no_key_is_a_sentinel_and_read_only_arrays_will_do(small: Admission) -> None:
    gate = gate_of(small)
    keys, counts = u64(*EXTREMES), ones(u64(*EXTREMES))
    for array in (keys, counts):
        array.flags.writeable = False
    for version in range(1, 200):
        admitted, totals = gate.admit(keys, counts, version)
        keys, counts = keys[~admitted], counts[~admitted]
        assert totals.tolist() == [totals[0]] * len(totals)
        if not len(keys):
            break
    assert len(keys) == 0
    gate.close()


def test_weighing_changes_nothing(small: Admission) -> None:
    gate = gate_of(small)
    keys = spread(0, 100)
    gate.admit(keys, ones(keys), 1)
    before = held(gate), gate.cells().tolist(), gate.entries, gate.waiting(keys).tolist()
    first = gate.weigh(keys, ones(keys), 2)
    second = gate.weigh(keys, ones(keys), 2)
    assert [a.tolist() for a in first] == [a.tolist() for a in second]
    assert (held(gate), gate.cells().tolist(), gate.entries, gate.waiting(keys).tolist()) == before
    gate.close()


def test_what_is_replayed_may_be_replayed_again(small: Admission) -> None:
    gate, keys = gate_of(small), u64(*EXTREMES)
    for _ in range(2):
        gate.put(keys, ones(keys), ones(keys).astype(np.uint64))
        gate.put(keys, 2 * ones(keys), 2 * ones(keys).astype(np.uint64))
    once = gate_of(small)
    once.put(keys, 2 * ones(keys), 2 * ones(keys).astype(np.uint64))
    assert gate.waiting(keys).tolist() == once.waiting(keys).tolist()
    assert held(gate) == held(once)
    gate.close()
    once.close()


# ---- gates that count


def compositions(total: int) -> Iterator[list[int]]:
    """Every way to write ``total`` as an ordered sum."""
    if total == 0:
        yield []
    for first in range(1, total + 1):
        for rest in compositions(total - first):
            yield [first, *rest]


@pytest.mark.parametrize("name", COUNTING)
@pytest.mark.parametrize("threshold", [1, 2, 3, 4, 5, 6, 7])
def test_the_nth_occurrence_admits_however_they_are_split(name: str, threshold: int) -> None:
    gate = gate_of(make_admission(name, {**SMALL[name], "threshold": threshold}))
    key = u64(MASK)
    for parts in compositions(7):
        waits = True
        for version, so_far in enumerate(itertools.accumulate(parts), 1):
            admitted, totals = gate.admit(key, u32(parts[version - 1]), version)
            assert totals.tolist() == [so_far]
            assert admitted.tolist() == [so_far >= threshold]
            if admitted[0]:
                waits = False
                break
            assert gate.waiting(key).tolist() == [so_far]
        assert not waits
        assert gate.waiting(key).tolist() == [0]
    assert gate.entries == 0
    gate.close()


def test_an_evicted_key_earns_its_row_again(counting: Gate) -> None:
    key = u64(7)
    for _ in range(3):  # lives
        story = [bool(counting.admit(key, u32(1), version)[0][0]) for version in (1, 2, 3)]
        assert story == [False, False, True]
        counting.discard(key)


def test_a_deleted_key_that_waits_starts_again(counting: Gate) -> None:
    keys = u64(7, 8)
    counting.admit(keys, u32(2, 2), 1)
    counting.discard(u64(7, 9))
    assert counting.waiting(u64(7, 8, 9)).tolist() == [0, 2, 0]
    assert counting.admit(keys, u32(1, 1), 2)[0].tolist() == [False, True]


def test_an_older_record_lowers_nothing(counting: Gate) -> None:
    keys = u64(*EXTREMES)
    counting.put(keys, 2 * ones(keys), np.full(len(keys), 9, np.uint64))
    counting.put(keys, ones(keys), np.full(len(keys), 8, np.uint64))
    assert counting.waiting(keys).tolist() == [2] * len(keys)
    assert set(held(counting).values()) <= {(2, 9)}


def test_a_key_that_does_not_occur_is_not_counted(counting: Gate) -> None:
    counting.admit(u64(1), u32(2), 1)
    admitted, totals = counting.admit(u64(1, 2), u32(0, 0), 2)
    assert (admitted.tolist(), totals.tolist()) == ([False, False], [2, 0])
    assert (counting.waiting(u64(1, 2)).tolist(), counting.entries) == ([2, 0], 1)


def test_totals_stop_at_the_largest_frequency(counting: Gate) -> None:
    counting.admit(u64(1), u32(2), 1)
    admitted, totals = counting.admit(u64(1), u32(LARGEST), 2)
    assert (admitted.tolist(), totals.tolist()) == ([True], [LARGEST])
    assert counting.waiting(u64(1)).tolist() == [0]


class AgainstDict(RuleBasedStateMachine):
    """Random operations on few keys; for a sketch these do not collide, and it does not age."""

    name: str
    keys = st.lists(st.sampled_from([*EXTREMES, *range(10, 16)]), unique=True, max_size=8)

    @initialize(threshold=st.integers(1, 5))
    def begin(self, threshold: int) -> None:
        self.threshold, self.version = threshold, 0
        self.gate = gate_of(make_admission(self.name, {**SMALL[self.name], "threshold": threshold}))
        self.model: dict[int, tuple[int, int]] = {}  # total and version
        self.admitted: dict[int, int] = {}

    @rule(keys=keys, data=st.data())
    def push(self, keys: list[int], data: st.DataObject) -> None:
        self.version += 1
        counts = [data.draw(st.integers(1, 3)) for _ in keys]
        admitted, totals = self.gate.admit(u64(*keys), u32(*counts), self.version)
        wanted = [self.model.get(k, (0, 0))[0] + c for k, c in zip(keys, counts, strict=True)]
        assert totals.tolist() == wanted
        assert admitted.tolist() == [total >= self.threshold for total in wanted]
        for key, total in zip(keys, wanted, strict=True):
            self.model[key] = total, self.version
            if total >= self.threshold:
                del self.model[key]

    @rule(keys=keys)
    def forget(self, keys: list[int]) -> None:
        self.gate.discard(u64(*keys))
        for key in keys:
            self.model.pop(key, None)

    @rule(key=st.sampled_from(EXTREMES), total=st.integers(1, 6), ago=st.integers(0, 3))
    def replay(self, key: int, total: int, ago: int) -> None:
        """As in a log: a later version of a key never has a lower total."""
        version = max(1, self.version - ago)
        before = self.model.get(key, (0, 0))
        if (total < before[0]) != (version < before[1]) and total != before[0]:
            return
        self.gate.put(u64(key), u32(total), u64(version))
        self.model[key] = max(before, (total, version), key=lambda each: each[::-1])

    @invariant()
    def every_counter_is_there(self) -> None:
        keys = [*EXTREMES, *range(10, 16)]
        totals = [self.model.get(key, (0, 0))[0] for key in keys]
        assert self.gate.waiting(u64(*keys)).tolist() == totals
        assert self.gate.entries == len(self.model)

    def teardown(self) -> None:
        if hasattr(self, "gate"):
            self.gate.close()


class CounterAgainstDict(AgainstDict):
    name = "counter"

    @rule(ago=st.integers(0, 5))
    def expire(self, ago: int) -> None:
        self.gate.expire(self.version - ago)
        self.model = {k: each for k, each in self.model.items() if each[1] >= self.version - ago}

    @invariant()
    def versions_are_there(self) -> None:
        assert held(self.gate) == self.model
        half = self.version // 2
        assert held(self.gate, half) == {k: e for k, e in self.model.items() if e[1] > half}


class SketchAgainstDict(AgainstDict):
    name = "sketch"


TestCounterAgainstDict = CounterAgainstDict.TestCase
TestSketchAgainstDict = SketchAgainstDict.TestCase
OFTEN = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestCounterAgainstDict.settings = TestSketchAgainstDict.settings = OFTEN


# ---- counter


def counter(threshold: int = 100, max_keys: int = 10_000_000, limit: int = 1 << 30) -> CounterGate:
    return gate_of(Counter(threshold=threshold, max_keys=max_keys), limit)


def test_counters_of_many_segments_are_exact() -> None:
    gate, keys = counter(threshold=3), spread(0, 150_000)
    assert not gate.admit(keys, ones(keys), 1)[0].any()
    assert not gate.admit(keys[::2], ones(keys[::2]), 2)[0].any()
    assert gate.waiting(keys).tolist() == [2, 1] * 75_000
    admitted, totals = gate.admit(keys, ones(keys), 3)
    assert admitted.tolist() == [True, False] * 75_000
    assert totals.tolist() == [3, 2] * 75_000
    assert gate.entries == 75_000
    gate.close()


def test_the_stalest_counters_make_room() -> None:
    gate = counter(max_keys=100)
    for version in range(1, 11):
        keys = spread(10 * version, 10 * version + 10)
        gate.admit(keys, ones(keys), version)
    gate.admit(spread(10, 15), ones(spread(10, 15)), 11)  # half of the oldest are touched
    assert (gate.entries, gate.dropped) == (100, 0)
    gate.admit(spread(500, 505), ones(spread(500, 505)), 12)
    left = [u64(*spread(10, 15)), spread(20, 110), spread(500, 505)]
    wanted = {int(key) for keys in left for key in keys}
    assert set(held(gate)) < wanted
    assert gate.entries + gate.dropped == 105
    gone = {version for key in wanted - set(held(gate)) for version in [(key in spread(20, 30))]}
    assert gone <= {True}  # what went beyond the five that had to go is of version 2
    assert 94 <= gate.entries <= 100
    gate.close()


def test_a_push_larger_than_the_cap_is_counted_as_far_as_it_goes() -> None:
    gate, keys = counter(max_keys=10), spread(0, 100_000)
    admitted, totals = gate.admit(keys, ones(keys), 1)
    assert (admitted.any(), totals.tolist()) == (False, [1] * len(keys))
    assert 1 <= gate.entries <= 10
    few = keys[:3]
    assert gate.admit(few, 200 * ones(few), 2)[0].all()
    gate.close()


def test_new_counters_stay_and_the_cap_holds_in_a_stream_of_new_keys() -> None:
    gate, size = counter(max_keys=100_000), 10_000
    for version in range(1, 41):
        keys = spread(version * size, (version + 1) * size)
        gate.admit(keys, ones(keys), version)
        assert gate.entries <= 100_000
    versions = np.array([version for _, version in held(gate).values()])
    assert len(versions) >= 100_000 * 0.9
    assert (versions > 35).sum() == 5 * size  # half the cap: all of them
    assert (versions < 27).sum() < 0.01 * len(versions)
    assert gate.dropped == 40 * size - gate.entries
    gate.close()


def test_without_memory_a_push_counts_nothing() -> None:
    gate, size = counter(limit=4 << 20), 5_000
    for version in range(1, 1000):
        keys = spread(version * size, (version + 2) * size)  # half of them known
        before, known = gate.entries, gate.waiting(keys)
        try:
            gate.admit(keys, ones(keys), version)
        except OutOfMemory:
            break
    assert version > 10
    assert gate.entries == before
    assert gate.waiting(keys).tolist() == known.tolist()
    assert len(held(gate, version - 1)) == 0
    gate.discard(spread(0, version * size // 2))
    gate.admit(keys[:100], ones(keys[:100]), version)
    assert gate.waiting(keys[:100]).tolist() == (known[:100] + 1).tolist()
    gate.close()


def test_old_counters_expire_a_slice_at_a_time() -> None:
    gate = counter()
    for version in range(1, 11):
        keys = spread(version * 10_000, (version + 1) * 10_000)
        gate.admit(keys, ones(keys), version)
    sizes = [gate.entries]
    while not sizes[2:] or sizes[-1] != sizes[-2]:
        gate.expire(6)
        sizes.append(gate.entries)
    assert max(-np.diff(sizes)) <= SEGMENT
    assert len(sizes) > 4
    assert (gate.entries, gate.dropped) == (50_000, 50_000)
    assert {version for _, version in held(gate).values()} == {6, 7, 8, 9, 10}
    gate.expire(11, limit=1 << 40)  # all at once
    assert gate.entries == 0
    gate.close()


def test_a_reader_misses_no_counter_when_segments_split_meanwhile() -> None:
    gate, keys = counter(), spread(0, 60_000)
    gate.admit(keys, ones(keys), 1)
    reader = gate.changed(0)
    seen = set(next(reader)[0].tolist())
    more = spread(100_000, 300_000)
    gate.admit(more, ones(more), 2)
    for found, _, _ in reader:
        seen |= set(found.tolist())
    assert seen >= set(keys.tolist())
    gate.close()


def test_versions_beyond_the_last_count_as_the_last() -> None:
    gate = counter()
    gate.admit(u64(1), u32(1), LAST_VERSION + 5)
    gate.admit(u64(2), u32(1), LAST_VERSION - 1)
    gate.expire(LAST_VERSION)
    assert held(gate, LAST_VERSION + 2) == {1: (1, LAST_VERSION)}
    gate.expire(LAST_VERSION + 7)
    assert gate.entries == 0
    gate.close()


def test_a_restored_count_stops_where_counters_do() -> None:
    gate = counter(threshold=MOST)
    gate.put(u64(1), u32(LARGEST), u64(5))
    assert held(gate) == {1: (MOST, 5)}
    assert gate.admit(u64(1), u32(1), 6)[0].tolist() == [True]
    gate.close()


# ---- sketch


def sketch(threshold: int = 3, expected: int = 1000, rate: float = 0.01, **of: int) -> SketchGate:
    rule = Sketch(threshold=threshold, expected_keys=expected, error_rate=rate)
    return rule.gate(Budget(1 << 30), of.get("seed", SEED))  # type: ignore[return-value]


def early(gate: SketchGate, count: int, threshold: int) -> float:
    """The share of keys never seen before that would be admitted at once."""
    fresh = spread(1 << 40, (1 << 40) + count)
    return float(gate.weigh(fresh, ones(fresh), 1)[0].mean())


@pytest.mark.parametrize("rate", [0.5, 0.1, 0.01, 0.001])
@pytest.mark.parametrize("threshold", [2, 3, 40])
def test_at_the_expected_keys_few_others_are_admitted_early(rate: float, threshold: int) -> None:
    """The worst case: every key that waits is one occurrence short."""
    gate, keys = sketch(threshold, 50_000, rate), spread(0, 50_000)
    gate.admit(keys, (threshold - 1) * ones(keys), 1)
    trials = 200_000
    assert early(gate, trials, threshold) <= five_sigma(rate, trials)
    assert gate.entries == pytest.approx(50_000, rel=0.02)
    gate.close()


@pytest.mark.parametrize("seed", [0, 1, MASK])
def test_the_share_is_that_of_a_bloom_filter(seed: int) -> None:
    """Two hashes do for k: each cell of a key is a fair draw from all cells."""
    gate, keys = sketch(2, 100_000, 2**-5, seed=seed), spread(0, 100_000)
    gate.admit(keys, ones(keys), 1)
    used = np.count_nonzero(gate.cells()) / len(gate.cells())
    assert used == pytest.approx(PLANNED, rel=0.01)
    trials = 1_000_000
    wanted = used**5
    error = 5 * math.sqrt(wanted / trials)
    assert early(gate, trials, 2) == pytest.approx(wanted, abs=error + 0.02 * wanted)
    gate.close()


def test_the_size_is_known_at_creation() -> None:
    rule = Sketch(threshold=3, expected_keys=1_000_000, error_rate=0.01)
    assert (rule.hashes, rule.bytes) == (7, rule.cells)
    assert rule.cells == math.ceil(7_000_000 / -math.log(1 - PLANNED))
    gate = gate_of(rule)
    assert rule.bytes <= gate.bytes <= rule.bytes + (2 << 20)
    assert Sketch(threshold=33, expected_keys=1_000_000).bytes == 2 * rule.bytes
    gate.close()
    with pytest.raises(OutOfMemory):
        gate_of(rule, rule.bytes // 2)


def test_with_more_keys_than_expected_it_ages_and_keeps_its_rate() -> None:
    rate, size = 0.01, 10_000
    gate = sketch(3, 100_000, rate)
    for version in range(1, 101):  # a million keys, each seen once or twice
        keys = spread(version * size, (version + 1) * size)
        gate.admit(keys, ones(keys) + np.uint32(version % 2), version)
        assert np.count_nonzero(gate.cells()) <= len(gate.cells()) / 2
        assert early(gate, 20_000, 3) <= five_sigma(rate, 20_000)
    gate.close()


@pytest.mark.parametrize("expected", [500, 2000, 20_000])
@pytest.mark.parametrize("count", [1, 2])
def test_pushes_of_more_keys_than_expected_make_no_others_early(expected: int, count: int) -> None:
    rate, size = 0.01, 10_000
    gate = sketch(3, expected, rate)
    for version in range(1, 11):
        keys = spread(version * size, (version + 1) * size)
        assert gate.admit(keys, count * ones(keys), version)[0].mean() <= five_sigma(rate, size)
        assert np.count_nonzero(gate.cells()) <= len(gate.cells()) / 2
    gate.close()


def test_a_push_ages_a_sketch_no_further_than_its_keys_pay_for() -> None:
    """High counts in most cells, of which a halving frees none."""
    gate, keys = sketch(100, 100_000), spread(0, 10)
    cells = len(gate.cells())
    gate.load_cells(0, np.full(2 * cells, 255, np.uint8))
    for version, halved in ((1, HALVED), (2, 2 * HALVED)):
        gate.admit(keys, ones(keys), version)
        assert np.count_nonzero(gate.cells() < 65_000) == halved
    gate.close()


def test_in_a_stream_few_are_early_and_next_to_none_late() -> None:
    """Zipf's law, each admission taken out again; no more wait than expected, so nothing ages."""
    rate, threshold, count = 0.01, 3, 200_000
    gate = sketch(threshold, count, rate)
    rng = np.random.default_rng(1)
    law = np.cumsum(1 / np.arange(1, count + 1) ** 0.9)
    true, has_row = np.zeros(count, np.int64), np.zeros(count, np.bool_)
    early_ones = late_ones = 0
    for version in range(1, 101):
        drawn = np.searchsorted(law, rng.random(10_000) * law[-1])
        ids, counts = np.unique(drawn[~has_row[drawn]], return_counts=True)
        true[ids] += counts
        admitted, totals = gate.admit(spread(0, count)[ids], counts.astype(np.uint32), version)
        assert (totals[admitted] >= threshold).all()
        has_row[ids[admitted]] = True
        before = true[ids] - counts
        early_ones += (true[ids][admitted] < threshold).sum()
        late_ones += (before[admitted] >= threshold).sum()
        assert (before[admitted] < 2 * threshold).all()
    assert early_ones <= five_sigma(rate, count) * count
    assert late_ones <= 0.002 * has_row.sum()
    assert has_row.sum() > 30_000
    gate.close()


def test_ageing_halves_every_count() -> None:
    gate, keys = sketch(100, 1000), spread(0, 9)
    gate.admit(keys, np.arange(1, 10, dtype=np.uint32), 5)
    gate.expire(5)  # its last halving was at version 0
    assert gate.waiting(keys).tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 4]
    gate.expire(5)  # that was at version 5
    assert gate.waiting(keys).tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 4]
    gate.admit(u64(77), u32(1), 9)
    gate.expire(6)
    assert gate.waiting(keys).tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert gate.entries == 6
    gate.close()


def test_ageing_goes_a_slice_at_a_time() -> None:
    gate, keys = sketch(100, 200_000), spread(0, 10)
    cells = len(gate.cells())
    assert cells > 4 * HALVED
    gate.admit(keys, 64 * ones(keys), 5)
    gate.expire(1, limit=cells // 2)
    assert set(gate.waiting(keys).tolist()) <= {32, 64}
    assert 32 in gate.waiting(keys).tolist()
    assert np.unique(gate.cells()[: cells // 2]).max() <= 32
    assert np.unique(gate.cells()[cells // 2 :]).max() == 64
    for version in range(6, 10):  # pushes go on with it
        gate.admit(u64(), u32(), version)
    assert gate.waiting(keys).tolist() == [32] * 10
    gate.close()


def test_a_cell_that_is_full_is_not_taken_from() -> None:
    gate, keys = sketch(32, 1), spread(0, 100)  # too few cells in use to age
    gate.put(keys, 300 * ones(keys), ones(keys).astype(np.uint64))  # as ten keys of a cell would
    full = gate.cells() == 255
    assert full.any()
    gate.discard(keys[:50])
    assert (gate.cells()[full] == 255).all()
    gate.close()


def test_cells_are_a_checkpoint_with_what_was_pushed_meanwhile() -> None:
    gate, keys = sketch(9, 1000), spread(0, 500)
    gate.admit(keys, 2 * ones(keys), 1)
    half = len(gate.cells()) // 2
    first = gate.cells()[:half].copy()
    _, totals = gate.admit(keys[100:], 3 * ones(keys[100:]), 2)
    second = gate.cells()[half:].copy()
    copy = sketch(9, 1000)
    copy.load_cells(0, first)
    copy.load_cells(half, second)
    for _ in range(2):
        copy.put(keys[100:], totals, np.full(400, 2, np.uint64))
    assert (copy.waiting(keys) == gate.waiting(keys)).mean() > 0.98
    assert (copy.waiting(keys) >= [2] * 100 + [5] * 400).all()
    assert not gate.cells().flags.writeable
    gate.close()
    copy.close()


def test_loaded_cells_are_the_same_sketch() -> None:
    gate, keys = sketch(), spread(0, 500)
    gate.admit(keys, 2 * ones(keys), 1)
    copy = sketch()
    copy.load_cells(0, gate.cells())
    assert (copy.entries, copy.waiting(keys).tolist()) == (gate.entries, [2] * 500)
    gate.discard(keys)
    copy.discard(keys)
    assert (gate.entries, copy.entries, copy.cells().max()) == (0, 0, 0)
    size = len(gate.cells())
    for start, count in ((0, size + 1), (size - 5, 6), (size + 1, 0), (-1, 1)):
        with pytest.raises(
            ValueError, match=rf"bytes {start}\.\..* are outside of a sketch of {size} bytes"
        ):
            copy.load_cells(start, np.zeros(count, np.uint8))
    gate.close()
    copy.close()


@pytest.mark.parametrize("name", [name for name in NAMES if name != "sketch"])
def test_other_gates_have_no_cells(name: str) -> None:
    gate = gate_of(make_admission(name, {}))
    gate.load_cells(0, gate.cells())
    with pytest.raises(ValueError, match=r"bytes 0\.\.0 are outside of a sketch of 0 bytes"):
        gate.load_cells(0, np.zeros(1, np.uint8))
    gate.close()


# ---- probability


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_each_occurrence_is_a_draw(p: float, count: int) -> None:
    gate, keys = gate_of(Probability(p=p)), spread(0, 200_000)
    admitted, totals = gate.admit(keys, count * ones(keys), 17)
    wanted = 1 - (1 - p) ** count
    sigma = math.sqrt(wanted * (1 - wanted) / len(keys))
    assert abs(admitted.mean() - wanted) < 5 * sigma
    assert totals.tolist() == [count] * len(keys)


def test_versions_are_independent_draws_for_a_key() -> None:
    gate = gate_of(Probability(p=0.5))
    story = np.array([gate.admit(u64(3), u32(1), v)[0][0] for v in range(1, 20_001)])
    assert abs(story.mean() - 0.5) < 5 * 0.5 / math.sqrt(20_000)
    pairs = (story[1:] & story[:-1]).mean()
    assert abs(pairs - 0.25) < 5 * 0.5 / math.sqrt(20_000)


def test_a_draw_depends_on_seed_key_and_version_alone() -> None:
    rule, keys = Probability(p=0.3), spread(0, 1000)
    whole = rule.gate(Budget(0), 5).admit(keys, ones(keys), 9)[0]
    gate = rule.gate(Budget(0), 5)
    gate.admit(keys, ones(keys), 8)
    parts = [gate.admit(keys[i : i + 7], ones(keys[i : i + 7]), 9)[0] for i in range(0, 1000, 7)]
    assert np.concatenate(parts).tolist() == whole.tolist()
    for other, version in ((rule.gate(Budget(0), 6), 9), (gate, 10)):
        assert 0.1 < (other.admit(keys, ones(keys), version)[0] != whole).mean() < 0.9


def test_certainty_admits_every_key_that_occurs() -> None:
    gate, keys = gate_of(Probability(p=1)), u64(*EXTREMES)
    assert gate.admit(keys, ones(keys), 1)[0].all()
    assert not gate.admit(keys, 0 * ones(keys), 1)[0].any()
