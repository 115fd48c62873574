"""The index against a dict: random operations, crafted collisions, churn, and no room left."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from storage import index as module
from storage.arena import Budget
from storage.errors import OutOfMemory
from storage.index import FULL, SEGMENT, Index
from storage.kernels import mix64

MASK = 2**64 - 1
EXTREMES = [0, 1, 2, MASK, MASK - 1, 1 << 63, (1 << 63) - 1, (1 << 63) + 1, 1 << 62]
SEGMENT_BYTES = 16 * SEGMENT
LARGEST_MOVE = 27_136  # entries, as the module says


def u64(numbers: Any) -> np.ndarray:
    return np.array(list(numbers), np.uint64)


def held(index: Index) -> dict[int, int]:
    """Everything in an index; asserts that it is there once."""
    found: dict[int, int] = {}
    for keys, locations in index.slices():
        for key, location in zip(keys.tolist(), locations.tolist(), strict=True):
            assert key not in found
            found[key] = location
    assert len(index) == len(found)
    return found


def random_keys(count: int, seed: int) -> np.ndarray:
    """Distinct keys; some are extreme, some are close together."""
    rng = np.random.default_rng(seed)
    wide = rng.integers(0, 2**64, count, np.uint64)
    wide[: count // 4] = np.arange(count // 4)
    keys = np.sort(np.concatenate([u64(EXTREMES), wide]))
    return rng.permutation(keys[np.append(True, keys[1:] != keys[:-1])])


def keys_of(hashes: Any) -> np.ndarray:
    """The keys with these hashes: mix64 backwards."""
    x = u64(hashes)
    x = x ^ x >> np.uint64(27) ^ x >> np.uint64(54)
    x = x * np.uint64(pow(0x1CE4E5B9AC31D2B5, -1, 1 << 64))
    x = x ^ x >> np.uint64(33)
    x = x * np.uint64(pow(0x3C79AC492BA7B653, -1, 1 << 64))
    return x ^ x >> np.uint64(27) ^ x >> np.uint64(54)


def test_keys_can_be_crafted_for_a_place_in_the_index() -> None:
    hashes = [*EXTREMES, 0x0123456789ABCDEF]
    assert [int(mix64(key)) for key in keys_of(hashes)] == hashes


# ---- a few keys


@pytest.mark.parametrize("key", EXTREMES)
def test_no_key_is_a_sentinel(key: int) -> None:
    index, keys = Index(Budget(1 << 30)), u64([key])
    assert index.find(keys)[0].tolist() == [0]
    assert index.remove(keys) == 0
    index.insert(keys, u64([9]))
    assert held(index) == {key: 9}
    others = u64(k for k in EXTREMES if k != key)
    assert index.find(others)[0].tolist() == [0] * len(others)
    assert index.find(others)[1] == len(others)
    index.assign(keys, u64([MASK]))
    assert (index.find(keys)[0].tolist(), index.find(keys)[1]) == ([MASK], 0)
    assert index.remove(keys) == 1
    assert held(index) == {}
    index.close()


def test_find_answers_for_present_absent_and_repeated_keys_in_order() -> None:
    index = Index(Budget(1 << 30))
    index.insert(u64([5, 0]), u64([50, 60]))
    locations, absent = index.find(u64([0, 7, 5, 5, 7, 0]))
    assert (locations.tolist(), absent) == ([60, 0, 50, 50, 0, 60], 2)


def test_calls_without_keys_do_nothing() -> None:
    index, none = Index(Budget(1 << 30)), u64([])
    index.insert(none, none)
    index.assign(none, none)
    assert index.remove(none) == 0
    assert (index.find(none)[0].tolist(), index.find(none)[1], held(index)) == ([], 0, {})


def test_remove_counts_only_the_keys_that_were_there() -> None:
    index = Index(Budget(1 << 30))
    index.insert(u64([1, 2, 3]), u64([1, 2, 3]))
    assert index.remove(u64([2, 9, 3, 2])) == 2
    assert held(index) == {1: 1}


class Crowd(RuleBasedStateMachine):
    """Keys that all want the same few entries, on both sides of the end of a segment."""

    POOL = tuple(
        keys_of(
            high << 40 | (SEGMENT - 4 + low) % SEGMENT for low in range(8) for high in range(5)
        ).tolist()
    )
    keys = st.lists(st.sampled_from(POOL), unique=True, max_size=20)

    @initialize()
    def open(self) -> None:
        self.index = Index(Budget(1 << 22))
        self.model: dict[int, int] = {}
        self.next = 1

    def _numbers(self, count: int) -> np.ndarray:
        self.next += count
        return np.arange(self.next - count, self.next, dtype=np.uint64)

    @rule(keys=keys)
    def insert(self, keys: list[int]) -> None:
        new = [key for key in keys if key not in self.model]
        numbers = self._numbers(len(new))
        self.index.insert(u64(new), numbers)
        self.model.update(zip(new, numbers.tolist(), strict=True))

    @rule(keys=keys)
    def assign(self, keys: list[int]) -> None:
        there = [key for key in keys if key in self.model]
        numbers = self._numbers(len(there))
        self.index.assign(u64(there), numbers)
        self.model.update(zip(there, numbers.tolist(), strict=True))

    @rule(keys=keys)
    def remove(self, keys: list[int]) -> None:
        there = sum(self.model.pop(key, None) is not None for key in keys)
        assert self.index.remove(u64(keys)) == there

    @invariant()
    def finds_what_the_model_finds(self) -> None:
        if hasattr(self, "index"):
            locations, absent = self.index.find(u64(self.POOL))
            assert locations.tolist() == [self.model.get(key, 0) for key in self.POOL]
            assert absent == len(self.POOL) - len(self.model)
            assert len(self.index) == len(self.model)


Crowd.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestCrowdedEntries = Crowd.TestCase


# ---- many keys


@pytest.mark.slow
def test_many_keys_come_move_and_go_as_in_a_dict() -> None:
    keys, rng = random_keys(250_000, 1), np.random.default_rng(2)
    index, model = Index(Budget(1 << 30)), {}
    for part in np.array_split(keys, 11):
        numbers = rng.integers(1, 2**64, len(part), np.uint64)
        index.insert(part, numbers)
        model.update(zip(part.tolist(), numbers.tolist(), strict=True))
    assert held(index) == model
    moved = rng.choice(keys, 60_000, replace=False)
    numbers = rng.integers(1, 2**64, len(moved), np.uint64)
    index.assign(moved, numbers)
    model.update(zip(moved.tolist(), numbers.tolist(), strict=True))
    gone = rng.choice(keys, 150_000, replace=False)
    assert index.remove(gone) == len(gone)
    for key in gone.tolist():
        del model[key]
    assert held(index) == model
    locations, absent = index.find(keys)
    assert locations.tolist() == [model.get(key, 0) for key in keys.tolist()]
    assert absent == len(gone)


def test_churn_leaves_no_trace() -> None:
    keys, rng = random_keys(120_000, 3), np.random.default_rng(4)
    index = Index(Budget(1 << 30))
    present = np.zeros(len(keys), bool)
    places = np.arange(1, len(keys) + 1, dtype=np.uint64)
    for _ in range(30):
        flip = rng.random(len(keys)) < 0.4
        leave, come = np.flatnonzero(flip & present), np.flatnonzero(flip & ~present)
        assert index.remove(keys[leave]) == len(leave)
        index.insert(keys[come], places[come])
        present ^= flip
        locations, absent = index.find(keys)
        assert np.array_equal(locations, np.where(present, places, 0))
        assert (absent, len(index)) == (np.count_nonzero(~present), np.count_nonzero(present))
    assert index.remove(keys) == np.count_nonzero(present)
    assert held(index) == {}
    assert not index._entries.array[: index._entries.rows].any()  # no tombstones


def test_keys_that_share_their_first_bits_split_one_segment_after_another() -> None:
    shared = 0b1011 << 60
    keys = keys_of(shared | i << 43 | i for i in range(40_000))
    index, places = Index(Budget(1 << 30)), np.arange(1, len(keys) + 1, dtype=np.uint64)
    index.insert(keys, places)
    assert np.array_equal(index.find(keys)[0], places)
    others = random_keys(5_000, 5)
    index.insert(others, np.arange(1, len(others) + 1, dtype=np.uint64))
    assert len(held(index)) == len(keys) + len(others)


@pytest.mark.slow
def test_an_index_that_cannot_be_split_says_so_and_stays_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MAX_DEPTH", 4)
    index, few = Index(Budget(1 << 30)), u64([1, 2])
    index._salt = np.uint64(0)  # or these keys would not share bits of the hash
    index.insert(few, u64([1, 2]))
    keys = keys_of(0b10110 << 59 | i for i in range(SEGMENT))
    with pytest.raises(RuntimeError, match=r"index is unbalanced: 4 bits of the hash do not split"):
        index.insert(keys, keys | np.uint64(1))
    assert held(index) == {1: 1, 2: 2}


# ---- room


@pytest.mark.parametrize("batch", [1, 700, 10_000, 100_000])
def test_growth_is_told_before_keys_are_inserted(batch: int) -> None:
    index = Index(Budget(1 << 40))
    keys = random_keys(min(600_000, 900 * batch), seed=batch)
    for at in range(0, len(keys), batch):
        new, before = keys[at : at + batch], index._segments
        growth = index.growth(len(new))
        assert growth <= index.most_growth(len(new))
        index.insert(new, new | np.uint64(1))
        assert SEGMENT_BYTES * (index._segments - before) <= growth
    assert index.growth(0) == 0


@pytest.mark.parametrize("before", [0, 10_000, 50_000])
def test_an_insert_without_room_leaves_the_index_as_it_was(before: int) -> None:
    budget = Budget(4 * SEGMENT_BYTES)
    keys = random_keys(200_000, 6)
    index, places = Index(budget), np.arange(1, len(keys) + 1, dtype=np.uint64)
    index.insert(keys[:before], places[:before])
    as_it_was = held(index)
    with pytest.raises(OutOfMemory, match=r"2097152 bytes of the memory budget of 2097152"):
        index.insert(keys[before:], places[before:])
    assert held(index) == as_it_was
    assert np.array_equal(index.find(keys)[0], np.where(places <= before, places, 0))
    index.insert(keys[before : before + 5_000], places[before : before + 5_000])
    assert len(held(index)) == before + 5_000
    assert budget.held == index.bytes == 4 * SEGMENT_BYTES
    index.close()
    assert (budget.held, index.bytes) == (0, 0)


def test_growth_moves_a_bounded_number_of_entries_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    moves: list[int] = []

    def counted(entries: Any, counts: Any, source: int, *rest: Any) -> None:
        moves.append(int(counts[source]))
        split(entries, counts, source, *rest)

    split = module.split
    monkeypatch.setattr(module, "split", counted)
    keys = random_keys(1_000_000, 7)
    index, places = Index(Budget(1 << 30)), np.arange(1, len(keys) + 1, dtype=np.uint64)
    most_at_once = 0
    for at in range(0, len(keys), 2_000):
        before = len(moves)
        index.insert(keys[at : at + 2_000], places[at : at + 2_000])
        most_at_once = max(most_at_once, len(moves) - before)
    assert FULL == LARGEST_MOVE
    assert set(moves) == {LARGEST_MOVE}
    assert len(moves) == index._segments - 1 >= 40
    assert most_at_once <= 3  # segments do not all split together
    assert np.array_equal(index.find(keys)[0], places)


@pytest.mark.parametrize(
    ("rows", "limit"), [(1_000, 525), (20_000, 27), (100_000, 42), (400_000, 32), (1_500_000, 30)]
)
def test_a_row_takes_a_known_number_of_bytes(rows: int, limit: int) -> None:
    index = Index(Budget(1 << 30))
    index._salt = np.uint64(0)  # the same segments in every run
    keys = np.arange(rows, dtype=np.uint64)
    index.insert(keys, keys + np.uint64(1))
    assert 16 * rows <= index.bytes <= limit * rows


def test_keys_made_to_collide_without_the_salt_are_spread_with_it() -> None:
    index = Index(Budget(1 << 30))
    keys = keys_of((0b1 << 63) | i for i in range(2 * SEGMENT))
    index.insert(keys, keys | np.uint64(1))
    assert index._segments <= 5
    assert len(index) == len(keys)


def test_the_memory_per_key_stays_the_same_while_an_index_grows() -> None:
    index, sizes = Index(Budget(1 << 30)), []
    for at in range(0, 2_000_000, 20_000):
        keys = np.arange(at, at + 20_000, dtype=np.uint64)
        index.insert(keys, keys + np.uint64(1))
        sizes.append(SEGMENT_BYTES * index._segments / (at + 20_000))
    assert max(sizes[50:]) < 29.5
    assert min(sizes[50:]) > 26.5
