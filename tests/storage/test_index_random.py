"""Random inserts, removals and moves in an index of several segments, against a dict."""

from __future__ import annotations

import numpy as np
import pytest

from storage.arena import Budget
from storage.index import FULL, PER_LINE, SEGMENT, Index
from storage.kernels import Keys

LINES = SEGMENT // PER_LINE


def unmixed(hashes: Keys) -> Keys:
    """The keys with these hashes: mix64 backwards."""
    x = hashes ^ hashes >> np.uint64(27) ^ hashes >> np.uint64(54)
    x = x * np.uint64(pow(0x1CE4E5B9AC31D2B5, -1, 1 << 64))
    x = x ^ x >> np.uint64(33)
    x = x * np.uint64(pow(0x3C79AC492BA7B653, -1, 1 << 64))
    return x ^ x >> np.uint64(27) ^ x >> np.uint64(54)


def mixed(keys: Keys) -> Keys:
    """mix64 of an array."""
    x = (keys ^ keys >> np.uint64(27)) * np.uint64(0x3C79AC492BA7B653)
    x = (x ^ x >> np.uint64(33)) * np.uint64(0x1CE4E5B9AC31D2B5)
    return x ^ x >> np.uint64(27)


class Pair:
    """An index and a dict with the same contents.

    kind  which keys are inserted. "spread": random ones; "crowded": all want the same 75 cache
          lines of a segment, at its end and its beginning; "ends": the first and the last hashes
    """

    def __init__(self, kind: str, seed: int) -> None:
        self.kind, self.rng = kind, np.random.default_rng(seed)
        self.index, self.model = Index(Budget(1 << 33)), dict[int, int]()

    def new_keys(self, count: int) -> Keys:
        """Up to ``count`` distinct keys that are absent."""
        hashes = self.rng.integers(0, 2**64, count, np.uint64)
        if self.kind == "crowded":
            low = self.rng.integers(-150, 150, count) % SEGMENT
            hashes = hashes & ~np.uint64(SEGMENT - 1) | low.astype(np.uint64)
        elif self.kind == "ends":
            hashes >>= np.uint64(14)
            hashes[::2] ^= np.uint64(2**64 - 1)
        keys = np.unique(unmixed(hashes) ^ self.index._salt)
        absent = [key not in self.model for key in keys.tolist()]
        return self.rng.permutation(keys[np.array(absent, bool)])

    def some_keys(self, count: int) -> Keys:
        """Up to ``count`` distinct keys that are present."""
        keys = np.fromiter(self.model, np.uint64, len(self.model))
        return self.rng.choice(keys, min(count, len(keys)), replace=False)

    def locations(self, keys: Keys) -> Keys:
        return self.rng.integers(1, 2**64, len(keys), np.uint64)

    def insert(self, count: int) -> None:
        keys, segments = self.new_keys(count), self.index._segments
        locations, growth = self.locations(keys), self.index.growth(len(keys))
        assert growth <= self.index.most_growth(len(keys))
        self.index.insert(keys, locations)
        if self.kind == "spread":
            assert (self.index._segments - segments) * SEGMENT * 16 <= growth
        self.model.update(zip(keys.tolist(), locations.tolist(), strict=True))

    def remove(self, count: int) -> None:
        keys, absent = self.some_keys(count), self.new_keys(min(count, 300))
        both = self.rng.permutation(np.concatenate([keys, absent]))
        assert self.index.remove(both) == len(keys)
        for key in keys.tolist():
            del self.model[key]

    def assign(self, count: int) -> None:
        keys = self.some_keys(count)
        locations = self.locations(keys)
        self.index.assign(keys, locations)
        self.model.update(zip(keys.tolist(), locations.tolist(), strict=True))

    def step(self, most: int) -> None:
        act = self.rng.choice([self.insert, self.remove, self.assign], p=[0.5, 0.3, 0.2])
        act(int(self.rng.choice([0, 1, 5, 300, most])))
        assert len(self.index) == len(self.model)

    def check(self) -> None:
        """Both have the same contents, and the segments are as the module describes them."""
        index = self.index
        keys = np.fromiter(self.model, np.uint64, len(self.model))
        locations, absent = index.find(keys)
        assert locations.tolist() == list(self.model.values())
        assert absent == 0
        assert not index.find(self.new_keys(300))[0].any()
        spans = np.bincount(index._directory, minlength=index._segments)
        assert index._spans[: index._segments].tolist() == spans.tolist()
        assert np.count_nonzero(np.diff(index._directory)) == index._segments - 1
        for segment in range(index._segments):
            self._check_segment(segment)

    def _check_segment(self, segment: int) -> None:
        index = self.index
        entries = index._entries.array[segment * SEGMENT : (segment + 1) * SEGMENT]
        used = np.flatnonzero(entries[:, 1])
        assert len(used) == index._counts[segment] <= FULL
        assert not entries[entries[:, 1] == 0].any()
        hashes = mixed(entries[used, 0] ^ index._salt)
        prefixes = hashes >> np.uint64(1) >> np.uint64(63 - index._depth)
        assert (index._directory[prefixes.astype(np.int64)] == segment).all()
        first = (hashes & np.uint64(SEGMENT - 1)).astype(np.int64) // PER_LINE
        beyond = (used // PER_LINE - first) % LINES  # cache lines that a search passes: all full
        full = entries[:, 1].reshape(LINES, PER_LINE).all(axis=1)
        before = np.concatenate([[0], np.cumsum(np.tile(full, 2))])
        assert (before[first + beyond] - before[first] == beyond).all()


@pytest.mark.parametrize(
    ("kind", "steps", "most"),
    [
        ("spread", 30, 20_000),
        ("crowded", 60, 3000),
        ("ends", 30, 20_000),
        pytest.param("spread", 100, 60_000, marks=pytest.mark.slow),
        pytest.param("crowded", 400, 6000, marks=pytest.mark.slow),
        pytest.param("ends", 100, 60_000, marks=pytest.mark.slow),
    ],
)
def test_an_index_does_what_a_dict_does(kind: str, steps: int, most: int) -> None:
    pair = Pair(kind, seed=steps)
    pair.insert(most)
    for step in range(steps):
        pair.step(most)
        if step % (steps // 5) == 0:
            pair.check()
    pair.check()
    pair.index.close()


def test_a_key_that_is_absent_cannot_be_moved() -> None:
    index = Index(Budget(1 << 30))
    index.insert(np.array([1, 2], np.uint64), np.array([10, 20], np.uint64))
    with pytest.raises(RuntimeError, match="1 of 2 keys are not in the index"):
        index.assign(np.array([2, 3], np.uint64), np.array([21, 30], np.uint64))
    assert index.find(np.array([1, 2, 3], np.uint64))[0].tolist() == [10, 21, 0]
