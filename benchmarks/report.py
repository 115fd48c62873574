"""Time contenders, print tables of results, and write them as JSON."""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

Contender = Callable[[int], Any]  # does one step, which is timed; called with its number


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that every benchmark has.

    description  docstring of the benchmark, shown by --help
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="Write the results to this file too, as JSON."
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="Do about a tenth of the work, to check that the benchmark runs.",
    )
    return parser


def add_directory(parser: argparse.ArgumentParser) -> None:
    """Add the option --directory of benchmarks that measure a disk."""
    parser.add_argument(
        "--directory",
        type=Path,
        help="Directory for all files, on the disk to measure. Default: the one for temporary"
        " files.",
    )


def interleave(
    contenders: dict[str, Contender], *, steps: int, rounds: int, warm: int = 20
) -> dict[str, list[float]]:
    """Run contenders in alternating turns; return the seconds of each measured step, by contender.

    contenders  {name: function that does one step}
    steps       steps to measure per contender, over all rounds
    rounds      number of turns of each contender; they alternate so that disturbances of the
                machine affect all contenders
    warm        steps at the start of each turn that are not measured
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    at = dict.fromkeys(contenders, 0)
    for _ in range(rounds):
        for name, step in contenders.items():
            for i in range(warm + steps // rounds):
                start = time.perf_counter()
                step(at[name])
                if i >= warm:
                    times[name].append(time.perf_counter() - start)
                at[name] += 1
    return times


def stolen() -> float:
    """Return the seconds of processor time that the host has taken from this virtual machine."""
    with open("/proc/stat") as stat:
        return int(stat.readline().split()[8]) / 100


class Report:
    """Prints the results of a benchmark in sections. ``close`` writes all of them as JSON.

    name  name of the benchmark
    path  JSON file; None: write no file
    """

    def __init__(self, name: str, path: Path | None) -> None:
        self._name = name
        self._path = path
        self._console = Console(width=118)
        self._sections: dict[str, list[dict[str, Any]]] = {}
        self._started = time.time()
        self._stolen = stolen()

    def section(self, title: str, rows: Sequence[dict[str, Any]]) -> None:
        """Print a table with a title.

        rows  {column name: value} for each row; all rows have the same columns
        """
        self._sections[title] = list(rows)
        table = Table(title=title, title_justify="left", title_style="bold")
        for i, head in enumerate(rows[0]):
            table.add_column(head, justify="right" if i else "left", no_wrap=not i)
        for row in rows:
            table.add_row(*(_cell(value) for value in row.values()))
        self._console.print(table)

    def note(self, text: str) -> None:
        """Print a line of text, and add it to the results."""
        self._sections.setdefault("notes", []).append({"note": text})
        self._console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        """Print the run time and the processor time taken by the host; write the JSON file."""
        took = time.time() - self._started
        self.note(
            f"{took:.0f} s; processor time taken by the host: {stolen() - self._stolen:.1f} s"
        )
        if self._path:
            result = {
                "benchmark": self._name,
                "python": platform.python_version(),
                "machine": platform.processor() or platform.machine(),
                "sections": self._sections,
            }
            self._path.write_text(json.dumps(result, indent=1))


def milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    """Return the median and the 99th percentile, in milliseconds, as columns of a report."""
    return {
        "p50 ms": float(np.median(seconds) * 1e3),
        "p99 ms": float(np.quantile(seconds, 0.99) * 1e3),
    }


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
