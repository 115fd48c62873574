"""Plots of an analysis (for plotly), each with a table of its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from psclient.tools.figures import (
    MISSES,
    Threshold,
    admissions,
    buckets,
    cells,
    memory,
    misses,
    percent,
    share,
    size,
    size_ticks,
    small,
    ttls,
    when,
)
from psclient.tools.history import Moment
from psclient.tools.misses import curves
from psclient.tools.summary import Analysis

MARKED = 20  # a curve with more points has no markers, which would hide it
CATEGORIES = {"type": "category", "autorange": "reversed", "showgrid": False}  # axis of labels


@dataclass(frozen=True, slots=True)
class Chart:
    """A plot, and a table with its numbers."""

    head: str  # title
    about: str  # one sentence that explains the plot
    data: list[dict[str, Any]]  # plotly traces
    layout: dict[str, Any]  # plotly layout
    columns: Sequence[str]  # column heads of the table
    lines: Sequence[Sequence[str]]  # lines of the table, one cell per column


def charts(result: Analysis, moments: Sequence[Moment]) -> list[Chart]:
    """Return all charts of an analysis.

    moments  earlier analyses of the table, ordered by time, for the charts of its growth
    """
    shards = [(f"{i}", rows) for i, rows in enumerate(result.shard_rows)]
    return [
        *(_growth(moments) if len(moments) > 1 else ()),
        *_admission(result),
        *_eviction(result),
        _memory(result),
        *_misses(result),
        _histogram("Shards", "Rows of each shard.", "shard", shards),
    ]


def _eviction(result: Analysis) -> tuple[Chart, ...]:
    """Return the charts of ages and norms, and of the effect of step TTLs and norm thresholds."""
    grace = f" that were not pushed for {result.grace:,} steps" if result.grace else ""
    return (
        _histogram(
            "Age",
            "Steps since the last push of a row.",
            "steps",
            buckets(result.ages, whole=True, upper=True),
        ),
        _curves(
            "Step TTLs",
            "Rows that a step TTL would evict now.",
            "step TTL, steps",
            ttls(result),
            ("rows evicted",),
        ),
        _histogram("Norm", "L2 norms of embeddings.", "norm", buckets(result.norms)),
        _curves(
            "Norm thresholds",
            f"Rows{grace} that a norm threshold would evict now.",
            "norm threshold",
            small(result),
            ("rows evicted",),
        ),
    )


def _admission(result: Analysis) -> tuple[Chart, Chart]:
    """Return the charts of frequencies, and of the effect of admission thresholds."""
    return (
        _histogram(
            "Frequency",
            "How often the keys that have rows were pushed.",
            "occurrences",
            buckets(result.frequencies, whole=True),
        ),
        _curves(
            "Admission thresholds",
            "Rows that an admission threshold would have refused, and the occurrences whose"
            " gradients it would have dropped.",
            "admission threshold, occurrences",
            admissions(result),
            ("rows refused", "occurrences dropped"),
        ),
    )


def _histogram(head: str, about: str, axis: str, counts: Sequence[tuple[str, int]]) -> Chart:
    """Return a bar chart of the number of rows in each range.

    head    title
    about   sentence that explains the chart
    axis    title of the axis of ranges
    counts  (range, number of rows)
    """
    labels, values = [label for label, _ in counts], [n for _, n in counts]
    whole = sum(values)
    shares = [percent(share(n, whole)) for n in values]
    trace = {
        "type": "bar",
        "orientation": "h",
        "x": values,
        "y": labels,
        "customdata": shares,
        "hovertemplate": "%{y}<br>%{x:,} rows, %{customdata}<extra></extra>",
    }
    layout = {
        "xaxis": {"title": {"text": "rows"}, "rangemode": "tozero"},
        "yaxis": {"title": {"text": axis}, "dtick": 1, **CATEGORIES},
    }
    lines = [(label, f"{n:,}", share) for (label, n), share in zip(counts, shares, strict=True)]
    return Chart(head, about, [trace], layout, (axis, "rows", "of rows"), lines)


def _curves(
    head: str, about: str, axis: str, chosen: Sequence[Threshold], names: tuple[str, ...]
) -> Chart:
    """Return a line chart of the share of rows that a rule would refuse or evict, by threshold.

    head    title
    about   sentence that explains the chart
    axis    title of the axis of thresholds
    chosen  the thresholds
    names   name of the curve of rows; optionally a second name, for a curve of occurrences
    """
    shares = [[each.share for each in chosen], [each.lost for each in chosen]]
    traces = [_curve(name, chosen, values) for name, values in zip(names, shares, strict=False)]
    layout = {
        "xaxis": {"title": {"text": axis}, "type": "log", "dtick": 1},
        "yaxis": {"tickformat": ".0%", "range": [-0.02, 1.04]},
    }
    lost = len(names) > 1
    columns = [axis, "rows", "of rows", *(["of occurrences"] if lost else [])]
    lines = [_threshold_cells(each, lost=lost) for each in chosen]
    return Chart(head, about, traces, layout, columns, lines)


def _curve(name: str, chosen: Sequence[Threshold], values: Sequence[float]) -> dict[str, Any]:
    """Return a plotly trace of a value per threshold; thresholds that were asked for are marked.

    name    name of the curve
    chosen  the thresholds
    values  value for each of them, in 0..1
    """
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "x": [each.value for each in chosen],
        "y": values,
        "customdata": [each.rows for each in chosen],
        "hovertemplate": f"%{{x}}: %{{y:.2%}} {name}<extra></extra>",
        "marker": {
            "size": [11 if each.asked else 6 for each in chosen],
            "symbol": ["diamond" if each.asked else "circle" for each in chosen],
        },
    }


def _threshold_cells(each: Threshold, *, lost: bool) -> list[str]:
    """Return the cells for a threshold: value (marked if it was asked for), rows, share of rows.

    lost  add the share of dropped occurrences
    """
    value, *counts = cells(each)
    marked = f"{value} ◆" if each.asked else value
    return [marked, *counts, *([percent(each.lost)] if lost else [])]


def _memory(result: Analysis) -> Chart:
    """Return a bar chart of the table's memory by part."""
    parts = memory(result)
    trace = {
        "type": "bar",
        "orientation": "h",
        "y": [escape(name) for name, _, _ in parts],
        "x": [count for _, _, count in parts],
        "customdata": [size(count) for _, _, count in parts],
        "hovertemplate": "%{y}: %{customdata}<extra></extra>",
    }
    layout = {
        "xaxis": _axis_of_bytes([count for _, _, count in parts]),
        "yaxis": CATEGORIES,
    }
    lines = [
        (name, "" if rows is None else f"{rows:,}", size(count)) for name, rows, count in parts
    ]
    about = "Memory by part: rows of each tier, unused room included, index and counters."
    return Chart("Memory", about, [trace], layout, ("part", "rows", "memory"), lines)


