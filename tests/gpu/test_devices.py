"""The contract of a device, over the fake one and over a GPU; and steps on a GPU, bit for bit."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
from cases import CASES, DIMS, agree, batches, first_rows
from cpukernels import compiler
from fakedevice import MODES, FakeDevice

from storage.arena import Budget
from storage.gpu import slab as slab_module
from storage.gpu.cuda import CudaDevice
from storage.gpu.device import Device, NoDevice, OutOfDeviceMemory, Queue, address
from storage.gpu.source import kernel_name, kernel_numbers
from storage.gpu.staging import Staging
from storage.optimizers import make_optimizer

SHIFT = 3  # pieces of 8 rows


def numbers(device: Device, count: int) -> Any:
    return device.pinned(4 * count).view(np.float32)


class Rows:
    """Rows in device memory, in pieces."""

    def __init__(
        self, device: Device, queue: Queue, capacity: int, width: int, shift: int = SHIFT
    ) -> None:
        self.queue, self.device, self.shift = queue, device, shift
        self.stride = -(-width // 4) * 4
        size = 4 * self.stride << shift
        self.pieces = [device.memory(size) for _ in range(-(-capacity >> shift))]
        self.table = device.memory(8 * len(self.pieces))
        known = device.pinned(8 * len(self.pieces)).view(np.uint64)
        known[:] = [piece.address for piece in self.pieces]
        whole = np.uint64(self.table.address), np.int64(len(known)), np.int64(0), address(known)
        queue.run("add_pieces", len(known), *whole)
        queue.mark().wait()

    def run(self, kernel: str, slots: Any, count: int, *more: Any) -> Any:
        """Run a kernel over slots; return the host memory that it uses until it is done."""
        there = self.device.pinned(8 * len(slots)).view(np.int64)
        there[:] = slots
        head = np.uint64(self.table.address), np.int32(self.shift), np.int64(self.stride)
        rows = address(there), np.int64(len(there)), np.int32(count)
        self.queue.run(kernel, len(there), *head, *rows, *more)
        return there

    def write(self, slots: Any, rows: Any) -> None:
        memory = numbers(self.device, rows.size)
        memory[:] = rows.ravel()
        held = self.run("scatter", slots, rows.shape[1], address(memory))
        self.queue.mark().wait()
        del held

    def read(self, slots: Any, count: int) -> Any:
        memory = numbers(self.device, len(slots) * count)
        held = self.run("gather", slots, count, address(memory))
        self.queue.mark().wait()
        del held
        return memory.reshape(-1, count).copy()


class DeviceContract:
    def test_rows_come_back_as_they_were_written(self, device: Device) -> None:
        rows = np.random.default_rng(1).standard_normal((100, 33)).astype(np.float32)
        slots = np.random.default_rng(2).permutation(100)
        slab = Rows(device, device.queue(), 100, 33)
        slab.write(slots, rows)
        assert slab.read(slots[::-1], 33).tobytes() == rows[::-1].tobytes()
        assert slab.read(slots, 5).tobytes() == np.ascontiguousarray(rows[:, :5]).tobytes()

    def test_no_rows_are_no_launch(self, device: Device) -> None:
        slab = Rows(device, device.queue(), 8, 4)
        assert slab.read(np.empty(0, np.int64), 4).shape == (0, 4)

    def test_a_queue_that_follows_a_mark_sees_what_came_before_it(self, device: Device) -> None:
        first, second = device.queue(), device.queue()
        slab = Rows(device, first, 4096, 64)
        slots = np.arange(4096)
        for value in range(30):
            memory = numbers(device, 4096 * 64)
            memory[:] = value
            slab.queue = first
            held = slab.run("scatter", slots, 64, address(memory))
            second.follow(first.mark())
            slab.queue = second
            assert (slab.read(slots, 64) == value).all()
            del held

    def test_memory_that_is_too_large_is_refused_and_the_rest_goes_on(self, device: Device) -> None:
        with pytest.raises(OutOfDeviceMemory, match="GPU memory is full"):
            device.memory(1 << 45)
        slab = Rows(device, device.queue(), 8, 4)
        slab.write(np.arange(8), np.ones((8, 4), np.float32))
        assert (slab.read(np.arange(8), 4) == 1).all()

    def test_forgotten_memory_is_free_again(self, device: Device) -> None:
        gc.collect()
        before = device.free
        memory = device.memory(64 << 20)
        assert device.free <= before - (64 << 20)
        del memory
        gc.collect()
        assert device.free >= before


@pytest.mark.skipif(compiler() is None, reason="no g++ to compile the CUDA kernels")
class TestFakeDevice(DeviceContract):
    @pytest.fixture(params=MODES)
    def device(self, request: pytest.FixtureRequest) -> Device:
        return FakeDevice(request.param)

    def test_no_rows_are_no_launch(self, device: FakeDevice) -> None:
        slab = Rows(device, device.queue(), 8, 4)
        before = device.launches
        assert slab.read(np.empty(0, np.int64), 4).shape == (0, 4)
        assert device.launches == before

    def test_page_locked_memory_freed_before_the_mark_gives_wrong_rows(self) -> None:
        device = FakeDevice("late")
        slab, memory = Rows(device, device.queue(), 8, 4), numbers(device, 32)
        memory[:] = 1
        held = slab.run("scatter", np.arange(8), 4, address(memory))
        del memory  # without a wait
        assert np.isnan(slab.read(np.arange(8), 4)).all()
        del held

    @pytest.mark.parametrize("mode", ["late", "random"])
    def test_host_memory_reused_before_the_mark_gives_wrong_rows(self, mode: str) -> None:
        device = FakeDevice(mode)
        slab, memory = Rows(device, device.queue(), 100, 4), numbers(device, 4)
        held = []
        for slot in range(100):
            memory[:] = slot  # without a wait
            held.append(slab.run("scatter", np.array([slot]), 4, address(memory)))
        wanted = np.repeat(np.arange(100, dtype=np.float32), 4).reshape(100, 4)
        assert not np.array_equal(slab.read(np.arange(100), 4), wanted)

    @pytest.mark.parametrize("mode", ["late", "random"])
    def test_rows_read_before_the_mark_are_nan(self, mode: str) -> None:
        device = FakeDevice(mode, seed=4)
        slab = Rows(device, device.queue(), 100, 4)
        slab.write(np.arange(100), np.ones((100, 4), np.float32))
        early = []
        for _ in range(20):
            memory = numbers(device, 400)
            held = slab.run("gather", np.arange(100), 4, address(memory))
            early.append(np.isnan(memory).any())
            del held
        assert any(early)

    @pytest.mark.parametrize("mode", ["late", "random"])
    def test_a_queue_that_does_not_follow_sees_old_rows(self, mode: str) -> None:
        device = FakeDevice(mode)
        first, second = device.queue(), device.queue()
        slab, old = Rows(device, first, 8, 4), 0
        for value in range(20):
            memory = numbers(device, 32)
            memory[:] = value
            slab.queue = first
            held = slab.run("scatter", np.arange(8), 4, address(memory))
            slab.queue = second
            old += not (slab.read(np.arange(8), 4) == value).all()
            first.mark().wait()
            del held
        assert old

    def test_new_device_memory_is_nan(self) -> None:
        device = FakeDevice("early")
        slab = Rows(device, device.queue(), 8, 4)
        assert np.isnan(slab.read(np.arange(8), 4)).all()


@pytest.fixture(scope="module")
def gpu() -> CudaDevice:
    try:
        device = CudaDevice()
    except NoDevice as error:
        pytest.skip(f"no GPU: {error}")
    return device


@pytest.mark.gpu
class TestCudaDevice(DeviceContract):
    @pytest.fixture
    def device(self, gpu: CudaDevice) -> Device:
        return gpu

    @pytest.mark.parametrize("dim", DIMS)
    @pytest.mark.parametrize(("name", "parameters"), CASES)
    def test_a_step_has_the_bits_of_the_cpu(
        self, device: Device, name: str, parameters: dict[str, float], dim: int
    ) -> None:
        optimizer = make_optimizer(name, None, parameters)
        host = first_rows(optimizer, dim)
        every = np.arange(len(host))
        slab = Rows(device, device.queue(), *host.shape)
        slab.write(every, host)
        for slots, gradients, step in batches(dim):
            optimizer.step(host, slots, gradients, optimizer.lr, step)
            there = numbers(device, gradients.size)
            there[:] = gradients.ravel()
            own = kernel_numbers(optimizer, optimizer.lr, step, dim)
            held = slab.run(kernel_name(optimizer.kernel), slots, dim, address(there), *own)
            slab.queue.mark().wait()
            del held
        got = slab.read(every, host.shape[1])
        differ = np.flatnonzero((got.view(np.int32) != host.view(np.int32)).any(axis=0))
        assert agree(optimizer, got, host), f"columns {differ.tolist()} differ"

    def test_rows_beyond_2_31_numbers_have_a_place(self, device: Device) -> None:
        slab, slots = (
            Rows(device, device.queue(), 1 << 21, 1028, 21),
            np.array([0, 1, (1 << 21) - 1]),
        )
        rows = np.random.default_rng(1).standard_normal((3, 1028)).astype(np.float32)
        slab.write(slots, rows)
        assert slab.stride * int(slots[-1]) > 1 << 31
        assert slab.read(slots, 1028).tobytes() == rows.tobytes()

    @pytest.mark.parametrize("width", [32, 36, 50, 132])
    def test_pieces_take_the_memory_that_is_counted(self, device: Device, width: int) -> None:
        gc.collect()
        slab = slab_module.Slab(width, Staging(device), Budget(1 << 30))
        slab.grow(1)
        before = device.free
        slab.grow(20 * slab.rows)
        assert abs(before - device.free - slab.bytes * 19 // 20) <= 2 << 20

    def test_norms_are_those_of_the_host_up_to_one_rounding(self, device: Device) -> None:
        rows = np.random.default_rng(1).standard_normal((1000, 33)).astype(np.float32)
        slab, norms = Rows(device, device.queue(), *rows.shape), device.pinned(8000)
        slab.write(np.arange(1000), rows)
        held = slab.run("measure", np.arange(1000), 33, address(norms))
        slab.queue.mark().wait()
        del held
        exact = np.linalg.norm(rows.astype(np.float64), axis=1)
        np.testing.assert_allclose(norms.view(np.float64), exact, rtol=2e-7)


def test_without_a_gpu_the_refusal_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cupy", None)  # import fails
    with pytest.raises(NoDevice, match=r"cannot import CuPy .*pip install 'embedding-ps\[gpu13\]'"):
        CudaDevice()
