"""Measure pulls and training steps of tables that are larger than the host memory of a server.

Two servers have equal tables, and do the same kind of work in alternating turns. The *whole* server
has all rows in host memory. The *limited* server has room for a part of them; all others are on
disk only. Both write a log and flush. The work draws new batches without end: a repeated batch
would find all its rows in memory.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.report import Report, milliseconds
from benchmarks.servers import Server
from benchmarks.step import CHUNK
from benchmarks.work import Draws, Ids, Rows, Work, keys_of
from psclient import Client, Table

DIM = 32
WIDTH = 2 * DIM  # embedding and Adagrad's state
SLOT_BYTES = 4 * WIDTH + 32  # memory of a row besides its entry in the index
RESERVE = 16 / 15  # a server with a disk keeps 1/16 of its budget free for indexes
FLUSH_SECONDS = 10.0
UNIFORM = 0.0  # "exponent" with which all ids are equally frequent
NEW = 1 << 40  # first id of the keys that no batch of the work contains

PULL, STEP, CHURN = "pull", "step", "step, 5 % new keys"
KINDS = {PULL: 0.0, STEP: 0.0, CHURN: 0.05}  # share of the ids that are new in each batch
TARGETS = {False: 0.6, True: 0.8}  # ratio for a step, budget 10 %, Zipf 1.05; by prefetch


class Size(NamedTuple):
    """Amount of work."""

    rows: int
    shares: tuple[float, ...]  # of the rows for which the limited server has room
    zipf: tuple[float, ...]  # exponents
    warm: int  # steps after a change of the work, which are not measured
    turns: int
    steps: int  # per turn


FULL = Size(10_000_000, (1.0, 0.5, 0.1, 0.02), (0.99, 1.05, 1.2, UNIFORM), 400, 6, 50)
QUICK = Size(1_000_000, (0.1,), (1.05, UNIFORM), 100, 2, 30)


class Trainer:
    """Does pulls and training steps on one table.

    table  the table, filled
    prefetch  ask for the rows of a batch one step before they are needed
    """

    def __init__(self, table: Table, draws: Draws, prefetch: bool) -> None:
        self.table = table
        self.times: list[float] = []  # seconds of each measured step
        self._draws, self._prefetch = draws, prefetch
        self._gradients = np.random.default_rng(0).standard_normal((CHUNK, DIM), dtype=np.float32)
        self._fresh = NEW + prefetch * (NEW >> 1)
        self._step = 0

    def turn(self, kind: str, steps: int, measured: bool) -> None:
        """Do ``steps`` pulls or training steps of one kind, a key of KINDS."""
        last, current = self._batch(kind), self._batch(kind)
        for _ in range(steps):
            following = self._batch(kind)
            start = time.perf_counter()
            if self._prefetch:
                self.table.prefetch(following)
            if kind == PULL:
                self.table.pull(current)
            else:
                push = last, self._gradients[: len(last)]
                self.table.exchange(current, push, step=self._step)
            if measured:
                self.times.append(time.perf_counter() - start)
            last, current = current, following
            self._step += 1

    def _batch(self, kind: str) -> Ids:
        """Return the distinct keys of the next batch."""
        ids = self._draws.ids()
        fresh = int(KINDS[kind] * len(ids))
        if fresh:
            ids[:fresh] = np.arange(self._fresh, self._fresh + fresh)
            self._fresh += fresh
        return keys_of(np.unique(ids))


def fill(table: Table, hottest: Ids) -> None:
    """Create a row for every id, the most frequent ids last, so that they are in memory."""
    gradients: Rows = np.ones((CHUNK, DIM), np.float32)
    for at in range(len(hottest), 0, -CHUNK):
        keys = keys_of(hottest[max(0, at - CHUNK) : at])
        table.push(keys, gradients[: len(keys)])


def budget(rows: int, share: float, index_bytes: int) -> int:
    """Return the host_bytes with which a part of the rows fit into host memory.

    rows         number of rows of the table
    share        fraction of the rows that must fit
    index_bytes  memory of the index, which has an entry for every row, in memory or not
    """
    spare = 8 << 20  # chunks that are not full
    return int((share * rows * SLOT_BYTES + index_bytes) * RESERVE) + spare


def hits(table: Table) -> tuple[int, int]:
    """Return (keys so far whose row was in host memory, all keys so far that had a row)."""
    host = table.describe().tiers["host"]
    return host.hits, host.hits + host.misses


def run(report: Report, directory: Path, quick: bool) -> None:
    """Run the section "service" of the benchmark; ``directory`` is for all files."""
    size = QUICK if quick else FULL
    draws = {zipf: Draws(Work(rows=size.rows, zipf=zipf)) for zipf in size.zipf}
    hottest = draws[size.zipf[0]].hottest
    flush = ["--flush-seconds", str(FLUSH_SECONDS), "--log-keep-bytes", "0"]
    with ExitStack() as stack:
        whole = started(stack, Server(directory / "whole", *flush), hottest)
        index_bytes = size.rows * 30  # largest average between two moments of growth
        for share in size.shares:
            with ExitStack() as inner:
                memory = budget(size.rows, share, index_bytes)
                server = Server(directory / f"{share}", *flush, "--host-bytes", str(memory))
                limited = started(inner, server, hottest)
                report.section(
                    f"service: {size.rows:,} rows of {DIM} + {DIM} numbers, room for {share:.0%}"
                    f" ({memory / 1e6:,.0f} MB with the index)",
                    compare(whole, limited, draws, size, share),
                )


def started(stack: ExitStack, server: Server, hottest: Ids) -> Table:
    """Start a server, and return a new table on it with a row for every id.

    stack  stops the server
    """
    server.start()
    stack.callback(server.stop)
    client = stack.enter_context(Client([server.address], timeout=120.0))
    table = client.create_table("rows", DIM, lr=0.05)
    fill(table, hottest)
    return table


def compare(
    whole: Table, limited: Table, draws: dict[float, Draws], size: Size, share: float
) -> Sequence[dict[str, Any]]:
    """Do all kinds of work on both servers in turns; return the rows of the report.

    draws  source of batches, by exponent of the Zipf distribution
    share  fraction of the rows for which the limited server has room
    """
    lines = []
    for zipf, each in draws.items():
        for kind in (STEP, PULL, CHURN):
            trainers = {
                "whole": Trainer(whole, each, False),
                "limited": Trainer(limited, each, False),
                "prefetch": Trainer(limited, each, True),
            }
            for name in ("whole", "limited"):
                trainers[name].turn(kind, size.warm, measured=False)
            there, every = 0, 0
            for _ in range(size.turns):
                for name, trainer in trainers.items():
                    before = hits(limited)
                    trainer.turn(kind, size.steps, measured=True)
                    if name == "limited":
                        there += hits(limited)[0] - before[0]
                        every += hits(limited)[1] - before[1]
            seconds = {name: trainer.times for name, trainer in trainers.items()}
            lines.append(_line(zipf, kind, share, there / max(1, every), seconds))
    return lines


def _line(
    zipf: float, kind: str, share: float, hit: float, seconds: dict[str, list[float]]
) -> dict[str, Any]:
    """Return a row of the report.

    hit      share of the keys with a row whose row was in host memory
    seconds  time of each step in seconds, by trainer
    """
    judged = (zipf, kind, share) == (1.05, STEP, 0.1)
    columns: dict[str, Any] = {
        "work": f"{f'Zipf {zipf}' if zipf else 'uniform'}, {kind}",
        "hits %": 100 * hit,
        "whole: mean ms": 1e3 * float(np.mean(seconds["whole"])),
        "limited: mean ms": 1e3 * float(np.mean(seconds["limited"])),
        "p99 ms": milliseconds(seconds["limited"])["p99 ms"],
    }
    for name, prefetch in (("limited", False), ("prefetch", True)):
        ratio = float(np.mean(seconds["whole"]) / np.mean(seconds[name]))
        target = f" (>= {TARGETS[prefetch]})" if judged else ""
        columns["prefetch: ratio" if prefetch else "throughput ratio"] = f"{ratio:.3g}{target}"
    return columns
