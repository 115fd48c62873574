"""Analyze a table: read every row once, in slices, and compute a summary. Nothing is changed.

All methods block, so they must run on worker threads. Each slice of rows in memory is read on the
engine thread, so that no row is read while a push changes it. This takes about 50 us per slice.
Rows on disk do not change, so the worker thread reads them. It also does the rest of the work,
mostly in one kernel that releases the interpreter lock.

Slices are small, so that a pull waits only briefly for a slice. All slices together use at most
1/81 of a core, so that few pulls wait at all. The rows of a checkpoint do not need the engine, but
the work on them competes with the engine for cores and for the interpreter lock. Therefore it uses
at most a tenth of a core.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from psproto import ps_pb2 as pb
from psserver.checkpoints import Checkpoints
from psserver.engine import Engine
from psserver.inspection import Inspector
from psserver.outbox import Columns, Outbox
from psserver.pace import SPARED_STORED, Pace
from psserver.shard import Shard
from psserver.stored import number_in, require_width, schema_in
from psserver.summaries import read_summary, write_summary
from psserver.views import TableView
from storage.admission.rules import Counter
from storage.analysis import RowColumns, Summary
from storage.checkpoint import Checkpoint
from storage.errors import UnknownTable
from storage.eviction.contract import FIRST_STEP
from storage.kernels import Rows, norms_of
from storage.part_reader import Piece, counters_of, rows_of
from storage.reuse import EDGES
from storage.schema import TableSchema
from storage.slots import KEY, STEP, VERSION
from storage.tablescan import Part
from storage.versionlog import VersionLog

SLICE_ROWS = 2_048  # maximum number of rows in a slice
SLICE_BYTES = 1 << 20  # maximum size of the embeddings in a slice, in bytes


class Analyses:
    """Summarizes tables and inspects keys of one shard. Thread-safe.

    log   version log, to look up time and step of a delete; None: both are left out
    pace  limits the share of a core that analyses use; None: the defaults of pace.py
    """

    def __init__(
        self,
        shard: Shard,
        engine: Engine,
        checkpoints: Checkpoints,
        log: VersionLog | None,
        pace: Pace | None = None,
    ) -> None:
        self._shard = shard
        self._engine = engine
        self._checkpoints = checkpoints
        self._inspector = Inspector(shard, engine, log)
        self._pace = pace or Pace(engine)
        self._pace_stored = pace or Pace(engine, SPARED_STORED)

    # ---- tables

    def analyze(self, request: pb.AnalyzeRequest) -> Iterator[pb.AnalyzeResponse]:
        """Analyze a table: yield progress messages and the requested rows, and last the summary.

        With ``request.checkpoint``, this shard's share of the table in that checkpoint is analyzed.
        """
        summary = read_summary(request)
        if request.checkpoint:
            yield from self._stored(request, summary)
        else:
            yield from self._live(request, summary)

    def _live(self, request: pb.AnalyzeRequest, summary: Summary) -> Iterator[pb.AnalyzeResponse]:
        """Analyze a table of the running shard: yield progress, rows, and last the summary.

        summary  empty; every row is added to it
        """
        progress = self._checkpoints.work.progress()  # raises an error if the server stops
        view = self._engine.run(lambda: self._shard.view_table(request.table))
        outbox = Outbox(request, view.stats.rows)

        def work(read: Callable[[], Part]) -> list[pb.AnalyzeResponse]:
            part = read()
            meta = part.meta
            if not len(meta):
                return []
            columns = meta[:, KEY], meta[:, VERSION], meta[:, STEP].view(np.int64), part.frequencies
            rows = RowColumns(*columns, part.norms, part.tier)
            summary.add(rows, view.step)
            return list(outbox.put(rows, part.rows if width else None, summary.rows))

        wanted = request.columns == Columns.COLUMNS_EMBEDDING
        width = view.schema.dim if wanted else 0
        while not view.scan.done:
            progress.add(0)
            yield from self._pace.run(partial(self._choose, request, view, width), work)
        yield from outbox.flush()
        message = write_summary(summary, view.schema, view.step)
        message.version, message.last_version = view.version, self._shard.version
        for tier in view.stats.tiers:
            rows = summary.tiers.get(tier.tier, 0)
            name, on_disk = tier.tier, tier.on_disk
            message.tiers.add(name=name, rows=rows, bytes=tier.bytes, on_disk=on_disk)
        edges, (pushes, pulls) = EDGES.tolist(), view.reuse
        message.reuses.CopyFrom(pb.Histogram(edges=edges, counts=pushes.tolist()))
        message.pull_reuses.CopyFrom(pb.Histogram(edges=edges, counts=pulls.tolist()))
        message.first_pushes = view.first
        message.index_bytes, message.waiting = view.stats.index_bytes, view.stats.waiting
        message.waiting_bytes = view.stats.counter_bytes
        yield pb.AnalyzeResponse(done=outbox.done, total=outbox.done, summary=message)

    def _choose(
        self, request: pb.AnalyzeRequest, view: TableView, width: int
    ) -> Callable[[], Part]:
        """Choose the next slice of rows. Must run on the engine thread.

        view   access to the table
        width  how many numbers of each row to copy

        Returns a function that returns the rows with their norms. Raises UnknownTable if the table
        was dropped meanwhile.
        """
        if not self._shard.holds(view.number):
            raise UnknownTable(request.table)
        most = max(1, min(SLICE_ROWS, SLICE_BYTES // (4 * view.schema.dim)))
        return view.scan.next(most, width, norms=True)

    def _stored(self, request: pb.AnalyzeRequest, summary: Summary) -> Iterator[pb.AnalyzeResponse]:
        """Analyze a table of the checkpoint ``request.checkpoint``; keep it from being deleted.

        summary  empty; every row is added to it
        """
        catalog = self._checkpoints.catalog
        with catalog.reading(request.checkpoint, "it is being analyzed") as checkpoint:
            yield from self._stored_rows(checkpoint, request, summary)

    def _stored_rows(
        self, checkpoint: Checkpoint, request: pb.AnalyzeRequest, summary: Summary
    ) -> Iterator[pb.AnalyzeResponse]:
        """Analyze a table of an open checkpoint. Each part (the files of one shard) is read twice.

        The first pass finds the largest training step in the part, because ages of rows are counted
        back from it. The second pass adds the rows to ``summary``.
        """
        catalog, beside = self._checkpoints.catalog, self._pace_stored.beside
        schema = schema_in(checkpoint, request.table)
        progress = self._checkpoints.work.progress()
        parts = catalog.share(checkpoint)
        outbox = Outbox(request, 2 * checkpoint.bytes_of(parts))
        wanted = request.columns == Columns.COLUMNS_EMBEDDING
        table = _StoredTable(checkpoint, schema, summary, wanted)
        newest, size, waiting = FIRST_STEP, 0, 0
        for part in parts:
            number = number_in(checkpoint, part, request.table)
            asked = catalog.store, checkpoint, part, [number], progress.add
            step, pieces = FIRST_STEP, rows_of(*asked)
            while (found := beside(partial(table.largest_step, pieces))) is not None:
                step = max(step, found)
                yield from outbox.progress(progress.bytes)
            newest, pieces = max(newest, step), rows_of(*asked)
            while (done := beside(partial(table.summarize, pieces, step))) is not None:
                rows, matrix, more = done
                size += more
                yield from outbox.put(rows, matrix, progress.bytes)
            if isinstance(schema.admission, Counter):  # checkpoints contain no sketches
                counters = counters_of(*asked)
                while (some := beside(partial(next, counters, None))) is not None:
                    waiting += len(some[1])
        yield from outbox.flush()
        message = write_summary(summary, schema, newest)
        message.waiting = waiting
        message.version = message.last_version = max(checkpoint.manifest.versions)
        message.tiers.add(name="checkpoint", rows=summary.rows, bytes=size)
        yield pb.AnalyzeResponse(done=progress.bytes, total=progress.bytes, summary=message)

    # ---- keys

    def inspect(self, request: pb.InspectRequest) -> pb.InspectResponse:
        """Report whether each of ``request.keys`` has a row, was deleted, or was never pushed."""
        return self._inspector.inspect(request)


@dataclass(frozen=True, slots=True)
class _StoredTable:
    """Adds the rows of one table of a checkpoint to a summary."""

    checkpoint: Checkpoint
    schema: TableSchema  # of the table in the checkpoint
    summary: Summary
    wanted: bool  # the client also wants the embeddings

    def largest_step(self, pieces: Iterator[Piece]) -> int | None:
        """Return the largest training step of a row in the next piece; None after the last piece.

        pieces  yields the rows of a part of the checkpoint
        """
        if (piece := next(pieces, None)) is None:
            return None
        require_width(self.checkpoint, self.schema, piece.rows)
        return int(piece.steps.max(initial=FIRST_STEP))

    def summarize(
        self, pieces: Iterator[Piece], step: int
    ) -> tuple[RowColumns, Rows | None, int] | None:
        """Add the rows of the next piece to the summary.

        pieces  yields the rows of a part of the checkpoint
        step    training step from which the ages of the rows are counted back

        Returns (metadata of the rows, embeddings or None if not wanted, bytes of the rows), or None
        after the last piece.
        """
        if (piece := next(pieces, None)) is None:
            return None
        columns = piece[1:]
        copies = map(np.array, columns[:-1])  # the arrays of a piece are valid until the next one
        norms = norms_of(piece.rows, self.schema.dim)
        rows = RowColumns._make([*copies, norms, "checkpoint"])
        self.summary.add(rows, step)
        matrix = np.array(piece.rows[:, : self.schema.dim]) if self.wanted else None
        return rows, matrix, sum(column.nbytes for column in columns)
