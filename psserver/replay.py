"""Recover a shard from its data directory when its server starts.

    data directory = LOCK  SHARD  log/ (storage/versionlog.py)  base/ (storage/base.py)

The base has a copy of all rows at one log version. The log has the changes after this version.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass

import numpy as np
import structlog

from psserver.basewriter import BaseWriter, Stored
from psserver.counted import Layer
from psserver.engine import Inline
from psserver.shard import Shard
from storage.base import Base
from storage.basestate import BaseState
from storage.block import (
    COUNTERS,
    FORMATS,
    ROWS,
    TOMBSTONES,
    Block,
    header_of,
    row_layout,
    rows_per_block,
)
from storage.blockfile import BlockFile
from storage.damage import examine
from storage.directory import BlockEntry, unpack
from storage.emptybase import DATA
from storage.errors import Corrupt, DiskFull
from storage.history import History, draw_epoch
from storage.inplace import HEADER
from storage.records import decode
from storage.versionlog import VersionLog

WARMED = 64  # blocks whose keys are read from the disk at once
REPLAY_BYTES = 4 << 20  # bytes of the log per read

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Recovered:
    """How much data a recovery has found, and what is needed to write to the base from now on."""

    rows: int  # rows, tombstones and counters found in the base
    records: int  # log records replayed
    record_bytes: int  # size of the replayed log records, in bytes
    writer: BaseWriter


def restore_excess(budget: int) -> int:
    """Return the number of bytes by which a shard may exceed its memory budget while it loads
    restored data.

    budget  memory budget, in bytes

    Indexes are randomized, so the same rows need slightly different amounts of memory on two
    servers. With this margin, rows that fitted into one shard fit into every shard with an equal
    budget.
    """
    return budget // 16 + (2 << 20)


def recover(shard: Shard, base: Base, versions: VersionLog, excess: int | None = None) -> Recovered:
    """Recover an empty shard: load the base, then replay the log records after it.

    versions  log of the shard
    excess    bytes by which the tables may exceed the memory budget; None: no limit

    The rows of the base stay there. If the replayed rows fill the memory, they are flushed to the
    base, so that rows can leave the memory. Draws the epoch (random number) of this server start,
    and records it in the base. Raises Corrupt if stored bytes are damaged, OutOfMemory if the
    tables exceed the budget by more than ``excess``.
    """
    file = BlockFile(base.directory / DATA).open()
    shard.keep_in(file)
    try:
        return _recover(shard, base, file, versions, excess)
    except BaseException:
        shard.close_file()
        raise


def _recover(
    shard: Shard, base: Base, file: BlockFile, versions: VersionLog, excess: int | None
) -> Recovered:
    shard.recovery.begin(excess)
    stored, rows = _load_base(shard, base, file)
    if versions.first > shard.version + 1:
        raise Corrupt(
            str(base.directory),
            f"the base ends at version {shard.version}, but the log begins at version"
            f" {versions.first}: changes between them are missing",
        )
    _draw_epoch(base, versions)
    writer = BaseWriter(shard, base, versions, stored)
    records, size = _replay(shard, versions, writer)
    shard.recovery.finish()
    if shard.version != versions.last:
        raise Corrupt(
            str(versions.directory),
            f"expected changes up to version {versions.last}, but recovery ended at version"
            f" {shard.version}",
        )
    _store_epoch(base, versions)
    return Recovered(rows, records, size, writer)


def _replay(shard: Shard, versions: VersionLog, writer: BaseWriter) -> tuple[int, int]:
    """Replay the log records after the shard's version. Returns (their number, their bytes)."""
    records = size = 0
    with closing(versions.cursor(shard.version)) as cursor:
        while frames := cursor.read(upto=versions.last, max_bytes=REPLAY_BYTES):
            for frame in frames:
                shard.recovery.replay(frame.version, decode(frame))
                size += len(frame.payload)
                if shard.recovery.pressed:
                    _relieve(shard, writer)
            records += len(frames)
    return records, size


def _relieve(shard: Shard, writer: BaseWriter) -> None:
    """Flush the replayed rows, so that they may leave the memory. If the disk is full, they stay:
    a shard loads everything that it has acknowledged, whatever its memory budget is.
    """
    try:
        writer.write(shard.capture(), Inline())
    except DiskFull as error:
        log.warning("no flush during the recovery", error=str(error))
        with suppress(DiskFull):
            writer.base.discard()
    shard.recovery.pressed = False


