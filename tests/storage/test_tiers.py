"""The contract of a tier that pushes can write, over every implementation."""

from __future__ import annotations

import queue
import threading
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from storage.arena import HUGE, Budget
from storage.errors import OutOfMemory
from storage.initializers import INITIALIZERS, make_initializer, table_seed
from storage.kernels import ABSENT, Images
from storage.optimizers import OPTIMIZERS, make_optimizer
from storage.slots import FREQUENCY, KEY, STEP, VERSION
from storage.tiers.base import Scan, Writable
from storage.tiers.host import HostTier

DIM = 3
STATE = np.array([10.0, 20.0], np.float32)
WIDTH = DIM + len(STATE)
SEED = table_seed(1, "t")
UNIFORM = make_initializer("uniform", {})
MASK = 2**64 - 1
MANY = 200_000  # rows of MANY are larger than the first chunks of any tier


def u64(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.uint64)


def ones(count: int) -> np.ndarray:
    return np.ones(count, np.uint32)


def initial(keys: np.ndarray) -> np.ndarray:
    """What rows of these keys start from."""
    rows = np.empty((len(keys), WIDTH), np.float32)
    UNIFORM.fill(SEED, keys, np.arange(len(keys)), DIM, rows)
    rows[:, DIM:] = STATE
    return rows


def create(tier: Writable, keys: np.ndarray) -> np.ndarray:
    places = tier.allocate(len(keys))
    tier.create(keys, places, UNIFORM, SEED)
    tier.slots.create(keys, places)
    return places


def push(
    tier: Writable,
    places: Any,
    gradients: Any,
    counts: Any,
    optimizer: Any,
    lr: float,
    step: int,
    version: int,
) -> None:
    """Push as a table does."""
    tier.slots.touch(places, counts, step, version)
    tier.step(places, gradients, optimizer, lr, step)


def dump(tier: Writable, places: np.ndarray, width: int = WIDTH) -> tuple[np.ndarray, np.ndarray]:
    """Copies of whole rows and of their metadata."""
    rows = np.empty((len(places), width), np.float32)
    tier.gather(places, rows)
    return rows, tier.meta(places)


def put(tier: Writable, places: np.ndarray, images: Images) -> None:
    """Write whole rows as a table does."""
    targets, _ = tier.slots.record(places, *images[:-1])
    tier.scatter(targets, images.rows)


