"""The device that CuPy gives: the first GPU that the process sees (see CUDA_VISIBLE_DEVICES).

CuPy is imported when a CudaDevice is made, not before. A process must not fork afterwards. Memory
is not taken from CuPy's pools, which would keep it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.gpu.device import DeviceLost, Mark, Memory, NoDevice, Number, OutOfDeviceMemory
from storage.gpu.nvrtc import CannotCompile, machine_code
from storage.gpu.source import BLOCK, LANES, ROW_KERNELS, cuda_source, kernel_name
from storage.optimizers import step_kernels

INSTALL = (
    "pip install 'embedding-ps[gpu13]' for a driver of CUDA 13, or 'embedding-ps[gpu12]' for 12"
)
ADVICE = {  # name of an error of CUDA -> what to do
    "cudaErrorInsufficientDriver": "install NVIDIA's driver, or make CuPy fit to it (nvidia-smi"
    f" shows its CUDA version): {INSTALL}",
    "cudaErrorNoDevice": "check nvidia-smi and CUDA_VISIBLE_DEVICES; a container must be given a"
    " GPU, for example nvidia.com/gpu: 1",
}
Lost = Callable[[DeviceLost], None]
OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation; the only error after which a GPU can be used


class CudaMemory:
    """A piece of GPU memory. See device.Memory."""

    def __init__(self, memory: Any) -> None:
        self._memory = memory
        self.address = int(memory.ptr)


def probe() -> Any:
    """Check that this process can use a GPU, without starting CUDA. Returns the module cupy.cuda.

    Raises NoDevice, with the error of CUDA and what to do.
    """
    try:
        import cupy
    except ImportError as error:
        raise NoDevice(f"cannot import CuPy ({error}): {INSTALL}") from error
    runtime = cupy.cuda.runtime
    try:
        if not runtime.getDeviceCount():
            raise NoDevice(f"CUDA finds no GPU: {ADVICE['cudaErrorNoDevice']}")
    except runtime.CUDARuntimeError as error:
        name = str(error).partition(":")[0]
        raise NoDevice(f"{error}: {ADVICE.get(name, 'check nvidia-smi')}") from error
    return cupy.cuda


class CudaMark:
    """A point in a stream. See device.Mark.

    lost  see CudaDevice; the same in CudaQueue
    """

    def __init__(self, event: Any, lost: Lost) -> None:
        self.event, self._lost = event, lost

    def wait(self) -> None:
        with _final_errors(self._lost):
            self.event.synchronize()


class CudaQueue:
    """A stream of its own. See device.Queue.

    stream  the stream of CuPy
    """

    def __init__(self, cuda: Any, kernels: dict[str, Any], lost: Lost) -> None:
        self._cuda, self._kernels, self._lost = cuda, kernels, lost
        self.stream = cuda.Stream(non_blocking=True)

    def run(self, kernel: str, rows: int, *arguments: Number) -> None:
        if not rows:
            return
        with _final_errors(self._lost):
            blocks = -(-rows * LANES // BLOCK)
            self._kernels[kernel]((blocks,), (BLOCK,), arguments, stream=self.stream)

    def mark(self) -> CudaMark:
        with _final_errors(self._lost):
            event = self._cuda.Event(disable_timing=True)
            event.record(self.stream)
        return CudaMark(event, self._lost)

    def follow(self, mark: Mark) -> None:
        assert isinstance(mark, CudaMark)
        with _final_errors(self._lost):
            self.stream.wait_event(mark.event)


class CudaDevice:
    """The GPU. See device.Device.

    cuda  the module cupy.cuda

    Raises NoDevice, CannotCompile if the kernels do not compile, or DeviceLost.
    """

    def __init__(self, lost: Lost = lambda error: None) -> None:
        """Start CUDA in this process, and load the kernels.

        lost  called when the GPU fails later, on the thread that notices it, before DeviceLost is
              raised there
        """
        self._lost: Lost = lambda error: None
        self._open()
        self._lost = lost

    def _open(self) -> None:
        self.cuda = probe()
        steps, module = step_kernels(), self.cuda.function.Module()
        names = [*ROW_KERNELS, *map(kernel_name, steps)]
        with _final_errors(self._lost):
            capability = int(self.cuda.Device(0).compute_capability)
            major = self.cuda.runtime.runtimeGetVersion() // 1000
            module.load(machine_code(cuda_source(steps), capability, major))
            # all of them now: CUDA takes memory for a kernel when it is first asked for
            self._kernels = {name: module.get_function(name) for name in names}

    @property
    def free(self) -> int:
        with _final_errors(self._lost):
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
            return CudaQueue(self.cuda, self._kernels, self._lost)

    @contextmanager
    def _asking(self, size: int, what: str = "GPU memory") -> Iterator[None]:
        """Raise OutOfDeviceMemory if ``size`` bytes are too many; DeviceLost for other errors."""
        with _final_errors(self._lost):
            try:
                yield
            except self.cuda.runtime.CUDARuntimeError as error:
                if error.status != OUT_OF_MEMORY:
                    raise
                raise OutOfDeviceMemory(size, self.free, what) from error


@contextmanager
def _final_errors(lost: Lost) -> Iterator[None]:
    """Raise DeviceLost for an error of CUDA: after most of them, a process cannot go on.

    lost  called before it is raised
    """
    try:
        yield
    except CannotCompile:
        raise
    except Exception as error:
        if type(error).__name__ in ("CUDARuntimeError", "CUDADriverError"):
            failure = DeviceLost(str(error))
            lost(failure)
            raise failure from error
        raise
