"""Build the messages of an analysis: summaries of tables, columns of rows, and progress."""

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

PROGRESS_SECONDS = 5.0  # minimum time between two progress messages
MESSAGE_BYTES = 1 << 20  # approximate size of the columns in a message
MAX_EDGES = 256  # maximum number of edges (bucket bounds) that a request may add to a histogram
MAX_TOP = 1000  # maximum number of rows in each list of most and least extreme rows
LAST_STEP = 1 << 48  # largest valid ``ages`` and ``grace`` of a request, in training steps


class Outbox:
    """Collects the rows of an analysis into messages, and creates progress messages.

    request  its field ``columns`` selects which columns of the rows to send; 0: no rows, only
             progress messages
    total    rows to read, or bytes to read from a checkpoint
    done     rows read so far, or bytes read from a checkpoint so far
    """

    def __init__(self, request: pb.AnalyzeRequest, total: int) -> None:
        self.done = 0
        self._total = total
        self._columns = request.columns
        self._collected: list[tuple[RowColumns, Rows | None]] = []
        self._bytes = 0
        self._reported = time.monotonic()

    def put(self, rows: RowColumns, matrix: Rows | None, done: int) -> Iterator[pb.AnalyzeResponse]:
        """Add n rows, and yield messages that are complete: with about 1 MiB, or with the last rows
        of a tier (a kind of memory).

        If the request has no columns, drops the rows and only yields progress messages.

        rows    key, version, step, frequency and norm of each row
        matrix  float32[n, dim], the embeddings; None if they are not requested
        done    new value of the attribute ``done``
        """
        self.done = done
        if not self._columns:
            yield from self.progress(done)
            return
        if self._collected and self._collected[0][0].tier != rows.tier:
            yield from self.flush()
        self._collected.append((rows, matrix))
        self._bytes += sum(column.nbytes for column in rows[:-1])
        self._bytes += 0 if matrix is None else matrix.nbytes
        if self._bytes >= MESSAGE_BYTES:
            yield from self.flush()

    def progress(self, done: int) -> Iterator[pb.AnalyzeResponse]:
        """Set ``done``; yield a progress message if at least 5 s have passed since the last one."""
        self.done = done
        if time.monotonic() - self._reported >= PROGRESS_SECONDS:
            self._reported = time.monotonic()
            yield pb.AnalyzeResponse(done=done, total=max(done, self._total))

    def flush(self) -> Iterator[pb.AnalyzeResponse]:
        """Yield the rows that are collected so far as one message, or nothing if there are none."""
        if not self._collected:
            return
        rows, matrices = zip(*self._collected, strict=True)
        message = pb.AnalyzeResponse(
            done=self.done, total=max(self.done, self._total), tier=rows[0].tier
        )
        for field in _COLUMNS:
            column = np.concatenate([getattr(each, field) for each in rows])
            setattr(message, field, column.tobytes())
        if self._columns == Columns.COLUMNS_EMBEDDING:
            message.embeddings = np.concatenate(matrices).tobytes()
        self._collected, self._bytes = [], 0
        yield message


_COLUMNS = ("keys", "versions", "steps", "frequencies", "norms")


def read_summary(request: pb.AnalyzeRequest) -> Summary:
    """Return an empty summary with the histogram edges, grace period and list lengths of a request.

    Raises BadRequest for an invalid value.
    """
    _require("frequencies", request.frequencies, 1, (1 << 32) - 1)
    _require("ages", request.ages, 0, LAST_STEP)
    _require("norms", request.norms, math.ulp(0.0), 1.8e308)
    _require("grace", [request.grace], 0, LAST_STEP)
    if request.top > MAX_TOP:
        raise BadRequest("INVALID_ARGUMENT", f"top must be in 0..{MAX_TOP}, got {request.top}")
    if request.columns not in Columns.values():
        raise BadRequest(
            "INVALID_ARGUMENT",
            f"columns must be one of {Columns.values()}, got {request.columns}",
        )
    asked = request.frequencies, request.ages, request.norms
    return Summary(*asked, grace=request.grace, top=request.top)


def _require(field: str, values: Sequence[float], least: float, most: float) -> None:
    """Raise BadRequest unless there are at most MAX_EDGES values, all of them finite and in
    ``least..most``.

    field  name of the request's field, for the message
    """
    if len(values) > MAX_EDGES:
        raise BadRequest(
            "INVALID_ARGUMENT",
            f"{field} may have at most {MAX_EDGES} edges, got {len(values)}",
        )
    for value in values:
        if not least <= value <= most or math.isinf(value):
            rule = f"in {least:g}..{most:g}" if least >= 1 or not least else "finite and above 0"
            raise BadRequest("INVALID_ARGUMENT", f"{field} must be {rule}, got {value!r}")


def write_summary(summary: Summary, schema: TableSchema, step: int) -> pb.Summary:
    """Convert a summary of a table's rows to a message.

    step  largest training step pushed to the table; FIRST_STEP (no push yet) is sent as 0
    """
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
    """Convert a list of rows, for example those with the largest norms, to a message."""
    rows = extremes.rows
    return pb.RowList(
        keys=rows.keys.tolist(),
        versions=rows.versions.tolist(),
        steps=rows.steps.tolist(),
        frequencies=rows.frequencies.tolist(),
        norms=rows.norms.tolist(),
        tiers=extremes.tiers.tolist(),
    )
