"""Measure shards, clients, table sizes, memory and start-up.

Rows are pulled and pushed as in the standard work (10,000 keys per exchange, float32). On a machine
with two cores, two shards and their trainer share the cores, so they are slower than one shard by
the cost of the additional messages.

A growing table is compared with plain memory: after the server has ended, a process reads the same
numbers of random index entries and embeddings from as much memory, with the same prefetching. If
plain memory becomes slower with size, because of caches, page tables or the virtual machine, the
table cannot be better.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from typing import Any

import numpy as np

from benchmarks.report import Report, arguments
from benchmarks.servers import cpu, huge, rss, shards
from benchmarks.step import Trainer, fill
from benchmarks.work import Work, keys_of, standard_work
from psclient import Client, Table
from storage.arena import Arena, Budget
from storage.kernels import gather

DIM = 32
ROW = 2 * DIM * 4  # raw bytes of an embedding and its Adagrad state
INDEX_PLACES = 17  # index entries per ten rows, at the average load


def _train(addresses: list[str], rows: int, steps: int, barrier: Any, answers: Any) -> None:
    """Train for ``steps`` exchanges. The body of a process.

    rows     number of rows of the table
    barrier  lets all trainers start at the same time
    answers  queue that receives (start, end) in seconds
    """
    with Client(addresses) as client:
        work = standard_work(Work(rows=rows), 32)
        trainer = Trainer(client.table("scale"), keys_of(np.arange(rows)), work, "float32")
        for i in range(20):
            trainer.exchange(i)
        barrier.wait()
        start = time.perf_counter()
        for i in range(steps):
            trainer.exchange(i)
        answers.put((start, time.perf_counter()))


def throughput(addresses: list[str], rows: int, clients: int, steps: int) -> float:
    """Return the rows per second, duplicates included, that concurrent trainers process together.

    rows     number of rows of the table
    clients  number of trainers, each a process
    steps    exchanges per trainer
    """
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(clients), context.Queue()
    trainers = [
        context.Process(target=_train, args=(addresses, rows, steps, barrier, answers))
        for _ in range(clients)
    ]
    for trainer in trainers:
        trainer.start()
    spans = [answers.get(timeout=300) for _ in trainers]
    for trainer in trainers:
        trainer.join()
    elapsed = max(end for _, end in spans) - min(start for start, _ in spans)
    return clients * steps * 10_000 / float(elapsed)


def main() -> None:
    """Run the benchmark and print its tables."""
    parser = arguments(__doc__)
    parser.add_argument(
        "--largest",
        type=int,
        default=20_000_000,
        help='Number of rows of the largest table in the part "growth" (default: %(default)s).',
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=("shards", "growth", "start"),
        help="Parts of the benchmark to run. Default: all.",
    )
    options = parser.parse_args()
    report = Report("scale", options.json)
    parts = options.parts or ("shards", "growth", "start")
    if "shards" in parts:
        report.section("shards and clients", _shards(options.quick))
    if "growth" in parts:
        sizes = _sizes(options.largest, options.quick)
        report.section("one table growing, 1 shard", _growth(sizes))
        report.section("as much bare memory", _bare(sizes))
    if "start" in parts:
        report.section("start", _starts())
    report.close()


def _shards(quick: bool) -> list[dict[str, Any]]:
    """Train with different numbers of shards and trainers; return a row of the report for each."""
    rows, steps = (200_000, 30) if quick else (2_000_000, 800)
    measured = []
    for count, clients in ((1, 1), (2, 1), (4, 1), (1, 4)):
        with ExitStack() as stack:
            addresses, pids = stack.enter_context(shards(count))
            client = stack.enter_context(Client(addresses))
            fill(client.create_table("scale", DIM, lr=0.05), keys_of(np.arange(rows)))
            before = sum(map(cpu, pids))
            rate = throughput(addresses, rows, clients, steps // clients)
            used = sum(map(cpu, pids)) - before
            moved = (steps // clients + 20) * clients * 10_000 / 1e6
            measured.append((count, clients, rate, used / moved))
    return [
        {
            "shards": count,
            "clients": clients,
            "rows/s": rate,
            "x 1 shard, 1 client": rate / measured[0][2],
            "server CPU s a million rows": used,
        }
        for count, clients, rate, used in measured
    ]


def _sizes(largest: int, quick: bool) -> list[int]:
    if quick:
        return [100_000, 200_000]
    millions = (1, 2, 5, 10, 20, 30, 40, 50)
    return [n * 1_000_000 for n in millions if n * 1_000_000 <= largest]


def _growth(sizes: list[int]) -> list[dict[str, Any]]:
    """Grow one table to each of ``sizes``, in rows; return a row of the report per size."""
    lines = []
    with ExitStack() as stack:
        addresses, pids = stack.enter_context(shards(1))
        client = stack.enter_context(Client(addresses))
        table = client.create_table("scale", DIM, lr=0.05)
        # fill and drop a table, so that the memory that serving needs is allocated before
        other = client.create_table("other", DIM)
        fill(other, keys_of(np.arange(50_000)))
        client.drop_table("other")
        empty, filled, first = rss(pids[0]), 0, 0.0
        for size in sizes:
            worst = 0.0
            for at in range(filled, size, 200_000):
                fill(table, keys_of(np.arange(at, min(at + 200_000, size))))
                filled = min(at + 200_000, size)
                if filled >= min(2_000_000, sizes[-1]):
                    worst = max(worst, (rss(pids[0]) - empty) / (filled * ROW))
            filled = size
            pull = _pull_time(table, size)
            first = first or pull
            info = table.describe()
            lines.append(
                {
                    "rows": size,
                    "pull, uniform, ns per key": pull,
                    "x the smallest (<= 1.3)": pull / first,
                    "resident bytes per row": (rss(pids[0]) - empty) / size,
                    "x raw (<= 1.25)": (rss(pids[0]) - empty) / (size * ROW),
                    "accounted x raw": info.bytes / (size * ROW),
                    "worst so far, x raw (<= 1.35)": worst or None,
                    "in huge pages": huge(pids[0]) / rss(pids[0]),
                }
            )
    return lines


def _pull_time(table: Table, rows: int) -> float:
    """Return the nanoseconds per key of pulls of uniform keys from a table of ``rows`` rows."""
    rng = np.random.default_rng(rows)
    batches = [keys_of(rng.integers(0, rows, 10_000)) for _ in range(60)]
    seconds = []
    for batch in batches:
        start = time.perf_counter()
        table.pull(batch)
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[10:])) / 10_000 * 1e9


def _bare(sizes: list[int]) -> list[dict[str, Any]]:
    """Read as much plain memory as tables of ``sizes`` rows need; return a row of the report per
    size.

    Runs in a new process, whose memory is empty.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_read_memory, (sizes,))


