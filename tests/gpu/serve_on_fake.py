"""Run ``psserver`` on the fake device: ``python tests/gpu/serve_on_fake.py serve --hbm-bytes N``.

Only this script puts the fake device in the place of a GPU. No setting does.

FAKE_MODE   mode of the device, see fakedevice.py
FAKE_BYTES  bytes of device memory
FAKE_FILE   path of a file. While it contains "lost", the device fails; while it contains "full",
            the device has no memory
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from fakedevice import FakeDevice, FakeMark, FakeMemory, FakeQueue
from fakeipc import FakeCudaGpu

import psserver.gpu
from psproto import cudaipc
from psserver.cli import main
from storage.gpu.device import DeviceLost, Mark, Number, OutOfDeviceMemory


class FailingQueue(FakeQueue):
    """A queue of a FailingDevice."""

    _device: FailingDevice

    def run(self, kernel: str, rows: int, *arguments: Number) -> None:
        self._device.fail_if_asked()
        super().run(kernel, rows, *arguments)

    def mark(self) -> FakeMark:
        self._device.fail_if_asked()
        return super().mark()

    def follow(self, mark: Mark) -> None:
        self._device.fail_if_asked()
        super().follow(mark)


class FailingDevice(FakeDevice):
    """A fake device that fails as FAKE_FILE says.

    lost  called before DeviceLost is raised
    """

    def __init__(self, lost: Callable[[DeviceLost], None]) -> None:
        mode, limit = os.environ.get("FAKE_MODE", "random"), os.environ.get("FAKE_BYTES", 1 << 30)
        self._lost = lost
        self._file = Path(os.environ.get("FAKE_FILE", os.devnull))
        super().__init__(mode, int(limit))

    def memory(self, size: int) -> FakeMemory:
        self.fail_if_asked()
        if self._said() == "full":
            raise OutOfDeviceMemory(size, 0)
        return super().memory(size)

    def queue(self) -> FakeQueue:
        self.fail_if_asked()
        return FailingQueue(self)

    def fail_if_asked(self) -> None:
        if self._said() == "lost":
            self._fail()

    def _said(self) -> str:
        return self._file.read_text() if self._file.exists() else ""

    def _fail(self) -> NoReturn:
        error = DeviceLost("cudaErrorIllegalAddress: an illegal memory access was encountered")
        self._lost(error)
        raise error


if __name__ == "__main__":
    open_device: Any = FailingDevice
    psserver.gpu.open_device = open_device
    shared: Any = FakeCudaGpu()
    cudaipc.gpu = lambda number=0: shared  # type: ignore[assignment]
    main()
