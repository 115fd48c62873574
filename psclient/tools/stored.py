"""Arrays in files, of which any range of rows can be read without reading the rest.

    FileArray    an array at a byte offset of a file: .npy, safetensors, raw numbers
    ZippedArray  an array in a zip archive: .npz; reading backwards begins anew
    TorchArray   a tensor of PyTorch, whose file is mapped into memory

Nothing here unpickles. A file whose array has Python objects is refused before it is read.
"""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from psclient.errors import InvalidArgument
from psclient.tools.locations import open_file, size_of

BFLOAT16 = "bfloat16"  # stands for a dtype that NumPy lacks
NUMPY_HEADER = 1 << 16  # maximum size of the header of an array in the format of NumPy
SAFETENSORS_HEADER = 100 << 20  # maximum size of the header of a safetensors file
_SAFETENSORS = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": BFLOAT16,
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1", "BOOL": "|b1",
}  # fmt: skip


class Stored(Protocol):
    """An array in a file.

    label  the file, and the array's name if the file has several
    dtype  NumPy dtype as text, or BFLOAT16
    """

    @property
    def label(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return the rows start..stop-1. An array of BFLOAT16 is returned as float32."""

    def offset(self, row: int) -> int | None:
        """Return the position of a row in the file, in bytes; None: it has none."""

    def close(self) -> None:
        """Close what ``read`` left open. ``read`` opens it again."""


@dataclass(frozen=True, slots=True)
class FileArray:
    """An array at a byte offset of a file, its rows one after the other."""

    location: str
    label: str
    dtype: str
    shape: tuple[int, ...]
    begin: int = 0  # byte offset of the array in the file

    @property
    def row_bytes(self) -> int:
        """Size of a row in bytes."""
        return item_bytes(self.dtype) * math.prod(self.shape[1:])

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return the rows start..stop-1."""
        with open_file(self.location) as file:
            file.seek(self.begin + start * self.row_bytes)
            data = file.read((stop - start) * self.row_bytes)
        return _decoded(self, data, stop - start)

    def offset(self, row: int) -> int | None:
        """Return the position of a row in the file, in bytes."""
        return self.begin + row * self.row_bytes

    def close(self) -> None:
        """Do nothing: no file stays open."""


class ZippedArray:
    """An array in a zip archive, as NumPy's savez writes it, compressed or not."""

    def __init__(self, location: str, member: str) -> None:
        """Read the header of the array ``member`` in the archive ``location``."""
        self.location = location
        self.label = f"{location}: array {member.removesuffix('.npy')!r}"
        self._member = member
        self._stream: IO[bytes] | None = None
        self._at = 0  # next row that the stream will give
        self._stack = ExitStack()
        try:
            self._opened()
        finally:
            self.close()
        self._row_bytes = item_bytes(self.dtype) * math.prod(self.shape[1:])

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return the rows start..stop-1. Rows before ``start`` are read and dropped."""
        if self._stream is None or start < self._at:
            self._stream, self._at = self._opened(), 0
        try:
            while self._at < start:
                rows = min(start - self._at, max(1, (1 << 20) // max(1, self._row_bytes)))
                self._stream.read(rows * self._row_bytes)
                self._at += rows
            data = self._stream.read((stop - start) * self._row_bytes)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError) as error:
            raise InvalidArgument(f"{self.label}: cannot be read: {error}") from error
        self._at = stop
        return _decoded(self, data, stop - start)

    def offset(self, row: int) -> int | None:
        """Return None: rows of an archive have no position in the file."""
        return None

    def close(self) -> None:
        """Close the archive."""
        self._stack.close()
        self._stream = None

    def _opened(self) -> IO[bytes]:
        """Open the archive; return a stream of the array's file in it, after its header."""
        self.close()
        try:
            file = self._stack.enter_context(open_file(self.location))
            archive = self._stack.enter_context(zipfile.ZipFile(file))
            stream = self._stack.enter_context(archive.open(self._member))
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError) as error:
            self.close()
            raise InvalidArgument(f"{self.label}: cannot be read: {error}") from error
        self.dtype, self.shape = _numpy_header(stream, self.label)
        return stream


