"""Print an analysis, or the states of keys, to the terminal."""

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

from psclient.tools.arrow import KeyType
from psclient.tools.figures import (
    EXTREMES,
    LISTS,
    MISSES,
    Threshold,
    admissions,
    buckets,
    cells,
    facts,
    lines,
    memory,
    misses,
    percent,
    share,
    size,
    small,
    title,
    ttls,
)
from psclient.tools.keys import KeyInfo
from psclient.tools.listing import natural_width, print_whole
from psclient.tools.summary import Analysis, RowList

BAR = 24  # length of the longest bar, in characters
GAP = 4  # characters between two tables
EIGHTHS = " ▏▎▍▌▋▊▉█"
STYLES = {"row": "green", "waiting": "yellow", "gone": "red", "new": "dim", "unknown": "magenta"}


def show(console: Console, result: Analysis, *, keys: KeyType = np.uint64) -> None:
    """Print an analysis.

    keys  type in which keys are shown: np.uint64 or np.int64
    """
    _print_facts(console, result)
    parts = _table("Memory", "part", "rows", "bytes")
    for name, rows, count in memory(result):
        parts.add_row(plain(name), "" if rows is None else f"{rows:,}", size(count))
    shards = [(f"shard {i}", rows) for i, rows in enumerate(result.shard_rows)]
    _print_pair(console, parts, _bars("Shards", "shard", shards))
    frequencies = buckets(result.frequencies, whole=True)
    _print_pair(
        console,
        _bars("Frequency of keys", "occurrences", frequencies),
        _tries("Refused by an admission threshold", "occurrences", admissions(result), lost=True),
    )
    ages = buckets(result.ages, whole=True, upper=True)
    _print_pair(
        console,
        _bars("Age of rows, since the last push", "steps", ages),
        _tries("Evicted by a step TTL", "steps", ttls(result)),
    )
    grace = f", grace {result.grace:,}" if result.grace else ""
    _print_pair(
        console,
        _bars("L2 norm of embeddings", "norm", buckets(result.norms)),
        _tries(f"Evicted by a norm threshold{grace}", "norm", small(result)),
    )
    if cells_of := misses(result):
        table = _table("Keys whose row would not be in host memory, by its size", *MISSES)
        for line in cells_of:
            table.add_row(*line)
        print_whole(console, table)
    _print_lists(console, result, keys)


def _print_facts(console: Console, result: Analysis) -> None:
    """Print the title and the main numbers of an analysis."""
    console.print(Text(title(result), style="bold"))
    grid = Table.grid(padding=(0, 2))
    for name, value in facts(result):
        grid.add_row(Text(name, style="dim"), plain(value))
    grid.add_row(Text("duration", style="dim"), f"{result.seconds:.2g} s")
    print_whole(console, grid)


def _print_lists(console: Console, result: Analysis, keys: KeyType) -> None:
    """Print the lists of extreme rows that are not empty; ``keys`` as in ``show``."""
    for field, head in LISTS:
        extremes: RowList = getattr(result, field)
        if len(extremes.keys):
            print_whole(console, _extremes(head, extremes, keys))


def _table(head: str, *columns: str) -> Table:
    """Return an empty table with a title; the first column is aligned left, the others right."""
    table = Table(
        title=head,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        min_width=len(head),
    )
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    return table


def _print_pair(console: Console, left: Table, right: Table) -> None:
    """Print two tables, side by side if the terminal is wide enough."""
    if natural_width(console, left) + GAP + natural_width(console, right) <= console.width:
        console.print(Columns([left, right], padding=(0, GAP)))
    else:
        print_whole(console, left)
        print_whole(console, right)


def _tries(head: str, column: str, chosen: Sequence[Threshold], *, lost: bool = False) -> Table:
    """Return a table with a line per threshold: how many rows the rule would refuse or evict.

    head    title of the table
    column  head of the column of thresholds
    lost    add a column with the share of dropped occurrences
    """
    table = _table(head, column, "rows", "of rows", *(("of occurrences",) if lost else ()))
    for each in chosen:
        row = (*cells(each), *((percent(each.lost),) if lost else ()))
        table.add_row(*row, style="bold yellow" if each.asked else "")
    return table


def _bars(head: str, column: str, counts: Sequence[tuple[str, int]]) -> Table:
    """Return a table with a line and a bar per range.

    head    title of the table
    column  head of the column of ranges
    counts  (range, number of rows)
    """
    table = _table(head, column, "rows", "of rows")
    table.add_column("", justify="left", no_wrap=True)
    whole, most = sum(n for _, n in counts), max((n for _, n in counts), default=0)
    for label, n in counts:
        bar = Text(_bar(share(n, most)), style="cyan")
        table.add_row(label, f"{n:,}", percent(share(n, whole)), bar)
    return table


def _bar(part: float) -> str:
    """Return a bar that is ``part * BAR`` characters long; ``part`` is in 0..1."""
    eighths = math.ceil(part * BAR * 8)
    return "█" * (eighths // 8) + EIGHTHS[eighths % 8].strip()


def _extremes(head: str, rows: RowList, keys: KeyType) -> Table:
    """Return a table with a line for each row in a list of extreme rows.

    head  title of the table
    keys  type in which keys are shown: np.uint64 or np.int64
    """
    table = _table(head, *EXTREMES)
    for line in lines(rows, keys):
        table.add_row(*map(plain, line))
    return table


def show_keys(console: Console, infos: Sequence[KeyInfo], names: Sequence[str] = ()) -> None:
    """Print the states of keys.

    names  strings to show next to the keys, which are their hashes; empty: show only the keys
    """
    table = Table(box=None, show_header=False, padding=(0, 2, 1, 0))
    table.add_column(no_wrap=True, justify="right", vertical="top")
    table.add_column()
    for i, each in enumerate(infos):
        name = f"{names[i]}\n{each.key}" if names else str(each.key)
        table.add_row(Text(name, style="bold"), Group(*_facts_of(each)))
    console.print(table)


def _facts_of(info: KeyInfo) -> list[Text]:
    """Return the lines to print for a key: its state, its row, its deletions, its embedding."""
    reason = Text(info.reason, style=STYLES[info.state])
    texts = [reason.append(f"  shard {info.shard}", style="dim")]
    if info.state == "row":
        texts.append(
            Text(
                f"{info.frequency:,} occurrences · last pushed at step {info.step:,},"
                f" version {info.version:,} · norm {info.norm:.4g}"
            )
        )
    earlier = info.deletions[:-1] if info.state == "gone" else info.deletions
    texts += [Text(f"earlier: {deletion}", style="dim") for deletion in reversed(earlier)]
    if info.embedding is not None:
        texts.append(Text(np.array2string(info.embedding, precision=4, threshold=64)))
    return texts
