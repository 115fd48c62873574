"""Numbers of an analysis, chosen and formatted as text for the terminal and the HTML page."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from psclient.tools.arrow import KeyType
from psclient.tools.misses import CURVES, curves, sizes
from psclient.tools.summary import GPU, Analysis, Histogram, RowList, Tier

UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")  # each is 1024 times the one before
STEPS = (1, 2, 5, 10, 20, 50, 100, 200, 500)  # distances of ticks on an axis, in one of the units


@dataclass(frozen=True, slots=True)
class Threshold:
    """How many rows an admission or eviction rule with this threshold would refuse or evict."""

    value: float
    asked: bool  # whether the caller asked for this threshold
    rows: int  # number of rows that the rule would refuse or evict
    share: float  # ``rows`` as a fraction of all rows
    lost: float = 0.0  # fraction of occurrences that an admission rule would drop


def size(count: float) -> str:
    """Format a number of bytes as the status page does: 1234567 as "1.18 MiB"."""
    power = 0
    while count >= 1024 and power < len(UNITS) - 1:
        count, power = count / 1024, power + 1
    text = f"{count:.0f}" if power == 0 or count >= 100 else f"{count:#.3g}".rstrip(".")
    return f"{text} {UNITS[power]}"


def size_ticks(most: float) -> tuple[list[int], list[str]]:
    """Return (values, labels) of at most 9 ticks of an axis of bytes that ends at ``most``."""
    steps = ((step, power) for power in range(len(UNITS)) for step in STEPS)
    step, power = next(each for each in steps if most <= 7 * each[0] * 1024 ** each[1])
    values = [at * step for at in range(int(most / (step * 1024**power)) + 2)]
    labels = [f"{value} {UNITS[power]}" if value else "0" for value in values]
    return [value * 1024**power for value in values], labels


def number(value: float) -> str:
    """Format a number: "12,345" if it is whole and at least 1, otherwise with up to 6 digits."""
    return f"{value:,.0f}" if value >= 1 and float(value).is_integer() else f"{value:.6g}"


def percent(part: float) -> str:
    """Format a fraction in percent, with enough digits to differ from 0% and 100%."""
    if part in (0.0, 1.0):
        return f"{part:.0%}"
    if part < 0.001:
        return f"{100 * part:.3g}%"
    digits = 1 if part <= 0.999 else math.ceil(round(-math.log10(1 - part), 9)) - 2
    return f"{100 * part:.{digits}f}%"


def share(part: float, whole: float) -> float:
    """Return ``part / whole``, or 0 if whole is 0."""
    return part / whole if whole else 0.0


def buckets(
    histogram: Histogram, *, whole: bool = False, upper: bool = False
) -> list[tuple[str, int]]:
    """Return (range as text, count) of each bucket, from the first to the last non-empty one.

    whole  the values are integers: show ranges with inclusive ends, "2 … 3"
    upper  a bucket includes its upper edge instead of its lower one; values are at least 0
    """
    used = np.flatnonzero(histogram.counts)
    if not len(used):
        return []
    edges = [0.0 if upper else -math.inf, *histogram.edges.tolist(), math.inf]
    ranges: list[tuple[str, int]] = []
    for i in range(int(used[0]), int(used[-1]) + 1):
        low, high = edges[i], edges[i + 1]
        if whole:
            low, high = (low + (i > 0), high) if upper else (low, high - 1)
        ranges.append((_between(low, high), int(histogram.counts[i])))
    return ranges


def _between(low: float, high: float) -> str:
    """Format a range: "1 … 3", "< 3" if ``low`` is infinite, "≥ 1" if ``high`` is."""
    if math.isinf(low):
        return f"< {number(high)}"
    if math.isinf(high):
        return f"≥ {number(low)}"
    return number(low) if low == high else f"{number(low)} … {number(high)}"


def admissions(result: Analysis) -> list[Threshold]:
    """Return how many rows admission rules with different thresholds would have refused.

    The thresholds are those that the caller of the analysis asked for, the built-in ones that
    refuse some rows but not all, and the next built-in one on either side of these.
    """
    chosen = _interesting(result.frequencies, result.asked.get("frequencies", ()), least=2)
    return [
        Threshold(
            value,
            asked,
            result.rows - result.admitted(int(value)),
            1 - share(result.admitted(int(value)), result.rows) if result.rows else 0.0,
            share(result.dropped(int(value)), result.occurrences),
        )
        for value, asked in chosen
    ]


def ttls(result: Analysis) -> list[Threshold]:
    """Return how many rows eviction by age would delete now, for different TTLs in steps.

    The TTLs are chosen in the same way as the thresholds in ``admissions``.
    """
    chosen = _interesting(result.ages, result.asked.get("ages", ()), least=1)
    rows = [(value, asked, result.idle(int(value))) for value, asked in chosen]
    return [Threshold(value, asked, n, share(n, result.rows)) for value, asked, n in rows]


def small(result: Analysis) -> list[Threshold]:
    """Return how many rows the norm rule would evict now with different thresholds.

    The thresholds are chosen in the same way as in ``admissions``.
    """
    chosen = _interesting(result.idle_norms, result.asked.get("norms", ()), least=0)
    rows = [(value, asked, result.small(value)) for value, asked in chosen]
    return [Threshold(value, asked, n, share(n, result.rows)) for value, asked, n in rows]


def _interesting(
    histogram: Histogram, asked: Sequence[float], least: float
) -> list[tuple[float, bool]]:
    """Choose edges of a histogram to show; return (edge, whether it is in ``asked``).

    asked  edges that are always chosen
    least  smallest edge that is chosen if it is not in ``asked``

    Chosen are all edges with values on both sides, and one more edge at either end.
    """
    sums = np.concatenate([[0], np.cumsum(histogram.counts)])[1:-1]
    both = np.flatnonzero((sums > 0) & (sums < histogram.counts.sum()))
    first, last = (max(0, both[0] - 1), both[-1] + 1) if len(both) else (0, -1)
    return [
        (edge, edge in asked)
        for i, edge in enumerate(histogram.edges.tolist())
        if edge in asked or (first <= i <= last and edge >= least)
    ]


def misses(result: Analysis) -> list[tuple[str, ...]]:
    """Return a line of text cells for each size of host memory; MISSES has the column titles."""
    found = curves(result)
    return [
        (
            f"{rows:,}",
            percent(share(rows, result.rows)),
            size(rows * result.row_bytes),
            *(percent(found[name].at(rows)) if name in found else "-" for name in CURVES),
        )
        for rows in (sizes(result) if found else [])
    ]


MISSES = ("rows in memory", "share of rows", "size of rows", "misses, LFU", "misses, LRU")


def title(result: Analysis) -> str:
    """Return a title: the table's name, then the checkpoint if there is one, then the time."""
    taken = when(result.time)
    of = f"checkpoint {result.checkpoint}, taken {taken}" if result.checkpoint else taken
    return f"{result.table} · {of}"