def _misses(result: Analysis) -> list[Chart]:
    """Return the chart of miss rates by size of host memory; [] if none is known."""
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers" if len(curve.rows) <= MARKED else "lines",
            "name": policy.upper(),
            "x": curve.rows[1:].tolist(),
            "y": curve.misses[1:].tolist(),
            "hovertemplate": f"%{{x:,.0f}} rows: %{{y:.2%}} {policy.upper()} misses<extra></extra>",
        }
        for policy, curve in curves(result).items()
    ]
    layout = {
        "xaxis": {"title": {"text": "rows in host memory"}, "type": "log", "dtick": 1},
        "yaxis": {"tickformat": ".0%", "range": [-0.02, 1.04]},
    }
    about = (
        "Share of the keys whose row would not be in host memory, by the number of rows that it"
        " keeps. LFU: of pushed keys, exact from the frequencies. LRU: of pulled and pushed keys,"
        " from a sample since the start of the servers."
    )
    if not traces:
        return []
    return [Chart("Misses by size of memory", about, traces, layout, MISSES, misses(result))]


def _growth(moments: Sequence[Moment]) -> list[Chart]:
    """Return the chart of rows over time, and of memory over time if it was measured twice."""
    live = [each for each in moments if each.checkpoint is None]  # a checkpoint uses no memory
    charts = [_growth_of_rows(moments)]
    return [*charts, _growth_of_memory(live)] if len(live) > 1 else charts


def _growth_of_rows(moments: Sequence[Moment]) -> Chart:
    """Return a chart of rows, and of waiting keys if there were any, over time."""
    rows = [_line("rows", [(each.time, each.rows) for each in moments])]
    counted = [each for each in moments if each.checkpoint is None or each.waiting]
    if any(each.waiting for each in counted):
        rows.append(_line("waiting keys", [(each.time, each.waiting) for each in counted]))
    return Chart(
        "Growth",
        "Rows of this table in earlier analyses and in checkpoints.",
        rows,
        {"xaxis": {"type": "date"}, "yaxis": {"rangemode": "tozero"}},
        ("time", "checkpoint", "rows", "waiting keys", "step"),
        [
            (
                when(each.time),
                each.checkpoint or "",
                f"{each.rows:,}",
                f"{each.waiting:,}" if each in counted else "",
                f"{each.step:,}",
            )
            for each in moments
        ],
    )


def _growth_of_memory(moments: Sequence[Moment]) -> Chart:
    """Return a chart of memory over time."""
    line = _line("memory", [(each.time, each.bytes) for each in moments])
    return Chart(
        "Growth of memory",
        "Memory of this table in earlier analyses.",
        [line],
        {"xaxis": {"type": "date"}, "yaxis": _axis_of_bytes([each.bytes for each in moments])},
        ("time", "memory"),
        [(when(each.time), size(each.bytes)) for each in moments],
    )


def _axis_of_bytes(counts: Sequence[int]) -> dict[str, Any]:
    """Return an axis for numbers of bytes that starts at 0."""
    values, labels = size_ticks(max(counts, default=0))
    return {"rangemode": "tozero", "tickmode": "array", "tickvals": values, "ticktext": labels}


def _line(name: str, points: Sequence[tuple[float, int]]) -> dict[str, Any]:
    """Return a plotly trace called ``name``; ``points`` are (seconds since 1970, value)."""
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "x": [when(at) for at, _ in points],
        "y": [value for _, value in points],
        "hovertemplate": f"%{{x}}<br>%{{y:,}} {name}<extra></extra>",
    }
