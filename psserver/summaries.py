"""Summaries of tables as messages, and the messages on their way."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence

import numpy as np

from psproto import ps_pb2 as pb
from psserver.errors import BadRequest
from psserver.schemas import write_schema
from storage.analysis import Extremes, Histogram, RowColumns, Summary
from storage.eviction.contract import FIRST_STEP
from storage.kernels import Rows
from storage.schema import TableSchema

Columns = pb.AnalyzeRequest.Columns

PROGRESS_SECONDS = 5.0  # between two messages without columns: each wakes both sides for a while
MESSAGE_BYTES = 1 << 20  # of columns in a message, about
MAX_EDGES = 256  # asked for, of each histogram
MAX_TOP = 1000
LAST_STEP = 1 << 48  # an age or a grace is at most this


class Outbox:
    """Messages on their way: the rows that are wanted, and now and then how far the work is."""

    def __init__(self, request: pb.AnalyzeRequest, total: int) -> None:
        self.done = 0
        self._total = total
        self._columns = request.columns
        self._held: list[tuple[RowColumns, Rows | None]] = []
        self._bytes = 0
        self._reported = time.monotonic()

    def put(self, rows: RowColumns, matrix: Rows | None, done: int) -> Iterator[pb.AnalyzeResponse]:
        """Send rows if they are wanted; ``done``: how far the work is with them."""
        self.done = done
        if not self._columns:
            yield from self.progress(done)
            return
        if self._held and self._held[0][0].tier != rows.tier:
            yield from self.flush()
        self._held.append((rows, matrix))
        self._bytes += sum(column.nbytes for column in rows[:-1])
        self._bytes += 0 if matrix is None else matrix.nbytes
        if self._bytes >= MESSAGE_BYTES:
            yield from self.flush()

    def progress(self, done: int) -> Iterator[pb.AnalyzeResponse]:
        """Say how far the work is, if it was not said just now."""
        self.done = done
        if time.monotonic() - self._reported >= PROGRESS_SECONDS:
            self._reported = time.monotonic()
            yield pb.AnalyzeResponse(done=done, total=max(done, self._total))

    def flush(self) -> Iterator[pb.AnalyzeResponse]:
        """Send what waits."""
        if not self._held:
            return
        rows, matrices = zip(*self._held, strict=True)
        message = pb.AnalyzeResponse(
            done=self.done, total=max(self.done, self._total), tier=rows[0].tier
        )
        for field in _COLUMNS:
            column = np.concatenate([getattr(each, field) for each in rows])
            setattr(message, field, column.tobytes())
        if self._columns == Columns.COLUMNS_EMBEDDING:
            message.embeddings = np.concatenate(matrices).tobytes()
        self._held, self._bytes = [], 0
        yield message


_COLUMNS = ("keys", "versions", "steps", "frequencies", "norms")


def read_summary(request: pb.AnalyzeRequest) -> Summary:
    """An empty summary as a request wants it; BadRequest if it breaks a rule."""
    _require("frequencies", request.frequencies, 1, (1 << 32) - 1)
    _require("ages", request.ages, 0, LAST_STEP)
    _require("norms", request.norms, math.ulp(0.0), 1.8e308)
    _require("grace", [request.grace], 0, LAST_STEP)
    if request.top > MAX_TOP:
        raise BadRequest("INVALID_ARGUMENT", f"top must be in 0..{MAX_TOP}, got {request.top}")
    if request.columns not in Columns.values():
        raise BadRequest("INVALID_ARGUMENT", f"columns {request.columns} is unknown")
    asked = request.frequencies, request.ages, request.norms
    return Summary(*asked, grace=request.grace, top=request.top)


def _require(field: str, values: Sequence[float], least: float, most: float) -> None:
    """BadRequest unless all edges, and not too many, are in a range."""
    if len(values) > MAX_EDGES:
        raise BadRequest(
            "INVALID_ARGUMENT", f"{field}: {len(values)} edges, the limit is {MAX_EDGES}"
        )
    for value in values:
        if not least <= value <= most or math.isinf(value):
            rule = f"in {least:g}..{most:g}" if least >= 1 or not least else "finite and above 0"
            raise BadRequest("INVALID_ARGUMENT", f"{field} must be {rule}, got {value!r}")


def write_summary(summary: Summary, schema: TableSchema, step: int) -> pb.Summary:
    return pb.Summary(
        schema=write_schema(schema),
        width=schema.width,
        step=step if step > FIRST_STEP else 0,
        rows=summary.rows,
        occurrences=summary.occurrences,
        norm_sum=summary.norm_sum,
        frequencies=_histogram(summary.frequencies),
        frequency_sums=summary.frequencies.sums.tolist(),
        ages=_histogram(summary.ages),
        norms=_histogram(summary.norms),
        idle_norms=_histogram(summary.idle_norms),
        grace=summary.grace,
        most_frequent=_list(summary.most_frequent),
        least_frequent=_list(summary.least_frequent),
        largest=_list(summary.largest),
        smallest=_list(summary.smallest),
    )


def _histogram(histogram: Histogram) -> pb.Histogram:
    return pb.Histogram(edges=histogram.edges.tolist(), counts=histogram.counts.tolist())


def _list(extremes: Extremes) -> pb.RowList:
    rows = extremes.rows
    return pb.RowList(
        keys=rows.keys.tolist(),
        versions=rows.versions.tolist(),
        steps=rows.steps.tolist(),
        frequencies=rows.frequencies.tolist(),
        norms=rows.norms.tolist(),
        tiers=extremes.tiers.tolist(),
    )
