"""A progress bar on stderr."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from psclient.tools.figures import size


@contextmanager
def bar(what: str, unit: str = "bytes") -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar on stderr, if it is a terminal.

    what  text before the bar
    unit  unit of the numbers: "bytes", or a word such as "rows"

    Yields a function show(done, total) that updates the bar. If ``total`` is 0, it is unknown.
    """
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[amount]}"),
    )
    start, console = time.monotonic(), Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=None, amount="")

        def show(done: int, total: int) -> None:
            amount = _amount(done, total, unit, time.monotonic() - start)
            total = max(done, total, 1) if total else 0
            progress.update(task, completed=done, total=total or None, amount=amount)

        yield show
        progress.update(task, completed=1, total=1)  # full, even if nothing was reported


def _amount(done: int, total: int, unit: str, seconds: float) -> str:
    """Format an amount and its average speed: "12.0 MiB of 30.0 MiB, 3.00 MiB/s", or
    "12 rows, 3 rows/s".
    """
    speed = int(done / seconds) if seconds else 0
    if unit != "bytes":
        return f"{done:,} {unit}, {speed:,} {unit}/s"
    whole = f" of {size(total)}" if total > done else ""
    return f"{size(done)}{whole}, {size(speed)}/s"


def summed(show: Callable[[int, int], None]) -> Callable[[int], None]:
    """Return a function that adds its argument to a sum and calls ``show(sum, 0)``."""
    done = 0

    def add(size: int) -> None:
        nonlocal done
        done += size
        show(done, 0)

    return add
