"""The figures of an analysis, as a page and a terminal show them."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from psclient.tools.summary import Analysis, Histogram, RowList

UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


@dataclass(frozen=True, slots=True)
class Threshold:
    """What a rule would do."""

    value: float
    asked: bool  # not one of the usual ones
    rows: int  # that stay below it, or leave
    share: float  # of all rows
    lost: float = 0.0  # share of the occurrences


def size(count: float) -> str:
    """Bytes with a unit."""
    power = 0 if count < 1000 else min(int(math.log10(count) // 3), len(UNITS) - 1)
    return f"{count / 1000**power:.3g} {UNITS[power]}" if power else f"{count:.0f} B"


def number(value: float) -> str:
    """A number of an axis: whole ones whole, others short."""
    return f"{value:,.0f}" if value >= 1 and float(value).is_integer() else f"{value:.6g}"


def percent(part: float) -> str:
    """A share: as many digits as it takes to tell it from nothing and from all."""
    if part in (0.0, 1.0):
        return f"{part:.0%}"
    return f"{part:.1%}" if 0.001 <= part <= 0.999 else f"{100 * part:.3g}%"


def share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def buckets(
    histogram: Histogram, *, whole: bool = False, upper: bool = False
) -> list[tuple[str, int]]:
    """The counts from the first that is not 0 to the last, under what they are of.

    whole  values are whole numbers
    upper  the larger edge of a bucket belongs to it, not the smaller one; values are at least 0
    """
    used = np.flatnonzero(histogram.counts)
    if not len(used):
        return []
    edges = [0.0 if upper else -math.inf, *histogram.edges.tolist(), math.inf]
    found = []
    for i in range(int(used[0]), int(used[-1]) + 1):
        low, high = edges[i], edges[i + 1]
        if whole:
            low, high = (low + (i > 0), high) if upper else (low, high - 1)
        found.append((_between(low, high), int(histogram.counts[i])))
    return found


def _between(low: float, high: float) -> str:
    if math.isinf(low):
        return f"< {number(high)}"
    if math.isinf(high):
        return f"≥ {number(low)}"
    return number(low) if low == high else f"{number(low)} … {number(high)}"


def admissions(found: Analysis) -> list[Threshold]:
    """What counting to a threshold would have left without a row."""
    chosen = _interesting(found.frequencies, found.asked.get("frequencies", ()), least=2)
    return [
        Threshold(
            value,
            asked,
            found.rows - found.admitted(int(value)),
            1 - share(found.admitted(int(value)), found.rows) if found.rows else 0.0,
            share(found.dropped(int(value)), found.occurrences),
        )
        for value, asked in chosen
    ]


def ttls(found: Analysis) -> list[Threshold]:
    """What a step TTL would evict."""
    chosen = _interesting(found.ages, found.asked.get("ages", ()), least=1)
    rows = [(value, asked, found.idle(int(value))) for value, asked in chosen]
    return [Threshold(value, asked, n, share(n, found.rows)) for value, asked, n in rows]


def small(found: Analysis) -> list[Threshold]:
    """What the norm rule would evict."""
    chosen = _interesting(found.idle_norms, found.asked.get("norms", ()), least=0)
    rows = [(value, asked, found.small(value)) for value, asked in chosen]
    return [Threshold(value, asked, n, share(n, found.rows)) for value, asked, n in rows]


def _interesting(
    histogram: Histogram, asked: Sequence[float], least: float
) -> list[tuple[float, bool]]:
    """Edges with values on both sides, one more on either end, and all that were asked for."""
    sums = np.concatenate([[0], np.cumsum(histogram.counts)])[1:-1]
    both = np.flatnonzero((sums > 0) & (sums < histogram.counts.sum()))
    first, last = (max(0, both[0] - 1), both[-1] + 1) if len(both) else (0, -1)
    return [
        (edge, edge in asked)
        for i, edge in enumerate(histogram.edges.tolist())
        if edge in asked or (first <= i <= last and edge >= least)
    ]


def title(found: Analysis) -> str:
    """What was analyzed, when."""
    taken = when(found.time)
    of = f"checkpoint {found.checkpoint}, taken {taken}" if found.checkpoint else taken
    return f"{found.table} · {of}"


def facts(found: Analysis) -> list[tuple[str, str]]:
    """The table in short: names and values."""
    per_row = share(found.occurrences, found.rows)
    shown = [
        ("rows", f"{found.rows:,}"),
        ("memory" if not found.checkpoint else "stored rows", size(found.bytes)),
        ("a row", f"{found.row_bytes:,} B"),
        ("dim, optimizer", f"{found.dim}, {found.optimizer}"),
        ("occurrences", f"{found.occurrences:,}"),
        ("occurrences a row", f"{per_row:,.1f}"),
        ("mean norm", f"{found.norm_mean:.4g}"),
        ("step", f"{found.step:,}"),
        ("shard versions", ", ".join(f"{version:,}" for version in found.versions)),
    ]
    if found.waiting or found.waiting_bytes:
        shown.insert(1, ("waiting keys", f"{found.waiting:,}"))
    return shown


def memory(found: Analysis) -> list[tuple[str, int | None, int]]:
    """What takes how many bytes: tiers, with their rows, and what else there is."""
    parts: list[tuple[str, int | None, int]] = [
        (tier.name, tier.rows, tier.bytes) for tier in found.tiers
    ]
    if found.index_bytes:
        parts.append(("index", None, found.index_bytes))
    if found.waiting_bytes:
        parts.append(("admission", None, found.waiting_bytes))
    return parts


LISTS = (
    ("most_frequent", "Most frequent"),
    ("least_frequent", "Least frequent"),
    ("largest", "Largest norm"),
    ("smallest", "Smallest norm"),
)


EXTREMES = ("key", "occurrences", "norm", "last step", "version", "shard", "tier")


def lines(rows: RowList) -> list[tuple[str, ...]]:
    """Rows of such a table."""
    return [
        (str(key), f"{frequency:,}", f"{norm:.4g}", f"{step:,}", f"{version:,}", str(shard), tier)
        for key, frequency, norm, step, version, shard, tier in zip(
            rows.keys.tolist(),
            rows.frequencies.tolist(),
            rows.norms.tolist(),
            rows.steps.tolist(),
            rows.versions.tolist(),
            rows.shards.tolist(),
            rows.tiers,
            strict=True,
        )
    ]


def cells(each: Threshold) -> tuple[str, str, str]:
    return number(each.value), f"{each.rows:,}", percent(each.share)


def when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
