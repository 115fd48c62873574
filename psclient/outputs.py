"""Arrays of the caller into which pulls write rows: the argument ``out`` of pulls and exchanges."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psclient.arrays import Rows
from psclient.errors import InvalidArgument
from psclient.gpurows import Arrived

CPU, CUDA, CUDA_HOST, CUDA_MANAGED = 1, 2, 3, 13  # device types of DLPack


class Output:
    """One array of the caller, checked.

    rows   float32[*shape], in host memory, into which the answer is decoded
    given  what the caller passed
    copy   copies ``rows`` into ``given``, which is on a GPU, if it is passed True, and gives
           ``rows`` back; None: ``rows`` is the memory of ``given``

    device   number of the GPU that needs the rows; None: they are needed in host memory
    arrived  for a GPU: the parts of the answers, in the order in which they arrived. Those that
             are in GPU memory are not in ``rows``
    """

    def __init__(
        self,
        rows: Rows,
        given: Any,
        copy: Callable[[bool], None] | None = None,
        device: int | None = None,
    ) -> None:
        self.rows, self._given, self._copy, self.device = rows, given, copy, device
        self.arrived: list[Arrived] = []

    def finish(self) -> Any:
        """Return what the caller passed, once it has the rows."""
        copy, self._copy = self._copy, None
        if copy is not None:
            copy(any(part.room is None for part in self.arrived))
        for part in self.arrived:
            if part.room is not None:
                part.put(_framework(self._given), self._given)
        self.arrived.clear()
        return self._given


def outputs_of(out: Any, tables: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the argument ``out`` of a pull; {} if it is None.

    tables  {table that is pulled: its keys}

    Raises InvalidArgument unless it is a mapping {table: array} of tables that are pulled.
    """
    if out is None:
        return {}
    if not isinstance(out, Mapping):
        raise InvalidArgument(f"out must be a mapping {{table: array}}, got {type(out).__name__}")
    if other := [name for name in out if name not in tables]:
        raise InvalidArgument(f"out: table {other[0]!r} is not among the tables that are pulled")
    return out


def output_of(given: Any, shape: tuple[int, ...], table: str) -> Output:
    """Check an array that the rows of a table are written into.

    given  array of NumPy, PyTorch or CuPy, or another object in host memory that supports DLPack
    shape  shape that it must have

    Raises InvalidArgument unless it is a contiguous, writable float32 array of this shape.
    """
    name = f"out of table {table!r}"
    device = _device(given, name)
    if device in (CUDA, CUDA_MANAGED):
        _check(given, shape, name)
        return _on_gpu(given, shape, name)
    if device not in (CPU, CUDA_HOST):
        raise InvalidArgument(f"{name} must be in host memory or on a CUDA device, got {given!r}")
    array = given if isinstance(given, np.ndarray) else _in_host(given, name)
    _check(array, shape, name)
    if not array.flags.writeable:
        raise InvalidArgument(f"{name} must be writable, but it is read-only: pass a copy of it")
    return Output(array, given)


def check_apart(outputs: Mapping[str, Output]) -> None:
    """Raise InvalidArgument if the arrays for two tables share memory."""
    spans = sorted(
        (start, start + each.rows.nbytes, table)
        for table, each in outputs.items()
        if each.rows.nbytes
        for start in [each.rows.ctypes.data]
    )
    for (_, end, table), (start, _, other) in pairwise(spans):
        if start < end:
            raise InvalidArgument(
                f"out: the arrays of tables {table!r} and {other!r} must not share memory: pass"
                " different arrays"
            )


def _device(given: Any, name: str) -> int:
    """Return the DLPack device type of an array."""
    if isinstance(given, np.ndarray):
        return CPU
    if not hasattr(given, "__dlpack_device__") or not hasattr(given, "__dlpack__"):
        raise InvalidArgument(
            f"{name} must be an array of NumPy, PyTorch or CuPy, or support DLPack,"
            f" got {type(given).__name__}"
        )
    try:
        return int(given.__dlpack_device__()[0])
    except (BufferError, TypeError, ValueError, RuntimeError) as error:
        raise InvalidArgument(f"{name} must be in host memory or on a CUDA device: {error}") from (
            error
        )


