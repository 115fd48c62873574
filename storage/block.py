"""Pack many rows, tombstones or counters into one run of bytes: a block.

The base (the on-disk copy of all rows at one log version) and checkpoints consist of blocks. A
tombstone records the delete of a key. A counter has the occurrences of a key without a row. A
sketch counts such keys approximately; its array of counters is called cells.

    block       = header body                        little-endian
    header      = magic[8] | format u32 | width u32 | count u64 | table u32 | kind u32
                  | start u64 | checksum u64 | zero[16]                           (64 bytes)
    body        = rows | tombstones | counters | cells       depending on kind
    rows        = keys u64[count] | versions u64[count] | steps i64[count]
                  | frequencies u64[count] | rows f32[count, width]               (kind 1)
    tombstones  = keys u64[count] | versions u64[count] | causes u32[count]
                  (kind 2; width is 0)
    counters    = keys u64[count] | versions u64[count] | totals u32[count]
                  (kind 3; width is 0)
    cells       = u8[count], a part of the bytes of a table's sketch, from byte ``start`` on
                  (kind 4; width is 0)

``start`` is 0 in blocks of other kinds. The checksum is the xxh3_64 of all other bytes, with seed
0. The length of a block follows from its header. Every array begins at a multiple of 8 bytes, the
first one at a multiple of 64.
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

BLOCK_BYTES = (2 << 20) - 16  # size of a full block; with LMDB's 16 bytes it fills 512 pages
MAGIC = b"PSBLOCK\n"
FORMAT = 1
ROWS, TOMBSTONES, COUNTERS, CELLS = KINDS = 1, 2, 3, 4

_HEADER = struct.Struct("<8sIIQIIQQ16x")  # magic format width count table kind start checksum
_CHECKSUM = 40  # offset of the checksum
_ROW_META = 32  # bytes per row in addition to its numbers: key, version, step, frequency
_TOMBSTONE = 20  # bytes: key, version, cause; or of a counter: key, version, total


def rows_per_block(width: int) -> int:
    """Return how many rows of ``width`` float32 numbers fit into a block of 2 MiB; at least 1."""
    return max(1, (BLOCK_BYTES - _HEADER.size) // (_ROW_META + 4 * width))


def tombstones_per_block() -> int:
    """Return how many tombstones, or how many counters, fit into a block of 2 MiB."""
    return (BLOCK_BYTES - _HEADER.size) // _TOMBSTONE


def size_of(kind: int, width: int, count: int) -> int:
    """Return the size in bytes of a block.

    kind   ROWS, TOMBSTONES, COUNTERS or CELLS
    width  float32 numbers per row; 0 for other kinds
    count  number of rows, tombstones or counters; for CELLS, number of bytes
    """
    each = {ROWS: _ROW_META + 4 * width, CELLS: 1}.get(kind, _TOMBSTONE)
    return _HEADER.size + count * each


@dataclass(frozen=True, slots=True)
class Block:
    """One block: its bytes, and its arrays as views of these bytes.

    Arrays that blocks of this kind do not have are empty. To write a block, call ``empty`` or
    ``tombstones``, fill the arrays in place, then call ``seal``. To read a block, call ``unpack``.
    If the bytes are read-only, so are the arrays.
    """

    data: Bytes  # uint8[size], the whole block; the arrays below are parts of it
    table: int  # number of the table
    kind: int  # ROWS, TOMBSTONES, COUNTERS or CELLS
    keys: Keys  # uint64[count]
    versions: NDArray[np.uint64]  # [count]  version of the last push, or of the delete
    steps: NDArray[np.int64]  # [count]  step of the last push
    frequencies: NDArray[np.uint64]  # [count]
    rows: Rows  # float32[count, width]  [embedding | state]
    causes: NDArray[np.uint32]  # [count]  Cause (records.py) of each delete
    totals: NDArray[np.uint32]  # [count]  occurrences of keys without a row
    cells: Bytes  # uint8[count]  a part of the bytes of a sketch

    @classmethod
    def empty(cls, table: int, width: int, count: int, buffer: Bytes | None = None) -> Block:
        """Return a block of ``count`` rows with undefined contents, for the caller to fill.

        table   number of the table
        width   float32 numbers per row
        buffer  uint8[>= size_of(ROWS, width, count)], 8-byte aligned, memory to use; None: new
                memory. Reusing one buffer for many blocks keeps it in the CPU's cache
        """
        return cls._over(_take(buffer, size_of(ROWS, width, count)), table, ROWS, width, count)

    @classmethod
    def tombstones(cls, table: int, count: int, buffer: Bytes | None = None) -> Block:
        """Return a block of ``count`` tombstones with undefined contents, for the caller to fill.

        table   number of the table
        buffer  memory to use, as in ``empty``; None: new memory
        """
        return cls._over(_take(buffer, size_of(TOMBSTONES, 0, count)), table, TOMBSTONES, 0, count)

    @classmethod
    def _over(cls, data: Bytes, table: int, kind: int, width: int, count: int) -> Block:
        """Return a block whose arrays are views of ``data``.

        data   uint8[size_of(kind, width, count)], 8-byte aligned
        table  number of the table
        kind   ROWS, TOMBSTONES, COUNTERS or CELLS
        width  float32 numbers per row; 0 for other kinds
        count  number of rows, tombstones or counters; for CELLS, number of bytes
        """
        end = _HEADER.size
        each = {of: count if of == kind else 0 for of in KINDS}
        keyed = count - each[CELLS]

        def part(dtype: str, length: int) -> NDArray[Any]:
            nonlocal end
            start, end = end, end + length * np.dtype(dtype).itemsize
            return data[start:end].view(dtype)

        alive = each[ROWS]
        keys, versions = part("<u8", keyed), part("<u8", keyed)
        steps, frequencies = part("<i8", alive), part("<u8", alive)
        rows = part("<f4", alive * width).reshape(alive, width)
        causes, totals = part("<u4", each[TOMBSTONES]), part("<u4", each[COUNTERS])
        cells = part("u1", each[CELLS])
        return cls(
            data, table, kind, keys, versions, steps, frequencies, rows, causes, totals, cells
        )

    def __len__(self) -> int:
        """Return the number of keys, or of bytes for CELLS."""
        return len(self.keys) + len(self.cells)

    @property
    def width(self) -> int:
        """Number of float32 numbers per row; 0 in a block without rows."""
        return int(self.rows.shape[1])

    @property
    def start(self) -> int:
        """Position of ``cells`` in the whole sketch, in bytes. Only for a sealed block."""
        return int(_HEADER.unpack_from(self.data.data)[6])

    def seal(self, start: int = 0) -> memoryview:
        """Write header and checksum into ``data``, and return a view of ``data``, without a copy.

        start  for CELLS: position of ``cells`` in the whole sketch, in bytes

        The caller must have filled the arrays, because the checksum covers them.
        """
        fields = (MAGIC, FORMAT, self.width, len(self), self.table, self.kind, start)
        _HEADER.pack_into(self.data.data, 0, *fields, 0)
        struct.pack_into("<Q", self.data.data, _CHECKSUM, _checksum(self.data))
        return self.data.data


def pack_counters(
    table: int, keys: Keys, versions: NDArray[np.uint64], totals: NDArray[np.uint32]
) -> memoryview:
    """Return the bytes of a sealed block of counters, with copies of the arrays.

    table     number of the table
    keys      uint64[n]
    versions  uint64[n]  log version of each counter's last change
    totals    uint32[n]  occurrences of each key
    """
    size = size_of(COUNTERS, 0, len(keys))
    block = Block._over(np.empty(size, np.uint8), table, COUNTERS, 0, len(keys))
    block.keys[:], block.versions[:], block.totals[:] = keys, versions, totals
    return block.seal()


def pack_cells(table: int, start: int, cells: Bytes) -> memoryview:
    """Return the bytes of a sealed block with a copy of some bytes of a table's sketch.

    table  number of the table
    start  position of ``cells`` in the whole sketch, in bytes
    cells  uint8[n]  the bytes to copy
    """
    size = size_of(CELLS, 0, len(cells))
    block = Block._over(np.empty(size, np.uint8), table, CELLS, 0, len(cells))
    block.cells[:] = cells
    return block.seal(start)


def unpack(data: Data, where: str) -> Block:
    """Return the block in ``data``. Verifies magic, checksum, format, kind and length.

    where  name of the block, for errors

    The arrays are views of ``data``, or of a copy if ``data`` is not 8-byte aligned. Raises Corrupt
    or UnknownFormat.
    """
    raw: Bytes = np.frombuffer(data, np.uint8)
    if raw.ctypes.data % 8:
        raw = raw.copy()
    if len(raw) < _HEADER.size:
        raise Corrupt(where, f"expected at least {_HEADER.size} bytes in a block, got {len(raw)}")
    magic, version, width, count, table, kind, _, checksum = _HEADER.unpack_from(raw.data)
    if magic != MAGIC:
        raise Corrupt(where, f"a block must begin with {MAGIC!r}, got {magic!r}")
    if _checksum(raw) != checksum:
        raise Corrupt(where, "the checksum of the block does not match its bytes")
    if version != FORMAT:
        raise UnknownFormat(where, version, FORMAT)
    if kind not in KINDS:
        raise Corrupt(where, f"expected a block of kind 1, 2, 3 or 4, got kind {kind}")
    if len(raw) != size_of(kind, width, count):
        raise Corrupt(
            where, f"expected a block of {size_of(kind, width, count)} bytes, got {len(raw)}"
        )
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
