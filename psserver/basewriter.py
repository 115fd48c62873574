"""Write the changes of a shard to its base, as one flush.

The base is the on-disk copy of all rows at one version of the log, in immutable blocks. Rows in
blocks may also be in host memory, or only in the block. A row is *live* in a block while the block
has the current value of its key. A row is *dirty* if no block has it.

    1  capture version S of the shard; choose sparse blocks, whose live rows are moved to new blocks
    2  copy dirty rows, moved rows, and new tombstones and counters to new blocks, while the shard
       works on
    3  write the directory: which rows of which blocks are live *now*, at a version T >= S
    4  sync the log up to T: it has the newest contents of rows that changed since S
    5  commit the new blocks and the directory to the base, with version S
    6  tell the shard where the rows are now (*adopt*), unless they changed meanwhile
    7  while the blocks of a table waste much space: move rows of more blocks, in steps 2 to 6
    8  delete the blocks whose rows the last commit has moved

A restart believes the directory, and replays the log after S. A row that changed between S and T is
not live in any block, so its row comes from the log. If the process is killed before step 5, the
base is as before. Blocks without live rows are taken from the shard in step 3, and the commit
deletes them. Blocks whose rows have been moved are needed until step 6, so a later commit deletes
them. A commit moves only a few rows, because they take space twice meanwhile. Steps 1, 3 and 6 run
on the engine thread, in slices; the other steps do not stop it.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import structlog
from numpy.typing import NDArray

from psserver.capture import Capture, CapturedTable
from psserver.compaction import (
    PART,
    SMALL_BYTES,
    Run,
    Source,
    choose,
    moved_blocks,
    moved_rows,
    roomy,
)
from psserver.counted import CounterWriter, Layer, Sketch, SketchWriter
from psserver.engine import Runner
from psserver.packing import dirty_blocks
from psserver.shard import Shard
from storage.base import Base
from storage.basestate import BaseState
from storage.block import BLOCK_BYTES, Block, rows_over, rows_per_block
from storage.damage import examine
from storage.directory import BlockEntry, Zones
from storage.directory import pack as pack_directory
from storage.errors import Corrupt, DiskFull, OutOfMemory
from storage.kernels import Slots
from storage.tiers.lmdb import Listed, Listing
from storage.versionlog import VersionLog

LISTED = 32  # blocks whose live rows are copied per call of the engine thread
MOST_ROUNDS = 32  # maximum number of times that a flush moves rows
MOVED = 8192  # rows that are moved in memory per call of the engine thread

log = structlog.get_logger()


@dataclass(slots=True)
class Stored:
    """What the base contains besides live rows, as far as a writer must know."""

    layers: list[Layer] = field(default_factory=list)  # tombstones and counters, oldest first
    small: dict[int, set[int]] = field(default_factory=dict)  # small blocks, by number of the table


@dataclass(frozen=True, slots=True)
class _New:
    """A new block of rows. The rows were either dirty or moved: one of ``slots`` and ``runs`` is
    empty.
    """

    number: int
    table: CapturedTable
    count: int
    zones: Zones
    slots: NDArray[Any]  # uint32[count] or int64[count], slots of the rows that were dirty
    runs: list[Run]  # where the rows came from that were moved


class Stopped(Exception):
    """The server stops, so the flush was given up. The base is as before."""


class BaseWriter:
    """Writes flushes of one shard to its base. One thread at a time may use it.

    stored  what the base contains
    stop    returns True if a flush is to be given up
    hurry   returns True if another flush is waited for
    """

    def __init__(
        self,
        shard: Shard,
        base: Base,
        versions: VersionLog,
        stored: Stored,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.base = base
        self.stop = stop
        self.hurry: Callable[[], bool] = lambda: False
        self._shard, self._versions, self._small = shard, versions, stored.small
        self._buffer = np.empty(BLOCK_BYTES, np.uint8)
        self._counters = CounterWriter(base, stored.layers, self._buffer, self._require_wanted)
        self._sketches = SketchWriter(base, self._require_wanted)
        self._listed = set[int]()  # numbers of the blocks in the committed directory
        self._listing = set[int]()  # the same for the directory that is being written

    def write(self, captured: Capture, engine: Runner) -> None:
        """Write all changes up to a captured version, and commit them to the base.

        captured  the shard at the version that the base will have
        engine    runs calls on the shard

        Raises Stopped if ``stop`` says so, DiskFull if the disk is full. After any error the caller
        must call ``base.discard``.
        """
        state = self.base.state
        sources = self._choose(captured, engine)
        new = [*self._write_dirty(captured), *self._write_moved(captured, sources)]
        layers = self._counters.write(captured, state, engine)
        sketches = self._sketches.write(captured, state)
        if self._store(captured, new, layers, sketches, engine):
            sources = self._make_space(captured, sources, engine)
        self._delete_moved(sources, captured, engine)

    def _make_space(
        self, captured: Capture, sources: dict[int, list[Source]], engine: Runner
    ) -> dict[int, list[Source]]:
        """Move rows of sparse blocks while the blocks of a table waste much space.

        captured  the shard at the version that the base has
        sources   blocks whose rows the last commit has moved, by number of the table

        Returns those whose rows the last commit has moved then. Stops if the disk is full, and
        earlier if another flush is waited for.
        """
        for _ in range(MOST_ROUNDS):
            if not self.crowded(captured, engine):
                break
            found, layers = self._choose(captured, engine), self._counters.layers
            try:
                new = list(self._write_moved(captured, found))
                adopted = self._store(captured, new, layers, self._sketches.stored, engine)
            except DiskFull as error:
                log.warning("the disk is too full to move rows", error=str(error))
                self.base.discard()
                break
            sources = found
            if not adopted:
                break
        return sources

    def _store(
        self,
        captured: Capture,
        new: list[_New],
        layers: list[Layer],
        sketches: dict[int, Sketch],
        engine: Runner,
    ) -> bool:
        """Write the directory, commit, and tell the shard where its rows are.

        captured  the shard at the version that the base gets
        new       the new blocks of rows
        layers    the tombstones and counters that the base gets
        sketches  the admission sketches that it gets, by number of the table

        Returns False if the shard had no memory for a block. The block is then only in the base,
        and the next commit deletes it: that commit must write all dirty rows again.
        """
        rows, directory = self._write_directory(captured, new, engine)
        self._versions.sync(engine.run(lambda: self._shard.version))
        cells = [block for sketch in sketches.values() for block in sketch.blocks]
        others = [block for layer in layers for block in layer.blocks]
        self._commit(captured, [*rows, *others], directory, cells)
        self._sketches.stored, self._counters.layers = sketches, layers
        self._listed = self._listing
        kept = set(rows)
        return self._adopt([each for each in new if each.number in kept], engine)

    def crowded(self, captured: Capture, engine: Runner) -> bool:
        """Return whether blocks waste much space, and moving their live rows can help.

        captured  the shard as of the last flush
        """
        return any(engine.run(partial(self._crowded_in, each)) for each in captured.tables)

    def _crowded_in(self, each: CapturedTable) -> bool:
        """Return what ``crowded`` does, for one table."""
        blocks, urgent = each.table.store.blocks, self.hurry()
        if blocks is None or not self._holds(each) or not roomy(blocks, each.width, urgent):
            return False
        return bool(choose(blocks, each.width, set()))

    def _require_wanted(self) -> None:
        if self.stop():
            raise Stopped

    # ---- rows

    def _choose(self, captured: Capture, engine: Runner) -> dict[int, list[Source]]:
        """Return the blocks whose live rows this flush moves, by number of the table."""
        chosen = {t.number: engine.run(partial(self._choose_in, t)) for t in captured.tables}
        return {number: sources for number, sources in chosen.items() if sources}

    def _choose_in(self, each: CapturedTable) -> list[Source]:
        """Return the blocks of a table whose live rows this flush moves."""
        store, small = each.table.store, self._small.setdefault(each.number, set())
        if not self._holds(each) or store.blocks is None or not store.blocks.live_rows:
            return []
        return choose(store.blocks, each.width, small)

    def _write_dirty(self, captured: Capture) -> Iterator[_New]:
        """Write the dirty rows of all tables to new blocks."""
        for each in captured.tables:
            for block, slots in dirty_blocks(each, captured.version, self._buffer):
                few = slots.astype(np.uint32) if slots[-1] < 1 << 32 else slots.copy()
                yield self._add(each, block, few, [])

    def _write_moved(self, captured: Capture, sources: dict[int, list[Source]]) -> Iterator[_New]:
        """Write the live rows of ``sources``, by number of the table, to new blocks."""
        for each in captured.tables:
            if each.number in sources:
                read = partial(self._read, each)
                found = moved_blocks(each.number, each.width, sources[each.number], read)
                for block, runs in found:
                    yield self._add(each, block, np.empty(0, np.int64), runs)

    def _read(self, each: CapturedTable, source: Source) -> tuple[Block, Slots]:
        """Return a block of the base, and the positions of rows to move that can be read.

        If the block is damaged, its other rows stay where they are.
        """
        try:
            return self.base.block(source.number), source.positions
        except Corrupt:
            self._shard.suspect(each.number, source.number)
        data = self.base.raw(source.number)
        block = rows_over(data, each.number, each.width, source.size, source.format)
        if block is None:
            return Block.empty(each.number, each.width, 0), source.positions[:0]
        damage = examine(data, each.width, source.size, source.format)
        lost = np.zeros(source.size, np.bool_) if damage is None else damage.lost
        return block, source.positions[~lost[source.positions]]

    def _add(self, each: CapturedTable, block: Block, slots: NDArray[Any], runs: list[Run]) -> _New:
        """Write a new block of rows of a table."""
        self._require_wanted()
        number = self.base.add(block.seal(each.table.schema.dim))
        return _New(number, each, len(block), Zones.of(block), slots, runs)

    def _holds(self, each: CapturedTable) -> bool:
        """Return whether a captured table still exists. Must run on the engine thread."""
        return self._shard.holds(each.number)

    # ---- the directory

    def _write_directory(
        self,
        captured: Capture,
        new: list[_New],
        engine: Runner,
    ) -> tuple[list[int], list[int]]:
        """Write which rows are live, according to the shard as it is now.

        Also takes blocks without live rows away from the shard.

        Returns (numbers of the blocks with rows to keep, numbers of the blocks of the directory).
        """
        rows: list[int] = []
        self._listing = set()
        entries = self._entries(captured, new, rows, engine)
        directory = [self.base.add(data) for data in pack_directory(entries)]
        held = engine.run(self._shard.held_blocks)
        return [*dict.fromkeys([*rows, *held])], directory

    def _entries(
        self,
        captured: Capture,
        new: list[_New],
        rows: list[int],
        engine: Runner,
    ) -> Iterator[BlockEntry]:
        """Yield the entries of the directory.

        rows  numbers of the blocks to keep are appended to it. Old blocks are kept even if the new
              blocks have all their rows, because the shard still reads them
        """
        for each in captured.tables:
            runs = [run for block in new if block.table is each for run in block.runs]
            moved = moved_rows(runs)
            extents = engine.run(partial(self._take_empty, each, moved.keys()))
            rows += [number for _, number in extents]
            for at in range(0, len(extents), LISTED):
                some = [extent for extent, _ in extents[at : at + LISTED]]
                if (read := engine.run(partial(self._listing_of, each, some))) is not None:
                    yield from self._old_entries(each, zip(some, read(), strict=True), moved)
        for block in new:
            live = engine.run(partial(self._live_in, block, captured.version))
            if live.any():
                rows.append(block.number)
                yield _entry(block.number, block.table, block.zones, live)

    def _take_empty(self, each: CapturedTable, busy: Container[int]) -> list[tuple[int, int]]:
        """Take blocks without live rows from a table. Return (extent, number) of its other blocks.

        busy  extents that are kept, because this flush moves their rows
        """
        blocks = each.table.store.blocks
        if blocks is None or not self._holds(each):
            return []
        for extent in blocks.empty():
            if extent not in busy:
                blocks.remove(extent)
        return list(blocks.extents())

    def _listing_of(self, each: CapturedTable, extents: list[int]) -> Listing | None:
        """Return ``Blocks.listing`` of some blocks; None if the table was dropped."""
        blocks = each.table.store.blocks
        return None if blocks is None or not self._holds(each) else blocks.listing(extents)

    def _old_entries(
        self, each: CapturedTable, listed: Iterable[tuple[int, Listed]], moved: dict[int, Slots]
    ) -> Iterator[BlockEntry]:
        """Yield the entries of those blocks of the shard that have live rows.

        listed  (extent, what ``Blocks.listing`` found) of each block
        moved   positions, by extent, of rows whose copies in a new block are to be live
        """
        for extent, (number, zones, live) in listed:
            if extent in moved:
                live[moved[extent]] = False
            if live.any():
                self._listing.add(number)
                yield _entry(number, each, zones, live)

    def _live_in(self, block: _New, upto: int) -> NDArray[np.bool_]:
        """Return which rows of a new block, bool[count], have not changed since they were copied.

        upto  version up to which rows were copied
        """
        store = block.table.table.store
        if not self._holds(block.table) or store.blocks is None:
            return np.zeros(block.count, np.bool_)
        if not block.runs:
            return store.waiting(block.slots.astype(np.int64), upto)
        return np.concatenate([store.blocks.live(r.extent)[r.positions] for r in block.runs])

    def _commit(
        self, captured: Capture, blocks: list[int], directory: list[int], cells: list[int]
    ) -> None:
        """Commit new contents of the base.

        captured   the shard at the version that the base gets
        blocks     numbers of the blocks with rows, tombstones and counters
        directory  numbers of the blocks with the directory
        cells      numbers of the blocks with admission sketches
        """
        self.base.commit(
            BaseState(
                lineage=self._versions.lineage,
                history=self._versions.history,
                version=captured.version,
                next_table=captured.next_table,
                tables=tuple(each.base for each in captured.tables),
                horizon=captured.horizon,
                sessions=captured.sessions.pack(),
                blocks=(*blocks, *directory, *cells),
                cells=len(cells),
                directory=len(directory),
                distinct=True,
                logged=True,
            )
        )

    def _delete_moved(
        self, sources: dict[int, list[Source]], captured: Capture, engine: Runner
    ) -> None:
        """Delete blocks whose rows have been moved, if they take much space.

        sources  the blocks whose rows this flush has moved, by number of the table
        """
        state, gone = self.base.state, set[int]()
        assert state is not None, "the flush has committed it"
        for each in captured.tables:
            moved = {source.extent for source in sources.get(each.number, ())}
            gone.update(engine.run(partial(self._take_moved, each, moved)))
        if gone:
            blocks = tuple(number for number in state.blocks if number not in gone)
            with suppress(DiskFull):  # then the next commit deletes them
                self.base.commit(replace(state, blocks=blocks))

    def _take_moved(self, each: CapturedTable, moved: set[int]) -> list[int]:
        """Take blocks without live rows from a table, if they take much space. Blocks that a scan
        reads stay, and blocks that the directory lists.

        moved  extents of the blocks whose rows have been moved

        Returns the numbers of the blocks.
        """
        blocks = each.table.store.blocks
        if blocks is None or not moved or not self._holds(each):
            return []
        numbers = {extent: blocks.number(extent) for extent in moved.intersection(blocks.empty())}
        empty = [extent for extent, number in numbers.items() if number not in self._listed]
        if blocks.size_of(empty) <= max(blocks.bytes // PART, SMALL_BYTES) // 4:
            return []
        return [blocks.remove(extent) for extent in empty]

    # ---- adoption

    def _adopt(self, new: list[_New], engine: Runner) -> bool:
        """Tell the shard about committed new blocks. Returns whether it has all of them now.

        A block for which there is no memory is not adopted: its rows stay dirty, or where they
        were, and the next flush deletes the block.
        """
        size, adopted = self.base.size, True
        for block in new:
            offset = self.base.offset(block.number)
            assert offset is not None, "a new block has pages of its own"
            try:
                extent = engine.run(partial(self._adopt_block, block, offset, size))
            except OutOfMemory as error:
                log.warning("no memory for a block on disk", error=str(error))
                extent, adopted = None, False
            if extent is None:
                continue
            if block.count < rows_per_block(block.table.width) // 2:
                self._small.setdefault(block.table.number, set()).add(block.number)
            for run in block.runs:
                for at in range(0, len(run.positions), MOVED):
                    positions = run.positions[at : at + MOVED]
                    part = Run(run.extent, positions, run.first + at)
                    engine.run(partial(self._adopt_run, block, extent, part))
        return adopted

    def _adopt_block(self, block: _New, offset: int, size: int) -> int | None:
        """Add a new block to its table, and make its rows clean that were dirty.

        offset  offset of the block in the file
        size    size of the file in bytes

        Returns the block's extent; None if the table was dropped. Raises OutOfMemory.
        """
        store = block.table.table.store
        blocks = store.blocks
        if blocks is None or not self._holds(block.table):
            return None
        self._shard.cover(size)
        with self._shard.budget.exceeding():  # so that rows can leave memory when it is exceeded
            extent = blocks.add(block.number, offset, block.count, block.zones, verified=True)
        if len(block.slots):
            slots = block.slots.astype(np.int64)
            store.adopt(extent, slots, blocks.keys(extent), blocks.versions(extent))
        return extent

    def _adopt_run(self, block: _New, extent: int, run: Run) -> None:
        """Make copies of moved rows in a new block current, instead of those in the old block."""
        if self._holds(block.table):
            block.table.table.store.move(run.extent, run.positions, extent, run.first)


def _entry(
    number: int,
    table: CapturedTable,
    zones: Zones,
    live: NDArray[np.bool_],
) -> BlockEntry:
    """Return the entry of a block in the directory."""
    return BlockEntry(
        number=number,
        table=table.number,
        width=table.width,
        count=len(live),
        zones=zones,
        live=live,
    )
