"""The rows, tombstones and counters of a captured shard, packed into blocks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from psserver.engine import Engine
from psserver.tombstones import joined
from psserver.views import Capture
from storage.admission.gates import Occurrences, Versions
from storage.block import (
    BLOCK_BYTES,
    Block,
    Bytes,
    rows_per_block,
    tombstones_per_block,
)
from storage.kernels import Keys
from storage.tiers.base import EVERY, KEY, STEP, VERSION

CELLS_BYTES = BLOCK_BYTES - 4096  # bytes of a sketch per block


def blocks_of(captured: Capture, after: int, buffer: Bytes) -> Iterator[Block]:
    """Yield what changed after version ``after``, up to the captured version, as unsealed blocks.

    Tombstones come first, then rows. A row that changes meanwhile may be missing or torn.

    buffer  uint8[BLOCK_BYTES]; a block is valid until the next one is asked for
    """
    size = tombstones_per_block()
    for number, dead in joined([part.after(after) for part in captured.tombstones]).by_table():
        for at in range(0, len(dead), size):
            part = dead.take(slice(at, at + size))
            block = Block.tombstones(number, len(part), buffer)
            block.keys[:], block.versions[:] = part.keys, part.versions
            block.causes[:] = part.causes
            yield block
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


Counted = tuple[int, Keys, Occurrences, Versions]  # number of the table, and its counters


def counters_of(captured: Capture, after: int, engine: Engine) -> Iterator[Counted]:
    """Yield exact counters that changed after version ``after``, in slices, as they are now.

    A counter that changes meanwhile may be missing or newer. The log has a record after the
    captured version with its new value.
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
    """Yield the sketches as they are now: number of the table, index of the first byte, bytes.

    but  numbers of tables whose sketches are left out
    """
    for each in captured.tables:
        if each.number in but:
            continue
        cells = each.gate.cells().view(np.uint8)
        for start in range(0, len(cells), CELLS_BYTES):
            yield each.number, start, cells[start : start + CELLS_BYTES]


def _unmoved(block: Block, after: int, upto: int) -> Iterator[Block]:
    """Yield the block without the rows that left their slots while they were copied.

    The slots may hold other keys by now, even keys that the block has already.
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
