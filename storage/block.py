"""Pack many rows, tombstones or counters into one run of bytes: a block.

The base (the on-disk copy of all rows at one log version) and checkpoints consist of blocks. A
tombstone records the delete of a key. A counter has the occurrences of a key without a row. A
sketch counts such keys approximately; its array of counters is called cells. The directory of a
base describes its blocks of rows.

    block       = header body                        little-endian
    header      = magic[8] | format u32 | width u32 | count u64 | table u32 | kind u32
                  | start u64 | checksum u64 | zero[16]                           (64 bytes)
    body        = rows | tombstones | counters | cells | directory       depending on kind
    rows        = keys u64[count] | versions u64[count] | steps i64[count]
                  | frequencies u64[count] | norms f32[count] | gap | rows f32[count, width]
                  | zeros up to a multiple of 8 bytes
                  | sums u32[pieces] | zeros up to a multiple of 8 bytes          (kind 1)
    tombstones  = keys u64[count] | versions u64[count] | causes u32[count]
                  (kind 2; width is 0)
    counters    = keys u64[count] | versions u64[count] | totals u32[count]
                  (kind 3; width is 0)
    cells       = u8[count], a part of the bytes of a table's sketch, from byte ``start`` on
                  (kind 4; width is 0)
    directory   = u8[count], entries of the directory, see directory.py  (kind 5; width is 0)

``start`` is 0 in blocks of other kinds. The checksum is the xxh3_64 of all other bytes, with seed
0. The length of a block follows from its header. Every array begins at a multiple of 8 bytes, the
first one at a multiple of 64.

Rows are also read in place, from the base's file, where a block begins 16 bytes after the start of
a page. ``gap`` is zeros, so many that the first row begins at a multiple of 64 bytes in the file,
or of the largest power of two, up to 4,096, that divides the size of a row: so a row is in as few
cache lines and pages as possible. ``sums`` verify the parts of the block before them; see sums.py.
``norms`` are the L2 norms of the embeddings, so that readers who need only norms read no rows.

Older formats of kind 1 are still read: format 2 has no norms, and format 1 also no gap, no sums and
no zeros. Kind 5 has format 3, or 2 in older bases. The other kinds have format 1.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from storage.errors import Corrupt, UnknownFormat
from storage.kernels import Keys, Rows, norms_of
from storage.sums import SHIFT, piece_count, sum_pieces

Bytes = NDArray[np.uint8]
Data = bytes | bytearray | memoryview | Bytes

BLOCK_BYTES = (2 << 20) - 16  # size of a full block; with LMDB's 16 bytes it fills 512 pages
MAGIC = b"PSBLOCK\n"
ROWS, TOMBSTONES, COUNTERS, CELLS, DIRECTORY = KINDS = 1, 2, 3, 4, 5
FORMATS = {ROWS: 3, TOMBSTONES: 1, COUNTERS: 1, CELLS: 1, DIRECTORY: 3}  # that are written
READABLE = {ROWS: (1, 2, 3), TOMBSTONES: (1,), COUNTERS: (1,), CELLS: (1,), DIRECTORY: (2, 3)}
NEWEST = max(FORMATS.values())

_HEADER = struct.Struct("<8sIIQIIQQ16x")  # magic format width count table kind start checksum
_CHECKSUM = 40  # offset of the checksum
_ROW_META = 32  # bytes per row: key, version, step, frequency
_NORM = 4  # bytes per row
_TOMBSTONE = 20  # bytes: key, version, cause; or of a counter: key, version, total


def rows_per_block(width: int) -> int:
    """Return how many rows of ``width`` float32 numbers fit into a block of 2 MiB; at least 1."""
    count = (BLOCK_BYTES - _HEADER.size) // (_ROW_META + _NORM + 4 * width)
    while count > 1 and size_of(ROWS, width, count) > BLOCK_BYTES:
        count -= 1
    return max(1, count)


def tombstones_per_block() -> int:
    """Return how many tombstones, or how many counters, fit into a block of 2 MiB."""
    return (BLOCK_BYTES - _HEADER.size) // _TOMBSTONE


def disk_bytes(width: int) -> int:
    """Return the bytes of a row with ``width`` numbers in a block, with its metadata."""
    return _ROW_META + _NORM + 4 * width


def size_of(kind: int, width: int, count: int) -> int:
    """Return the size in bytes of a block, in the format in which its kind is written.

    kind   ROWS, TOMBSTONES, COUNTERS, CELLS or DIRECTORY
    width  float32 numbers per row; 0 for other kinds
    count  number of rows, tombstones or counters; for CELLS and DIRECTORY, number of bytes
    """
    if kind == ROWS:
        return row_layout(width, count, FORMATS[ROWS]).size
    return _HEADER.size + count * (1 if kind in (CELLS, DIRECTORY) else _TOMBSTONE)


class RowLayout(NamedTuple):
    """Offsets in a block of kind ROWS, in bytes."""

    norms: int  # of the first norm; 0: the block has no norms
    rows: int  # of the first row
    sums: int  # of the sums; also the number of bytes that they verify
    pieces: int  # number of sums
    size: int  # of the block


def row_layout(width: int, count: int, version: int) -> RowLayout:
    """Return where the parts of a block of kind ROWS are.

    width    float32 numbers per row
    count    number of rows
    version  format of the block, 1 to 3
    """
    rows = _HEADER.size + _ROW_META * count
    if version == 1:
        end = rows + 4 * width * count
        return RowLayout(0, rows, end, 0, end)
    norms = 0
    if version > 2:
        norms, rows = rows, rows + _NORM * count
    align = max(64, min(4096, 4 * width & -4 * width))
    rows = _whole(rows + SHIFT, align) - SHIFT
    end = _whole(rows + 4 * width * count, 8)
    pieces = piece_count(end // 8)
    return RowLayout(norms, rows, end, pieces, _whole(end + 4 * pieces, 8))


@dataclass(frozen=True, slots=True)
class Block:
    """One block: its bytes, and its arrays as views of these bytes.

    Arrays that blocks of this kind do not have are empty. To write a block, call ``empty`` or
    ``tombstones``, fill the arrays in place, then call ``seal``. To read a block, call ``unpack``.
    If the bytes are read-only, so are the arrays.
    """

    data: Bytes  # uint8[size], the whole block; the arrays below are parts of it
    table: int  # number of the table
    kind: int  # ROWS, TOMBSTONES, COUNTERS, CELLS or DIRECTORY
    keys: Keys  # uint64[count]
    versions: NDArray[np.uint64]  # [count]  version of the last push, or of the delete
    steps: NDArray[np.int64]  # [count]  step of the last push
    frequencies: NDArray[np.uint64]  # [count]
    norms: NDArray[np.float32]  # [count]  L2 norm of the embedding; empty in formats 1 and 2
    rows: Rows  # float32[count, width]  [embedding | state]
    causes: NDArray[np.uint32]  # [count]  Cause (records.py) of each delete
    totals: NDArray[np.uint32]  # [count]  occurrences of keys without a row
    cells: Bytes  # uint8[count]  a part of the bytes of a sketch
    entries: Bytes  # uint8[count]  entries of the directory
    sums: NDArray[np.uint32]  # [pieces]  sums of the pieces of the block; none in format 1
    format: int  # see the module docstring

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
    def _over(
        cls, data: Bytes, table: int, kind: int, width: int, count: int, version: int = 0
    ) -> Block:
        """Return a block whose arrays are views of ``data``.

        data     uint8[size_of(kind, width, count)], 8-byte aligned
        table    number of the table
        kind     ROWS, TOMBSTONES, COUNTERS, CELLS or DIRECTORY
        width    float32 numbers per row; 0 for other kinds
        count    number of rows, tombstones or counters; for CELLS and DIRECTORY, number of bytes
        version  format of the block; 0: the one in which blocks of this kind are written
        """
        end = _HEADER.size
        each = {of: count if of == kind else 0 for of in KINDS}
        keyed = count - each[CELLS] - each[DIRECTORY]
        alive = each[ROWS]
        version = version or FORMATS[kind]
        layout = row_layout(width, alive, version)

        def part(dtype: str, length: int, start: int | None = None) -> NDArray[Any]:
            nonlocal end
            start = end if start is None else start
            end = start + length * np.dtype(dtype).itemsize
            return data[start:end].view(dtype)

        keys, versions = part("<u8", keyed), part("<u8", keyed)
        steps, frequencies = part("<i8", alive), part("<u8", alive)
        norms = part("<f4", alive if layout.norms else 0)
        causes, totals = part("<u4", each[TOMBSTONES]), part("<u4", each[COUNTERS])
        cells, entries = part("u1", each[CELLS]), part("u1", each[DIRECTORY])
        rows = part("<f4", alive * width, layout.rows).reshape(alive, width)
        sums = part("<u4", layout.pieces if kind == ROWS else 0, layout.sums)
        return cls(
            *(data, table, kind, keys, versions, steps, frequencies, norms, rows, causes, totals),
            *(cells, entries, sums, version),
        )

    def __len__(self) -> int:
        """Return the number of keys, or of bytes for CELLS and DIRECTORY."""
        return len(self.keys) + len(self.cells) + len(self.entries)

    @property
    def width(self) -> int:
        """Number of float32 numbers per row; 0 in a block without rows."""
        return int(self.rows.shape[1])

    @property
    def start(self) -> int:
        """Position of ``cells`` in the whole sketch, in bytes. Only for a sealed block."""
        return int(_HEADER.unpack_from(self.data.data)[6])

    def seal(self, dim: int = 0, start: int = 0) -> memoryview:
        """Write header, norms and checksum into ``data``, and return a view of ``data``.

        dim    for ROWS: numbers in an embedding, the first part of a row; 0: all numbers of a row
        start  for CELLS: position of ``cells`` in the whole sketch, in bytes

        The caller must have filled the other arrays, because the checksum covers them.
        """
        if len(self.norms):
            self.norms[:] = norms_of(self.rows, dim or self.width)
        fields = (MAGIC, self.format, self.width, len(self), self.table, self.kind, start)
        _HEADER.pack_into(self.data.data, 0, *fields, 0)
        if len(self.sums):
            layout = row_layout(self.width, len(self), self.format)
            meta = _HEADER.size + _ROW_META * len(self) + self.norms.nbytes
            self.data[meta : layout.rows] = 0
            self.data[layout.rows + self.rows.nbytes : layout.sums] = 0
            self.data[layout.sums + self.sums.nbytes :] = 0
            body = layout.sums // 8
            sum_pieces(self.data[: layout.sums].view(np.uint64), body, self.sums)
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
    return block.seal(start=start)


def pack_entries(entries: Bytes) -> memoryview:
    """Return the bytes of a sealed block of kind DIRECTORY.

    entries  uint8[n]  the bytes of entries of the directory, which are copied
    """
    size = size_of(DIRECTORY, 0, len(entries))
    block = Block._over(np.empty(size, np.uint8), 0, DIRECTORY, 0, len(entries))
    block.entries[:] = entries
    return block.seal()


class Header(NamedTuple):
    """The fields of a block's header that describe its contents."""

    format: int
    width: int  # float32 numbers per row; 0 for other kinds
    length: int  # number of rows, tombstones or counters; for CELLS and DIRECTORY, of bytes
    table: int  # number of the table
    kind: int  # ROWS, TOMBSTONES, COUNTERS, CELLS or DIRECTORY

    @property
    def size(self) -> int:
        """Size of the block in bytes."""
        if self.kind == ROWS:
            return row_layout(self.width, self.length, self.format).size
        return size_of(self.kind, self.width, self.length)


