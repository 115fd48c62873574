"""The device that CuPy gives: the first GPU that the process sees (see CUDA_VISIBLE_DEVICES).

CuPy is imported when a CudaDevice is made, not before. A process must not fork afterwards. Memory
is not taken from CuPy's pools, which would keep it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.gpu.device import DeviceLost, Mark, Memory, NoDevice, Number, OutOfDeviceMemory
from storage.gpu.nvrtc import CannotCompile, machine_code
from storage.gpu.source import BLOCK, LANES, ROW_KERNELS, cuda_source, kernel_name
from storage.optimizers import step_kernels

ADVICE = "install embedding-ps[gpu13] (or [gpu12]), and check nvidia-smi"
OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation; the only error after which a GPU can be used


class CudaMemory:
    """A piece of GPU memory. See device.Memory."""

    def __init__(self, memory: Any) -> None:
        self._memory = memory
        self.address = int(memory.ptr)


class CudaMark:
    """A point in a stream. See device.Mark."""

    def __init__(self, event: Any) -> None:
        self.event = event

    def wait(self) -> None:
        with _final_errors():
            self.event.synchronize()


class CudaQueue:
    """A stream of its own. See device.Queue.

    stream  the stream of CuPy
    """

    def __init__(self, cuda: Any, kernels: dict[str, Any]) -> None:
        self._cuda, self._kernels = cuda, kernels
        self.stream = cuda.Stream(non_blocking=True)

    def run(self, kernel: str, rows: int, *arguments: Number) -> None:
        if not rows:
            return
        with _final_errors():
            blocks = -(-rows * LANES // BLOCK)
            self._kernels[kernel]((blocks,), (BLOCK,), arguments, stream=self.stream)

    def mark(self) -> CudaMark:
        with _final_errors():
            event = self._cuda.Event(disable_timing=True)
            event.record(self.stream)
        return CudaMark(event)

    def follow(self, mark: Mark) -> None:
        assert isinstance(mark, CudaMark)
        with _final_errors():
            self.stream.wait_event(mark.event)


class CudaDevice:
    """The GPU. See device.Device.

    cuda  the module cupy.cuda

    Raises NoDevice, or CannotCompile if the kernels do not compile.
    """

    def __init__(self) -> None:
        try:
            import cupy
        except ImportError as error:
            raise NoDevice(f"cannot import CuPy ({error}): {ADVICE}") from error
        self.cuda = cupy.cuda
        try:
            if not self.cuda.runtime.getDeviceCount():
                raise NoDevice(f"CUDA finds no GPU: {ADVICE}")
        except self.cuda.runtime.CUDARuntimeError as error:
            raise NoDevice(f"{error}: {ADVICE}") from error
        steps, module = step_kernels(), self.cuda.function.Module()
        names = [*ROW_KERNELS, *map(kernel_name, steps)]
        with _final_errors():
            capability = int(self.cuda.Device(0).compute_capability)
            major = self.cuda.runtime.runtimeGetVersion() // 1000
            module.load(machine_code(cuda_source(steps), capability, major))
            # all of them now: CUDA takes memory for a kernel when it is first asked for
            self._kernels = {name: module.get_function(name) for name in names}

    @property
    def free(self) -> int:
        with _final_errors():
            return int(self.cuda.runtime.memGetInfo()[0])

    def memory(self, size: int) -> Memory:
        with self._asking(size):
            return CudaMemory(self.cuda.Memory(size))

    def pinned(self, size: int) -> NDArray[np.uint8]:
        runtime = self.cuda.runtime
        flags = runtime.hostAllocPortable | runtime.hostAllocMapped
        with self._asking(size, "page-locked memory of the host"):
            block = self.cuda.PinnedMemory(max(size, 1), flags)
            pointer = self.cuda.PinnedMemoryPointer(block, 0)
        return np.frombuffer(pointer, np.uint8, size)

    def queue(self) -> CudaQueue:
        with self._asking(0):
            return CudaQueue(self.cuda, self._kernels)

    @contextmanager
    def _asking(self, size: int, what: str = "GPU memory") -> Iterator[None]:
        """Raise OutOfDeviceMemory if ``size`` bytes are too many; DeviceLost for other errors."""
        with _final_errors():
            try:
                yield
            except self.cuda.runtime.CUDARuntimeError as error:
                if error.status != OUT_OF_MEMORY:
                    raise
                raise OutOfDeviceMemory(size, self.free, what) from error


@contextmanager
def _final_errors() -> Iterator[None]:
    """Raise DeviceLost for an error of CUDA: after most of them, a process cannot go on."""
    try:
        yield
    except CannotCompile:
        raise
    except Exception as error:
        if type(error).__name__ in ("CUDARuntimeError", "CUDADriverError"):
            raise DeviceLost(str(error)) from error
        raise
