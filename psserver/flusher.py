"""Write changed rows to the base in the background, so that a restart replays little of the log.

The base is the copy of all rows on disk, in blocks, at one version of the log. A flush notes the
shard's version S, scans the rows while pushes continue, and packs the rows that changed since the
last flush into new blocks. When the blocks are committed, a restart no longer needs the log up to
S. If a push changes a row while it is copied, the copy may be half old and half new. But each such
push has a log record newer than S, and the base is committed only after these records are on disk.
So a restart always replays them over the damaged copies.

A full flush replaces all blocks by new ones. It happens when the blocks contain more than twice as
many entries as a full flush would write. It also happens when more keys were deleted since the last
flush than the shard remembers. (It remembers a limited number of deletes, as tombstones.)
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import structlog

from psserver.capture import Capture
from psserver.engine import Engine
from psserver.packing import blocks_of, cells_of, counters_of
from psserver.shard import Shard
from storage.base import Base
from storage.basestate import BaseState
from storage.block import BLOCK_BYTES, pack_cells, pack_counters
from storage.errors import Corrupt, DiskFull, LogFailed
from storage.versionlog import VersionLog

STALE = 2  # a flush is full if the blocks have more than STALE times the entries it would write

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class _Sketch:
    """The admission sketch (a counting Bloom filter) of one table, as stored in the base."""

    edits: int  # Gate.edits when the sketch was written: the number of its changes until then
    blocks: tuple[int, ...]  # numbers of the blocks that contain it; empty: it must be written


class Flusher:
    """Thread that flushes changed rows to the base, and then deletes old segment files of the log.

    The base is the copy of all rows on disk, at one version of the log.

    fail         called with the error, on the flusher's thread, if a failed write leaves the files
                 in an unknown state; the thread then ends
    seconds      seconds between flushes
    keep         (b, s): keep the newest b bytes of the log for subscribers, and in any case the
                 records of the last s seconds
    stored_rows  number of rows in the blocks of the base
    flushed      monotonic time of the last flush, in seconds; a restart replays only later changes
    pins         reader of the log, for example a running checkpoint -> version; log records newer
                 than the version are not deleted while the entry exists
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
        self._stored = stored_rows
        self._buffer = np.empty(BLOCK_BYTES, np.uint8)
        self._sketches: dict[int, _Sketch] = {}  # by number of the table
        self.pins: dict[str, int] = {}
        self.flushed = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="flusher", daemon=True)

    def open(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """Stop the thread. A flush in progress is abandoned, and the base stays unchanged."""
        self._stop.set()
        self._thread.join()

    def flush(self) -> None:
        """Write all changes since the last flush to the base, then delete log that nobody needs.

        If nothing has changed, only old log is deleted. Raises DiskFull if the disk is full; the
        base then stays as the last flush left it.
        """
        state, began = self._base.state, time.monotonic()
        captured = self._engine.run(self._shard.capture)
        if (state is None or captured.version > state.version) and not self._write(captured, state):
            return
        self.flushed = began
        needed = min([captured.version, *self.pins.values()])
        self._versions.truncate(needed, *self._keep)

    def _write(self, captured: Capture, state: BaseState | None) -> bool:
        """Write the changes since the last flush to new blocks, and commit them to the base.

        captured  the shard at the version that the base will have
        state     the base as last committed; None: it is empty

        Returns False, with the base unchanged, if the thread was told to stop.
        """
        full = self._must_be_full(captured, state)
        after, kept = 0, tuple[int, ...]()
        if not full and state is not None:
            after, kept = state.version, state.blocks[: len(state.blocks) - state.cells]
        written = self._write_changes(captured, after)
        sketches = None if written is None else self._write_sketches(captured, state)
        if written is None or sketches is None:
            self._base.discard()
            return False
        blocks, rows = written
        # a restart replays these records over rows that changed while they were copied
        self._versions.sync(self._engine.run(lambda: self._shard.version))
        cells = [block for sketch in sketches.values() for block in sketch.blocks]
        self._commit(captured, [*kept, *blocks], cells)
        self._sketches = sketches
        self._stored = rows if full else self._stored + rows
        return True

    def _commit(self, captured: Capture, blocks: list[int], cells: list[int]) -> None:
        """Commit new contents of the base.

        captured  the shard at the version that the base gets
        blocks    numbers of the blocks with rows, tombstones and counters
        cells     numbers of the blocks with admission sketches
        """
        self._base.commit(
            BaseState(
                lineage=self._versions.lineage,
                history=self._versions.history,
                version=captured.version,
                next_table=captured.next_table,
                tables=tuple(each.base for each in captured.tables),
                horizon=captured.horizon,
                sessions=captured.sessions.pack(),
                blocks=(*blocks, *cells),
                cells=len(cells),
                logged=True,
            )
        )

    def _must_be_full(self, captured: Capture, state: BaseState | None) -> bool:
        """Return whether the flush must write all rows, not only those that changed.

        captured  the shard at the version that the base will have
        state     the base as last committed; None: it is empty
        """
        live = sum(each.rows + each.counters for each in captured.tables)
        live += sum(map(len, captured.tombstones))  # a full flush writes them again
        return (
            state is None
            or self._stored > STALE * live
            or captured.horizon > state.version  # tombstones since then were discarded
        )

    def _write_changes(self, captured: Capture, after: int) -> tuple[list[int], int] | None:
        """Write rows, counters and tombstones (deletes) that changed after version ``after``.

        Returns (numbers of the new blocks, number of entries in them); None if the thread was told
        to stop.
        """
        blocks, rows = [], 0
        for block in blocks_of(captured, after, self._buffer):
            blocks.append(self._base.add(block.seal()))
            rows += len(block)
            if self._stop.is_set():
                return None
        for table, keys, totals, versions in counters_of(captured, after, self._engine):
            blocks.append(self._base.add(pack_counters(table, keys, versions, totals)))
            rows += len(keys)
        return blocks, rows

    def _write_sketches(
        self, captured: Capture, state: BaseState | None
    ) -> dict[int, _Sketch] | None:
        """Write the admission sketches that changed since they were last written.

        Returns table number -> sketch for all tables, changed or not; None if the thread was told
        to stop.
        """
        sketches = self._kept_sketches(captured, state)
        written: dict[int, list[int]] = {}
        unchanged = {table for table, sketch in sketches.items() if sketch.blocks}
        for table, start, cells in cells_of(captured, unchanged):
            block = self._base.add(pack_cells(table, start, cells))
            written.setdefault(table, []).append(block)
            if self._stop.is_set():
                return None
        for table, blocks in written.items():
            sketches[table] = _Sketch(sketches[table].edits, tuple(blocks))
        return sketches

    def _kept_sketches(self, captured: Capture, state: BaseState | None) -> dict[int, _Sketch]:
        """Return table number -> sketch, without blocks if the sketch must be written again."""
        listed = set(state.blocks) if state is not None else set()
        kept: dict[int, _Sketch] = {}
        for each in captured.tables:
            old = self._sketches.get(each.number, _Sketch(-1, ()))
            same = old.edits == each.edits and listed.issuperset(old.blocks)
            kept[each.number] = _Sketch(each.edits, old.blocks if same else ())
        return kept

    def _run(self) -> None:
        while not self._stop.wait(self._seconds):
            start = time.monotonic()
            try:
                if self._succeeds(self.flush):
                    log.debug("flush", seconds=round(time.monotonic() - start, 3))
                else:  # if this fails too, the next flush deletes the blocks
                    self._succeeds(self._base.discard)
            except LogFailed:  # the log has called its own ``fail``
                return
            except Exception as error:
                self._fail(error)
                return

    def _succeeds(self, call: Callable[[], None]) -> bool:
        """Run ``call`` and return True; if it fails but may succeed later, log it and return False.

        Raises Corrupt, LogFailed, and any error after which it is unknown what is on disk.
        """
        try:
            call()
        except (Corrupt, LogFailed):
            raise
        except Exception as error:
            if self._base.failure is not None:
                raise
            expected = isinstance(error, (DiskFull, OSError))
            log.warning("flush failed", error=str(error), exc_info=not expected)
            return False
        return True
