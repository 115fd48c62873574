"""Tables of a terminal. No number is cut off, even where the terminal is too narrow."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

UNBOUNDED = 1 << 16  # columns, wider than any table


def listing(*columns: str) -> Table:
    """Return a table for ``print_listing``; columns align right, or left if "<" follows."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for column in columns:
        justify: Literal["left", "right"] = "left" if column.endswith("<") else "right"
        table.add_column(column.removesuffix("<"), justify=justify, no_wrap=True)
    return table


def print_listing(table: Table, lines: Iterable[Sequence[str | Text]]) -> None:
    """Print lines under the columns of a table."""
    for line in lines:
        table.add_row(*line)
    print_whole(Console(highlight=False), table)


def print_whole(console: Console, what: RenderableType) -> None:
    """Print something at its natural width; the terminal wraps lines that are too long for it."""
    width = console.width
    console.width = max(width, natural_width(console, what))
    try:
        console.print(what)
    finally:
        console.width = width


def natural_width(console: Console, what: RenderableType) -> int:
    """Return how many columns something needs so that nothing is cut off."""
    return console.measure(what, options=console.options.update(max_width=UNBOUNDED)).maximum