def facts(result: Analysis) -> list[tuple[str, str]]:
    """Return the main numbers of an analysis as (name, value): rows, memory, occurrences, ..."""
    per_row = share(result.occurrences, result.rows)
    shown = [
        ("rows", f"{result.rows:,}"),
        ("memory" if not result.checkpoint else "stored rows", size(result.bytes)),
        ("bytes per row", f"{result.row_bytes:,}"),
        ("dim, optimizer", f"{result.dim}, {result.optimizer}"),
        ("occurrences", f"{result.occurrences:,}"),
        ("occurrences per row", f"{per_row:,.1f}"),
        ("mean norm", f"{result.norm_mean:.4g}"),
        ("step", f"{result.step:,}"),
        ("shard versions", ", ".join(f"{version:,}" for version in result.versions)),
    ]
    if result.waiting or result.waiting_bytes:
        shown.insert(1, ("waiting keys", f"{result.waiting:,}"))
    return shown


def storage(tier: str, on_disk: bool) -> str:
    """Return the kind of storage that a tier is, as text."""
    return "disk" if on_disk else "GPU memory" if tier == GPU else "memory"


def _named(tier: Tier) -> str:
    kind = storage(tier.name, tier.on_disk)
    return tier.name if tier.in_memory else f"{tier.name} ({kind})"


def memory(result: Analysis) -> list[tuple[str, int | None, int]]:
    """Return (name, rows or None, bytes) of each part of a table's memory, and of other tiers.

    The parts are the tiers (kinds of storage for rows), the index and the admission counters.
    """
    parts: list[tuple[str, int | None, int]] = [
        (_named(tier), tier.rows, tier.bytes) for tier in result.tiers
    ]
    if result.index_bytes:
        parts.append(("index", None, result.index_bytes))
    if result.waiting_bytes:
        parts.append(("admission", None, result.waiting_bytes))
    return parts


LISTS = (
    ("most_frequent", "Most frequent"),
    ("least_frequent", "Least frequent"),
    ("largest", "Largest norm"),
    ("smallest", "Smallest norm"),
)


EXTREMES = ("key", "occurrences", "norm", "last step", "version", "shard", "tier")


def lines(rows: RowList, keys: KeyType = np.uint64) -> list[tuple[str, ...]]:
    """Return a line of text cells for each row in a list; EXTREMES has the column heads.

    keys  type in which keys are shown: np.uint64 or np.int64
    """
    return [
        (str(key), f"{frequency:,}", f"{norm:.4g}", f"{step:,}", f"{version:,}", str(shard), tier)
        for key, frequency, norm, step, version, shard, tier in zip(
            rows.keys.view(keys).tolist(),
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
    """Return the text cells for a threshold: its value, number of rows, share of all rows."""
    return number(each.value), f"{each.rows:,}", percent(each.share)


def when(seconds: float) -> str:
    """Format a time, in seconds since 1970, as local time: "2026-01-31 12:00:00"."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
