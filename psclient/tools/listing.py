"""Print tables to the terminal. Long lines are wrapped, so that no number is cut off."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

UNBOUNDED = 1 << 16  # width in characters, wider than any table


def listing(*columns: str) -> Table:
    """Return an empty table for ``print_listing``.

    columns  heads of the columns; cells are aligned right, or left if the head ends with "<"
    """
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for column in columns:
        justify: Literal["left", "right"] = "left" if column.endswith("<") else "right"
        table.add_column(column.removesuffix("<"), justify=justify, no_wrap=True)
    return table


def print_listing(table: Table, lines: Iterable[Sequence[str | Text]]) -> None:
    """Add lines to a table, one cell per column, and print the table."""
    for line in lines:
        table.add_row(*line)
    print_whole(Console(highlight=False), table)


def print_whole(console: Console, what: RenderableType) -> None:
    """Print ``what`` without cutting anything off; the terminal wraps lines that are too long."""
    width = console.width
    console.width = max(width, natural_width(console, what))
    try:
        console.print(what)
    finally:
        console.width = width


def natural_width(console: Console, what: RenderableType) -> int:
    """Return the width in characters that ``what`` needs so that nothing is cut off."""
    return console.measure(what, options=console.options.update(max_width=UNBOUNDED)).maximum