def header_of(data: Data) -> Header | None:
    """Return the header at the start of ``data``; None if there is none that this release can read.

    The checksum is not verified.
    """
    raw = np.frombuffer(data, np.uint8)[: _HEADER.size]
    if len(raw) < _HEADER.size:
        return None
    magic, version, width, count, table, kind, _, _ = _HEADER.unpack_from(raw.data)
    readable = magic == MAGIC and version in READABLE.get(kind, ())
    return Header(version, width, count, table, kind) if readable else None


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
    if not 1 <= version <= NEWEST:
        raise UnknownFormat(where, version, NEWEST)
    if version not in READABLE.get(kind, ()):
        raise Corrupt(
            where, f"expected a block of kind 1 to 5, got kind {kind} in format {version}"
        )
    size = Header(version, width, count, table, kind).size
    if len(raw) != size:
        raise Corrupt(where, f"expected a block of {size} bytes, got {len(raw)}")
    return Block._over(raw, table, kind, width, count, version)


def rows_over(data: Bytes, table: int, width: int, count: int, version: int) -> Block | None:
    """Return the block of rows in ``data``, which may be damaged; None if ``data`` is too short.

    table, width, count, version  number of the table, float32 numbers per row, number of rows, and
                                  format of the block that was written

    Verifies nothing. ``data`` may end with zeros.
    """
    if len(data) < row_layout(width, count, version).size:
        return None
    return Block._over(data, table, ROWS, width, count, version)


def verify(data: Data, where: str) -> None:
    """Raise Corrupt or UnknownFormat unless ``data`` is an intact block; see ``unpack``."""
    unpack(data, where)


def _whole(size: int, unit: int) -> int:
    """Return ``size`` rounded up to a multiple of ``unit``."""
    return -(-size // unit) * unit


def _take(buffer: Bytes | None, size: int) -> Bytes:
    return np.empty(size, np.uint8) if buffer is None else buffer[:size]


def _checksum(data: Bytes) -> int:
    state = xxhash.xxh3_64(data[:_CHECKSUM].data)
    state.update(data[_CHECKSUM + 8 :].data)
    return int(state.intdigest())
