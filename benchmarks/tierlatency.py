"""Measure pulls of rows in host memory while other clients make the server use the disk.

The puller and the disturber are two processes. The disturber pulls rows that are on disk only, and
pushes to others, so that the server reads the disk, flushes, and flushes sparse blocks again. It
does so during every other time window, at low priority, because in production it would run on
another machine.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np

from benchmarks.analyze import pulls, sleep_until, ticks
from benchmarks.report import Report, milliseconds
from benchmarks.servers import Server, helper
from benchmarks.tierservice import DIM, budget, fill
from benchmarks.work import Draws, Work, keys_of
from psclient import Client

PULLED = 1_000  # keys per pull
DISTURB_SECONDS = 0.05  # time from one disturbance to the next
SHARE = 0.1  # of the rows for which there is room in host memory


def disturb(address: str, rows: int) -> None:
    """Print "ready", then pull and push uniformly drawn keys while the input says so.

    A line "go" on standard input starts the work, and a line "stop" ends it.

    address  "host:port" of the shard
    rows     number of rows of the table
    """
    os.nice(19)
    going = Event()
    Thread(target=_follow, args=(going,), daemon=True).start()
    draws = Draws(Work(rows=rows, batch=PULLED, zipf=0.0))
    gradients = np.ones((PULLED, DIM), np.float32)
    with Client([address], timeout=60.0) as client:
        table = client.table("rows")
        print("ready", flush=True)
        for due in ticks(DISTURB_SECONDS):
            going.wait()
            table.pull(keys_of(draws.ids()))
            keys = keys_of(np.unique(draws.ids()))
            table.push(keys, gradients[: len(keys)])
            sleep_until(due)


def _follow(going: Event) -> None:
    """Set ``going`` when a line "go" arrives on standard input, and clear it at other lines."""
    for line in sys.stdin:
        if line == "go\n":
            going.set()
        else:
            going.clear()


def run(report: Report, directory: Path, quick: bool, rows: int) -> None:
    """Run the section "latency" of the benchmark; ``directory`` is for all files."""
    windows, seconds = (4, 4.0) if quick else (12, 10.0)
    draws = Draws(Work(rows=rows, batch=PULLED))
    memory = budget(rows, SHARE)
    flags = ["--host-bytes", str(memory), "--flush-seconds", "1", "--log-keep-bytes", "0"]
    server = Server(directory / "server", *flags)
    hot = draws.hottest[: int(rows * SHARE / 4)]
    keys = [keys_of(np.random.default_rng(i).choice(hot, PULLED)) for i in range(64)]
    quiet: list[list[float]] = []
    busy: list[list[float]] = []
    with ExitStack() as stack:
        server.start()
        stack.callback(server.stop)
        client = stack.enter_context(Client([server.address], timeout=60.0))
        table = client.create_table("rows", DIM, lr=0.05)
        fill(table, draws.hottest)
        for _ in range(2):  # rows that were pushed more than once stay in memory
            fill(table, hot)
        process = stack.enter_context(helper("benchmarks.tierlatency", server.address, str(rows)))
        assert process.stdin is not None
        before = table.describe()
        for window in range(windows):
            during = window % 4 in (1, 2)
            process.stdin.write("go\n" if during else "stop\n")
            time.sleep(1.0)
            end = time.perf_counter() + seconds
            taken = pulls(table, keys, lambda: time.perf_counter() > end)  # noqa: B023
            (busy if during else quiet).append(taken)
        after = table.describe()
    report.section(
        f"pulls of {PULLED:,} keys in host memory, {rows:,} rows, room for {SHARE:.0%}",
        [_line(quiet, busy, before.cache, after.cache)],
    )


def _line(
    quiet: list[list[float]], busy: list[list[float]], before: Any, after: Any
) -> dict[str, Any]:
    """Return the row of the report.

    quiet, busy    seconds of each pull in each window without and with disturbances
    before, after  counts of the table's moves between tiers
    """
    calm, rough = (milliseconds(list(chain.from_iterable(each))) for each in (quiet, busy))
    return {
        "pulls": sum(map(len, busy)),
        "p50 ms quiet": calm["p50 ms"],
        "busy": rough["p50 ms"],
        "p99 ms quiet": calm["p99 ms"],
        "busy ": rough["p99 ms"],
        "busy / quiet (<= 2)": rough["p99 ms"] / calm["p99 ms"],
        "reads that waited": after.warm_reads - before.warm_reads,
        "rows flushed": after.flushed_rows - before.flushed_rows,
        "blocks flushed again": after.reflushed_blocks - before.reflushed_blocks,
    }


if __name__ == "__main__":
    disturb(sys.argv[1], int(sys.argv[2]))
