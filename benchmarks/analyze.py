"""Measure how long an analysis takes, and how much it slows pulls.

There are four processes: a shard, a pusher and a puller that work at a steady rate, and an analyst.
The puller measures its pulls in time windows. During half of the windows, the analyst runs an
analysis. Windows without an analysis are as long as the first window with one. The analyst runs at
low priority, because in production it would run on another machine.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np

from benchmarks.report import Report, arguments, milliseconds
from benchmarks.servers import helper, shards
from benchmarks.step import fill
from benchmarks.work import Ids, Work, keys_of, standard_work
from psclient import Client, Table
from psclient.tools.analysis import analyze
from psclient.tools.sink import ParquetSink

PULLED = 1_000  # keys per pull, drawn from the work
PULL_SECONDS, PUSH_SECONDS = 0.01, 0.04  # time from one pull or push to the next
DISTINCT = 64  # number of different training steps, which are pushed in a cycle


def summary(client: Client, _: Path) -> int:
    """Run an analysis that only computes a summary; return the number of rows."""
    return analyze(client, "rows", frequencies=[3], ages=[5000], norms=[0.01]).rows


def metadata(client: Client, path: Path) -> int:
    """Run an analysis that also writes the metadata of every row to Parquet.

    Returns the number of rows.
    """
    with ParquetSink(path) as sink:
        analyze(client, "rows", sink=sink)
    return sink.rows


def embeddings(client: Client, path: Path) -> int:
    """Run an analysis that also writes the metadata and embedding of every row to Parquet.

    Returns the number of rows.
    """
    with ParquetSink(path) as sink:
        analyze(client, "rows", sink=sink, embeddings=True)
    return sink.rows


KINDS: dict[str, Callable[[Client, Path], int]] = {
    "summary": summary,
    "summary and Parquet": metadata,
    "summary and Parquet with embeddings": embeddings,
}


def push(address: str, rows: int) -> None:
    """Print "ready", then push to the table at a steady rate until the process is killed.

    address  "host:port" of the shard
    rows     number of rows of the table
    """
    steps, keys = standard_work(Work(rows=rows), DISTINCT), keys_of(np.arange(rows))
    with Client([address]) as client:
        table = client.table("rows")
        print("ready", flush=True)
        for i, due in enumerate(ticks(PUSH_SECONDS)):
            _, distinct, gradients = steps[i % DISTINCT]
            table.push(keys[distinct], gradients, step=i)
            sleep_until(due)


def analyst(address: str, _: int) -> None:
    """Print "ready", then run the analyses that are named on standard input, one per line.

    Prints the number of rows and the seconds of each analysis.

    address  "host:port" of the shard
    """
    os.nice(19)
    with Client([address]) as client, tempfile.TemporaryDirectory(prefix="ps-bench-") as directory:
        path = Path(directory) / "rows.parquet"
        print("ready", flush=True)
        for line in sys.stdin:
            start = time.perf_counter()
            count = KINDS[line.strip()](client, path)
            print(count, time.perf_counter() - start, flush=True)


def ticks(seconds: float) -> Iterator[float]:
    """Yield the times, by ``time.perf_counter``, at which steps that take ``seconds`` are due.

    A time that has passed when it is asked for is replaced by the present time.
    """
    due = time.perf_counter()
    while True:
        due = max(due + seconds, time.perf_counter())
        yield due


def sleep_until(moment: float) -> None:
    """Sleep until ``moment``, by ``time.perf_counter``; return immediately if it has passed."""
    time.sleep(max(0.0, moment - time.perf_counter()))


def pulls(table: Table, draws: Sequence[Ids], done: Callable[[], bool]) -> list[float]:
    """Pull at a steady rate until ``done()`` is true; return the seconds of each pull.

    draws  keys of the pulls, used in a cycle
    """
    seconds = []
    for i, due in enumerate(ticks(PULL_SECONDS)):
        start = time.perf_counter()
        table.pull(draws[i % len(draws)])
        seconds.append(time.perf_counter() - start)
        if done():
            return seconds
        sleep_until(due)
    raise AssertionError("ticks never end")


def measure(address: str, rows: int, kinds: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """Pull in windows with and without an analysis; return a row of the report per kind.

    rows    number of rows of the table
    kinds   kinds of analysis, keys of KINDS
    rounds  number of windows with an analysis, and of windows without, for each kind
    """
    draws = [keys_of(ids) for ids, _, _ in standard_work(Work(rows=rows, batch=PULLED), 256)]
    lines = []
    with (
        Client([address]) as client,
        helper("benchmarks.analyze", "pusher", address, str(rows)),
        helper("benchmarks.analyze", "analyst", address, str(rows)) as process,
    ):
        table = client.table("rows")
        warm = time.perf_counter() + 3.0
        pulls(table, draws, lambda: time.perf_counter() > warm)
        for kind in kinds:
            alone: list[list[float]] = []
            during: list[list[float]] = []
            took: list[float] = []
            for i in range(2 * rounds):
                # with, without, without, with: a drift of the machine affects both alike
                if i % 4 in (0, 3):
                    during.append(_with(process, kind, table, draws, took))
                else:
                    end = time.perf_counter() + took[0]
                    alone.append(pulls(table, draws, lambda end=end: time.perf_counter() > end))  # type: ignore[misc]
            lines.append(_line(kind, took, alone, during))
    return lines


def _line(
    kind: str, took: list[float], alone: list[list[float]], during: list[list[float]]
) -> dict[str, Any]:
    """Return a row of the report.

    kind    kind of analysis
    took    seconds of each analysis
    alone   seconds of each pull in each window without an analysis
    during  seconds of each pull in each window with an analysis
    """
    before, after = (milliseconds(list(chain.from_iterable(each))) for each in (alone, during))
    pairs = zip(alone, during, strict=True)
    rises = [np.quantile(b, 0.99) / np.quantile(a, 0.99) - 1 for a, b in pairs]
    return {
        "analysis": kind,
        "takes s (<= 60)": float(np.median(took)),
        "pulls": sum(map(len, during)),
        "p50 ms without": before["p50 ms"],
        "with": after["p50 ms"],
        "p99 ms without": before["p99 ms"],
        "with ": after["p99 ms"],
        "rise % (<= 20)": 100 * (after["p99 ms"] / before["p99 ms"] - 1),
        "of the rounds, median": 100 * float(np.median(rises)),
        "lowest p99 without": min(float(np.quantile(a, 0.99) * 1e3) for a in alone),
        "highest": max(float(np.quantile(a, 0.99) * 1e3) for a in alone),
    }


def _with(
    process: subprocess.Popen[str], kind: str, table: Table, draws: Sequence[Ids], took: list[float]
) -> list[float]:
    """Pull while the analyst runs one analysis; return the seconds of each pull.

    process  the analyst
    draws    keys of the pulls, used in a cycle
    took     receives the seconds of the analysis
    """
    assert process.stdin is not None
    assert process.stdout is not None
    answer: list[str] = []
    reader = Thread(target=lambda: answer.append(process.stdout.readline()))  # type: ignore[union-attr]
    process.stdin.write(f"{kind}\n")
    reader.start()
    seconds = pulls(table, draws, lambda: not reader.is_alive())
    took.append(float(answer[0].split()[1]))
    return seconds


def main(words: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its tables."""
    parser = arguments(__doc__)
    parser.add_argument(
        "--only", choices=KINDS, help="Run only this kind of analysis. Default: all."
    )
    options = parser.parse_args(words)
    report = Report("analyze", options.json)
    rows, rounds = (500_000, 4) if options.quick else (5_000_000, 2)
    kinds = [options.only] if options.only else list(KINDS)
    with shards(1) as (addresses, _):
        with Client(addresses) as client:
            fill(client.create_table("rows", 32, lr=0.05), keys_of(np.arange(rows)))
        report.section(
            f"pulls of {PULLED:,} keys during an analysis, {rows:,} rows, dim 32, one pusher",
            measure(addresses[0], rows, kinds, rounds),
        )
    report.close()


ROLES = {"pusher": push, "analyst": analyst}

if __name__ == "__main__":
    if len(sys.argv) == 4 and sys.argv[1] in ROLES:
        ROLES[sys.argv[1]](sys.argv[2], int(sys.argv[3]))
    else:
        main()
