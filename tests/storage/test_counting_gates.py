"""Gates that count against dicts: few occurrences in every order, and random operations."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from gates import (
    COUNTING,
    EXTREMES,
    MASK,
    SMALL,
    gate_of,
    held,
    ones,
    u32,
    u64,
)
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from storage.admission.gates import LARGEST, Gate
from storage.admission.rules import (
    make_admission,
)


@pytest.fixture(params=COUNTING)
def counting(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A gate of threshold 3 that counts."""
    gate = gate_of(make_admission(request.param, SMALL[request.param]))
    yield gate
    gate.close()


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
