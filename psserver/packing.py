"""Pack the rows, tombstones and admission counters of a captured shard into blocks.

A tombstone records the delete of a key. A block (storage/block.py) is the unit of the files on disk
that hold rows. A capture (capture.py) gives access to a shard as it was at one version, while
pushes continue.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psserver.capture import Capture, CapturedTable
from psserver.engine import Runner
from psserver.tombstones import joined
from storage.admission.gates import Occurrences, Versions
from storage.block import (
    BLOCK_BYTES,
    Block,
    Bytes,
    rows_per_block,
    tombstones_per_block,
)
from storage.kernels import Keys, Slots
from storage.slots import KEY, STEP, VERSION

CELLS_BYTES = BLOCK_BYTES - 4096  # bytes of a sketch (approximate counters) per block


def dirty_blocks(each: CapturedTable, upto: int, buffer: Bytes) -> Iterator[tuple[Block, Slots]]:
    """Yield blocks, without checksums, with the dirty rows of a table: those without an up-to-date
    copy in a block.

    upto    version; newer rows are skipped
    buffer  uint8[BLOCK_BYTES]  memory for the blocks: each is valid until the next is requested

    Each block comes with the slots of its rows, int64[n]. A row that is pushed while this generator
    runs may be missing, or be a mix of old and new numbers. Its slot then has a newer version.
    """
    start: int | None = 0
    most = rows_per_block(each.width)
    while start is not None:
        slots, start = each.scan.dirty(start, upto, most)
        if len(slots):
            # a row may be larger than a block
            block = Block.empty(each.number, each.width, len(slots), buffer if most > 1 else None)
            meta = each.scan.copy(slots, block.frequencies, block.rows)
            block.keys[:], block.versions[:] = meta[:, KEY], meta[:, VERSION]
            block.steps[:] = meta[:, STEP].view(np.int64)
            kept = (block.versions > 0) & (block.versions <= np.uint64(upto))
            if kept.any():  # others were pushed, or their slots used again, after they were found
                yield (block, slots) if kept.all() else (reduced(block, kept), slots[kept])


def tombstone_blocks(captured: Capture, after: int, buffer: Bytes) -> Iterator[Block]:
    """Yield blocks with the tombstones (records of deletes) that are newer than version ``after``.

    captured  the shard as of one version
    buffer    uint8[BLOCK_BYTES]  memory for the blocks: each is valid until the next is requested
    """
    size = tombstones_per_block()
    for number, dead in joined([part.after(after) for part in captured.tombstones]).by_table():
        for at in range(0, len(dead), size):
            part = dead.take(slice(at, at + size))
            block = Block.tombstones(number, len(part), buffer)
            block.keys[:], block.versions[:] = part.keys, part.versions
            block.causes[:] = part.causes
            yield block


Counted = tuple[int, Keys, Occurrences, Versions]  # number of the table, and counters of some keys


def counters_of(captured: Capture, after: int, engine: Runner) -> Iterator[Counted]:
    """Yield (table number, keys, totals, versions) with the exact admission counters that changed
    after version ``after``. Each tuple has counters of many keys of one table.

    keys      uint64[n]
    totals    uint32[n]  occurrences counted
    versions  uint64[n]  version of the counter's last change

    captured  the shard as of one version
    engine    runs the reads of the counters, on its thread

    A counter that changes while this generator runs may be missing, or newer than the captured
    version. The log has its new value.
    """
    most = tombstones_per_block()
    for each in captured.tables:
        slices = each.gate.changed(after)
        while (found := engine.run(lambda: next(slices, None))) is not None:  # noqa: B023
            keys, totals, versions = found
            for at in range(0, len(keys), most):
                part = slice(at, at + most)
                yield each.number, keys[part], totals[part], versions[part]


def cells_of(captured: Capture, but: set[int]) -> Iterator[tuple[int, int, Bytes]]:
    """Yield the sketches of all tables in pieces: (table number, offset in bytes, bytes).

    A sketch is the array of approximate admission counters of a table. Tables with exact counters
    are skipped. The bytes are those at the time of reading, not of the capture.

    captured  the shard as of one version
    but       numbers of more tables to skip
    """
    for each in captured.tables:
        if each.number in but:
            continue
        cells = each.gate.cells().view(np.uint8)
        for start in range(0, len(cells), CELLS_BYTES):
            yield each.number, start, cells[start : start + CELLS_BYTES]


def reduced(block: Block, kept: NDArray[np.bool_]) -> Block:
    """Return a new block, without a checksum, with some rows of a block: those with True in
    ``kept``, bool[n].
    """
    less = Block.empty(block.table, block.width, int(np.count_nonzero(kept)))
    copy_rows(block, kept, less, slice(None))
    return less


def copy_rows(source: Block, chosen: Any, target: Block, where: slice) -> None:
    """Copy rows from one block to another.

    chosen  index of the rows in ``source``: bool[n] or int64[m]
    where   range of the rows in ``target``
    """
    target.keys[where], target.versions[where] = source.keys[chosen], source.versions[chosen]
    target.steps[where] = source.steps[chosen]
    target.frequencies[where] = source.frequencies[chosen]
    target.rows[where] = source.rows[chosen]
