"""Exact counters: the cap, expiry, readers, versions."""

from __future__ import annotations

import numpy as np
from gates import (
    gate_of,
    held,
    ones,
    spread,
    u32,
    u64,
)

from storage.admission.counter import LAST_VERSION, MOST, CounterGate
from storage.admission.gates import LARGEST
from storage.admission.rules import (
    Counter,
)
from storage.errors import OutOfMemory
from storage.index import SEGMENT


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
