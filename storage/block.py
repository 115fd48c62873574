"""Many rows, or tombstones, as one run of bytes: the unit of base state, checkpoint and snapshot.

    block       = header body                        little-endian
    header      = magic[8] | format u32 | width u32 | count u64 | table u32 | kind u32
                  | zero u64 | checksum u64 | zero[16]                            (64 bytes)
    body        = rows | tombstones                  as kind says
    rows        = keys u64[count] | versions u64[count] | steps i64[count]
                  | frequencies u64[count] | rows f32[count, width]               (kind 1)
    tombstones  = keys u64[count] | versions u64[count] | causes u32[count]
                  (kind 2; width is 0)

The checksum is the xxh3_64 of all other bytes, seed 0. A block is exactly as long as its header
says. Every array begins at a multiple of 8 bytes, the first at a multiple of 64.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from storage.errors import Corrupt, UnknownFormat
from storage.kernels import Keys, Rows

Bytes = NDArray[np.uint8]
Data = bytes | bytearray | memoryview | Bytes

BLOCK_BYTES = (2 << 20) - 16  # of a full block; with LMDB's 16 bytes, 512 pages
MAGIC = b"PSBLOCK\n"
FORMAT = 1
ROWS, TOMBSTONES = 1, 2

_HEADER = struct.Struct("<8sIIQIIQQ16x")  # magic format width count table kind zero checksum
_CHECKSUM = 40  # offset of the checksum
_ROW_META = 32  # bytes beside a row: key, version, step, frequency
_TOMBSTONE = 20  # bytes: key, version, cause


def rows_per_block(width: int) -> int:
    """Rows of ``width`` numbers that fill a block; at least one."""
    return max(1, (BLOCK_BYTES - _HEADER.size) // (_ROW_META + 4 * width))


def tombstones_per_block() -> int:
    """Tombstones that fill a block."""
    return (BLOCK_BYTES - _HEADER.size) // _TOMBSTONE


def size_of(kind: int, width: int, count: int) -> int:
    """Bytes of a block of ``count`` rows or tombstones."""
    return _HEADER.size + count * (_ROW_META + 4 * width if kind == ROWS else _TOMBSTONE)


@dataclass(frozen=True, slots=True)
class Block:
    """Views into the bytes of one block; nothing is copied. Arrays of the other kind are empty.

    A new block comes from ``empty`` or ``tombstones``: fill the arrays in place, then ``seal``.
    A stored one comes from ``unpack``; where its bytes are read-only, so are the arrays.
    """

    data: Bytes  # uint8[size], all of the block; the arrays below are parts of it
    table: int  # number of the table
    kind: int  # ROWS or TOMBSTONES
    keys: Keys  # uint64[count]
    versions: NDArray[np.uint64]  # [count]  last push, or the delete
    steps: NDArray[np.int64]  # [count]  of the last push
    frequencies: NDArray[np.uint64]  # [count]
    rows: Rows  # float32[count, width]  [embedding | state]
    causes: NDArray[np.uint32]  # [count]  why the keys were deleted

    @classmethod
    def empty(cls, table: int, width: int, count: int, buffer: Bytes | None = None) -> Block:
        """A block of ``count`` rows whose arrays are still undefined.

        ``buffer``, uint8 and at least ``size_of(ROWS, width, count)`` bytes, 8-byte aligned, is
        used for it if given: a loop over blocks then touches the same, cached memory.
        """
        return cls._over(_take(buffer, size_of(ROWS, width, count)), table, ROWS, width, count)

    @classmethod
    def tombstones(cls, table: int, count: int, buffer: Bytes | None = None) -> Block:
        """A block of ``count`` tombstones whose arrays are still undefined; see ``empty``."""
        return cls._over(_take(buffer, size_of(TOMBSTONES, 0, count)), table, TOMBSTONES, 0, count)

    @classmethod
    def _over(cls, data: Bytes, table: int, kind: int, width: int, count: int) -> Block:
        """The views of a block over its bytes, the header excepted."""
        end = _HEADER.size

        def part(dtype: str, length: int) -> NDArray[Any]:
            nonlocal end
            start, end = end, end + length * np.dtype(dtype).itemsize
            return data[start:end].view(dtype)

        alive, dead = (count, 0) if kind == ROWS else (0, count)
        keys, versions = part("<u8", count), part("<u8", count)
        steps, frequencies = part("<i8", alive), part("<u8", alive)
        rows = part("<f4", alive * width).reshape(alive, width)
        return cls(data, table, kind, keys, versions, steps, frequencies, rows, part("<u4", dead))

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def width(self) -> int:
        """Numbers in a row; 0 for tombstones."""
        return int(self.rows.shape[1])

    def seal(self) -> memoryview:
        """Write header and checksum; the block's bytes, not a copy. Fill the arrays before."""
        fields = (MAGIC, FORMAT, self.width, len(self), self.table, self.kind, 0)
        _HEADER.pack_into(self.data.data, 0, *fields, 0)
        struct.pack_into("<Q", self.data.data, _CHECKSUM, _checksum(self.data))
        return self.data.data


