"""Measure the memory of a server that gets many more rows than fit, and its bytes on disk."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.disk import size_of
from benchmarks.report import Report
from benchmarks.servers import Server, unshared
from benchmarks.step import CHUNK
from benchmarks.tierservice import DIM, SLOT_BYTES, STEP, WIDTH, Trainer, fill
from benchmarks.work import Draws, Work, keys_of
from psclient import Client, Subscriber, Table

SAMPLE = 20  # pushes between two measurements of the memory
ROW_BYTES = 4 * WIDTH + 32  # bytes of a row in a block, its metadata included
TIMES = 10  # rows are written for so many times the host memory
FLUSH_SECONDS = 5.0
EXERCISED = 100_000  # rows with which the memory of the process itself is measured: 54 MB
LOOK_SECONDS = 0.05  # time between two looks at the bytes on disk
LONG = 64  # dim of these rows: with much shorter ones, the index alone would fill the memory
LONG_SLOT = 4 * 2 * LONG + 32  # bytes of one of them in memory


def budget(report: Report, directory: Path, quick: bool) -> None:
    """Run the section "budget": push new keys, ten times as many as fit into host memory.

    host_bytes limits the memory of tables. What the process takes besides does not depend on it, so
    it is measured first, with a small table, and subtracted. The first lines may be far below the
    limit, because not all of host_bytes is in use yet.
    """
    limit = (256 if quick else 1024) << 20
    server = Server(
        directory / "server", "--host-bytes", str(limit), "--flush-seconds", str(FLUSH_SECONDS)
    )
    rows = TIMES * limit // LONG_SLOT
    lines = []
    with ExitStack() as stack:
        server.start()
        stack.callback(server.stop)
        client = stack.enter_context(Client([server.address], timeout=120.0))
        before = _exercise(client.create_table("first", LONG, lr=0.05), server.process.pid)
        client.drop_table("first")
        table = client.create_table("rows", LONG, lr=0.05)
        for part in range(TIMES):
            most = 0
            for each in _pushed(table, part * rows // TIMES, (part + 1) * rows // TIMES):
                if each % SAMPLE == 0:
                    most = max(most, unshared(server.process.pid) - before)
            described = table.describe()
            lines.append(
                {
                    "rows": described.rows,
                    "in host memory": described.tiers["host"].rows,
                    "table, with index, MB": described.bytes / 1e6,
                    "largest memory, MB": most / 1e6,
                    "over the budget, % (<= 5)": 100 * (most / limit - 1),
                }
            )
    report.section(
        f"memory without file cache: dim {LONG}, host_bytes {limit >> 20} MiB, {TIMES} times as"
        f" many rows (the process itself: {before / 1e6:,.0f} MB)",
        lines,
    )


def _exercise(table: Table, pid: int) -> int:
    """Push, pull and flush for a while; return the most memory that was taken by all but the table.

    That memory holds kernels, messages, the log, and the blocks that a flush writes at once. The
    rows take more bytes than these blocks.
    """
    most, end = 0, time.perf_counter() + 2 * FLUSH_SECONDS
    while time.perf_counter() < end:
        for _ in _pushed(table, 0, EXERCISED):
            table.pull(keys_of(np.arange(CHUNK)))
            most = max(most, unshared(pid) - table.describe().bytes)
    return most


def _pushed(table: Table, start: int, stop: int) -> Iterator[int]:
    """Push gradients for the ids start..stop-1, in batches. Yields the number of each push."""
    gradients = np.ones((CHUNK, LONG), np.float32)
    for number, at in enumerate(range(start, stop, CHUNK)):
        keys = keys_of(np.arange(at, min(at + CHUNK, stop)))
        table.push(keys, gradients[: len(keys)])
        yield number


def growth(report: Report, directory: Path, quick: bool) -> None:
    """Run the section "disk": train for a while, without and with a snapshot that stays open."""
    rows, seconds = (300_000, 15.0) if quick else (2_000_000, 60.0)
    flags = ["--host-bytes", str(rows * SLOT_BYTES // 8 + rows * 40), "--flush-seconds", "2"]
    server = Server(directory / "server", *flags, "--log-keep-bytes", "0")
    draws = Draws(Work(rows=rows))
    lines: list[dict[str, Any]] = []
    with ExitStack() as stack:
        server.start()
        stack.callback(server.stop)
        client = stack.enter_context(Client([server.address], timeout=120.0))
        table = client.create_table("rows", DIM, lr=0.05)
        fill(table, draws.hottest)
        trainer = Trainer(client, table, draws, False)
        lines.append(_churn("no snapshot", server, trainer, rows, seconds))
        subscriber = stack.enter_context(Subscriber(client, start="snapshot"))
        next(iter(subscriber))  # and no further: the snapshot stays open
        lines.append(_churn("a snapshot is open", server, trainer, rows, seconds))
    report.section(f"bytes on disk while {rows:,} rows are trained, flush every 2 s", lines)


def _churn(name: str, server: Server, trainer: Trainer, rows: int, seconds: float) -> Any:
    """Train for a time, and return a row of the report. ``rows`` is the number of live rows."""
    end, steps, stop, sizes = time.perf_counter() + seconds, 0, threading.Event(), list[int]()

    def look() -> None:
        while not stop.wait(LOOK_SECONDS):
            sizes.append(size_of(server.data / "base"))

    looking = threading.Thread(target=look)
    looking.start()
    try:
        while time.perf_counter() < end:
            trainer.turn(STEP, SAMPLE, measured=False)
            steps += SAMPLE
    finally:
        stop.set()
        looking.join()
    described = trainer.table.describe()
    cache, live, most = described.cache, rows * ROW_BYTES, max(sizes)
    return {
        "during": name,
        "steps": steps,
        "rows flushed so far": cache.flushed_rows,
        "blocks flushed again so far": cache.reflushed_blocks,
        "live rows, MB": live / 1e6,
        "blocks of rows at the end, MB": described.tiers["lmdb"].bytes / 1e6,
        "largest base, MB": most / 1e6,
        "mean per byte of live rows": float(np.mean(sizes)) / live,
        "largest per byte of live rows (<= 1.5)": most / live,
    }