def _read_memory(sizes: list[int]) -> list[dict[str, Any]]:
    budget = Budget(1 << 40)
    slab, entries = Arena(2 * DIM, np.float32, budget), Arena(2, np.uint64, budget)
    entry, row = np.empty((10_000, 1), np.uint64), np.empty((10_000, DIM), np.float32)
    lines: list[dict[str, Any]] = []
    filled = 0
    for size in sizes:
        for arena, rows, before in (
            (slab, size, filled),
            (entries, size * INDEX_PLACES // 10, filled * INDEX_PLACES // 10),
        ):
            arena.grow(rows)
            for at in range(before, rows, 200_000):  # touches every page
                arena.array[at : min(at + 200_000, rows), 0] = 1
        filled = size
        rng = np.random.default_rng(size)
        seconds = []
        for _ in range(60):
            places, slots = (
                rng.integers(0, size * INDEX_PLACES // 10, 10_000),
                rng.integers(0, size, 10_000),
            )
            start = time.perf_counter()
            gather(entries.array, places, 1, entry)
            gather(slab.array, slots, DIM, row)
            seconds.append(time.perf_counter() - start)
        taken = float(np.median(seconds[10:])) / 10_000 * 1e9
        first = lines[0]["random reads, ns per key"] if lines else taken
        pid = os.getpid()
        lines.append(
            {
                "rows": size,
                "random reads, ns per key": taken,
                "x the smallest": taken / first,
                "GB": (slab.bytes + entries.bytes) / 1e9,
                "in huge pages": huge(pid) / rss(pid),
            }
        )
    return lines


def _starts() -> list[dict[str, Any]]:
    """Measure how long a server with cached kernels takes to start; return rows of the report."""
    lines = []
    for _ in range(3):
        start = time.perf_counter()
        with shards(1):
            lines.append(time.perf_counter() - start)
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import psserver.process"], check=True)
    imports = time.perf_counter() - start
    return [
        {"what": "psserver up, to ready (<= 3 s)", "seconds": float(np.median(lines))},
        {"what": "of which importing", "seconds": imports},
    ]


if __name__ == "__main__":
    main()