def _load_base(shard: Shard, base: Base, file: BlockFile) -> tuple[Stored, int]:
    """Load the base into an empty shard.

    file  the map of the base's file

    Returns (what the base contains besides rows; number of its rows, tombstones and counters).
    """
    stored, rows, state = Stored(), 0, base.state
    if state is None:
        return stored, rows
    shard.recovery.load_state(state)
    end = len(state.blocks) - state.cells
    start = end - state.directory
    listed, others = set[int](), Layer(0)
    for number in state.blocks[start:end]:
        entries = unpack(base.block(number), f"block {number} of the directory")
        for entry, offset in _warmed(base, file, entries):
            shard.recovery.adopt(entry, offset)
            listed.add(entry.number)
            rows += int(np.count_nonzero(entry.live))
            if entry.count < rows_per_block(entry.width) // 2:
                stored.small.setdefault(entry.table, set()).add(entry.number)
    for number in (*state.blocks[:start], *state.blocks[end:]):
        if number in listed:
            continue
        block = _other_block(base, number)
        if block is None:
            continue
        shard.recovery.load_block(block, number, base.offset(number))
        if block.kind in (TOMBSTONES, COUNTERS):
            others.blocks.append(number)
            others.entries += len(block)
        if block.kind != ROWS or not state.distinct:
            rows += len(block.keys)
    stored.layers += [others] if others.blocks else []
    shard.recovery.blocks_loaded()
    return stored, rows


def _other_block(base: Base, number: int) -> Block | None:
    """Return a block that the directory does not list; None if its rows are not needed.

    If there is a directory, rows of other blocks are outdated: such blocks may be damaged. Raises
    Corrupt for other damage.
    """
    try:
        return base.block(number)
    except Corrupt:
        data = base.raw(number)
        header = header_of(data)
        if base.state is None or not base.state.distinct or header is None or header.kind != ROWS:
            raise
        damage = examine(data, header.width, header.length, header.format)
        if damage is None or not damage.intact[:1].any():  # the header may be damaged, too
            raise
        return None


def _warmed(
    base: Base, file: BlockFile, entries: list[BlockEntry]
) -> Iterator[tuple[BlockEntry, int]]:
    """Yield (entry, offset of its block in the file), after the keys of the block were read.

    The keys of many blocks, and the sums that verify them, are read from the disk at once.
    """
    for at in range(0, len(entries), WARMED):
        some = entries[at : at + WARMED]
        offsets = np.array([_offset(base, entry.number) for entry in some], np.int64)
        size = min(HEADER + 8 * max(entry.count for entry in some), base.size)
        file.warm(np.minimum(offsets, base.size - size), size)
        sums = offsets + [
            row_layout(entry.width, entry.count, FORMATS[ROWS]).sums for entry in some
        ]
        file.warm(np.minimum(sums, base.size - 1), 1)
        yield from zip(some, offsets.tolist(), strict=True)


def _offset(base: Base, number: int) -> int:
    """Return the offset in the base's file of a block that its directory lists."""
    offset = base.offset(number)
    if offset is None:
        raise Corrupt(f"{base.directory}: block {number}", "it is not stored in pages of its own")
    return offset


def _draw_epoch(base: Base, versions: VersionLog) -> None:
    """Draw the epoch (random number) of this server start."""
    state, epoch = base.state, draw_epoch()
    if state is None:
        versions.history = History((epoch,))
    else:
        versions.history = state.history.begin(epoch, versions.last)


def _store_epoch(base: Base, versions: VersionLog) -> None:
    """Commit the epoch of this server start to the base, together with the fact that a log exists.

    If the disk is full, the next flush commits them instead. If the server restarts before that
    flush, it does not recognize versions of this epoch, and subscribers that have such versions
    start with a snapshot.
    """
    state = base.state or BaseState(
        lineage=versions.lineage,
        history=versions.history,
        version=0,
        next_table=1,
        distinct=True,
    )
    with suppress(DiskFull):
        base.commit(dataclasses.replace(state, history=versions.history, logged=True))
