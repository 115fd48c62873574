"""Measure tables that are larger than memory: rows on disk, and host memory as a cache over them.

gets     Pull batches of uniformly drawn keys whose rows are all on disk, from a table in this
         process, from LMDB with a row per key, and from RocksDB. Once with all files in the file
         cache (the operating system's copy of files in memory), and once without any. The limit is
         the number of random 4 KiB reads per second of the disk, 32 at once. Without file cache,
         ours first reads the pages of all rows, many at once, as a server does. Row "ours, pages
         checked first" does the same with file cache: there, it only finds that nothing is missing.
puts     Flush changed rows to disk and demote them (give up their copies in host memory), against
         batch puts of the same rows by the two peers.
memory   Bytes of memory per row that is on disk only.
service  Pulls and training steps through a server whose host memory has room for a part of the
         rows, in turns with a server that has all rows in memory.
budget   Memory of a server, without file cache, while it gets ten times as many rows as fit.
disk     Bytes on disk while rows change and a subscriber holds a snapshot open.
latency  Pulls of rows in memory while other clients make the server read and write the disk.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import disk, tierbudget, tierlatency, tierservice
from benchmarks.coldtable import ColdTable
from benchmarks.peers import Unavailable
from benchmarks.report import Report, add_directory, arguments, interleave
from benchmarks.rowstores import STORES, RowStore, batches
from benchmarks.servers import unshared
from benchmarks.work import keys_of
from storage.kernels import Keys, Rows

DIM = 32
BATCH = 10_000
PUTS = 20  # batches per sync
OURS = "blocks (ours)"
CHECKED = "ours, pages checked first"
TARGETS = {"rocksdb": 20, "lmdb, row per key": 8}  # gets: ratio of ours to the peer


def drawn(keys: Keys, seed: int) -> Iterator[Keys]:
    """Yield batches of distinct keys without end, drawn uniformly from ``keys``."""
    rng = np.random.default_rng(seed)
    while True:
        yield keys[rng.choice(len(keys), BATCH, replace=False)]


def stores(stack: ExitStack, report: Report, directory: Path) -> dict[str, RowStore]:
    """Return our store and the peers that are installed, by name, still empty.

    stack  closes them
    """
    made: dict[str, RowStore] = {OURS: ColdTable(directory / "blocks", DIM)}
    for name, make in STORES.items():
        try:
            made[name] = make(directory / name.split(",")[0], DIM)
        except Unavailable as reason:
            report.note(f"{name} is left out: {reason}")
    for store in made.values():
        stack.callback(store.close)
    return made


def contents(rows: int) -> tuple[Keys, Rows]:
    """Return the keys and the rows, embedding and optimizer state, that every store gets first."""
    rng = np.random.default_rng(0)
    keys = keys_of(np.arange(rows)).view(np.uint64)
    return keys, np.abs(rng.standard_normal((rows, 2 * DIM), dtype=np.float32))


def gets(report: Report, directory: Path, rows: int, rounds: int) -> None:
    """Run the section "gets".

    directory  directory for all files
    rounds     batches that are measured per store, with files in the file cache
    """
    reads, tool = disk.random_reads(directory, 512 * rows, 5.0)
    with ExitStack() as stack:
        made = stores(stack, report, directory)
        keys, values = contents(rows)
        for store in made.values():
            store.fill(keys, values)
        del values
        warm = {}
        for seed, (name, store) in enumerate(made.items()):
            disk.load(store.directory)
            warm[name] = _get(store.get, drawn(keys, seed))
        ours = made[OURS]
        assert isinstance(ours, ColdTable)
        warm[CHECKED], warm[OURS] = warm[OURS], _get(ours.pull, drawn(keys, len(warm)))
        times = interleave(warm, steps=rounds, rounds=4, warm=2)
        dropped: dict[str, list[float]] = {name: [] for name in made}
        every = drawn(keys, len(made))
        for _ in range(max(3, rounds // 8)):
            for name, store in made.items():
                disk.drop(store.directory)
                dropped[name].append(_seconds(lambda: store.get(next(every))))  # noqa: B023
        sizes = {name: disk.size_of(store.directory) for name, store in made.items()}
    report.section(
        f"gets of {BATCH:,} uniform keys, {rows:,} rows of {DIM} + {DIM} numbers on disk; the disk:"
        f" {reads:,.0f} random reads/s ({tool})",
        [_gets_row(name, times, dropped, reads, sizes.get(name, 0) / rows) for name in times],
    )


def _get(get: Callable[[Keys], Any], batches: Iterator[Keys]) -> Callable[[int], Any]:
    return lambda _: get(next(batches))


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _gets_row(
    name: str,
    warm: dict[str, list[float]],
    dropped: dict[str, list[float]],
    reads: float,
    size: float,
) -> dict[str, Any]:
    """Return a row of the section "gets".

    name     name of the store
    warm     seconds of each batch with files in the file cache, by store
    dropped  seconds of each batch with no file in the file cache, by store
    reads    random reads per second of the disk
    size     bytes on disk per row
    """
    fast, best = (float(np.median(warm[each])) for each in (name, OURS))
    target = f" (>= {TARGETS[name]})" if name in TARGETS else ""
    columns: dict[str, Any] = {
        "store": name,
        "cached rows/s": BATCH / fast,
        "ours / it": f"{fast / best:.3g}{target}",
    }
    slow, least = (float(np.median(dropped.get(each, [np.nan]))) for each in (name, OURS))
    known = name in dropped
    return columns | {
        "dropped rows/s": BATCH / slow if known else None,
        "ours / it (>= 1.5)": slow / least if known else None,
        "rows / disk's reads (>= 0.8)": BATCH / slow / reads if known else None,
        "bytes/row on disk": size if known else None,
    }


def puts(report: Report, directory: Path, rows: int, rounds: int) -> None:
    """Run the section "puts".

    directory  directory for all files
    rounds     number of times that PUTS batches of 10,000 rows are put and then synced; one more
               comes first, and is not measured
    """
    with ExitStack() as stack:
        made = stores(stack, report, directory)
        keys, values = contents(rows)
        taken: dict[str, list[tuple[float, ...]]] = {name: [] for name in made}
        for store in made.values():
            store.fill(keys, values)
        for number in range(rounds + 1):
            chosen = np.random.default_rng(number).choice(rows, PUTS * BATCH, replace=False)
            for name, store in made.items():
                taken[name].append(_put(store, keys[chosen], values[chosen]))
    spent = {name: np.sum(each[1:], axis=0) for name, each in taken.items()}
    put, flush, demote = spent.pop(OURS)
    lines = {
        "ours: flush and demotion": flush + demote,
        "ours, with writing to host memory": put + flush + demote,
        **{name: sum(seconds) for name, seconds in spent.items()},
    }
    report.section(
        f"puts of uniform rows among {rows:,}: {rounds} times {PUTS} batches of {BATCH:,}, then a"
        " sync to disk",
        [
            {
                "store": name,
                "rows/s": rounds * PUTS * BATCH / seconds,
                "flush and demotion / it (>= 5)": seconds / (flush + demote),
            }
            for name, seconds in lines.items()
        ],
    )


def _put(store: RowStore, keys: Keys, rows: Rows) -> tuple[float, ...]:
    """Put rows in batches, then sync. Returns the seconds of the puts, of flush and of demotion.

    The sync of a peer counts as its flush.
    """
    put = sum(_seconds(lambda: store.put(keys[at], rows[at])) for at in batches(len(keys)))  # noqa: B023
    if isinstance(store, ColdTable):
        return put, _seconds(store.flush), _seconds(store.demote)
    return put, _seconds(store.sync), 0.0


def memory(report: Report, directory: Path, rows: int) -> None:
    """Run the section "memory": fill a table with rows on disk, and look at 64 moments.

    The index grows by doubling its parts, not all at once. So the memory per row depends on the
    moment.
    """
    held, resident = list[float](), list[float]()
    table = ColdTable(directory / "blocks", DIM)
    try:
        before = table.budget.held
        keys, values = contents(rows)
        process = unshared(os.getpid())
        for at in batches(rows, rows // 64):
            table.fill(keys[at], values[at])
            held.append((table.budget.held - before) / at.stop)
            resident.append((unshared(os.getpid()) - process) / at.stop)
    finally:
        table.close()
    half = len(held) // 2  # before, what the process needs in any case is a large part
    report.section(
        f"memory of rows on disk while a table grows to {rows:,} rows, {DIM} + {DIM} numbers",
        [
            {
                "bytes per row": name,
                "last": each[-1],
                "mean of the second half (<= 30)": float(np.mean(each[half:])),
                "largest of the second half": max(each[half:]),
            }
            for name, each in (("of the budget", held), ("resident", resident))
        ],
    )


SECTIONS = ("gets", "puts", "memory", "service", "budget", "disk", "latency")


def main(words: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its tables."""
    parser = arguments(__doc__)
    parser.add_argument(
        "--only",
        choices=SECTIONS,
        action="append",
        help="Run only this section; may be repeated. Default: all.",
    )
    parser.add_argument(
        "--rows",
        type=int,
        help="Number of rows of all sections but budget and disk. Default: 5 million; section"
        " service 10 million. With --quick, a tenth of that.",
    )
    parser.add_argument(
        "--budget",
        type=float,
        metavar="PERCENT",
        help="Section service: host memory has room for this part of the rows, and the work is"
        " training steps with Zipf 1.05. Default: several budgets, distributions and kinds of"
        " work.",
    )
    add_directory(parser)
    options = parser.parse_args(words)
    report, quick = Report("tiers", options.json), options.quick
    rows = options.rows or (500_000 if quick else 5_000_000)
    for section in options.only or SECTIONS:
        with tempfile.TemporaryDirectory(prefix="ps-bench-", dir=options.directory) as name:
            directory = Path(name)
            match section:
                case "gets":
                    gets(report, directory, rows, 20 if quick else 80)
                case "puts":
                    puts(report, directory, rows, 2 if quick else 6)
                case "memory":
                    memory(report, directory, rows)
                case "service":
                    size = tierservice.chosen(quick, options.rows, options.budget)
                    tierservice.run(report, directory, size)
                case "budget":
                    tierbudget.budget(report, directory, quick)
                case "disk":
                    tierbudget.growth(report, directory, quick)
                case _:
                    tierlatency.run(report, directory, quick, rows)
    report.close()


if __name__ == "__main__":
    main()