@dataclass(frozen=True, slots=True)
class TorchArray:
    """A tensor of PyTorch."""

    label: str
    tensor: Any

    @property
    def dtype(self) -> str:
        """NumPy dtype as text, or BFLOAT16."""
        name = str(self.tensor.dtype).removeprefix("torch.")
        return name if name == BFLOAT16 else np.dtype(name).str

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return tuple(self.tensor.shape)

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return a copy of the rows start..stop-1."""
        some = self.tensor[start:stop]
        some = some.float() if self.dtype == BFLOAT16 else some
        return np.array(some.numpy())

    def offset(self, row: int) -> int | None:
        """Return None: the position of a tensor in its file is unknown."""
        return None

    def close(self) -> None:
        """Do nothing: the file stays mapped while the tensor is used."""


def item_bytes(dtype: str) -> int:
    """Return the size of a number of a dtype in bytes."""
    return 2 if dtype == BFLOAT16 else np.dtype(dtype).itemsize


def dtype_name(dtype: str) -> str:
    """Return the name of a dtype, such as "float32"."""
    return dtype if dtype == BFLOAT16 else np.dtype(dtype).name


def numpy_array(location: str) -> FileArray:
    """Return the array of a .npy file. Raises InvalidArgument if the file is not one."""
    with open_file(location) as file:
        dtype, shape = _numpy_header(file, location)
        array = FileArray(location, location, dtype, shape, file.tell())
    return _complete(array)


def zipped_arrays(location: str) -> dict[str, ZippedArray]:
    """Return the arrays of a .npz file by name. Raises InvalidArgument if the file is not one."""
    try:
        with open_file(location) as file, zipfile.ZipFile(file) as archive:
            names = [each for each in archive.namelist() if each.endswith(".npy")]
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise InvalidArgument(f"{location}: cannot be read as .npz: {error}") from error
    return {each.removesuffix(".npy"): ZippedArray(location, each) for each in names}


def safetensors_arrays(location: str) -> tuple[dict[str, FileArray], dict[str, str]]:
    """Return ({name: array}, metadata) of a safetensors file.

    Raises InvalidArgument if the file is not one.
    """
    end = size_of(location)
    with open_file(location) as file:
        size = int.from_bytes(file.read(8), "little")
        if not 2 <= size <= min(SAFETENSORS_HEADER, end - 8):
            raise InvalidArgument(f"{location}: cannot be read as safetensors: no valid header")
        text = file.read(size)
    try:
        entries = json.loads(text)
        metadata = dict(entries.pop("__metadata__", None) or {})
        arrays = {
            name: FileArray(
                location,
                f"{location}: tensor {name!r}",
                _SAFETENSORS[each["dtype"]],
                tuple(int(n) for n in each["shape"]),
                8 + size + int(each["data_offsets"][0]),
            )
            for name, each in entries.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidArgument(f"{location}: cannot be read as safetensors: {error!r}") from error
    return {name: _complete(each) for name, each in arrays.items()}, metadata


def raw_array(location: str, dtype: str, columns: int | None = None) -> FileArray:
    """Return a file of plain numbers as an array [n], or [n, columns].

    Raises InvalidArgument if the size of the file is not a multiple of a row.
    """
    size, row = size_of(location), np.dtype(dtype).itemsize * (columns or 1)
    if size % row:
        shown = f"{columns or 1} {dtype_name(dtype)}"
        raise InvalidArgument(
            f"{location}: the size must be a multiple of {row} bytes ({shown}), got {size:,} bytes"
        )
    shape = (size // row,) if columns is None else (size // row, columns)
    return FileArray(location, location, dtype, shape)


def as_float32(array: Stored, start: int, stop: int) -> NDArray[np.float32]:
    """Return rows start..stop-1 as float32[n, m]. Numbers too large for float32 become infinite."""
    values = array.read(start, stop)
    with np.errstate(over="ignore"):
        numbers = values.astype(np.float32, copy=False)
    return np.ascontiguousarray(numbers.reshape(stop - start, -1))


def _complete(array: FileArray) -> FileArray:
    """Return ``array``. Raises InvalidArgument if the file ends before the array does."""
    needed = array.begin + array.shape[0] * array.row_bytes if array.shape else array.begin
    if min(array.shape, default=0) < 0 or array.begin < 0:
        raise InvalidArgument(f"{array.label}: invalid shape {array.shape}")
    if (size := size_of(array.location)) < needed:
        raise InvalidArgument(
            f"{array.label}: the file is truncated: an array of {dtype_name(array.dtype)} with the"
            f" shape {array.shape} ends at byte {needed:,}, but the file has {size:,} bytes"
        )
    return array


def _decoded(array: Stored, data: bytes, rows: int) -> NDArray[Any]:
    """Return bytes that were read from a file as an array of ``rows`` rows.

    Raises InvalidArgument if bytes are missing.
    """
    shape: Sequence[int] = (rows, *array.shape[1:])
    if len(data) != math.prod(shape) * item_bytes(array.dtype):
        raise InvalidArgument(f"{array.label}: the file is truncated, or changed while it was read")
    if array.dtype == BFLOAT16:
        wide = np.frombuffer(data, "<u2").astype(np.uint32) << 16
        return wide.view(np.float32).reshape(shape)
    return np.frombuffer(data, array.dtype).reshape(shape)


def _numpy_header(file: IO[bytes], label: str) -> tuple[str, tuple[int, ...]]:
    """Read the header of an array in the format of NumPy; return (dtype, shape).

    Raises InvalidArgument if it is not such an array, has Python objects (which would have to be
    unpickled), or stores columns one after the other.
    """
    try:
        version = np.lib.format.read_magic(file)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, by_columns, dtype = read(file, max_header_size=NUMPY_HEADER)
    except Exception as error:  # NumPy may raise anything for a malformed header
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InvalidArgument(f"{label}: cannot be read as an array of NumPy: {reason}") from error
    if dtype.hasobject:
        raise InvalidArgument(
            f"{label}: dtype must be a number, got {dtype}: arrays of Python objects are pickled,"
            " and unpickling a file can run any code; save the array with a numeric dtype"
        )
    if by_columns and len(shape) > 1:
        raise InvalidArgument(
            f"{label}: rows must be stored one after the other (C order), got Fortran order; save"
            " np.ascontiguousarray(array)"
        )
    return dtype.str, tuple(shape)