def pack_rows(
    table: int,
    keys: Keys,
    versions: NDArray[np.uint64],
    steps: NDArray[np.int64],
    frequencies: NDArray[np.uint64],
    rows: Rows,
) -> memoryview:
    """A sealed block of copies of these arrays: [n], and rows [n, width]."""
    block = Block.empty(table, rows.shape[1], len(keys))
    block.keys[:], block.versions[:], block.steps[:] = keys, versions, steps
    block.frequencies[:], block.rows[:] = frequencies, rows
    return block.seal()


def pack_tombstones(
    table: int, keys: Keys, versions: NDArray[np.uint64], causes: NDArray[np.uint32]
) -> memoryview:
    """A sealed block of copies of these arrays, each [n]."""
    block = Block.tombstones(table, len(keys))
    block.keys[:], block.versions[:], block.causes[:] = keys, versions, causes
    return block.seal()


def unpack(data: Data, where: str) -> Block:
    """The block in ``data``, checked: views, or views of a copy if the bytes are not aligned.

    ``where`` names the block in Corrupt, which is raised unless magic, checksum and length are
    right, and in UnknownFormat.
    """
    raw: Bytes = np.frombuffer(data, np.uint8)
    if raw.ctypes.data % 8:
        raw = raw.copy()
    if len(raw) < _HEADER.size:
        raise Corrupt(where, f"{len(raw)} bytes are too few for a block")
    magic, version, width, count, table, kind, _, checksum = _HEADER.unpack_from(raw.data)
    if magic != MAGIC:
        raise Corrupt(where, f"a block does not begin with {magic!r}")
    if _checksum(raw) != checksum:
        raise Corrupt(where, "the checksum of the block does not fit its bytes")
    if version != FORMAT:
        raise UnknownFormat(where, version, FORMAT)
    if kind not in (ROWS, TOMBSTONES):
        raise Corrupt(where, f"a block of kind {kind} is unknown")
    if len(raw) != size_of(kind, width, count):
        raise Corrupt(where, f"the block is {len(raw)} bytes, not {size_of(kind, width, count)}")
    return Block._over(raw, table, kind, width, count)


def verify(data: Data, where: str) -> None:
    """Raise Corrupt or UnknownFormat unless ``data`` is an intact block; see ``unpack``."""
    unpack(data, where)


def _take(buffer: Bytes | None, size: int) -> Bytes:
    return np.empty(size, np.uint8) if buffer is None else buffer[:size]


def _checksum(data: Bytes) -> int:
    state = xxhash.xxh3_64(data[:_CHECKSUM].data)
    state.update(data[_CHECKSUM + 8 :].data)
    return int(state.intdigest())
