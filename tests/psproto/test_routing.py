"""Routing: its hash and maps against literals and plain integers, its kernels against numpy."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psproto import routing
from psproto.routing import BUCKETS, MAX_SHARDS, ShardMap, even_map

MASK = (1 << 64) - 1
INT64_MIN = 1 << 63

# key -> hash, bucket, shard of 1, 2, 3, 4, 1024; literals, so that no release may change them
GOLDEN = {
    0: (0x0000000000000000, 0, 0, 0, 0, 0, 0),
    1: (0x5692161D100B05E5, 1385, 0, 0, 1, 1, 346),
    2: (0xDBD238973A2B148A, 3517, 0, 1, 2, 3, 879),
    MASK: (0xB4D055FCF2CBBD7B, 2893, 0, 1, 2, 2, 723),
    MASK - 1: (0xDA26E52FA3730902, 3490, 0, 1, 2, 3, 872),
    INT64_MIN: (0x25C26EA579CEA98A, 604, 0, 0, 0, 0, 151),
    INT64_MIN - 1: (0x5A682AFE7965DEBD, 1446, 0, 0, 1, 1, 361),
    INT64_MIN + 1: (0x22CB06B07578BBFE, 556, 0, 0, 0, 0, 139),
    1 << 20: (0xB7C4539491951F72, 2940, 0, 1, 2, 2, 735),
    1 << 32: (0xD820B7E910B0F93F, 3458, 0, 1, 2, 3, 864),
    0x0123456789ABCDEF: (0xB2C058E4EBB5112C, 2860, 0, 1, 2, 2, 715),
    0x9E3779B97F4A7C15: (0xE220A8397B1DCDAF, 3618, 0, 1, 2, 3, 904),
}
EXTREMES = list(GOLDEN)
SHARDS = (1, 2, 3, 4, 1024)

any_key = st.integers(0, MASK) | st.integers(0, 9) | st.sampled_from(EXTREMES)
any_keys = st.lists(any_key, max_size=200).map(lambda keys: np.array(keys, np.uint64))
any_shards = st.integers(1, 9) | st.sampled_from([64, 1023, MAX_SHARDS])


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """Compile the kernels before an example of hypothesis has to wait for them."""
    keys, rows = np.zeros(1, np.uint64), np.zeros((1, 1), np.float32)
    split = routing.split(keys, even_map(2))
    routing.check(keys, even_map(1), 0)
    routing.first_foreign(keys, even_map(1), 0)
    routing.sum_rows(rows, split.inverse, rows.copy())
    routing.scatter(rows, 0, split.inverse, rows.copy())
    routing.all_finite(rows.reshape(-1).view(np.uint32))


def hash_of(key: int) -> int:
    """SplitMix64's finalizer as ps.proto words it, in plain integers."""
    x = key & MASK
    x ^= x >> 30
    x = x * 0xBF58476D1CE4E5B9 & MASK
    x ^= x >> 27
    x = x * 0x94D049BB133111EB & MASK
    return x ^ x >> 31


def shards_of(keys: np.ndarray, shard_map: ShardMap) -> list[int]:
    return [int(shard_map.shard_of_bucket[hash_of(int(key)) >> 52]) for key in keys]


# ---- hash, buckets, maps


@pytest.mark.parametrize("key", GOLDEN)
def test_the_hash_the_bucket_and_the_shard_of_a_key_never_change(key: int) -> None:
    hashed, bucket, *shards = GOLDEN[key]
    assert int(routing.mix64(np.uint64(key))) == hash_of(key) == hashed
    assert bucket == hashed >> 52
    assert [int(even_map(n).shard_of_bucket[bucket]) for n in SHARDS] == shards


@given(any_keys)
def test_the_hash_is_the_one_of_ps_proto(keys: np.ndarray) -> None:
    assert [int(routing.mix64(key)) for key in keys] == [hash_of(int(key)) for key in keys]


@pytest.mark.parametrize("signed", [-1, -2, -(2**63), 2**63 - 1, 0, 1])
def test_signed_keys_route_as_the_unsigned_ones_with_their_bits(signed: int) -> None:
    as_unsigned = np.array([signed], np.int64).view(np.uint64)
    assert int(as_unsigned[0]) == signed & MASK
    assert int(routing.mix64(as_unsigned[0])) == hash_of(signed)


