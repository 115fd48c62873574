"""An analysis for the eye: tables of a terminal, and one HTML page with plots.

The page loads nothing: plotly.js is part of it, and a content security policy says so to the
browser. Whatever is plotted also stands in a table, and all that comes from data is escaped.
Needs plotly: pip install 'embedding-ps[report]'.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from string import Template
from typing import Any

import numpy as np
from rich import box
from rich.columns import Columns
from rich.console import Console, Group
from rich.markup import escape as plain
from rich.table import Table
from rich.text import Text

from psclient.analysis import Analysis, Histogram, KeyInfo, Moment, RowList
from psclient.errors import InvalidArgument

BAR = 24  # characters
EIGHTHS = " ▏▎▍▌▋▊▉█"
UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


@dataclass(frozen=True, slots=True)
class Threshold:
    """What a rule would do."""

    value: float
    asked: bool  # not one of the usual ones
    rows: int  # that stay below it, or leave
    share: float  # of all rows
    lost: float = 0.0  # share of the occurrences


# ---- figures


def size(count: float) -> str:
    """Bytes with a unit."""
    power = 0 if count < 1000 else min(int(math.log10(count) // 3), len(UNITS) - 1)
    return f"{count / 1000**power:.3g} {UNITS[power]}" if power else f"{count:.0f} B"


def number(value: float) -> str:
    """A number of an axis: whole ones whole, others short."""
    return f"{value:,.0f}" if value >= 1 and float(value).is_integer() else f"{value:.6g}"


def percent(share: float) -> str:
    """A share: as many digits as it takes to tell it from nothing and from all."""
    if share in (0.0, 1.0):
        return f"{share:.0%}"
    return f"{share:.1%}" if 0.001 <= share <= 0.999 else f"{100 * share:.3g}%"


def _share(part: float, whole: float) -> float:
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
            1 - _share(found.admitted(int(value)), found.rows) if found.rows else 0.0,
            _share(found.dropped(int(value)), found.occurrences),
        )
        for value, asked in chosen
    ]


def ttls(found: Analysis) -> list[Threshold]:
    """What a step TTL would evict."""
    chosen = _interesting(found.ages, found.asked.get("ages", ()), least=1)
    rows = [(value, asked, found.idle(int(value))) for value, asked in chosen]
    return [Threshold(value, asked, n, _share(n, found.rows)) for value, asked, n in rows]


def small(found: Analysis) -> list[Threshold]:
    """What the norm rule would evict."""
    chosen = _interesting(found.idle_norms, found.asked.get("norms", ()), least=0)
    rows = [(value, asked, found.small(value)) for value, asked in chosen]
    return [Threshold(value, asked, n, _share(n, found.rows)) for value, asked, n in rows]


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
    when = _when(found.time)
    of = f"checkpoint {found.checkpoint}, taken {when}" if found.checkpoint else when
    return f"{found.table} · {of}"


def facts(found: Analysis) -> list[tuple[str, str]]:
    """The table in short: names and values."""
    per_row = _share(found.occurrences, found.rows)
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


STYLES = {"row": "green", "waiting": "yellow", "gone": "red", "new": "dim", "unknown": "magenta"}
LISTS = (
    ("most_frequent", "Most frequent"),
    ("least_frequent", "Least frequent"),
    ("largest", "Largest norm"),
    ("smallest", "Smallest norm"),
)


# ---- terminal


def show(console: Console, found: Analysis) -> None:
    """Print an analysis."""
    console.print(Text(title(found), style="bold"))
    grid = Table.grid(padding=(0, 2))
    for name, value in facts(found):
        grid.add_row(Text(name, style="dim"), plain(value))
    grid.add_row(Text("took", style="dim"), f"{found.seconds:.2g} s")
    console.print(grid)
    parts = _table("Memory", "part", "rows", "bytes")
    for name, rows, count in memory(found):
        parts.add_row(plain(name), "" if rows is None else f"{rows:,}", size(count))
    shards = [(f"shard {i}", rows) for i, rows in enumerate(found.shard_rows)]
    _print_beside(console, parts, _bars("Shards", "shard", shards))
    frequencies = buckets(found.frequencies, whole=True)
    _print_beside(
        console,
        _bars("Frequency of keys", "occurrences", frequencies),
        _tries("Refused by an admission threshold", "occurrences", admissions(found), lost=True),
    )
    ages = buckets(found.ages, whole=True, upper=True)
    _print_beside(
        console,
        _bars("Age of rows, since the last push", "steps", ages),
        _tries("Evicted by a step TTL", "steps", ttls(found)),
    )
    grace = f", grace {found.grace:,}" if found.grace else ""
    _print_beside(
        console,
        _bars("L2 norm of embeddings", "norm", buckets(found.norms)),
        _tries(f"Evicted by a norm threshold{grace}", "norm", small(found)),
    )
    for field, head in LISTS:
        extremes: RowList = getattr(found, field)
        if len(extremes.keys):
            console.print(_extremes(head, extremes))


def _table(head: str, *columns: str) -> Table:
    table = Table(
        title=head,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        min_width=len(head),
    )
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    return table


def _print_beside(console: Console, left: Table, right: Table) -> None:
    """Print two tables, beside one another where there is room."""
    console.print(Columns([left, right], padding=(0, 4)))


def _tries(head: str, column: str, chosen: Sequence[Threshold], *, lost: bool = False) -> Table:
    table = _table(head, column, "rows", "of rows", *(("of occurrences",) if lost else ()))
    for each in chosen:
        cells = (*_cells(each), *((percent(each.lost),) if lost else ()))
        table.add_row(*cells, style="bold yellow" if each.asked else "")
    return table


def _bars(head: str, column: str, counts: Sequence[tuple[str, int]]) -> Table:
    table = _table(head, column, "rows", "of rows")
    table.add_column("", justify="left", no_wrap=True)
    whole, most = sum(n for _, n in counts), max((n for _, n in counts), default=0)
    for label, n in counts:
        bar = Text(_bar(_share(n, most)), style="cyan")
        table.add_row(label, f"{n:,}", percent(_share(n, whole)), bar)
    return table


def _bar(share: float) -> str:
    eighths = math.ceil(share * BAR * 8)
    return "█" * (eighths // 8) + EIGHTHS[eighths % 8].strip()


def _cells(each: Threshold) -> tuple[str, str, str]:
    return number(each.value), f"{each.rows:,}", percent(each.share)


def _extremes(head: str, rows: RowList) -> Table:
    table = _table(head, *_EXTREMES)
    for cells in _lines(rows):
        table.add_row(*map(plain, cells))
    return table


_EXTREMES = ("key", "occurrences", "norm", "last step", "version", "shard", "tier")


def _lines(rows: RowList) -> list[tuple[str, ...]]:
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


def show_keys(console: Console, found: Sequence[KeyInfo], names: Sequence[str] = ()) -> None:
    """Print what is known of keys; names: what they were made of."""
    table = Table(box=None, show_header=False, padding=(0, 2, 1, 0))
    table.add_column(no_wrap=True, justify="right", vertical="top")
    table.add_column()
    for i, each in enumerate(found):
        name = f"{names[i]}\n{each.key}" if names else str(each.key)
        said = [
            Text(each.reason, style=STYLES[each.state]).append(f"  shard {each.shard}", style="dim")
        ]
        if each.state == "row":
            said.append(
                Text(
                    f"{each.frequency:,} occurrences · last pushed at step {each.step:,},"
                    f" version {each.version:,} · norm {each.norm:.4g}"
                )
            )
        before = each.gone[:-1] if each.state == "gone" else each.gone
        said += [Text(f"before: {gone}", style="dim") for gone in reversed(before)]
        if each.embedding is not None:
            said.append(Text(np.array2string(each.embedding, precision=4, threshold=64)))
        table.add_row(Text(name, style="bold"), Group(*said))
    console.print(table)


# ---- HTML


def require() -> None:
    """InvalidArgument if plotly is missing, without which there is no page."""
    _library()


def page(found: Analysis, moments: Sequence[Moment] = ()) -> str:
    """One HTML page; ``moments`` of a history, by time, are its growth.

    InvalidArgument if plotly is missing.
    """
    library = _library()
    charts = _charts(found, moments)
    cards = "".join(_card(f"chart{i}", chart) for i, chart in enumerate(charts)) + "".join(
        _list_card(head, getattr(found, field)) for field, head in LISTS
    )
    figures = {f"chart{i}": {"data": c.data, "layout": c.layout} for i, c in enumerate(charts)}
    tiles = "".join(
        f"<div class=tile><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in facts(found)
    )
    return _PAGE.substitute(
        title=escape(title(found)),
        table=escape(found.table),
        subtitle=escape(title(found).partition(" · ")[2]),
        seconds=f"{found.seconds:.2g}",
        tiles=tiles,
        cards=cards,
        figures=_json(figures),
        library=library,
    )


def _library() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise InvalidArgument(
            "an HTML report needs plotly: pip install 'embedding-ps[report]'"
        ) from error
    return str(get_plotlyjs())


def _json(value: Any) -> str:
    """JSON that may stand in a script element."""
    text = json.dumps(value, allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


@dataclass(frozen=True, slots=True)
class _Chart:
    head: str
    about: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    columns: Sequence[str]
    lines: Sequence[Sequence[str]]


def _charts(found: Analysis, moments: Sequence[Moment]) -> list[_Chart]:
    charts = _growth(moments) if len(moments) > 1 else []
    grace = f" that were not pushed for {found.grace:,} steps" if found.grace else ""
    for head, about, axis, counts in (
        (
            "Frequency",
            "How often the keys that have rows were pushed.",
            "occurrences",
            buckets(found.frequencies, whole=True),
        ),
        (
            "Age",
            "Steps since a row was pushed last.",
            "steps",
            buckets(found.ages, whole=True, upper=True),
        ),
        ("Norm", "L2 norms of embeddings.", "norm", buckets(found.norms)),
    ):
        charts.append(_histogram(head, about, axis, counts))
    admitted = admissions(found)
    charts.insert(
        -2,
        _curves(
            "If a key had to earn its row",
            "Rows that an admission threshold would have refused, and the occurrences whose"
            " gradients it would have dropped.",
            "admission threshold, occurrences",
            admitted,
            ("rows refused", "occurrences dropped"),
        ),
    )
    charts.insert(
        -1,
        _curves(
            "If rows had to be pushed",
            "Rows that a step TTL would evict now.",
            "step TTL, steps",
            ttls(found),
            ("rows evicted",),
        ),
    )
    charts.append(
        _curves(
            "If rows had to be large",
            f"Rows{grace} that a norm threshold would evict now.",
            "norm threshold",
            small(found),
            ("rows evicted",),
        )
    )
    charts.append(_memory(found))
    shards = [(f"{i}", rows) for i, rows in enumerate(found.shard_rows)]
    charts.append(_histogram("Shards", "Rows of each shard.", "shard", shards))
    return charts


def _histogram(head: str, about: str, axis: str, counts: Sequence[tuple[str, int]]) -> _Chart:
    labels, values = [label for label, _ in counts], [n for _, n in counts]
    whole = sum(values)
    shares = [percent(_share(n, whole)) for n in values]
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
        "yaxis": {
            "title": {"text": axis},
            "type": "category",
            "autorange": "reversed",
            "dtick": 1,
            "showgrid": False,
        },
    }
    lines = [(label, f"{n:,}", share) for (label, n), share in zip(counts, shares, strict=True)]
    return _Chart(head, about, [trace], layout, (axis, "rows", "of rows"), lines)


def _curves(
    head: str, about: str, axis: str, chosen: Sequence[Threshold], names: tuple[str, ...]
) -> _Chart:
    at = [each.value for each in chosen]
    shares = [[each.share for each in chosen], [each.lost for each in chosen]]
    traces: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": name,
            "x": at,
            "y": values,
            "customdata": [each.rows for each in chosen],
            "hovertemplate": f"%{{x}}: %{{y:.2%}} {name}<extra></extra>",
            "marker": {
                "size": [11 if each.asked else 6 for each in chosen],
                "symbol": ["diamond" if each.asked else "circle" for each in chosen],
            },
        }
        for name, values in zip(names, shares, strict=False)
    ]
    layout = {
        "xaxis": {"title": {"text": axis}, "type": "log", "dtick": 1},
        "yaxis": {"tickformat": ".0%", "range": [-0.02, 1.04]},
    }
    columns = [axis, "rows", "of rows"]
    lines = [[*_cells(each)] for each in chosen]
    for line, each in zip(lines, chosen, strict=True):
        line[0] += " ◆" if each.asked else ""
        line += [percent(each.lost)] if len(names) > 1 else []
    columns += ["of occurrences"] if len(names) > 1 else []
    return _Chart(head, about, traces, layout, columns, lines)


def _memory(found: Analysis) -> _Chart:
    parts = memory(found)
    trace = {
        "type": "bar",
        "orientation": "h",
        "y": [escape(name) for name, _, _ in parts],
        "x": [count for _, _, count in parts],
        "customdata": [size(count) for _, _, count in parts],
        "hovertemplate": "%{y}: %{customdata}<extra></extra>",
    }
    layout = {
        "xaxis": {"title": {"text": "bytes"}, "rangemode": "tozero", "tickformat": ".3~s"},
        "yaxis": {"type": "category", "autorange": "reversed", "showgrid": False},
    }
    lines = [
        (name, "" if rows is None else f"{rows:,}", size(count)) for name, rows, count in parts
    ]
    about = "What is taken: rows by tier, with unused room, and what finds them."
    return _Chart("Memory", about, [trace], layout, ("part", "rows", "bytes"), lines)


def _growth(moments: Sequence[Moment]) -> list[_Chart]:
    """Rows over time, and memory, which checkpoints do not have."""
    live = [each for each in moments if each.checkpoint is None]
    rows = [_line("rows", [(each.time, each.rows) for each in moments])]
    counted = [each for each in moments if each.checkpoint is None or each.waiting]
    if any(each.waiting for each in counted):
        rows.append(_line("waiting keys", [(each.time, each.waiting) for each in counted]))
    charts = [
        _Chart(
            "Growth",
            "Rows of this table in earlier analyses and in checkpoints, from the history.",
            rows,
            {"xaxis": {"type": "date"}, "yaxis": {"rangemode": "tozero"}},
            ("time", "checkpoint", "rows", "waiting keys", "step"),
            [
                (
                    _when(each.time),
                    each.checkpoint or "",
                    f"{each.rows:,}",
                    f"{each.waiting:,}" if each in counted else "",
                    f"{each.step:,}",
                )
                for each in moments
            ],
        )
    ]
    if len(live) > 1:
        charts.append(
            _Chart(
                "Growth of memory",
                "What the table took in earlier analyses.",
                [_line("bytes", [(each.time, each.bytes) for each in live])],
                {
                    "xaxis": {"type": "date"},
                    "yaxis": {
                        "rangemode": "tozero",
                        "tickformat": ".3~s",
                        "title": {"text": "bytes"},
                    },
                },
                ("time", "memory"),
                [(_when(each.time), size(each.bytes)) for each in live],
            )
        )
    return charts


def _line(name: str, points: Sequence[tuple[float, int]]) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "x": [_when(at) for at, _ in points],
        "y": [value for _, value in points],
        "hovertemplate": f"%{{x}}<br>%{{y:,}} {name}<extra></extra>",
    }


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _card(id: str, chart: _Chart) -> str:
    return (
        f"<section class=card><h2>{escape(chart.head)}</h2>"
        f"<p>{escape(chart.about)}</p><div class=plot id={id}></div>"
        f"<details><summary>Figures</summary>{_html_table(chart.columns, chart.lines)}</details>"
        "</section>"
    )


def _list_card(head: str, rows: RowList) -> str:
    if not len(rows.keys):
        return ""
    table = _html_table(_EXTREMES, _lines(rows))
    return f"<section class=card><h2>{escape(head)}</h2><div class=scroll>{table}</div></section>"


def _html_table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in lines
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline';\
 style-src 'unsafe-inline'; img-src data: blob:">
<title>$title</title>
<style>
:root {
  color-scheme: light dark;
  --page: #f5f6f8; --card: #ffffff; --edge: #e1e4e9; --text: #1d2229; --soft: #5d6673;
  --grid: #e8eaee; --one: #2f6fde; --two: #e07b1a; --three: #159a80;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #111418; --card: #1a1e24; --edge: #2b313a; --text: #e5e8ec; --soft: #98a2b0;
    --grid: #2a3039; --one: #6ea0ff; --two: #f2a254; --three: #4fc9ad;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
       font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 32px 20px 48px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
header p, .card p, footer { color: var(--soft); }
header p { margin: 4px 0 20px; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 12px;
     margin: 0 0 16px; }
.tile, .card { background: var(--card); border: 1px solid var(--edge); border-radius: 10px; }
.tile { padding: 10px 14px; }
dt { color: var(--soft); font-size: 13px; }
dd { margin: 0; font-size: 17px; font-weight: 600; font-variant-numeric: tabular-nums;
     overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 520px), 1fr));
         gap: 16px; }
.card { padding: 16px 18px; min-width: 0; }
h2 { font-size: 17px; margin: 0; }
.card p { margin: 2px 0 6px; font-size: 14px; min-height: 2.9em; }
.plot { height: 300px; }
.scroll { overflow-x: auto; margin-top: 8px; }
details { margin-top: 6px; }
summary { cursor: pointer; color: var(--soft); font-size: 14px; }
table { border-collapse: collapse; width: 100%; font-size: 13px;
        font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 4px 8px; border-bottom: 1px solid var(--edge);
         white-space: nowrap; }
th { color: var(--soft); font-weight: 500; }
th:first-child, td:first-child { text-align: left; }
footer { margin-top: 24px; font-size: 13px; }
@media print { details > table { display: table; } .card { break-inside: avoid; } }
</style>
</head>
<body>
<main>
<header><h1>$table</h1><p>$subtitle</p></header>
<dl>$tiles</dl>
<div class="cards">$cards</div>
<footer>Every row was read once, as it was at that moment, in $seconds s. What lies on either side
of a threshold is counted exactly; ◆ marks those that were asked for.</footer>
</main>
<script type="application/json" id="figures">$figures</script>
<script>$library</script>
<script>
"use strict";
const figures = JSON.parse(document.getElementById("figures").textContent);
function themed(figure) {
  const style = getComputedStyle(document.documentElement);
  const color = name => style.getPropertyValue(name).trim();
  const axis = {
    gridcolor: color("--grid"), linecolor: color("--edge"), zerolinecolor: color("--grid"),
    automargin: true, fixedrange: true, title: { font: { size: 13 }, standoff: 8 },
  };
  const layout = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: color("--text"), family: "system-ui, sans-serif", size: 12 },
    colorway: [color("--one"), color("--two"), color("--three")],
    margin: { l: 8, r: 8, t: 8, b: 8 }, bargap: 0.12,
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
    hoverlabel: { bgcolor: color("--card"), bordercolor: color("--edge"),
                  font: { color: color("--text") } },
  };
  for (const [name, value] of Object.entries(figure.layout)) {
    layout[name] = name.includes("axis")
      ? { ...axis, ...value, title: { ...axis.title, ...value.title } } : value;
  }
  return layout;
}
function draw() {
  for (const [id, figure] of Object.entries(figures)) {
    Plotly.react(id, figure.data, themed(figure), { responsive: true, displayModeBar: false });
  }
}
draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
</script>
</body>
</html>
""")
