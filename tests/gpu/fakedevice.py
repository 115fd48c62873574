"""A device without a GPU: it runs the same kernels on this CPU, as late or as early as a GPU may.

late    a queue runs nothing before somebody waits for it. Host memory that is read too early is
        NaN; host memory that is reused too early gives the kernel wrong numbers
early   a queue runs everything at once, so that what must come later is found to be too early
random  at each call, one of the queues runs some of what it was given

Device memory is NaN at first, has pages before and after it that cannot be touched, and cannot be
touched when it is freed. Page-locked memory is NaN at first, and again when it is freed.
"""

from __future__ import annotations

import ctypes
import mmap
import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from cpukernels import CpuKernels, cpu_kernels

from storage.gpu.device import Mark, Number, OutOfDeviceMemory
from storage.gpu.source import BLOCK, LANES
from storage.optimizers import step_kernels

MODES = ("late", "early", "random")
PAGE = mmap.PAGESIZE
NO_ACCESS = 0  # PROT_NONE
_libc = ctypes.CDLL(None, use_errno=True)


class FakeMemory:
    def __init__(self, size: int, device: FakeDevice) -> None:
        self._size, self._device = size, device
        whole = -(-size // PAGE) * PAGE
        self._map = mmap.mmap(-1, whole + 2 * PAGE)
        first = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        ctypes.memset(first + PAGE, 0xFF, whole)
        for guard in (first, first + PAGE + whole):
            done = _libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(PAGE), NO_ACCESS)
            assert done == 0
        self.address = first + PAGE + (whole - size) // 256 * 256  # ends next to a guard
        device.held += size

    def __del__(self) -> None:
        self._device.held -= self._size


class FakePinned:
    """Memory of a numpy array, which is garbage when the array and all its views are."""

    def __init__(self, size: int, device: FakeDevice) -> None:
        self._size, self._device = size, device
        self._whole = np.full(size + 256, 0xFF, np.uint8)
        start = -self._whole.ctypes.data % 256
        self.__array_interface__ = self._whole[start : start + size].__array_interface__
        device.pinned_bytes += size

    def __del__(self) -> None:
        self._whole[:] = 0xFF
        self._device.pinned_bytes -= self._size
        self._device.freed.append(self._whole)  # kernels that have not run yet may use it


class FakeMark:
    def __init__(self, queue: FakeQueue) -> None:
        self._queue, self._at = queue, queue.given

    def wait(self) -> None:
        self._queue.run_to(self._at)


class FakeQueue:
    def __init__(self, device: FakeDevice) -> None:
        self._device, self._work = device, list[Callable[[], None]]()
        self.given = self.done = 0
        device.queues.append(self)

    def run(self, kernel: str, rows: int, *arguments: Number) -> None:
        if rows:
            blocks = -(-rows * LANES // BLOCK)
            self._give(lambda: self._device.kernels.launch(kernel, blocks, BLOCK, arguments))
            self._device.launches += 1

    def mark(self) -> FakeMark:
        return FakeMark(self)

    def follow(self, mark: Mark) -> None:
        self._give(mark.wait)

    def _give(self, work: Callable[[], None]) -> None:
        with self._device.lock:
            self._work.append(work)
            self.given += 1
            self._device.progress()

    def run_to(self, end: int) -> None:
        with self._device.lock:
            while self.done < end:
                self.done += 1
                self._work.pop(0)()


class FakeDevice:
    """See device.Device.

    mode          see above
    limit         bytes of device memory
    held          bytes of device memory that are in use
    pinned_bytes  bytes of page-locked memory that are in use
    launches      number of kernels that queues were given
    """

    def __init__(self, mode: str, limit: int = 1 << 30, seed: int = 0) -> None:
        self.kernels: CpuKernels = cpu_kernels(step_kernels())
        self.kernels.reverse = bool(seed % 2)
        self.mode, self.limit, self.held, self.launches = mode, limit, 0, 0
        self.queues: list[FakeQueue] = []
        self.pinned_bytes = 0
        self.freed: list[Any] = []
        self.lock = threading.RLock()  # held while kernels run: each thread may run those of all
        self._random = random.Random(seed)

    @property
    def free(self) -> int:
        return self.limit - self.held

    def memory(self, size: int) -> FakeMemory:
        if size > self.free:
            raise OutOfDeviceMemory(size, self.free)
        return FakeMemory(size, self)

    def pinned(self, size: int) -> Any:
        with self.lock:
            if all(queue.done == queue.given for queue in self.queues):
                self.freed.clear()
        return np.asarray(FakePinned(size, self))

    def queue(self) -> FakeQueue:
        return FakeQueue(self)

    def progress(self) -> None:
        """Let queues run what the mode wants."""
        if self.mode == "early":
            for queue in self.queues:
                queue.run_to(queue.given)
        elif self.mode == "random":
            queue = self._random.choice(self.queues)
            queue.run_to(self._random.randint(queue.done, queue.given))
