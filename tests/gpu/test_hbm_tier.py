"""Rows in GPU memory: the contract of a tier, and the same bits as in host memory.

The tier runs on the fake device, which runs the real kernels late, early and in random order.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest
from cases import CASES, DIMS, exact
from cpukernels import compiler
from fakedevice import MODES, FakeDevice
from lifted import NONE, PIECE, LiftedTier, tier_on

from storage.arena import Budget
from storage.errors import OutOfMemory
from storage.gpu import slab, staging
from storage.gpu.cuda import CudaDevice
from storage.gpu.device import Device, NoDevice, OutOfDeviceMemory
from storage.gpu.staging import Staging
from storage.kernels import ABSENT, Images
from storage.optimizer import Optimizer
from storage.optimizers import make_optimizer
from storage.tiers.base import Writable
from storage.tiers.host import HostTier
from tests.storage.test_tiers import (
    DIM,
    SEED,
    STATE,
    UNIFORM,
    WIDTH,
    WritableContract,
    create,
    dump,
    push,
    put,
)

needs_compiler = pytest.mark.skipif(compiler() is None, reason="no g++ to compile the CUDA kernels")


@pytest.fixture(scope="module")
def gpu() -> CudaDevice:
    try:
        return CudaDevice()
    except NoDevice as error:
        pytest.skip(f"no GPU: {error}")


@needs_compiler
class TestLateDevice(WritableContract):
    mode, share = "late", 1.0

    def make(self, budget: Budget, dim: int, state: np.ndarray) -> Writable:
        return tier_on(FakeDevice(self.mode), budget, dim, state, self.share)


class TestEarlyDevice(TestLateDevice):
    mode = "early"


class TestRandomDevice(TestLateDevice):
    mode = "random"


class TestHalfInHostMemory(TestLateDevice):
    mode, share = "random", 0.5


class TestAllInHostMemory(TestLateDevice):
    share = 0.0


@pytest.mark.gpu
class TestGpu(WritableContract):
    @pytest.fixture(autouse=True)
    def device(self, gpu: CudaDevice) -> None:
        self.gpu = gpu

    def make(self, budget: Budget, dim: int, state: np.ndarray) -> Writable:
        return tier_on(self.gpu, budget, dim, state)


class Twins:
    """The same random operations on rows in GPU memory and in host memory.

    Rows have other places in each tier. ``run`` compares whatever the tiers return.
    """

    def __init__(self, device: Device, optimizer: Optimizer, dim: int, seed: int) -> None:
        self.rng, self.dim = np.random.default_rng(seed), dim
        self.optimizer, state = optimizer, optimizer.initial_state(dim)
        self.width, self.version, self.next_key = dim + len(state), 0, 0
        self.near = tier_on(device, Budget(1 << 30), dim, state, 0.6)
        self.old: tuple[Any, Any, int] | None = None  # earlier scans, and the version then
        self.far = HostTier(dim, state, Budget(1 << 30))
        self.far.allocate(3)  # so that places differ
        self.places = np.empty((0, 2), np.int64)  # of each row in both tiers

    def some(self) -> Any:
        """Choose rows: int64[n, 2]."""
        count = int(self.rng.integers(0, min(len(self.places), 90) + 1))
        return self.rng.permutation(self.places)[:count]

    def same(self, read: Callable[[Writable, Any], Any], places: Any) -> None:
        """Check that both tiers return the same arrays."""
        pairs = zip(read(self.near, places[:, 0]), read(self.far, places[:, 1]), strict=True)
        for got, wanted in pairs:
            assert got.tobytes() == wanted.tobytes()

    def create(self) -> None:
        count = int(self.rng.integers(0, 120))
        keys = np.arange(self.next_key, self.next_key + count, dtype=np.uint64)
        self.next_key += count
        both = [tier.allocate(count) for tier in (self.near, self.far)]
        for tier, places in zip((self.near, self.far), both, strict=True):
            tier.create(keys, places, UNIFORM, SEED)
            tier.slots.create(keys, places)
        self.places = np.concatenate([self.places, np.stack(both, axis=1)])

    def push(self) -> None:
        some, self.version = self.some(), self.version + 1
        size = 10.0 ** float(self.rng.integers(-30, 2))
        gradients = (self.rng.standard_normal((len(some), self.dim)) * size).astype(np.float32)
        counts = self.rng.integers(1, 9, len(some)).astype(np.uint32)
        for k, tier in enumerate((self.near, self.far)):
            given = gradients.copy()
            rows = np.ascontiguousarray(some[:, k])
            push(tier, rows, given, counts, self.optimizer, 0.01, self.version, self.version)
            given[:] = np.nan  # a tier must not look at it later

    def read(self) -> None:
        some = self.some()
        some[::3] = ABSENT

        def read(tier: Writable, places: Any) -> Any:
            out = np.full((len(places), self.dim), 7, np.float32)
            tier.gather(np.ascontiguousarray(places), out)
            return (out,)

        self.same(read, some)

    def write(self) -> None:
        some, self.old = self.some(), None
        n = len(some)
        rows = self.rng.standard_normal((n, self.width)).astype(np.float32)
        keys = self.near.meta(some[:, 0])[:, 0].copy()
        versions = self.rng.integers(0, self.version + 2, n).astype(np.uint64)
        numbers = self.rng.integers(0, 99, n)
        images = Images(keys, versions, numbers, numbers.astype(np.uint64), abs(rows))
        for k, tier in enumerate((self.near, self.far)):
            put(tier, np.ascontiguousarray(some[:, k]), images)

    def leave(self) -> None:
        chosen = self.rng.random(len(self.places)) < 0.1
        for k, tier in enumerate((self.near, self.far)):
            tier.release(np.ascontiguousarray(self.places[chosen, k]))
        self.places = self.places[~chosen]

    def move(self) -> None:
        self.near.stir(self.rng)

    def look_back(self) -> None:
        """Compare rows that were not changed since the scans were created, whatever moved."""
        near, far, version = self.old or (None, None, 0)
        self.old = self.near.scan(), self.far.scan(), self.version
        if near is None or not len(self.places):
            return
        n, found = len(self.places), []
        for k, scan in enumerate((near, far)):
            rows, frequencies = np.empty((n, self.width), np.float32), np.empty(n, np.uint64)
            meta = scan.copy(np.ascontiguousarray(self.places[:, k]), frequencies, rows)
            same = meta[:, 1] <= version
            found.append((meta[same].tobytes(), frequencies[same].tobytes(), rows[same].tobytes()))
        assert found[0] == found[1]

    def examine(self) -> None:
        def read(tier: Writable, places: Any) -> Any:
            places = np.ascontiguousarray(places)
            scan, n = tier.scan(), len(places)
            rows, frequencies = np.empty((n, self.width), np.float32), np.empty(n, np.uint64)
            out = np.empty((n, self.dim), np.float32)
            meta = scan.copy(places, frequencies, rows)
            scan.read(places, out)
            return rows, frequencies, out, meta, np.array([tier.largest(places)])

        self.same(read, self.some())

    def run(self, rounds: int) -> None:
        verbs = (self.create, self.push, self.push, self.push, self.read, self.write)
        every = (*verbs, self.leave, self.examine, self.move, self.move, self.look_back)
        self.create()
        for choice in self.rng.integers(0, len(every), rounds):
            every[choice]()
        self.same(lambda tier, places: dump(tier, places, self.width), self.places)


EXACT = [(n, p) for n, p in CASES if exact(make_optimizer(n, None, p))]


@pytest.mark.quick(8)
@needs_compiler
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "parameters"), EXACT)
def test_random_operations_give_the_bits_of_host_memory(
    name: str, parameters: dict[str, float], mode: str
) -> None:
    optimizer = make_optimizer(name, None, parameters)
    for dim in DIMS:
        Twins(FakeDevice(mode, seed=dim), optimizer, dim, seed=dim).run(40)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "parameters"), EXACT)
def test_random_operations_on_a_gpu_give_the_bits_of_host_memory(
    gpu: CudaDevice, name: str, parameters: dict[str, float]
) -> None:
    optimizer = make_optimizer(name, None, parameters)
    for dim in DIMS:
        Twins(gpu, optimizer, dim, seed=dim).run(100)


LEND, KEPT = Staging.lend, list[Any]()


def lend_without_waiting(self: Staging, *sizes: int) -> Any:
    """Lend memory that a kernel still needs; but not its slots, without which it would crash."""
    KEPT.append(self._blocks[self._turn])
    self._marks[self._turn] = None
    KEPT.append(np.empty(sizes[0], np.uint8))
    return [KEPT[-1], *LEND(self, *sizes)[1:]]


def read_without_waiting(unread: Any, out: Any) -> None:
    _, some, rows = unread.pop(0)
    out[some] = rows


class NeverFollows:
    """A device whose queues do not wait for others."""

    def __init__(self, device: FakeDevice) -> None:
        self._device = device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)

    def queue(self) -> Any:
        queue = self._device.queue()
        queue.follow = lambda mark: None  # type: ignore[method-assign]
        return queue


def found(device: Any, rounds: int = 100) -> bool:
    """Return whether random operations see a fault."""
    try:
        for dim in (3, 32):
            Twins(device, make_optimizer("adagrad", None, {}), dim, seed=dim).run(rounds)
    except AssertionError:
        return True
    return False


@needs_compiler
@pytest.mark.parametrize("mode", ["late", "random"])
class TestFaults:
    def test_no_fault_is_no_failure(self, mode: str) -> None:
        assert not found(FakeDevice(mode))

    def test_reusing_page_locked_memory_too_early_is_seen(
        self, mode: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(staging.Staging, "lend", lend_without_waiting)
        assert found(FakeDevice(mode))

    def test_reading_rows_before_the_kernel_ended_is_seen(
        self, mode: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(slab, "_finish", read_without_waiting)
        assert found(FakeDevice(mode))

    def test_a_move_that_mixes_rows_up_is_seen(
        self, mode: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        move = LiftedTier._move

        def mix(self: LiftedTier, up: Any, down: Any) -> None:
            move(self, up, down)
            self._where.array[up, 0] = np.roll(self._where.array[up, 0], 1)  # of another row

        monkeypatch.setattr(LiftedTier, "_move", mix)
        assert found(FakeDevice(mode))

    def test_a_move_that_does_not_wait_is_seen(
        self, mode: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        move = LiftedTier._move

        def hurry(self: LiftedTier, up: Any, down: Any) -> None:
            with mock.patch.object(staging.Staging, "finish", return_value=None):
                move(self, up, down)

        monkeypatch.setattr(LiftedTier, "_move", hurry)
        assert found(FakeDevice(mode), rounds=300)

    def test_a_scan_that_does_not_follow_the_engine_is_seen(self, mode: str) -> None:
        assert found(NeverFollows(FakeDevice(mode)), rounds=300)


def filled(device: FakeDevice, rows: int, **more: Any) -> tuple[LiftedTier, Any]:
    """A tier of dim 3 with pushed rows in host memory, and their slots."""
    tier = tier_on(device, Budget(1 << 30), DIM, STATE, 0.0, **more)
    places = create(tier, np.arange(rows, dtype=np.uint64))
    zero, sgd = np.zeros((rows, DIM), np.float32), make_optimizer("sgd", None, {})
    push(tier, places, zero, np.ones(rows, np.uint32), sgd, 1.0, 1, 1)
    return tier, places


@needs_compiler
class TestMemory:
    def test_a_full_gpu_pauses_moves_and_everything_else_goes_on(self) -> None:
        device = FakeDevice("late", limit=3 * PIECE + 1024)
        full: list[str] = []
        tier, places = filled(device, 20_000, on_pause=full.append)
        wanted = dump(tier, places)[0]
        tier.move(places[:100], NONE)
        before = tier.rows, tier.bytes, tier.hbm_rows, device.held
        with pytest.raises(OutOfMemory, match=r"^GPU memory is full: .* has 512 bytes free"):
            tier.move(places[100:], NONE)
        assert (tier.rows, tier.bytes, tier.hbm_rows, device.held) == before
        assert full
        assert not tier.gpu.promotes
        assert tier.hbm_room() == PIECE // 32
        assert dump(tier, places)[0].tobytes() == wanted.tobytes()
        tier.move(places[100:200], places[:100])
        assert (tier.hbm_rows, device.held) == before[2:]
        assert tier.in_hbm(places[:200]).tolist() == [False] * 100 + [True] * 100
        device.limit += PIECE
        tier.move(places[1000 : 1000 + PIECE // 32], NONE)
        assert tier.gpu.promotes
        assert dump(tier, places)[0].tobytes() == wanted.tobytes()

    def test_the_budget_of_gpu_memory_limits_rows_alone(self) -> None:
        device = FakeDevice("late")
        tier, places = filled(device, 5 * PIECE // 32, limit=2 * PIECE)
        assert tier.hbm_room() == 2 * PIECE // 32
        tier.move(places[: tier.hbm_room()], NONE)
        assert tier.gpu.budget.held == tier.hbm_bytes == 2 * PIECE
        with pytest.raises(OutOfMemory, match=r"^no GPU memory: .* of the memory budget"):
            tier.move(places[tier.hbm_room() :][:1], NONE)
        assert tier.gpu.promotes
        assert create(tier, np.arange(10**6, 10**6 + 9, dtype=np.uint64)).tolist()
        tier.close()
        assert tier.gpu.budget.held == 0

    def test_a_full_host_keeps_rows_in_the_gpu(self) -> None:
        tier, places = filled(FakeDevice("early"), 50_000)
        tier.move(places, NONE)
        create(tier, np.arange(10**6, 10**6 + 50_000, dtype=np.uint64))  # in their old places
        wanted, budget = dump(tier, places), tier.budget
        budget.limit = budget.held
        with pytest.raises(OutOfMemory):
            tier.move(NONE, places)
        assert tier.hbm_rows == 50_000
        for a, b in zip(wanted, dump(tier, places), strict=True):
            assert a.tobytes() == b.tobytes()

    def test_rows_in_the_gpu_leave_room_for_others_in_host_memory(self) -> None:
        tier, places = filled(FakeDevice("early"), 50_000)
        tier.budget.limit = tier.budget.held + 60_000 * 48
        before = tier.room(tier.budget.free)
        tier.move(places, NONE)
        assert tier.room(tier.budget.free) >= before + 10_000
        fits = tier.room(tier.budget.free - (1 << 20))
        assert tier.cost(fits) <= tier.budget.free
        create(tier, np.arange(10**6, 10**6 + fits, dtype=np.uint64))

    def test_memory_of_rows_that_moved_is_given_back(self) -> None:
        device = FakeDevice("random")
        tier, places = filled(device, 50_000)
        wanted, before = dump(tier, places)[0], tier.bytes
        up = np.ascontiguousarray(places[::2])
        tier.move(up, NONE)
        tier.compact(1 << 30)
        assert tier.bytes <= before - 25_000 * 4 * WIDTH
        assert dump(tier, places)[0].tobytes() == wanted.tobytes()
        tier.move(NONE, np.ascontiguousarray(up[1000:]))
        while tier.hbm_unused:
            tier.shrink_hbm()
        assert tier.hbm_rows == 1000
        assert tier.hbm_bytes == PIECE
        assert dump(tier, places)[0].tobytes() == wanted.tobytes()

    def test_rows_do_not_move_while_another_thread_copies_them(self) -> None:
        tier, places = filled(FakeDevice("early"), 1000)
        with tier.still():
            assert not tier.move(places, NONE)
            tier.compact(1 << 30)
        assert tier.hbm_rows == 0
        assert tier.move(places, NONE)

    def test_no_verb_takes_page_locked_memory(self) -> None:
        device = FakeDevice("late")
        tier, places = filled(device, 9000, part=slab.PART)
        scan, pinned = tier.scan(), device.pinned

        def full(size: int) -> Any:
            raise OutOfDeviceMemory(size, 0, "page-locked memory of the host")

        device.pinned = full  # type: ignore[method-assign]
        tier.move(places, NONE)
        rows, meta = dump(tier, places)
        scan.copy(places, np.empty(9000, np.uint64), np.empty_like(rows))
        sgd = make_optimizer("sgd", None, {})
        push(tier, places, rows[:, :DIM].copy(), np.ones(9000, np.uint32), sgd, 1.0, 2, 2)
        put(
            tier, places, Images(meta[:, 0].copy(), meta[:, 1] + 9, places, meta[:, 3].copy(), rows)
        )
        assert tier.largest(places) > 0
        assert tier.norms(places).max() > 0
        device.pinned = pinned  # type: ignore[method-assign]

    def test_a_scan_of_rows_that_were_cut_finds_them_deleted(self) -> None:
        device = FakeDevice("late")
        tier, places = filled(device, 5000)
        tier.move(places, NONE)
        scan = tier.scan()
        tier.release(places)
        tier.cut(0)
        tier.compact(1 << 30)
        tier.shrink_hbm()
        create(tier, np.arange(9, dtype=np.uint64))
        rows, norms = np.empty((5000, WIDTH), np.float32), np.empty(5000)
        assert not scan.copy(places, np.empty(5000, np.uint64), rows)[:, 1].any()
        assert not scan.measure(places, norms)[:, 1].any()
        del scan
        tier.close()
        gc.collect()
        assert tier.budget.held == 0
        assert device.held == 0

    def test_a_scan_of_a_closed_tier_finds_all_rows_deleted(self) -> None:
        device = FakeDevice("random")
        tier, places = filled(device, 500)
        scan, look = tier.scan(), tier.look()
        tier.move(places[::2].copy(), NONE)
        tier.close()
        for each in (scan, look):
            rows, norms = np.empty((500, WIDTH), np.float32), np.empty(500)
            assert not each.copy(places, np.empty(500, np.uint64), rows).any()
            assert not each.measure(places, norms).any()
        del scan, look, each
        gc.collect()
        assert tier.budget.held == 0
        assert device.held == 0

    def test_a_scan_that_is_dropped_unread_leaves_no_kernel_behind(self) -> None:
        device = FakeDevice("late")
        tier = tier_on(device, Budget(1 << 30), DIM, STATE)
        create(tier, np.arange(50, dtype=np.uint64))
        given = device.launches
        scan = tier.scan()
        assert device.launches == given  # a kernel would use memory that is freed now
        del scan
        for queue in device.queues:
            queue.run_to(queue.given)

    def test_a_slab_whose_table_has_no_room_is_as_before(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(slab, "LEAST_TABLE", 1)
        device = FakeDevice("late")
        tier, places = filled(device, 4 * PIECE // 32)
        tier.move(places[:100], NONE)
        wanted, before = dump(tier, places)[0], (tier.hbm_rows, tier.hbm_bytes, device.held)

        def full(size: int) -> Any:
            raise OutOfDeviceMemory(size, 0, "page-locked memory of the host")

        device.limit = device.held + 3 * PIECE  # pieces, but no table
        device.pinned, pinned = full, device.pinned  # type: ignore[method-assign]
        with pytest.raises(OutOfMemory, match=r"^page-locked memory of the host is full: "):
            tier.move(places[100:], NONE)
        gc.collect()
        assert (tier.hbm_rows, tier.hbm_bytes, device.held) == before
        device.pinned = pinned  # type: ignore[method-assign]
        tier.move(places[100:], NONE)
        assert dump(tier, places)[0].tobytes() == wanted.tobytes()

    def test_many_scans_leave_no_memory_behind(self) -> None:
        device = FakeDevice("random")
        tier = tier_on(device, Budget(1 << 30), DIM, STATE)
        tier.create(np.arange(50, dtype=np.uint64), tier.allocate(50), UNIFORM, SEED)
        tier.scan().read(np.arange(50), np.empty((50, DIM), np.float32))
        gc.collect()
        held, pinned = device.held, device.pinned_bytes
        for _ in range(20):
            tier.scan().read(np.arange(50), np.empty((50, DIM), np.float32))
        gc.collect()
        assert (device.held, device.pinned_bytes) == (held, pinned)

    @pytest.mark.parametrize("dim", [1, 32, 300_000])
    def test_page_locked_memory_is_bounded(self, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(slab, "PART", 1 << 18)
        monkeypatch.setattr(slab, "SCAN_PART", 1 << 15)
        device, count = FakeDevice("early"), max(3, (3 << 18) // (8 + 4 * dim))
        tier = tier_on(device, Budget(1 << 30), dim, np.empty(0, np.float32), part=1)
        places, at_first = tier.allocate(count), device.pinned_bytes
        for _ in range(2):
            tier.scatter(places, np.zeros((count, dim), np.float32))
        engine = device.pinned_bytes
        assert engine - at_first <= 2 * max(slab.PART, 4 * dim + 8) + 4096
        scan = tier.scan()
        scan.read(places, np.empty((count, dim), np.float32))
        assert device.pinned_bytes - engine <= 2 * max(slab.SCAN_PART, 4 * dim + 8) + 4096

    @pytest.mark.parametrize("width", [1, 32, 36, 50, 132, 200, 1000, 5_000_000])
    def test_a_piece_takes_the_memory_that_is_counted(self, width: int) -> None:
        rows = slab.Slab(width, Staging(FakeDevice("late")), Budget(1 << 30))
        used = 4 * rows.stride << rows._shift
        assert rows.piece_bytes % (2 << 20) == 0
        assert used <= rows.piece_bytes <= used * 9 // 8
        assert rows.piece_bytes <= max(32 << 20, used * 9 // 8)


@needs_compiler
def test_a_batch_larger_than_page_locked_memory_goes_in_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(slab, "PART", 1000)  # bytes
    for mode in MODES:
        for name in ("sgd", "adam"):
            Twins(FakeDevice(mode), make_optimizer(name, None, {}), 8, seed=3).run(100)
