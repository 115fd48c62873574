"""Progress bar for the examples; prints some lines instead if there is no terminal."""

import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Bar:
    """Base class of progress bars that are shown during a ``with`` block.

    A subclass updates the bar and the text next to it.

    steps  total number of steps
    lines  total number of lines to print if there is no terminal
    """

    def __init__(self, console: Console, steps: int, lines: int) -> None:
        self._console = console
        self._steps = steps
        self._lines = lines
        self._progress = Progress(
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=steps)

    def __enter__(self) -> Self:
        self._start = time.monotonic()
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def _has_line(self, step: int) -> bool:
        """Return whether to print a line after ``step`` if there is no terminal."""
        return step * self._lines // self._steps > (step - 1) * self._lines // self._steps
