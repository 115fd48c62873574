"""The memory of rows in a GPU, and of their moves: bounds, and what is given back."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
from cpukernels import compiler
from fakedevice import MODES, FakeDevice
from lifted import NONE, PIECE, LiftedTier, tier_on
from twins import Twins

from storage.arena import Budget
from storage.errors import OutOfMemory
from storage.gpu import slab
from storage.gpu.device import OutOfDeviceMemory
from storage.gpu.staging import Staging
from storage.kernels import Images
from storage.optimizers import make_optimizer
from tests.storage.test_tiers import DIM, SEED, STATE, UNIFORM, WIDTH, create, dump, push, put

needs_compiler = pytest.mark.skipif(compiler() is None, reason="no g++ to compile the CUDA kernels")


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
