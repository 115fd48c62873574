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
from storage.gpu.source import BLOCK, LANES, cuda_source
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

    def __init__(self, cuda: Any, module: Any) -> None:
        self._cuda, self._module = cuda, module
        self._kernels: dict[str, Any] = {}
        self.stream = cuda.Stream(non_blocking=True)

    def run(self, kernel: str, rows: int, *arguments: Number) -> None:
        if not rows:
            return
        with _final_errors():
            function = self._kernels.get(kernel)
            if function is None:
                function = self._kernels[kernel] = self._module.get_function(kernel)
            blocks = -(-rows * LANES // BLOCK)
            function((blocks,), (BLOCK,), arguments, stream=self.stream)

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
        self._module = self.cuda.function.Module()
        with _final_errors():
            capability = int(self.cuda.Device(0).compute_capability)
            self._module.load(machine_code(cuda_source(step_kernels()), capability))

    @property
    def free(self) -> int:
        with _final_errors():
            return int(self.cuda.runtime.memGetInfo()[0])

    def memory(self, size: int) -> Memory:
        try:
            return CudaMemory(self.cuda.Memory(size))
        except self.cuda.runtime.CUDARuntimeError as error:
            if error.status == OUT_OF_MEMORY:
                raise OutOfDeviceMemory(size, self.free) from error
            raise DeviceLost(str(error)) from error

    def pinned(self, size: int) -> NDArray[np.uint8]:
        runtime = self.cuda.runtime
        flags = runtime.hostAllocPortable | runtime.hostAllocMapped
        with _final_errors():
            block = self.cuda.PinnedMemory(max(size, 1), flags)
            pointer = self.cuda.PinnedMemoryPointer(block, 0)
        return np.frombuffer(pointer, np.uint8, size)

    def queue(self) -> CudaQueue:
        with _final_errors():
            return CudaQueue(self.cuda, self._module)


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
