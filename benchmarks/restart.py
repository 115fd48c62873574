"""Measure how long a shard takes from its start until it serves, by the number of rows on disk.

A shard reads the directory of its base (the on-disk copy of all rows) and the keys of all rows, but
no rows. So the time should grow with the number of rows and blocks (up to 2 MiB of rows of one
table), but not with the bytes per row. Two tables of equal bytes, one with short and one with long
rows, show that. The shard is stopped after a flush, so that there is no log to replay. It is
started with its files in the file cache and without. The limit of the whole start is that of an
empty shard, which only starts its process and loads compiled kernels.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import disk
from benchmarks.report import Report, add_directory, arguments
from benchmarks.servers import Server, unshared
from benchmarks.work import keys_of
from psclient import Client

HOST_BYTES = 1 << 30  # memory for tables: much less than the rows of the larger tables
FLUSH_SECONDS = 2.0
CHUNK_BYTES = 8 << 20  # bytes of gradients per push while the table is filled
TARGET = 5.0  # seconds to read the base, with 20 million rows of dim 32
FULL = ((32, 1_000_000), (32, 5_000_000), (32, 20_000_000), (256, 720_000), (256, 2_800_000))
QUICK = ((32, 200_000), (32, 1_000_000), (256, 144_000))
RUNS = 3


def fill(server: Server, dim: int, rows: int) -> None:
    """Start a server, create a table and its rows, wait until they are flushed, and stop it."""
    server.start()
    with Client([server.address], timeout=300.0) as client:
        table = client.create_table("rows", dim, lr=0.05)
        chunk = CHUNK_BYTES // (4 * dim)
        gradients = np.ones((chunk, dim), np.float32)
        for at in range(0, rows, chunk):
            keys = keys_of(np.arange(at, min(at + chunk, rows)))
            table.push(keys, gradients[: len(keys)], durability="applied")
        client.wait_durable()
        until_flushed(server)
    server.stop()


def until_flushed(server: Server) -> None:
    """Wait until a flush has written everything: until the base no longer changes."""
    base, size, quiet = server.data / "base" / "data.mdb", -1.0, 0
    while quiet < 2:
        time.sleep(2 * FLUSH_SECONDS)
        last, size = size, base.stat().st_mtime
        quiet = quiet + 1 if size == last else 0


def seconds(server: Server, dropped: bool) -> tuple[float, float]:
    """Start a stopped server several times, and stop it again. Returns medians.

    dropped  drop its files from the file cache before each start

    Returns (seconds from the start until it serves; how many of them it spent reading the base).
    """
    taken, reading = [], []
    for _ in range(RUNS):
        (disk.drop if dropped else disk.load)(server.data)
        start = time.perf_counter()
        server.start()
        taken.append(time.perf_counter() - start)
        reading.append(float(server.logged("recovered")["seconds"]))
        with Client([server.address], timeout=60.0) as client:
            if client.list_tables():
                client.table("rows").pull(keys_of(np.arange(1000)))
        server.stop()
    return float(np.median(taken)), float(np.median(reading))


def measure(directory: Path, dim: int, rows: int) -> dict[str, Any]:
    """Fill a shard, restart it, and return a row of the report."""
    server = Server(directory, "--host-bytes", str(HOST_BYTES), "--log-keep-bytes", "0")
    server.flags += ["--flush-seconds", str(FLUSH_SECONDS)]
    fill(server, dim, rows)
    (whole, reading), (_, cold) = seconds(server, False), seconds(server, True)
    server.start()
    memory = unshared(server.process.pid)
    server.stop()
    target = f" (<= {TARGET:g})" if (dim, rows) == (32, 20_000_000) else ""
    return {
        "dim": str(dim),
        "rows": rows,
        "blocks": round(rows * (8 * dim + 32) / (2 << 20)),
        "GB on disk": disk.size_of(server.data / "base") / 1e9,
        "serves after s": whole,
        "reading the base s": f"{reading:.3g}{target}",
        "ns/row": 1e9 * reading / rows,
        "file cache dropped: s": cold,
        "records replayed": server.logged("recovered")["records"],
        "memory MB": memory / 1e6,
    }


def main(words: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its table."""
    parser = arguments(__doc__)
    add_directory(parser)
    options = parser.parse_args(words)
    report = Report("restart", options.json)
    lines = []
    with tempfile.TemporaryDirectory(prefix="ps-bench-", dir=options.directory) as name:
        empty = Server(Path(name) / "empty")
        empty.start()
        empty.stop()
        bare, _ = seconds(empty, False)
    for dim, rows in QUICK if options.quick else FULL:
        with tempfile.TemporaryDirectory(prefix="ps-bench-", dir=options.directory) as name:
            lines.append(measure(Path(name) / "server", dim, rows))
    report.section(
        f"restart: time until a shard serves, host_bytes {HOST_BYTES >> 20} MiB; an empty shard"
        f" takes {bare:.3g} s",
        lines,
    )
    report.close()


if __name__ == "__main__":
    main()
