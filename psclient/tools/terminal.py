"""An analysis for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from rich import box
from rich.columns import Columns
from rich.console import Console, Group
from rich.markup import escape as plain
from rich.table import Table
from rich.text import Text

from psclient.tools.figures import (
    EXTREMES,
    LISTS,
    Threshold,
    admissions,
    buckets,
    cells,
    facts,
    lines,
    memory,
    percent,
    share,
    size,
    small,
    title,
    ttls,
)
from psclient.tools.keys import KeyInfo
from psclient.tools.summary import Analysis, RowList

BAR = 24  # characters
EIGHTHS = " ▏▎▍▌▋▊▉█"
STYLES = {"row": "green", "waiting": "yellow", "gone": "red", "new": "dim", "unknown": "magenta"}


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
        row = (*cells(each), *((percent(each.lost),) if lost else ()))
        table.add_row(*row, style="bold yellow" if each.asked else "")
    return table


def _bars(head: str, column: str, counts: Sequence[tuple[str, int]]) -> Table:
    table = _table(head, column, "rows", "of rows")
    table.add_column("", justify="left", no_wrap=True)
    whole, most = sum(n for _, n in counts), max((n for _, n in counts), default=0)
    for label, n in counts:
        bar = Text(_bar(share(n, most)), style="cyan")
        table.add_row(label, f"{n:,}", percent(share(n, whole)), bar)
    return table


def _bar(part: float) -> str:
    eighths = math.ceil(part * BAR * 8)
    return "█" * (eighths // 8) + EIGHTHS[eighths % 8].strip()


def _extremes(head: str, rows: RowList) -> Table:
    table = _table(head, *EXTREMES)
    for line in lines(rows):
        table.add_row(*map(plain, line))
    return table


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