class WritableContract:
    """What every tier does. An implementation inherits it and makes one."""

    def make(self, budget: Budget, dim: int, state: np.ndarray) -> Writable:
        raise NotImplementedError

    @pytest.fixture
    def budget(self) -> Budget:
        return Budget(1 << 30)

    @pytest.fixture
    def tier(self, budget: Budget) -> Writable:
        return self.make(budget, DIM, STATE)

    def test_its_code_fits_into_a_location(self, tier: Writable) -> None:
        assert 1 <= tier.code <= 255
        assert tier.name

    def test_a_new_tier_is_empty(self, tier: Writable, budget: Budget) -> None:
        assert (tier.rows, tier.bytes, budget.held) == (0, 0, 0)

    def test_places_are_distinct_and_counted(self, tier: Writable) -> None:
        first, second = tier.allocate(5), tier.allocate(7)
        assert first.dtype == second.dtype == np.int64
        assert len(set(first.tolist()) | set(second.tolist())) == 12
        assert min(*first, *second) >= 0
        assert tier.rows == 12
        assert tier.allocate(0).tolist() == []

    def test_places_given_back_are_used_again_before_new_ones(self, tier: Writable) -> None:
        places = create(tier, u64(*range(10)))
        size = tier.bytes
        tier.release(places[2:7])
        assert tier.rows == 5
        again = tier.allocate(6)
        assert set(places[2:7].tolist()) < set(again.tolist())
        assert not set(again.tolist()) & {*places[:2].tolist(), *places[7:].tolist()}
        assert len(set(again.tolist())) == 6
        assert tier.rows == 11
        assert size <= tier.bytes

    def test_churn_never_hands_out_a_place_twice(self, tier: Writable) -> None:
        rng = np.random.default_rng(1)
        held: set[int] = set()
        for _ in range(200):
            new = tier.allocate(int(rng.integers(0, 3000))).tolist()
            assert not held & set(new)
            assert len(set(new)) == len(new)
            held |= set(new)
            leave = rng.permutation(sorted(held))[: int(rng.integers(0, len(held) + 1))]
            tier.release(leave.astype(np.int64))
            held -= set(leave.tolist())
            assert tier.rows == len(held)

    def test_create_writes_embeddings_state_and_empty_metadata(self, tier: Writable) -> None:
        keys = u64(0, 1, MASK, 1 << 63, 42)
        rows, meta = dump(tier, create(tier, keys))
        assert np.array_equal(rows, initial(keys))
        assert meta.tolist() == [[key, 0, 0, 0] for key in keys.tolist()]

    @pytest.mark.parametrize("name", INITIALIZERS)
    def test_every_initializer_fills_the_embedding_alone(self, tier: Writable, name: str) -> None:
        initializer, keys = make_initializer(name, {}), u64(7, 8)
        places = tier.allocate(2)
        tier.create(keys, places, initializer, SEED)
        tier.slots.create(keys, places)
        want = np.full((2, DIM), np.nan, np.float32)
        initializer.fill(SEED, keys, np.arange(2), DIM, want)
        rows = dump(tier, places)[0]
        assert np.array_equal(rows[:, :DIM], want)
        assert rows[:, DIM:].tolist() == [STATE.tolist()] * 2

    def test_a_recycled_place_keeps_nothing_of_its_last_row(self, tier: Writable) -> None:
        places = create(tier, u64(1, 2))
        sgd = make_optimizer("sgd", None, {})
        push(tier, places, np.ones((2, DIM), np.float32), ones(2), sgd, 1.0, 5, 6)
        tier.release(places)
        keys = u64(3, 4)
        rows, meta = dump(tier, create(tier, keys))
        assert np.array_equal(rows, initial(keys))
        assert meta.tolist() == [[3, 0, 0, 0], [4, 0, 0, 0]]

    def test_read_copies_embeddings_and_leaves_absent_rows_untouched(self, tier: Writable) -> None:
        keys = u64(5, 6, 7)
        places = create(tier, keys)
        asked = np.array([ABSENT, places[2], places[0], ABSENT, places[2]], np.int64)
        out = np.full((5, DIM), -99, np.float32)
        tier.gather(asked, out)
        want = np.full((5, DIM), -99, np.float32)
        want[[1, 2, 4]] = initial(keys)[[2, 0, 2], :DIM]
        assert np.array_equal(out, want)

    def test_read_of_absent_rows_alone_touches_nothing(self, tier: Writable) -> None:
        out = np.full((20, DIM), 3, np.float32)
        tier.gather(np.full(20, ABSENT, np.int64), out)
        assert (out == 3).all()

    def test_read_changes_nothing(self, tier: Writable) -> None:
        places = create(tier, u64(*range(50)))
        before = dump(tier, places)
        tier.gather(places, np.empty((50, DIM), np.float32))
        for a, b in zip(before, dump(tier, places), strict=True):
            assert np.array_equal(a, b)

    def test_push_records_metadata(self, tier: Writable) -> None:
        keys = u64(5, 6, MASK)
        places, sgd = create(tier, keys), make_optimizer("sgd", None, {})
        zero = np.zeros((2, DIM), np.float32)
        counts = np.array([2**32 - 1, 1], np.uint32)
        push(tier, places[[0, 2]], zero, counts, sgd, 1.0, -(2**47), 11)
        push(tier, places[[0, 1]], zero, counts, sgd, 1.0, 2**47 - 1, 2**48 - 1)
        meta = dump(tier, places)[1]
        assert meta[:, KEY].tolist() == keys.tolist()
        assert meta[:, VERSION].tolist() == [2**48 - 1, 2**48 - 1, 11]
        assert meta[:, STEP].view(np.int64).tolist() == [2**47 - 1, 2**47 - 1, -(2**47)]
        assert meta[:, FREQUENCY].tolist() == [2**32 - 1, 1, 1]  # stops there

    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_push_runs_the_optimizer_over_its_rows_and_no_others(
        self, budget: Budget, name: str
    ) -> None:
        optimizer = make_optimizer(name, None, {})
        state = optimizer.initial_state(DIM)
        tier, keys = self.make(budget, DIM, state), u64(*range(20))
        places = tier.allocate(20)
        tier.create(keys, places, UNIFORM, SEED)
        tier.slots.create(keys, places)
        want = dump(tier, places, DIM + len(state))[0]
        at = np.array([3, 19, 0])
        gradients = np.arange(1, 1 + 3 * DIM, dtype=np.float32).reshape(3, DIM)
        optimizer.step(want, at, gradients, 0.5, 9)
        push(tier, places[at], gradients, ones(3), optimizer, 0.5, 9, 1)
        assert np.array_equal(dump(tier, places, DIM + len(state))[0], want)

    def test_a_batch_larger_than_a_chunk_works(self, tier: Writable, budget: Budget) -> None:
        keys = np.arange(MANY, dtype=np.uint64)
        places = create(tier, keys)
        rows, meta = dump(tier, places)
        assert np.array_equal(rows, initial(keys))
        assert np.array_equal(meta[:, KEY], keys)
        assert tier.rows == MANY
        assert MANY * (4 * WIDTH + 32) <= tier.bytes == budget.held

    def test_rows_stay_what_they_are_while_the_tier_grows(self, tier: Writable) -> None:
        keys = u64(*range(100))
        places = create(tier, keys)
        create(tier, np.arange(1000, 1000 + MANY, dtype=np.uint64))
        assert np.array_equal(dump(tier, places)[0], initial(keys))

    @pytest.mark.parametrize("chunks", range(2, 8))
    def test_allocate_without_room_leaves_the_rows_as_they_were(self, chunks: int) -> None:
        budget = Budget(chunks * HUGE)
        tier, keys = self.make(budget, DIM, STATE), u64(*range(100))
        places = create(tier, keys)
        tier.release(places[:10])
        before = dump(tier, places[10:])
        with pytest.raises(OutOfMemory):
            tier.allocate(MANY * 2)
        assert tier.rows == 90
        for a, b in zip(before, dump(tier, places[10:]), strict=True):
            assert np.array_equal(a, b)
        again = tier.allocate(20)
        assert set(places[:10].tolist()) < set(again.tolist())
        assert not set(again.tolist()) & set(places[10:].tolist())
        assert budget.held <= budget.limit
        tier.close()
        assert budget.held == 0

    def test_put_writes_whole_rows_over_older_ones_alone(self, tier: Writable) -> None:
        sgd, keys = make_optimizer("sgd", None, {}), u64(1, 2, 3, 4)
        old = create(tier, keys[:3])
        for place, version in zip(old, (8, 9, 10), strict=True):
            zero = np.zeros((1, DIM), np.float32)
            push(tier, np.array([place]), zero, ones(1), sgd, 1.0, 5, version)
        before = dump(tier, old)
        places = np.concatenate([old, tier.allocate(1)])
        rows = np.arange(4 * WIDTH, dtype=np.float32).reshape(4, WIDTH)
        versions, steps = u64(9, 9, 9, 9), np.array([-1, -(2**47), 2**47 - 1, 7])
        put(tier, places, Images(keys, versions, steps, u64(3, 2**32 - 1, 1, 2**40), rows))
        got, meta = dump(tier, places)
        assert np.array_equal(got[[0, 1, 3]], rows[[0, 1, 3]])
        assert np.array_equal(got[2], before[0][2])
        assert meta.tolist() == [
            [1, 9, MASK, 3],
            [2, 9, MASK + 1 - 2**47, 2**32 - 1],
            [3, 10, 5, 1],
            [4, 9, 7, 2**32 - 1],  # frequencies stop there
        ]

    def test_put_of_nothing_changes_nothing(self, tier: Writable) -> None:
        places = create(tier, u64(1))
        before = dump(tier, places)
        none = u64()
        places_none, rows = none.view(np.int64), np.empty((0, WIDTH), np.float32)
        put(tier, places_none, Images(none, none, none.view(np.int64), none, rows))
        for a, b in zip(before, dump(tier, places), strict=True):
            assert np.array_equal(a, b)

    def found(self, tier: Writable, after: int, upto: int, limit: int) -> list[tuple[int, int]]:
        """Keys and versions of a whole scan, in its order."""
        scan, start = tier.scan(), 0
        found = []
        while start is not None:
            places, start = scan.find(start, after, upto, limit)
            assert len(places) <= limit
            assert places.tolist() == sorted(set(places.tolist()))
            frequencies = np.zeros(len(places), np.uint64)
            rows = np.zeros((len(places), WIDTH), np.float32)
            meta = scan.copy(places, frequencies, rows)
            want, same = dump(tier, places)
            assert np.array_equal(rows, want)
            assert np.array_equal(meta, same)
            assert np.array_equal(frequencies, meta[:, FREQUENCY])
            found += [(int(key), int(version)) for key, version in meta[:, [KEY, VERSION]]]
        return found

    @pytest.mark.parametrize("limit", [1, 2, 3, 7, 1000])
    def test_a_scan_finds_each_row_of_its_versions_once(self, tier: Writable, limit: int) -> None:
        sgd = make_optimizer("sgd", None, {})
        assert self.found(tier, 0, 100, limit) == []
        places = create(tier, u64(*range(10)))
        assert self.found(tier, 0, 100, limit) == []  # never pushed
        for version in range(1, 7):
            some = places[version : version + 3]
            push(
                tier,
                some,
                np.zeros((len(some), DIM), np.float32),
                ones(len(some)),
                sgd,
                1.0,
                0,
                version,
            )
        versions = {key: min(key, 6) for key in range(1, 9)}
        for after in range(8):
            for upto in range(after, 9):
                want = {(k, v) for k, v in versions.items() if after < v <= upto}
                got = self.found(tier, after, upto, limit)
                assert (set(got), len(got)) == (want, len(want))

    def test_a_scan_knows_rows_of_its_moment_and_no_later_places(self, tier: Writable) -> None:
        sgd = make_optimizer("sgd", None, {})
        places = create(tier, u64(1, 2))
        push(tier, places, np.zeros((2, DIM), np.float32), ones(2), sgd, 1.0, 0, 1)
        scan = tier.scan()
        more = create(tier, np.arange(10, 10 + MANY, dtype=np.uint64))
        zero = np.zeros((MANY, DIM), np.float32)
        push(tier, more, zero, ones(MANY), sgd, 1.0, 0, 1)
        found, start = scan.find(0, 0, 9, 2 * MANY)
        assert (sorted(found.tolist()), start) == (sorted(places.tolist()), None)

    def test_a_row_that_left_is_not_found(self, tier: Writable) -> None:
        sgd = make_optimizer("sgd", None, {})
        places = create(tier, u64(1, 2, 3))
        push(tier, places, np.zeros((3, DIM), np.float32), ones(3), sgd, 1.0, 0, 4)
        scan = tier.scan()
        tier.release(places[1:2])
        assert sorted(key for key, _ in self.found(tier, 0, 9, 10)) == [1, 3]
        found, _ = scan.find(0, 0, 9, 10)
        assert sorted(found.tolist()) == sorted(places[[0, 2]].tolist())
        meta = scan.copy(places[1:2], np.zeros(1, np.uint64), np.zeros((1, WIDTH), np.float32))
        assert meta[0, VERSION] == 0
        assert scan.measure(places, np.zeros(3))[:, VERSION].tolist() == [4, 0, 4]

    def test_a_scan_measures_and_reads_embeddings_without_their_state(self, tier: Writable) -> None:
        sgd = make_optimizer("sgd", None, {})
        keys = u64(*range(30), MASK, 1 << 63)
        places = create(tier, keys)
        gradients = np.arange(len(keys) * DIM, dtype=np.float32).reshape(-1, DIM)
        push(tier, places, gradients, ones(len(keys)), sgd, 1.0, -5, 4)
        some = places[::-2]
        norms, rows = np.zeros(len(some)), np.zeros((len(some), DIM), np.float32)
        scan = tier.scan()
        meta = scan.measure(some, norms)
        scan.read(some, rows)
        whole, wanted = dump(tier, some)
        assert_array_equal(meta, wanted)
        assert_array_equal(rows, whole[:, :DIM])
        assert_allclose(norms, np.linalg.norm(whole[:, :DIM].astype(np.float64), axis=1))

    @pytest.mark.slow
    def test_a_scan_beside_pushes_finds_untouched_rows_whole(self, budget: Budget) -> None:
        """Half of the rows are pushed, released and created all the time, the others never."""
        tier, sgd = self.make(budget, DIM, STATE), make_optimizer("sgd", None, {})
        keys = np.arange(4000, dtype=np.uint64)
        places = create(tier, keys)
        zero = np.zeros((4000, DIM), np.float32)
        push(tier, places, zero, ones(4000), sgd, 1.0, 0, 1)
        still = dict(zip(keys[::2].tolist(), dump(tier, places[::2])[0].tolist(), strict=True))
        made, broken = queue.Queue[Scan | None](1), []

        def scans() -> None:
            while (scan := made.get(timeout=60)) is not None:
                start, seen = 0, {}
                while start is not None:
                    found, start = scan.find(start, 0, 1, 333)
                    rows = np.zeros((len(found), WIDTH), np.float32)
                    meta = scan.copy(found, np.zeros(len(found), np.uint64), rows)
                    for row, (key, version, _, _) in zip(rows, meta.tolist(), strict=True):
                        if version == 1 and key % 2 == 0:
                            seen[key] = row.tolist()
                        elif version == 1:
                            broken.append(("a row of the past", key))
                if seen != still:
                    broken.append(("rows that nobody touched", len(seen)))

        moving = places[1::2]
        push(tier, moving, zero[: len(moving)], ones(len(moving)), sgd, 1.0, 0, 2)
        thread = threading.Thread(target=scans)
        thread.start()
        for version in range(3, 63):
            tier.release(moving)
            moving = create(tier, keys[1::2])
            push(tier, moving, zero[: len(moving)], ones(len(moving)), sgd, 1.0, 0, version)
            made.put(tier.scan(), timeout=60)
        made.put(None, timeout=60)
        thread.join()
        assert broken == []

    def test_close_returns_everything(self, tier: Writable, budget: Budget) -> None:
        create(tier, np.arange(MANY, dtype=np.uint64))
        assert tier.bytes == budget.held > 0
        tier.close()
        assert (tier.bytes, budget.held) == (0, 0)


class TestHostTier(WritableContract):
    def make(self, budget: Budget, dim: int, state: np.ndarray) -> Writable:
        return HostTier(dim, state, budget)


def test_a_refused_allocation_gives_back_what_it_had_taken() -> None:
    budget = Budget(64 << 20)
    tier = HostTier(32, np.zeros(32, np.float32), budget)
    tier.allocate(10)
    held = budget.held
    with pytest.raises(OutOfMemory):
        tier.allocate(260_000)  # the slab would fit, its metadata no longer
    assert budget.held == held
    tier.allocate(200_000)
