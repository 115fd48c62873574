"""Rows in GPU memory: the contract of a tier, and the same bits as in host memory.

The tier runs on the fake device, which runs the real kernels late, early and in random order.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cases import CASES, DIMS, exact
from cpukernels import compiler
from fakedevice import MODES, FakeDevice

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
from storage.tiers.hbm import HbmTier
from storage.tiers.host import HostTier
from tests.storage.test_tiers import DIM, SEED, STATE, UNIFORM, WritableContract, dump, push, put

PIECE = 1 << 16  # bytes
needs_compiler = pytest.mark.skipif(compiler() is None, reason="no g++ to compile the CUDA kernels")


def tier_on(device: Device, budget: Budget, dim: int, state: Any) -> HbmTier:
    return HbmTier(dim, state, budget, budget, Staging(device), PIECE)


@pytest.fixture(scope="module")
def gpu() -> CudaDevice:
    try:
        return CudaDevice()
    except NoDevice as error:
        pytest.skip(f"no GPU: {error}")


@needs_compiler
class TestLateDevice(WritableContract):
    mode = "late"

    def make(self, budget: Budget, dim: int, state: np.ndarray) -> Writable:
        return tier_on(FakeDevice(self.mode), budget, dim, state)


class TestEarlyDevice(TestLateDevice):
    mode = "early"


class TestRandomDevice(TestLateDevice):
    mode = "random"


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
        self.near = tier_on(device, Budget(1 << 30), dim, state)
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
        some = self.some()
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
        every = (*verbs, self.leave, self.examine)
        self.create()
        for choice in self.rng.integers(0, len(every), rounds):
            every[choice]()
        self.same(lambda tier, places: dump(tier, places, self.width), self.places)


EXACT = [(n, p) for n, p in CASES if exact(make_optimizer(n, None, p))]


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

    def test_a_scan_that_does_not_follow_the_engine_is_seen(self, mode: str) -> None:
        assert found(NeverFollows(FakeDevice(mode)), rounds=300)


@needs_compiler
class TestMemory:
    def test_a_full_gpu_refuses_rows_and_everything_else_goes_on(self) -> None:
        device = FakeDevice("late", limit=3 * PIECE + 1024)
        tier = HbmTier(3, STATE, Budget(1 << 30), Budget(1 << 30), Staging(device), PIECE)
        places = tier.allocate(100)
        keys = np.arange(100, dtype=np.uint64)
        tier.create(keys, places, UNIFORM, SEED)
        before = tier.rows, tier.bytes, device.held
        with pytest.raises(OutOfMemory, match=r"^GPU memory is full: .* has 512 bytes free"):
            tier.allocate(100_000)
        assert (tier.rows, tier.bytes, device.held) == before
        assert np.isfinite(dump(tier, places)[0]).all()
        tier.allocate(3 * PIECE // 32 - 100)

    def test_the_budget_of_gpu_memory_limits_rows_alone(self) -> None:
        device, room = FakeDevice("late"), Budget(2 * PIECE)
        tier = HbmTier(3, STATE, Budget(1 << 30), room, Staging(device), PIECE)
        tier.allocate(2 * PIECE // 32)
        assert room.held == 2 * PIECE
        with pytest.raises(OutOfMemory, match=r"^no GPU memory: .* of the memory budget"):
            tier.allocate(1)
        tier.close()
        assert room.held == 0

    def test_a_scan_keeps_the_memory_of_rows_that_are_cut(self) -> None:
        device, budget = FakeDevice("late"), Budget(1 << 30)
        tier = tier_on(device, budget, DIM, STATE)
        keys = np.arange(5000, dtype=np.uint64)
        places = tier.allocate(5000)
        tier.create(keys, places, UNIFORM, SEED)
        tier.slots.create(keys, places)
        wanted = dump(tier, places)[0]
        scan = tier.scan()
        tier.release(places)
        tier.cut(0)
        tier.create(keys[:9], tier.allocate(9), UNIFORM, SEED + 1)
        rows = np.empty_like(wanted)
        meta = scan.copy(places, np.empty(5000, np.uint64), rows)
        assert rows.tobytes() == wanted.tobytes()
        assert not meta[9:].any()
        del scan
        tier.close()
        gc.collect()
        assert budget.held == 0
        assert device.held == 0

    def test_a_scan_that_is_dropped_unread_leaves_no_kernel_behind(self) -> None:
        device = FakeDevice("late")
        tier = tier_on(device, Budget(1 << 30), DIM, STATE)
        tier.create(np.arange(50, dtype=np.uint64), tier.allocate(50), UNIFORM, SEED)
        device.queues[0].run_to(device.queues[0].given)
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
        device, budget = FakeDevice("late"), Budget(1 << 30)
        tier = tier_on(device, budget, 3, STATE)
        places, keys = tier.allocate(100), np.arange(100, dtype=np.uint64)
        tier.create(keys, places, UNIFORM, SEED)
        wanted, before = dump(tier, places)[0], (tier.rows, tier.bytes, device.held)

        def full(size: int) -> Any:
            raise OutOfDeviceMemory(size, 0, "page-locked memory of the host")

        device.limit = device.held + 3 * PIECE  # pieces, but no table
        device.pinned, pinned = full, device.pinned  # type: ignore[method-assign]
        with pytest.raises(OutOfMemory, match=r"^page-locked memory of the host is full: "):
            tier.allocate(4 * PIECE // 32 - 100)
        gc.collect()
        assert (tier.rows, tier.bytes, device.held) == before
        device.pinned = pinned  # type: ignore[method-assign]
        tier.allocate(4 * PIECE // 32 - 100)
        assert dump(tier, places)[0].tobytes() == wanted.tobytes()

    @pytest.mark.parametrize("dim", [3, 10_000])
    def test_new_rows_take_little_memory_of_the_host(
        self, dim: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        part, sizes = 1 << 16, list[int]()
        monkeypatch.setattr(slab, "PART", part)
        monkeypatch.setattr(slab.Slab, "scatter", lambda _, slots, rows: sizes.append(rows.nbytes))
        tier = tier_on(FakeDevice("late"), Budget(1 << 30), dim, STATE)
        keys, width = np.arange(9000 if dim == 3 else 20, dtype=np.uint64), dim + len(STATE)
        tier.create(keys, tier.allocate(len(keys)), UNIFORM, SEED)
        assert sum(sizes) == 4 * width * len(keys)
        assert max(sizes) <= max(part, 4 * width)

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
        tier = tier_on(device, Budget(1 << 30), dim, np.empty(0, np.float32))
        places = tier.allocate(count)
        for _ in range(2):
            tier.scatter(places, np.zeros((count, dim), np.float32))
        engine = device.pinned_bytes
        assert engine <= 2 * max(slab.PART, 4 * dim + 8) + 4096
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
