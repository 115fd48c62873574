"""Fake GPU memory that processes share, and as much of CuPy as a client of the lane uses.

The memory is a memfd, which the other process opens through /proc. It is NaN at first.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from types import SimpleNamespace
from typing import Any

import numpy as np

from psproto.cudaipc import HANDLE_BYTES, CudaError

UUID = b"the fake device."
HANDLE = struct.Struct("<II")  # process, descriptor


class FakeCudaGpu:
    """Stands in for cudaipc.CudaGpu.

    mapped  number of regions that are mapped
    """

    def __init__(self, uuid: bytes = UUID) -> None:
        self.uuid, self.mapped = uuid, 0
        self._files: dict[int, int] = {}  # by address
        self._maps: dict[int, mmap.mmap] = {}

    def allocate(self, size: int) -> int:
        fd = os.memfd_create("fake-gpu", os.MFD_CLOEXEC)
        os.ftruncate(fd, size)
        address = self._mapped(fd, size)
        ctypes.memset(address, 0xFF, size)
        self._files[address] = fd
        return address

    def free(self, address: int) -> None:
        os.close(self._files.pop(address))
        del self._maps[address]

    def handle_of(self, address: int) -> bytes:
        return HANDLE.pack(os.getpid(), self._files[address]).ljust(HANDLE_BYTES, b"\0")

    def map(self, handle: bytes, size: int) -> int:
        process, number = HANDLE.unpack_from(handle)
        try:
            fd = os.open(f"/proc/{process}/fd/{number}", os.O_RDWR)
        except OSError as error:
            raise CudaError("cuIpcOpenMemHandle_v2: CUDA_ERROR_INVALID_VALUE (1)") from error
        try:
            if (whole := os.fstat(fd).st_size) < size:
                raise CudaError(f"the memory has {whole} bytes, not {size}")
            address = self._mapped(fd, size)
        finally:
            os.close(fd)
        self.mapped += 1
        return address

    def unmap(self, address: int) -> None:
        del self._maps[address]
        self.mapped -= 1

    def _mapped(self, fd: int, size: int) -> int:
        memory = mmap.mmap(fd, size)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._maps[address] = memory
        return address


class Array:
    """Stands in for cupy.ndarray, with memory of the host."""

    __module__ = "cupy"

    def __init__(self, host: Any) -> None:
        self.host = host
        self.shape, self.dtype, self.flags = host.shape, host.dtype, host.flags
        self.device = self

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __dlpack__(self) -> Any:
        raise NotImplementedError

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def __getitem__(self, index: Array) -> Array:
        return Array(self.host[index.host])

    def __setitem__(self, index: Array | slice, rows: Array) -> None:
        self.host[index if isinstance(index, slice) else index.host] = rows.host

    def reshape(self, *shape: int) -> Array:
        return Array(self.host.reshape(*shape))

    def set(self, rows: Any) -> None:
        self.host[...] = rows

    def get(self) -> Any:
        return self.host.copy()


def _asarray(given: Any) -> Array:
    if not hasattr(given, "__cuda_array_interface__"):
        return Array(np.asarray(given))
    facts = given.__cuda_array_interface__
    count = int(np.prod(facts["shape"]))
    memory = (ctypes.c_float * count).from_address(facts["data"][0])
    return Array(np.frombuffer(memory, np.float32).reshape(facts["shape"]))


def _take(rows: Array, index: Array, *, axis: int, out: Array) -> None:
    np.take(rows.host, index.host, axis=axis, out=out.host)


def fake_cupy() -> Any:
    """Return what stands in for the module cupy."""
    stream = SimpleNamespace(synchronize=lambda: None)
    cuda = SimpleNamespace(get_current_stream=lambda: stream, alloc_pinned_memory=bytearray)
    return SimpleNamespace(
        asarray=_asarray,
        take=_take,
        cuda=cuda,
        full=lambda shape, value, dtype: Array(np.full(shape, value, dtype)),
    )