def _in_host(given: Any, name: str) -> NDArray[Any]:
    """Return a NumPy array that has the memory of ``given``, which supports DLPack."""
    try:
        return np.from_dlpack(given.detach() if hasattr(given, "detach") else given)
    except (BufferError, TypeError, ValueError, RuntimeError) as error:
        raise InvalidArgument(f"{name} must be a writable float32 array: {error}") from error


def _check(array: Any, shape: tuple[int, ...], name: str) -> None:
    """Raise InvalidArgument unless an array is contiguous float32 of this shape."""
    dtype = str(array.dtype).removeprefix("torch.")
    if dtype != "float32":
        raise InvalidArgument(f"{name} must have dtype float32, got {dtype}")
    if tuple(array.shape) != shape:
        raise InvalidArgument(
            f"{name} must have shape {list(shape)}, got {list(map(int, array.shape))}"
        )
    contiguous = (
        array.is_contiguous() if hasattr(array, "is_contiguous") else array.flags.c_contiguous
    )
    if not contiguous:
        raise InvalidArgument(f"{name} must be contiguous in memory, in C order: pass a copy of it")


# ---- arrays on a GPU


class _Pool:
    """Page-locked buffers that are free. Each is used by one pull at a time, then again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[tuple[str, Rows]] = []

    def take(self, framework: str, count: int) -> Rows:
        """Return a free buffer of at least ``count`` float32 numbers; allocate one if none is.

        framework  "torch" or "cupy", which allocates it
        """
        with self._lock:
            for at, (owner, buffer) in enumerate(self._free):
                if owner == framework and len(buffer) >= count:
                    del self._free[at]
                    return buffer
        return _allocate(framework, 1 << max(count - 1, 1).bit_length())

    def give_back(self, framework: str, buffer: Rows) -> None:
        """Let other pulls use a buffer."""
        with self._lock:
            self._free.append((framework, buffer))


_pool = _Pool()


def _allocate(framework: str, count: int) -> Rows:
    """Return page-locked memory for ``count`` float32 numbers."""
    if framework == "torch":
        import torch

        pinned: Rows = torch.empty(count, dtype=torch.float32, pin_memory=True).numpy()
        return pinned
    import cupy

    return np.frombuffer(cupy.cuda.alloc_pinned_memory(4 * count), np.float32, count)


def _on_gpu(given: Any, shape: tuple[int, ...], name: str) -> Output:
    """Return the Output of an array on a GPU: rows are decoded into page-locked memory first."""
    framework = _framework(given)
    if framework not in ("torch", "cupy"):
        raise InvalidArgument(
            f"{name}: arrays on a GPU must be those of PyTorch or CuPy, got {framework}"
        )
    count = int(np.prod(shape))
    buffer = _pool.take(framework, count)
    rows = buffer[:count].reshape(shape)

    def copy(needed: bool) -> None:
        if not needed:
            pass
        elif framework == "torch":
            import torch

            given.detach().copy_(torch.from_numpy(rows), non_blocking=True)
            torch.cuda.current_stream(given.device).synchronize()
        else:
            import cupy

            given.set(rows)
            cupy.cuda.get_current_stream().synchronize()
        _pool.give_back(framework, buffer)

    return Output(rows, given, copy, int(given.__dlpack_device__()[1]))


def _framework(given: Any) -> str:
    """Return the package of an array: "torch" or "cupy", also for subclasses; or another one."""
    packages = [kind.__module__.split(".")[0] for kind in type(given).__mro__]
    return next((each for each in packages if each in ("torch", "cupy")), packages[0])
