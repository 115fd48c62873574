"""Pack the rows, tombstones and admission counters of a captured shard into blocks.

A tombstone records the delete of a key. A block (storage/block.py) is the unit of the files on disk
that hold rows. A capture (capture.py) gives access to a shard as it was at one version, while
pushes continue.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from psserver.capture import Capture
from psserver.engine import Engine
from psserver.tombstones import joined
from storage.admission.gates import Occurrences, Versions
from storage.block import (
    BLOCK_BYTES,
    Block,
    Bytes,
    rows_per_block,
    tombstones_per_block,
)
from storage.kernels import Keys
from storage.slots import EVERY, KEY, STEP, VERSION

CELLS_BYTES = BLOCK_BYTES - 4096  # bytes of a sketch (approximate counters) per block


def blocks_of(captured: Capture, after: int, buffer: Bytes) -> Iterator[Block]:
    """Yield blocks, without checksums, with the tombstones and then the rows that changed after
    version ``after``, up to the captured version.

    captured  the shard as of one version
    after     version; 0: all rows
    buffer    uint8[BLOCK_BYTES]  memory for the blocks: each is valid until the next is requested

    A row that is pushed while this generator runs may be missing, or be a mix of old and new
    numbers. The log has its new contents.
    """
    yield from _tombstone_blocks(captured, after, buffer)
    for each in captured.tables:
        number, width, scan = each.number, each.width, each.scan
        start: int | None = 0
        most = rows_per_block(width)
        while start is not None:
            places, start = scan.find(start, after, captured.version, most, EVERY)
            if len(places):
                # a row may be larger than a block
                block = Block.empty(number, width, len(places), buffer if most > 1 else None)
                meta = scan.copy(places, block.frequencies, block.rows)
                block.keys[:], block.versions[:] = meta[:, KEY], meta[:, VERSION]
                block.steps[:] = meta[:, STEP].view(np.int64)
                yield from _unmoved(block, after, captured.version)


def _tombstone_blocks(captured: Capture, after: int, buffer: Bytes) -> Iterator[Block]:
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


def counters_of(captured: Capture, after: int, engine: Engine) -> Iterator[Counted]:
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


def _unmoved(block: Block, after: int, upto: int) -> Iterator[Block]:
    """Yield the block reduced to the rows with versions in ``after + 1..upto``; nothing if there
    are none.

    The other rows were pushed, or their slots reused for different keys, after the scan found them.
    """
    kept = (block.versions > np.uint64(after)) & (block.versions <= np.uint64(upto))
    if kept.all():
        yield block
    elif kept.any():
        less = Block.empty(block.table, block.width, int(kept.sum()))
        less.keys[:], less.versions[:] = block.keys[kept], block.versions[kept]
        less.steps[:], less.frequencies[:] = block.steps[kept], block.frequencies[kept]
        less.rows[:] = block.rows[kept]
        yield less
