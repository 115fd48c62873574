"""Rows in GPU memory: the contract of a tier, and the same bits as in host memory.

The tier runs on the fake device, which runs the real kernels late, early and in random order.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest
from cases import CASES, DIMS, exact
from cpukernels import compiler
from fakedevice import MODES, FakeDevice
from lifted import LiftedTier, tier_on
from twins import Twins

from storage.arena import Budget
from storage.gpu import slab, staging
from storage.gpu.cuda import CudaDevice
from storage.gpu.device import NoDevice
from storage.gpu.staging import Staging
from storage.optimizers import make_optimizer
from storage.tiers.base import Writable
from tests.storage.test_tiers import WritableContract

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
