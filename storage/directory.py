"""The directory of a base: which rows of its blocks are current.

A base (the on-disk copy of all rows at one log version) consists of blocks. A row in a block is
*live* while it is the current value of its key: it was not pushed, moved or deleted since. The
directory has one entry for each block of rows that has live rows. It is stored in blocks of kind
DIRECTORY, which contain entries one after another:

    entry   = number u64 | table u32 | width u32 | count u32 | listed u32
              | least version u64 | greatest version u64 | least step i64 | greatest step i64
              | least frequency u64 | greatest frequency u64
              | least norm f32 | greatest norm f32 | which                           (80 bytes)
    which   = bits u8[(count + 7) / 8]          listed is 2^32-1: bit i % 8 of byte i / 8 is row i
            | dead u16[listed]                  positions of the rows that are not live, ascending
            zeros up to a multiple of 8 bytes

Little-endian. The shorter of the two forms is used, so that the entry of a block whose rows are all
live takes 80 bytes. Format 2 of the block has entries without norms, which are still read.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from storage.block import BLOCK_BYTES, DIRECTORY, Block, pack_entries, size_of
from storage.errors import Corrupt

_ENTRY = struct.Struct("<QIIIIQQqqQQff")
_OLD_ENTRY = struct.Struct("<QIIIIQQqqQQ")  # of format 2
_BITS = 2**32 - 1  # value of `listed` where bits follow
_ROOM = BLOCK_BYTES - size_of(DIRECTORY, 0, 0)  # bytes of entries in a block


@dataclass(frozen=True, slots=True, kw_only=True)
class Zones:
    """Bounds of the metadata of some rows, so that readers can skip all of them at once.

    A block's zones are those of all its rows, live or not. Norms of 0 to infinity are unknown.
    """

    least_version: int
    greatest_version: int
    least_step: int
    greatest_step: int
    least_frequency: int
    greatest_frequency: int
    least_norm: float = 0.0  # of the embeddings, in float32
    greatest_norm: float = math.inf

    @classmethod
    def of(cls, block: Block) -> Zones:
        """Return the bounds of all rows of a sealed block, which must have at least one."""
        norms = block.norms if len(block.norms) else np.array([0.0, np.inf], np.float32)
        versions, steps, frequencies = block.versions, block.steps, block.frequencies
        return cls(
            least_version=int(versions.min()),
            greatest_version=int(versions.max()),
            least_step=int(steps.min()),
            greatest_step=int(steps.max()),
            least_frequency=int(frequencies.min()),
            greatest_frequency=int(frequencies.max()),
            least_norm=float(np.fmin.reduce(norms, initial=np.inf)),
            greatest_norm=float(np.fmax.reduce(norms, initial=0.0)),
        )


_FIELDS = tuple(field.name for field in fields(Zones))
_values = attrgetter(*_FIELDS)  # of Zones, as a tuple


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockEntry:
    """The entry of one block of rows in the directory."""

    number: int  # the block's number in the base
    table: int  # number of the table
    width: int  # float32 numbers per row
    count: int  # number of rows, live or not; at most 65,536
    zones: Zones
    live: NDArray[np.bool_]  # [count]  True for live rows


def pack(entries: Iterable[BlockEntry]) -> Iterator[memoryview]:
    """Yield the bytes of sealed DIRECTORY blocks that contain the entries, in their order."""
    parts: list[bytes] = []
    taken = 0
    for entry in entries:
        data = _pack(entry)
        if taken + len(data) > _ROOM:
            yield pack_entries(np.frombuffer(b"".join(parts), np.uint8))
            parts, taken = [], 0
        parts.append(data)
        taken += len(data)
    if parts:
        yield pack_entries(np.frombuffer(b"".join(parts), np.uint8))


def unpack(block: Block, where: str) -> list[BlockEntry]:
    """Return the entries in a DIRECTORY block, in their order. Raises Corrupt.

    where  name of the block, for errors
    """
    data, at = block.entries.tobytes(), 0
    head = _ENTRY if block.format > 2 else _OLD_ENTRY
    entries = []
    while at < len(data):
        if at + head.size > len(data):
            raise Corrupt(where, f"the block ends within the entry at byte {at}")
        number, table, width, count, listed, *zones = head.unpack_from(data, at)
        at += head.size
        size = -(-count // 8) if listed == _BITS else 2 * listed
        if size + -size % 8 > len(data) - at:
            raise Corrupt(where, f"the block ends within the entry of block {number}")
        live = _live(data[at : at + size], count, listed)
        if live is None:
            raise Corrupt(where, f"the entry of block {number} lists a row that it does not have")
        at += size + -size % 8
        entries.append(
            BlockEntry(
                number=number,
                table=table,
                width=width,
                count=count,
                zones=Zones(**dict(zip(_FIELDS, zones, strict=False))),
                live=live,
            )
        )
    return entries


def _pack(entry: BlockEntry) -> bytes:
    """Return the bytes of one entry."""
    count, listed = entry.count, entry.count - int(np.count_nonzero(entry.live))
    if 2 * listed <= -(-count // 8):
        which = np.flatnonzero(~entry.live).astype("<u2").tobytes()
    else:
        listed = _BITS
        which = np.packbits(entry.live, bitorder="little").tobytes()
    head = _ENTRY.pack(entry.number, entry.table, entry.width, count, listed, *_values(entry.zones))
    return head + which + bytes(-len(which) % 8)


def _live(which: bytes, count: int, listed: int) -> NDArray[np.bool_] | None:
    """Return which rows of a block are live, bool[count]; None if ``which`` is invalid.

    which   the bits, or the positions of dead rows
    listed  number of positions; 2^32-1 if there are bits
    """
    if listed == _BITS:
        bits = np.unpackbits(np.frombuffer(which, np.uint8), bitorder="little")
        return None if bits[count:].any() else bits[:count].astype(np.bool_)
    dead = np.frombuffer(which, "<u2")
    if listed and (dead[-1] >= count or (dead[:-1] >= dead[1:]).any()):
        return None
    live = np.ones(count, np.bool_)
    live[dead] = False
    return live
