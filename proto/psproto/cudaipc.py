"""GPU memory that two processes share: the few functions of CUDA's driver that this takes.

Both sides call the driver's own library, which is there wherever a GPU can be used. So a client
needs neither CuPy nor a certain version of PyTorch. All functions use the context that PyTorch,
CuPy and CUDA's runtime use as well (the primary one), and leave the thread's context as it was.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

HANDLE_BYTES = 64
LAZY_PEER_ACCESS = 1  # the only flag of cuIpcOpenMemHandle, which requires it


class CudaError(Exception):
    """CUDA refused a call; the message has the name of the error."""


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_ubyte * HANDLE_BYTES),)


class CudaGpu:
    """A GPU that this process can use. Any thread may call the methods.

    number  number of the GPU, as CUDA_VISIBLE_DEVICES makes this process count them

    uuid  16 bytes that no other GPU has

    Raises CudaError.
    """

    def __init__(self, number: int = 0) -> None:
        _call("cuInit", 0)
        device, uuid = ctypes.c_int(), (ctypes.c_ubyte * 16)()
        _call("cuDeviceGet", ctypes.byref(device), number)
        _call("cuDeviceGetUuid", ctypes.byref(uuid), device)
        self.uuid = bytes(uuid)
        self._context = ctypes.c_void_p()
        _call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)

    def allocate(self, size: int) -> int:
        """Return the address of ``size`` new bytes, which are no part of a pool.

        A handle names the whole allocation: nothing else may be in it.
        """
        address = ctypes.c_uint64()
        with self._current():
            _call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        return address.value

    def free(self, address: int) -> None:
        """Free memory that ``allocate`` returned."""
        with self._current():
            _call("cuMemFree_v2", ctypes.c_uint64(address))

    def handle_of(self, address: int) -> bytes:
        """Return the handle with which another process can map memory of ``allocate``."""
        handle = _Handle()
        with self._current():
            _call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(address))
        return bytes(handle.reserved)

    def map(self, handle: bytes, size: int) -> int:
        """Map memory of another process, and return its address.

        Raises CudaError if CUDA refuses it, or if the memory has less than ``size`` bytes.
        """
        address, base = ctypes.c_uint64(), ctypes.c_uint64()
        whole, given = ctypes.c_size_t(), _Handle.from_buffer_copy(handle)
        with self._current():
            flags = ctypes.c_uint(LAZY_PEER_ACCESS)
            _call("cuIpcOpenMemHandle_v2", ctypes.byref(address), given, flags)
            try:
                found = ctypes.byref(base), ctypes.byref(whole)
                _call("cuMemGetAddressRange_v2", *found, address)
                if base.value != address.value or whole.value < size:
                    raise CudaError(f"the memory has {whole.value} bytes, not {size}")
            except BaseException:
                _call("cuIpcCloseMemHandle", address)
                raise
        return address.value

    def unmap(self, address: int) -> None:
        """Undo ``map``."""
        with self._current():
            _call("cuIpcCloseMemHandle", ctypes.c_uint64(address))

    @contextmanager
    def _current(self) -> Iterator[None]:
        """Use the context of the GPU on this thread."""
        _call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            _call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))


@cache
def gpu(number: int = 0) -> CudaGpu:
    """Return the GPU with this number. Raises CudaError."""
    return CudaGpu(number)


@cache
def _library() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise CudaError(f"the library of NVIDIA's driver cannot be loaded: {error}") from error


def _call(function: str, *arguments: Any) -> None:
    """Call a function of the driver. Raises CudaError if it fails."""
    library = _library()
    if not hasattr(library, function):
        raise CudaError(f"NVIDIA's driver has no function {function}: it is too old")
    if status := getattr(library, function)(*arguments):
        name = ctypes.c_char_p()
        library.cuGetErrorName(status, ctypes.byref(name))
        text = (name.value or b"unknown error").decode()
        raise CudaError(f"{function}: {text} ({status})")
