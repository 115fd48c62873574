"""Read the options of an analysis, and convert its summary to a message."""

from __future__ import annotations

import math
from collections.abc import Sequence

from psproto import ps_pb2 as pb
from psserver.errors import BadRequest
from psserver.outbox import Columns
from psserver.schemas import write_schema
from storage.analysis import Extremes, Histogram, Summary
from storage.eviction.contract import FIRST_STEP
from storage.schema import TableSchema

MAX_EDGES = 256  # maximum number of edges (bucket bounds) that a request may add to a histogram
MAX_TOP = 1000  # maximum number of rows in each list of most and least extreme rows
LAST_STEP = 1 << 48  # largest valid ``ages`` and ``grace`` of a request, in training steps


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
