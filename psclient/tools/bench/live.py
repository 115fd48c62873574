"""Figures of a load test in the terminal, while it runs."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

from psclient.tools.bench.latencies import SHOWN, Latencies
from psclient.tools.bench.result import Result, Second
from psclient.tools.bench.words import duration, rate
from psclient.tools.figures import size
from psclient.tools.listing import listing

COLUMNS = (
    *("run<", "offered/s", "achieved/s", *(f"p{each:g}" for each in SHOWN), "max"),
    *("refused", "failed", "keys/s", "bytes/s"),
)


class Sums:
    """Sums over seconds of a run."""

    def __init__(self) -> None:
        self.latency = Latencies()
        self.seconds = 0.0
        self.offered = self.ok = self.keys = self.bytes = self.refused = self.failed = 0

    def add(self, second: Second) -> None:
        """Add a second."""
        self.latency.merge(second.latency.encoded())
        self.seconds += second.seconds
        self.offered += second.offered
        self.ok += second.ok
        self.keys += second.keys
        self.bytes += second.bytes
        self.refused += second.refused
        self.failed += sum(second.errors.values()) - second.refused

    def line(self, name: str) -> list[str]:
        """Return the cells of a line of the table."""
        seconds = self.seconds or 1.0
        times = [*self.latency.percentiles(SHOWN), self.latency.longest]
        return [
            name,
            rate(self.offered / seconds),
            rate(self.ok / seconds),
            *map(duration, times),
            f"{self.refused:,}",
            f"{self.failed:,}",
            rate(self.keys / seconds),
            size(self.bytes / seconds),
        ]


class Board:
    """Shows the last second, the run so far, and all earlier runs; in a ``with`` statement.

    console  terminal to show them on
    note     if ``console`` is no terminal, called with a line of text for each run that has ended

    Pass ``begin``, ``second`` and ``result`` as on_run, on_second and on_end of a Runner.
    """

    def __init__(self, console: Console, note: Callable[[str], Any]) -> None:
        self._note = note
        self._lines: list[list[str]] = []
        self._name = ""
        self._sums, self._last = Sums(), Sums()
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()
        if self._live is not None:
            self._live.update(self._table(running=False), refresh=True)
            self._live.stop()

    def begin(self, what: str, wanted: float) -> None:
        """Note that a run begins: what it is for, and its rate (0: closed loop)."""
        self._end()
        self._name = f"{what} {rate(wanted)}/s" if wanted else what
        self._sums, self._last = Sums(), Sums()

    def second(self, second: Second) -> None:
        """Show the figures of one second."""
        self._last = Sums()
        self._last.add(second)
        if second.second:
            self._sums.add(second)
        if self._live is not None:
            self._live.update(self._table(running=True), refresh=True)

    def result(self, result: Result) -> None:
        """Take the figures of a run that has ended: those that the report has.

        The sums over its seconds differ a little: they lack the requests that were answered last.
        """
        sums, seconds = Sums(), result.seconds
        sums.latency, sums.seconds = result.latency, seconds
        sums.offered, sums.ok = round(result.offered * seconds), round(result.achieved * seconds)
        sums.keys, sums.bytes = round(result.keys * seconds), round(result.bytes * seconds)
        sums.refused, sums.failed = result.refused, result.failed - result.refused
        self._sums = sums

    def _end(self) -> None:
        """Keep the line of the run that has ended."""
        if not self._name or not self._sums.seconds:
            return
        self._lines.append(self._sums.line(self._name))
        self._name = ""
        if self._live is None:
            line = zip(COLUMNS[1:], self._lines[-1][1:], strict=True)
            text = ", ".join(f"{name} {value}" for name, value in line)
            self._note(f"{self._lines[-1][0]}: {text}")

    def _table(self, *, running: bool) -> Table:
        """Return the table of all runs; ``running``: with those of the run in progress."""
        table = listing(*COLUMNS)
        for line in self._lines:
            table.add_row(*line)
        if running:
            table.add_row(*self._sums.line(f"{self._name}, so far"), style="bold")
            table.add_row(*self._last.line("last second"), style="dim")
        return table
