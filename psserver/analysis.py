"""Analyze a table: read every row once, in slices, and sum it up. Changes nothing.

All methods block, and run on worker threads. The engine reads the slices of a live table, so that
each row is whole. A slice takes the engine about 50 us. The rest of the work runs on the worker
thread, mostly in one kernel that releases the interpreter lock.

Slices are small, so a pull waits only briefly for a slice. All slices together get 1/81 of a core,
so few pulls wait at all. The rows of a checkpoint do not need the engine, but compete with it for
cores and for the interpreter lock. They get a tenth of a core.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from numpy.typing import NDArray

from psproto import ps_pb2 as pb
from psserver.checkpoints import Checkpoints
from psserver.engine import Engine
from psserver.inspection import Inspector
from psserver.pace import SPARED_STORED, Pace
from psserver.shard import Shard
from psserver.stored import number_in, require_width, schema_in
from psserver.summaries import Columns, Outbox, read_summary, write_summary
from psserver.views import TableView
from storage.admission.rules import Counter
from storage.analysis import RowColumns, Summary, norms_of
from storage.checkpoint import Checkpoint
from storage.errors import UnknownTable
from storage.eviction.contract import FIRST_STEP
from storage.kernels import Rows
from storage.part_reader import Piece, counters_of, rows_of
from storage.tiers.base import FREQUENCY, KEY, STEP, VERSION, Scan
from storage.versionlog import VersionLog

SLICE_ROWS = 2_048  # rows that the engine reads at a time
SLICE_BYTES = 1 << 20  # bytes of their embeddings, at most
ALL = (1 << 48) - 1  # the largest version


class Analyses:
    """Analyses of one shard's tables and keys. Thread-safe.

    log  gives time and step of deletes; None: they are left out
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
        """Sum up a table of this shard or of a checkpoint. The last message has the summary."""
        summary = read_summary(request)
        if request.checkpoint:
            yield from self._stored(request, summary)
        else:
            yield from self._live(request, summary)

    def _live(self, request: pb.AnalyzeRequest, summary: Summary) -> Iterator[pb.AnalyzeResponse]:
        progress = self._checkpoints.work.progress()  # ends the work when the server does
        view = self._engine.run(lambda: self._shard.view_table(request.table))
        outbox = Outbox(request, view.stats.rows)

        def work(found: tuple[RowColumns, Rows | None]) -> list[pb.AnalyzeResponse]:
            rows, embeddings = found
            summary.add(rows, view.step)
            return list(outbox.put(rows, embeddings, summary.rows))

        for read in self._slices(request, view):
            progress.add(0)
            yield from self._pace.run(read, work)
        yield from outbox.flush()
        message = write_summary(summary, view.schema, view.step)
        message.version, message.last_version = view.version, self._shard.version
        for name, _, size in view.tiers:
            message.tiers.add(name=name, rows=summary.tiers.get(name, 0), bytes=size)
        message.index_bytes, message.waiting = view.stats.index_bytes, view.stats.waiting
        message.waiting_bytes = view.stats.counter_bytes
        yield pb.AnalyzeResponse(done=outbox.done, total=outbox.done, summary=message)

    def _slices(
        self, request: pb.AnalyzeRequest, view: TableView
    ) -> Iterator[Callable[[], tuple[RowColumns, Rows | None]]]:
        """Yield calls for the engine: each reads some rows, with embeddings if requested."""
        dim = view.schema.dim
        most = max(1, min(SLICE_ROWS, SLICE_BYTES // (4 * dim)))
        wanted = request.columns == Columns.COLUMNS_EMBEDDING

        def read(
            tier: str, scan: Scan, places: NDArray[np.int64]
        ) -> tuple[RowColumns, Rows | None]:
            if not self._shard.holds(view.number):
                raise UnknownTable(request.table)
            norms = np.empty(len(places), np.float64)
            meta = scan.measure(places, norms)
            if not (there := meta[:, VERSION] != 0).all():  # some rows left since they were found
                meta, norms, places = meta[there], norms[there], places[there]
            matrix = None
            if wanted:
                matrix = np.empty((len(places), dim), np.float32)
                scan.read(places, matrix)
            columns = meta[:, KEY], meta[:, VERSION], meta[:, STEP].view(np.int64)
            return RowColumns(*columns, meta[:, FREQUENCY], norms, tier), matrix

        for tier, scan, _ in view.tiers:
            start: int | None = 0
            while start is not None:
                places, start = scan.find(start, 0, ALL, most)
                if len(places):
                    yield partial(read, tier, scan, places)

    def _stored(self, request: pb.AnalyzeRequest, summary: Summary) -> Iterator[pb.AnalyzeResponse]:
        catalog = self._checkpoints.catalog
        with catalog.reading(request.checkpoint, "it is being analyzed") as checkpoint:
            yield from self._stored_rows(checkpoint, request, summary)

    def _stored_rows(
        self, checkpoint: Checkpoint, request: pb.AnalyzeRequest, summary: Summary
    ) -> Iterator[pb.AnalyzeResponse]:
        """Read each part twice: its largest step, from which ages are counted, then its rows."""
        catalog, beside = self._checkpoints.catalog, self._pace_stored.beside
        schema = schema_in(checkpoint, request.table)
        progress = self._checkpoints.work.progress()
        parts = catalog.share(checkpoint)
        outbox = Outbox(request, 2 * checkpoint.bytes_of(parts))
        wanted = request.columns == Columns.COLUMNS_EMBEDDING
        newest, size, waiting = FIRST_STEP, 0, 0

        def largest(pieces: Iterator[Piece]) -> int | None:
            """Return the largest step of the next piece; None after the last piece."""
            if (piece := next(pieces, None)) is None:
                return None
            require_width(checkpoint, schema, piece.rows)
            return int(piece.steps.max(initial=FIRST_STEP))

        def summed(
            pieces: Iterator[Piece], step: int
        ) -> tuple[RowColumns, Rows | None, int] | None:
            """Sum up the next piece; return rows, embeddings and bytes; None after the last."""
            if (piece := next(pieces, None)) is None:
                return None
            columns = piece[1:]
            copies = map(np.array, columns[:-1])  # see Piece
            norms = norms_of(piece.rows, schema.dim)
            rows = RowColumns._make([*copies, norms, "checkpoint"])
            summary.add(rows, step)
            matrix = np.array(piece.rows[:, : schema.dim]) if wanted else None
            return rows, matrix, sum(column.nbytes for column in columns)

        for part in parts:
            number = number_in(checkpoint, part, request.table)
            asked = catalog.store, checkpoint, part, [number], progress.add
            step, pieces = FIRST_STEP, rows_of(*asked)
            while (found := beside(partial(largest, pieces))) is not None:
                step = max(step, found)
                yield from outbox.progress(progress.bytes)
            newest, pieces = max(newest, step), rows_of(*asked)
            while (done := beside(partial(summed, pieces, step))) is not None:
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
        """Return the state of single keys; see Inspector."""
        return self._inspector.inspect(request)
