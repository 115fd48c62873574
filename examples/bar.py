"""Progress bar for the examples; prints some lines instead if there is no terminal."""

import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

REFRESH_SECONDS = 1.0  # seconds between updates of the text on a terminal


class Bar:
    """Base class of progress bars that are shown during a ``with`` block.

    A subclass updates the bar and the text next to it: with ``_update``, it defines only the text.

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
        self._shown = time.monotonic()

    def __enter__(self) -> Self:
        self._start = time.monotonic()
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def _update(self, step: int) -> None:
        """Show that ``step`` is done, with new text now and then."""
        if self._console.is_terminal:
            self._progress.update(self._task, completed=step)
            if step == self._steps or time.monotonic() - self._shown >= REFRESH_SECONDS:
                self._progress.update(self._task, description=self._figures(step))
                self._shown = time.monotonic()
        elif self._has_line(step):
            self._console.print(f"step {step:>6}  {self._figures(step)}", highlight=False)

    def _figures(self, step: int) -> str:
        """Return the text next to the bar."""
        raise NotImplementedError

    def _has_line(self, step: int) -> bool:
        """Return whether to print a line after ``step`` if there is no terminal."""
        return step * self._lines // self._steps > (step - 1) * self._lines // self._steps
