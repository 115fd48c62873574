"""What a shard keeps in its data directory beside the log: made in the background, read at a start.

    data directory = LOCK  SHARD  log/ (storage/versionlog.py)  base/ (storage/base.py)

A checkpoint takes the shard's version S, then goes through the rows while pushes go on, and packs
those that changed since the last checkpoint into blocks. Once they are committed, the log up to S
is not needed for a restart. Rows that a push changes meanwhile may be copied torn: each such push
has a record behind S, and the base is committed only after these records are on disk, so that a
restart always replays them over the copies.

When the blocks hold more than twice the rows that live, or more keys were deleted than the shard
remembers, the next checkpoint is a full one, and replaces them all.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import structlog

from psserver.engine import Engine
from psserver.shard import Shard
from psserver.views import Capture
from storage.admission.gates import Occurrences, Versions
from storage.base import Base
from storage.basestate import BaseState
from storage.block import (
    BLOCK_BYTES,
    Block,
    Bytes,
    pack_cells,
    pack_counters,
    rows_per_block,
    tombstones_per_block,
)
from storage.errors import Corrupt, DiskFull, LogFailed
from storage.kernels import Keys
from storage.records import decode
from storage.tiers.base import KEY, STEP, VERSION
from storage.versionlog import VersionLog

REPLAY_BYTES = 4 << 20  # of the log, read at once
CELLS_BYTES = BLOCK_BYTES - 4096  # of a sketch, in a block
STALE = 2  # rows in blocks for one that lives, at which all are written anew

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Recovered:
    """What a start found."""

    rows: int  # in blocks, tombstones and counters too
    records: int  # replayed
    record_bytes: int


def recover(shard: Shard, base: Base, versions: VersionLog) -> Recovered:
    """Bring an empty shard to the newest version: the base's blocks, then the records behind it.

    From then on the base says that there is a log, so that a lost one is not taken for a new one.
    Raises Corrupt where stored bytes are damaged, OutOfMemory if they do not fit.
    """
    rows = records = size = 0
    state = base.state
    if state is not None:
        shard.recovery.load_state(state)
        for _, block in base.blocks():
            shard.recovery.load_block(block)
            rows += len(block.keys)
    if versions.first > shard.version + 1:
        raise Corrupt(
            str(base.directory),
            f"stands at version {shard.version}, but the log begins at version {versions.first}",
        )
    cursor = versions.cursor(shard.version)
    while frames := cursor.read(upto=versions.last, max_bytes=REPLAY_BYTES):
        for frame in frames:
            shard.recovery.replay(frame.version, decode(frame))
            size += len(frame.payload)
        records += len(frames)
    cursor.close()
    shard.recovery.finish()
    if shard.version != versions.last:
        raise Corrupt(str(versions.directory), f"ends at version {shard.version}, before its end")
    if state is None:
        state = BaseState(lineage=versions.lineage, epoch=versions.epoch, version=0, next_table=1)
    if not state.logged:
        with suppress(DiskFull):  # the next start does it
            base.commit(dataclasses.replace(state, logged=True))
    return Recovered(rows, records, size)


class Checkpointer:
    """A thread that makes checkpoints.

    fail          called on the thread, once, when nobody can say what is on disk any more
    seconds       between them
    keep          bytes and seconds of log kept beyond what a restart needs

    ``made`` is when the newest change that a restart need not replay was the newest: monotonic
    seconds.
    """

    def __init__(
        self,
        shard: Shard,
        engine: Engine,
        base: Base,
        versions: VersionLog,
        *,
        fail: Callable[[Exception], None],
        seconds: float,
        keep: tuple[int, float],
        stored_rows: int,
    ) -> None:
        self._shard = shard
        self._engine = engine
        self._base = base
        self._versions = versions
        self._fail = fail
        self._seconds = seconds
        self._keep = keep
        self._stored = stored_rows  # in the base's blocks
        self._buffer = np.empty(BLOCK_BYTES, np.uint8)
        self._sketches: dict[int, tuple[int, list[int]]] = {}  # by table: edits, its blocks
        self.pins: dict[str, int] = {}  # who needs the log behind which version
        self.made = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="checkpointer", daemon=True)

    def open(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """Give up the checkpoint under way, and stop."""
        self._stop.set()
        self._thread.join()

    def checkpoint(self) -> None:
        """Make one now, unless nothing has changed; DiskFull leaves the last one in place.

        Then cut the log: what it is kept for passes by itself, too.
        """
        state, began = self._base.state, time.monotonic()
        captured = self._engine.run(self._shard.capture)
        if (state is None or captured.version > state.version) and not self._make(captured, state):
            return
        self.made = began
        keep_bytes, keep_seconds = self._keep
        self._versions.truncate(
            min([captured.version, *self.pins.values()]), keep_bytes, keep_seconds
        )

    def _make(self, captured: Capture, state: BaseState | None) -> bool:
        """Bring the base from a state to the captured one; False if that was given up."""
        after = state.version if state is not None else 0
        live = sum(each.rows + each.counters for each in captured.tables)
        full = (
            state is None
            or self._stored > STALE * live
            or captured.horizon > after  # deleted since, and nobody remembers which
        )
        after, kept = 0, tuple[int, ...]()
        if not full and state is not None:
            after, kept = state.version, state.blocks[: len(state.blocks) - state.cells]
        before = 0 if full else self._stored
        added, rows = [], 0
        for block in blocks_of(captured, after, self._buffer):
            added.append(self._base.add(block.seal()))
            rows += len(block)
            if self._stop.is_set():
                self._base.discard()
                return False
        for table, keys, totals, versions in counters_of(captured, after, self._engine):
            added.append(self._base.add(pack_counters(table, keys, versions, totals)))
            rows += len(keys)
        sketches = self._kept_sketches(captured, state)
        for part in cells_of(captured, {table for table, (_, held) in sketches.items() if held}):
            sketches[part[0]][1].append(self._base.add(pack_cells(*part)))
            if self._stop.is_set():
                self._base.discard()
                return False
        # what was copied torn is whole in records up to here
        self._versions.sync(self._engine.run(lambda: self._shard.version))
        self._sketches = sketches
        cells = [block for _, held in sketches.values() for block in held]
        self._base.commit(
            BaseState(
                lineage=self._versions.lineage,
                epoch=self._versions.epoch,
                version=captured.version,
                next_table=captured.next_table,
                tables=tuple(each.base for each in captured.tables),
                horizon=captured.horizon,
                sessions=captured.sessions,
                blocks=(*kept, *added, *cells),
                cells=len(cells),
                logged=True,
            )
        )
        self._stored = before + rows
        return True

    def _kept_sketches(
        self, captured: Capture, state: BaseState | None
    ) -> dict[int, tuple[int, list[int]]]:
        """By table, the edits of its sketch, and the blocks that have it; none if it changed."""
        listed = set(state.blocks) if state is not None else set()
        kept: dict[int, tuple[int, list[int]]] = {}
        for each in captured.tables:
            edits, blocks = self._sketches.get(each.base.number, (-1, []))
            same = edits == each.edits and listed.issuperset(blocks)
            kept[each.base.number] = each.edits, blocks if same else []
        return kept

    def _run(self) -> None:
        while not self._stop.wait(self._seconds):
            start = time.monotonic()
            try:
                if self._survives(self.checkpoint):
                    log.debug("checkpoint", seconds=round(time.monotonic() - start, 3))
                else:  # blocks that stay are deleted with the next one
                    self._survives(self._base.discard)
            except LogFailed:  # which it has told by itself
                return
            except Exception as error:
                self._fail(error)
                return

    def _survives(self, call: Callable[[], None]) -> bool:
        """Whether the call went well. Raises what another attempt cannot mend: damage, and a write
        or sync after which nobody can say what is on disk.
        """
        try:
            call()
        except (Corrupt, LogFailed):
            raise
        except Exception as error:
            if self._base.failure is not None:
                raise
            expected = isinstance(error, (DiskFull, OSError))
            log.warning("checkpoint failed", error=str(error), exc_info=not expected)
            return False
        return True


def blocks_of(captured: Capture, after: int, buffer: Bytes) -> Iterator[Block]:
    """What changed after a version, up to the captured one: unsealed blocks of tombstones, then of
    rows, with no key twice.

    buffer  uint8[BLOCK_BYTES]: a block is valid until the next one

    A row that changes while this runs may be missing, or torn.
    """
    size = tombstones_per_block()
    for dead in captured.tombstones:
        if dead.version > after:
            for at in range(0, len(dead.keys), size):
                keys = dead.keys[at : at + size]
                block = Block.tombstones(dead.table, len(keys), buffer)
                block.keys[:], block.versions[:], block.causes[:] = keys, dead.version, dead.cause
                yield block
    for each in captured.tables:
        number, width, scan = each.base.number, each.width, each.scan
        start: int | None = 0
        most = rows_per_block(width)
        while start is not None:
            places, start = scan.find(start, after, captured.version, most)
            if len(places):
                # a row may be larger than a block
                block = Block.empty(number, width, len(places), buffer if most > 1 else None)
                meta = scan.copy(places, block.frequencies, block.rows)
                block.keys[:], block.versions[:] = meta[:, KEY], meta[:, VERSION]
                block.steps[:] = meta[:, STEP].view(np.int64)
                yield from _unmoved(block, after, captured.version)


Counted = tuple[int, Keys, Occurrences, Versions]  # number of the table, and its counters


def counters_of(captured: Capture, after: int, engine: Engine) -> Iterator[Counted]:
    """Exact counters that changed after a version, as they are now, a slice at a time.

    What changes while this runs may be missing, or newer: a record behind the captured version has
    what it became.
    """
    most = tombstones_per_block()
    for each in captured.tables:
        slices = each.table.gate.changed(after)
        while (found := engine.run(lambda: next(slices, None))) is not None:  # noqa: B023
            keys, totals, versions = found
            for at in range(0, len(keys), most):
                part = slice(at, at + most)
                yield each.base.number, keys[part], totals[part], versions[part]


def cells_of(captured: Capture, but: set[int]) -> Iterator[tuple[int, int, Bytes]]:
    """Sketches as they are now: number of the table, first byte, a block's worth of bytes.

    but  tables whose sketches are left out
    """
    for each in captured.tables:
        if each.base.number in but:
            continue
        cells = each.table.gate.cells().view(np.uint8)
        for start in range(0, len(cells), CELLS_BYTES):
            yield each.base.number, start, cells[start : start + CELLS_BYTES]


def _unmoved(block: Block, after: int, upto: int) -> Iterator[Block]:
    """The block without the rows that left their places while it was copied.

    The places may hold other keys by now, even one that the block has already.
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