@pytest.mark.parametrize("shards", SHARDS)
def test_the_even_map_gives_bucket_b_to_shard_b_times_shards_over_4096(shards: int) -> None:
    shard_map = even_map(shards)
    assert (shard_map.epoch, shard_map.shards) == (1, shards)
    assert shard_map.shard_of_bucket.dtype == np.uint16
    assert shard_map.shard_of_bucket.tolist() == [b * shards // BUCKETS for b in range(BUCKETS)]


@pytest.mark.parametrize("shards", SHARDS)
def test_every_shard_of_the_even_map_has_its_share_of_buckets(shards: int) -> None:
    sizes = np.bincount(even_map(shards).shard_of_bucket, minlength=shards)
    assert {int(size) for size in sizes} <= {BUCKETS // shards, -(-BUCKETS // shards)}


@pytest.mark.parametrize(
    ("shards", "table", "message"),
    [
        (0, np.zeros(BUCKETS, np.uint16), "shards must be in 1..1024, got 0"),
        (-1, np.zeros(BUCKETS, np.uint16), "shards must be in 1..1024, got -1"),
        (1025, np.zeros(BUCKETS, np.uint16), "shards must be in 1..1024, got 1025"),
        (1, np.zeros(4095, np.uint16), "shard map must be uint16[4096], got uint16[4095]"),
        (1, np.zeros((4096, 1), np.uint16), "shard map must be uint16[4096], got uint16[4096, 1]"),
        (1, np.zeros(BUCKETS, np.int64), "shard map must be uint16[4096], got int64[4096]"),
        (2, np.full(BUCKETS, 2, np.uint16), "shard map: shards must be in 0..1, got 2"),
    ],
)
def test_an_impossible_map_is_refused(shards: int, table: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=r"^shard") as caught:
        ShardMap(1, shards, table)
    assert str(caught.value) == message


@pytest.mark.parametrize("shards", [0, -1, MAX_SHARDS + 1])
def test_there_is_no_even_map_of_an_impossible_number_of_shards(shards: int) -> None:
    with pytest.raises(ValueError, match=rf"shards must be in 1..1024, got {shards}"):
        even_map(shards)


N = 100_000
SPREAD = {
    "sequential": np.arange(N, dtype=np.uint64),
    "from -1 downwards": np.arange(-1, -N - 1, -1, dtype=np.int64).view(np.uint64),
    "strided by 2^20": np.arange(N, dtype=np.uint64) << np.uint64(20),
    "strided by 4": np.arange(N, dtype=np.uint64) << np.uint64(2),
    "high bits only": np.arange(N, dtype=np.uint64) << np.uint64(47),
}


@pytest.mark.parametrize("kind", SPREAD)
def test_regular_keys_spread_evenly_over_four_shards(kind: str) -> None:
    sizes = np.diff(routing.split(SPREAD[kind], even_map(4)).bounds)
    assert sizes.sum() == N
    assert sizes.max() / sizes.mean() <= 1.1


# ---- split, check, first_foreign


@given(any_keys, any_shards)
def test_split_finds_the_distinct_keys_that_numpy_finds(keys: np.ndarray, shards: int) -> None:
    shard_map = even_map(shards)
    split = routing.split(keys, shard_map)
    unique, first, counts = np.unique(keys, return_index=True, return_counts=True)
    assert np.array_equal(split.keys[split.inverse], keys)
    order = np.argsort(split.keys)
    assert np.array_equal(split.keys[order], unique)
    assert np.array_equal(split.counts[order], counts)
    assert (split.keys.dtype, split.counts.dtype) == (np.uint64, np.uint32)
    assert (split.inverse.dtype, split.bounds.dtype) == (np.int32, np.int64)
    owners = shards_of(split.keys, shard_map)
    assert split.bounds.tolist() == [sum(o < s for o in owners) for s in range(shards + 1)]
    met = {int(key): int(at) for key, at in zip(unique, first, strict=True)}
    in_order = sorted(zip(owners, (met[int(k)] for k in split.keys), strict=True))
    assert [(o, met[int(k)]) for o, k in zip(owners, split.keys, strict=True)] == in_order


def test_split_follows_a_map_that_is_not_even() -> None:
    table = np.arange(BUCKETS, dtype=np.uint16) * 7 % 5
    shard_map = ShardMap(9, 5, table.astype(np.uint16))
    keys = np.arange(1000, dtype=np.uint64)
    split = routing.split(keys, shard_map)
    for shard in range(5):
        mine = split.keys[split.bounds[shard] : split.bounds[shard + 1]]
        assert set(shards_of(mine, shard_map)) == {shard}
    assert np.array_equal(np.sort(split.keys), keys)


def test_split_leaves_the_batch_as_it_was() -> None:
    keys = np.array([3, 1, 3, MASK], np.uint64)
    keys.flags.writeable = False
    assert routing.split(keys, even_map(2)).keys.tolist() != []
    assert keys.tolist() == [3, 1, 3, MASK]


@given(any_keys, any_shards, st.data())
def test_check_counts_repetitions_and_finds_the_first_key_of_another_shard(
    keys: np.ndarray, shards: int, data: st.DataObject
) -> None:
    shard = data.draw(st.integers(0, shards - 1))
    shard_map = even_map(shards)
    foreign = [i for i, owner in enumerate(shards_of(keys, shard_map)) if owner != shard]
    first = foreign[0] if foreign else -1
    assert routing.check(keys, shard_map, shard) == (len(keys) - len(set(keys.tolist())), first)
    assert routing.first_foreign(keys, shard_map, shard) == first


# ---- keys that were chosen to collide


def unmix64(hashes: np.ndarray) -> np.ndarray:
    """Return the keys of hashes: mix64 is invertible."""

    def unshift(x: np.ndarray, bits: int) -> np.ndarray:
        keys = x
        for _ in range(64 // bits):
            keys = x ^ (keys >> np.uint64(bits))
        return keys

    x = unshift(hashes, 31) * np.uint64(pow(0x94D049BB133111EB, -1, 2**64))
    x = unshift(x, 27) * np.uint64(pow(0xBF58476D1CE4E5B9, -1, 2**64))
    return unshift(x, 30)


CRAFTED = unmix64(np.arange(60_000, dtype=np.uint64) << 20)  # equal lower halves
TABLES = {
    "split": lambda keys: routing.split(keys, even_map(1)),
    "check": lambda keys: routing.check(keys, even_map(1), 0),
}


def seconds(work: Callable[[], Any]) -> float:
    start = time.thread_time()
    work()
    return time.thread_time() - start


def test_crafted_keys_have_equal_lower_halves_of_their_hashes() -> None:
    assert {hash_of(int(key)) & 0xFFFFF for key in CRAFTED[:100]} == {0}


@pytest.mark.parametrize("table", TABLES)
def test_keys_with_equal_hashes_take_no_longer_than_any_others(table: str) -> None:
    random = np.random.default_rng(1).integers(0, MASK, len(CRAFTED), np.uint64)
    TABLES[table](random)
    usual = min(seconds(lambda: TABLES[table](random)) for _ in range(5))
    assert min(seconds(lambda: TABLES[table](CRAFTED)) for _ in range(5)) < 20 * usual + 0.01


@pytest.mark.parametrize("keys", [CRAFTED, *SPREAD.values()], ids=["crafted", *SPREAD])
def test_no_slot_of_a_table_gets_many_keys(keys: np.ndarray) -> None:
    mask, salt = np.uint64((1 << 18) - 1), routing.draw_salt()
    slots = [int(routing._place(key, salt, mask)) for key in keys[:20_000]]
    assert max(Counter(slots).values()) <= 8


def test_each_process_draws_its_own_salt() -> None:
    assert not np.array_equal(routing.draw_salt(), routing.draw_salt())
    assert all(routing.draw_salt()[1:] & np.uint64(1))


# ---- rows


@given(st.data(), st.integers(0, 5), st.integers(0, 40), st.integers(1, 8))
def test_sum_rows_adds_the_rows_of_equal_keys(
    data: st.DataObject, dim: int, n: int, distinct: int
) -> None:
    place = st.integers(0, distinct - 1)
    inverse = np.array(data.draw(st.lists(place, min_size=n, max_size=n)), np.int32)
    rows = np.arange(n * dim, dtype=np.float32).reshape(n, dim)
    out = np.zeros((distinct, dim), np.float32)
    routing.sum_rows(rows, inverse, out)
    want = np.zeros((distinct, dim), np.float32)
    np.add.at(want, inverse, rows)
    assert np.array_equal(out, want)


@pytest.mark.parametrize(("first", "m"), [(0, 5), (0, 3), (2, 3), (4, 1), (1, 0)])
def test_scatter_fills_the_places_of_its_keys_and_no_others(first: int, m: int) -> None:
    inverse = np.array([4, 0, 1, 1, 3, 2, 0], np.int32)
    distinct = np.arange(10, 20).reshape(5, 2).astype(np.float32)
    out = np.full((7, 2), 99, np.float32)
    routing.scatter(distinct[first : first + m], first, inverse, out)
    want = [distinct[u].tolist() if first <= u < first + m else [99, 99] for u in inverse.tolist()]
    assert out.tolist() == want


FINITE = [0.0, -0.0, 1.0, 3.4028234663852886e38, -3.4028234663852886e38, 1e-45, -1e-45, 1e-38]


def finite(values: list[float]) -> bool:
    return bool(routing.all_finite(np.array(values, np.float32).view(np.uint32)))


def test_all_finite_accepts_every_number_and_none_at_all() -> None:
    assert finite(FINITE)
    assert finite([])


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, -math.nan])
@pytest.mark.parametrize("at", [0, 3, len(FINITE)])
def test_all_finite_finds_one_bad_number_anywhere(bad: float, at: int) -> None:
    assert not finite([*FINITE[:at], bad, *FINITE[at:]])


@pytest.mark.parametrize("bits", [0x7F800001, 0x7FC00000, 0xFF800001, 0xFFFFFFFF, 0x7FFFFFFF])
def test_all_finite_knows_every_kind_of_nan(bits: int) -> None:
    assert not routing.all_finite(np.array([0, bits], np.uint32))


@settings(max_examples=200)
@given(st.lists(st.integers(0, 2**32 - 1), max_size=20))
def test_all_finite_agrees_with_numpy_on_any_bits(bits: list[int]) -> None:
    values = np.array(bits, np.uint32)
    assert bool(routing.all_finite(values)) == bool(np.isfinite(values.view(np.float32)).all())
