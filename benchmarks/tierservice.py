"""Measure pulls and training steps of tables that are larger than the host memory of a server.

Two servers have equal tables, and do the same kind of work in alternating turns. The *whole* server
has all rows in host memory. The *limited* server has room for a part of them; all others are on
disk only. Both write a log and flush. The work draws new batches without end: a repeated batch
would find all its rows in memory.

A trainer that computes nothing between two steps leaves a prefetch no time. So there is also a
trainer that computes; its computation is not part of the measured times.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.report import Report, milliseconds
from benchmarks.servers import Server
from benchmarks.step import CHUNK
from benchmarks.threads import Clock, Use, cores, spent, spread
from benchmarks.work import Draws, Ids, Rows, Work, keys_of
from psclient import Batch, Client, Table
from storage.arena import Budget
from storage.index import Index
from storage.rowstore import AHEAD

DIM = 32
WIDTH = 2 * DIM  # embedding and Adagrad's state
SLOT_BYTES = 4 * WIDTH + 32  # memory of a row besides its entry in the index
RESERVE = 16 / 15  # a server with a disk keeps 1/16 of its budget free for indexes
FLUSH_SECONDS = 10.0
UNIFORM = 0.0  # "exponent" with which all ids are equally frequent
NEW = 1 << 40  # first id of the keys that no batch of the work contains


class Kind(NamedTuple):
    """What a trainer does in each step."""

    name: str
    push: bool = True  # an exchange; else only a pull
    fresh: float = 0.0  # share of the ids that are new in each batch
    compute: float = 0.0  # seconds for which it computes between two steps


STEP = Kind("step")
COMPUTING = Kind("step, computes 7 ms", compute=0.007)
PULL = Kind("pull", push=False)
CHURN = Kind("step, 5 % new keys", fresh=0.05)
TARGETS = {False: 0.6, True: 0.8}  # ratio for a step, budget 10 %, Zipf 1.05; by prefetch
WHOLE, LIMITED, PREFETCH = "whole", "limited", "limited, prefetch"  # trainers


class Size(NamedTuple):
    """Amount of work."""

    rows: int
    shares: tuple[float, ...]  # of the rows for which the limited server has room
    zipf: tuple[float, ...]  # exponents
    kinds: tuple[Kind, ...]
    warm: int  # steps after a change of the work, which are not measured
    turns: int
    steps: int  # per turn


KINDS = STEP, COMPUTING, PULL, CHURN
FULL = Size(10_000_000, (1.0, 0.5, 0.1, 0.02), (0.99, 1.05, 1.2, UNIFORM), KINDS, 400, 6, 50)
QUICK = Size(1_000_000, (0.1,), (1.05, UNIFORM), KINDS, 100, 2, 30)
LONG = 12  # turns if there is only one budget


def chosen(quick: bool, rows: int | None, percent: float | None) -> Size:
    """Return the amount of work.

    rows     of the table; None: the default
    percent  of the rows for which the limited server has room; then training steps with Zipf 1.05
             are the only work. None: all shares and all kinds of work
    """
    size = QUICK if quick else FULL
    if rows is not None:
        size = size._replace(rows=rows)
    if percent is not None:
        size = size._replace(shares=(percent / 100,), zipf=(1.05,), kinds=(STEP, COMPUTING))
        size = size._replace(warm=FULL.warm, turns=LONG)
    return size


class Trainer:
    """Does pulls and training steps on one table.

    client    of the table
    table     filled
    prefetch  ask for the rows of a batch one step before they are needed
    """

    def __init__(self, client: Client, table: Table, draws: Draws, prefetch: bool) -> None:
        self.table = table
        self.times: list[float] = []  # seconds of each measured step, without its computation
        self.clock = Clock()  # of the measured steps
        self._client, self._draws, self._prefetch = client, draws, prefetch
        self._gradients = np.random.default_rng(0).standard_normal((CHUNK, DIM), dtype=np.float32)
        self._fresh = NEW + prefetch * (NEW >> 1)
        self._step = 0

    def turn(self, kind: Kind, steps: int, measured: bool) -> None:
        """Do ``steps`` pulls or training steps of one kind."""
        last, current = (self._client.batch(self._keys(kind)) for _ in range(2))
        for _ in range(steps):
            keys, clock = self._keys(kind), Clock()
            with clock:
                following = self._work(kind, last, current, keys)
            if measured:
                self.times.append(clock.wall)
                self.clock.add(clock)
            compute(self._gradients, kind.compute)
            last, current = current, following
            self._step += 1

    def _work(self, kind: Kind, last: Batch, current: Batch, keys: Ids) -> Batch:
        """Do one step. Returns the batch of the next step, whose keys are ``keys``."""
        following = self._client.batch(keys)
        if self._prefetch:
            self.table.prefetch(following)
        if kind.push:
            push = last, self._gradients[: len(last)]
            self.table.exchange(current, push, step=self._step)
        else:
            self.table.pull(current)
        return following

    def _keys(self, kind: Kind) -> Ids:
        """Return the distinct keys of the next batch."""
        ids = self._draws.ids()
        fresh = int(kind.fresh * len(ids))
        if fresh:
            ids[:fresh] = np.arange(self._fresh, self._fresh + fresh)
            self._fresh += fresh
        return keys_of(np.unique(ids))


def compute(numbers: Rows, seconds: float) -> None:
    """Compute on one core for a time, as a model does between two steps."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        np.tanh(numbers[:1000])


def fill(table: Table, hottest: Ids) -> None:
    """Create a row for every id, the most frequent ids last, so that they are in memory."""
    gradients: Rows = np.ones((CHUNK, DIM), np.float32)
    for at in range(len(hottest), 0, -CHUNK):
        keys = keys_of(hottest[max(0, at - CHUNK) : at])
        table.push(keys, gradients[: len(keys)], durability="applied")


def budget(rows: int, share: float) -> int:
    """Return the host_bytes with which a part of the rows fit into host memory.

    rows   number of rows of the table
    share  fraction of the rows that must fit

    The index has an entry for every row, in memory or not. Its memory depends on the number of rows
    in an irregular way, so it is measured.
    """
    index = Index(Budget(1 << 40))
    for at in range(0, rows, CHUNK):
        keys = keys_of(np.arange(at, min(at + CHUNK, rows))).view(np.uint64)
        index.insert(keys, keys | np.uint64(1))
    size = share * rows * SLOT_BYTES * (1 + 1 / AHEAD) + index.bytes
    index.close()
    spare = 8 << 20  # chunks that are not full
    return int(size * RESERVE) + spare


def hits(table: Table) -> tuple[int, int]:
    """Return (keys so far whose row was in host memory, all keys so far that had a row)."""
    host = table.describe().tiers["host"]
    return host.hits, host.hits + host.misses


class Loaded(NamedTuple):
    """A running server with a filled table."""

    pid: int
    client: Client
    table: Table

    def trainer(self, draws: Draws, *, prefetch: bool = False) -> Trainer:
        """Return a new trainer."""
        return Trainer(self.client, self.table, draws, prefetch)


def run(report: Report, directory: Path, size: Size) -> None:
    """Run the section "service" of the benchmark; ``directory`` is for all files."""
    draws = {zipf: Draws(Work(rows=size.rows, zipf=zipf)) for zipf in size.zipf}
    hottest = draws[size.zipf[0]].hottest
    flush = ["--flush-seconds", str(FLUSH_SECONDS), "--log-keep-bytes", "0"]
    with ExitStack() as stack:
        whole: Loaded | None = None
        for share in size.shares:
            with ExitStack() as inner:
                memory = budget(size.rows, share)
                server = Server(directory / f"{share}", *flush, "--host-bytes", str(memory))
                started = [start(inner, server)]
                if whole is None:
                    started.append(start(stack, Server(directory / "whole", *flush)))
                load([each.table for each in started], hottest)
                whole = whole or started[1]
                lines, uses = compare(whole, started[0], draws, size, share)
                title = (
                    f"service: {size.rows:,} rows of {DIM} + {DIM} numbers, room for {share:.0%}"
                    f" ({memory / 1e6:,.0f} MB with the index)"
                )
                report.section(title, lines)
                report.section(
                    f"processor time per step in ms, {cores()} cores, room for {share:.0%}", uses
                )


def start(stack: ExitStack, server: Server) -> Loaded:
    """Start a server, and create a table on it. ``stack`` stops it."""
    server.start()
    stack.callback(server.stop)
    client = stack.enter_context(Client([server.address], timeout=120.0))
    return Loaded(server.process.pid, client, client.create_table("rows", DIM, lr=0.05))


def load(tables: Sequence[Table], hottest: Ids) -> None:
    """Fill tables at the same time, and wait until all their rows are flushed."""
    with ThreadPoolExecutor(len(tables)) as pool:
        list(pool.map(lambda table: fill(table, hottest), tables))
    for table in tables:
        while table.describe().cache.flushed_rows < len(hottest):
            time.sleep(0.1)


def compare(
    whole: Loaded, limited: Loaded, draws: dict[float, Draws], size: Size, share: float
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Do all kinds of work on both servers in turns.

    draws  source of batches, by exponent of the Zipf distribution
    share  fraction of the rows for which the limited server has room

    Returns the rows of the report about time per step, and of that about processor time.
    """
    lines, uses = [], []
    for zipf, each in draws.items():
        for kind in size.kinds:
            trainers = {
                WHOLE: whole.trainer(each),
                LIMITED: limited.trainer(each),
                PREFETCH: limited.trainer(each, prefetch=True),
            }
            for name in (WHOLE, LIMITED):
                trainers[name].turn(kind, size.warm, measured=False)
            used, (there, every) = take_turns(trainers, whole.pid, limited.pid, kind, size)
            times = {name: trainer.times for name, trainer in trainers.items()}
            work = f"{f'Zipf {zipf}' if zipf else 'uniform'}, {kind.name}"
            judged = (zipf, kind, share) == (1.05, STEP, 0.1)
            lines.append({"work": work, **_times(times, there / max(1, every), judged)})
            uses += [
                {"work": work, "trainer": name, **use.per_step()} for name, use in used.items()
            ]
    return lines, uses


def take_turns(
    trainers: dict[str, Trainer], whole: int, limited: int, kind: Kind, size: Size
) -> tuple[dict[str, Use], tuple[int, int]]:
    """Let trainers work in turns.

    whole, limited  process ids of the servers

    Returns what each trainer and its server used, and the ``hits`` of the turns of LIMITED.
    What a server does later, while others have their turns, counts for its own trainers.
    """
    used, there, every = {name: Use() for name in trainers}, 0, 0
    first = {pid: spent(pid) for pid in (whole, limited)}
    for _ in range(size.turns):
        for name, trainer in trainers.items():
            pid = whole if name == WHOLE else limited
            before, counted = spent(pid), hits(trainer.table)
            trainer.turn(kind, size.steps, measured=True)
            used[name].add(before, spent(pid))
            if name == LIMITED:
                more = np.subtract(hits(trainer.table), counted)
                there, every = there + int(more[0]), every + int(more[1])
    for name, trainer in trainers.items():
        used[name].steps, used[name].clock = len(trainer.times), trainer.clock
    for pid, names in ((whole, [WHOLE]), (limited, [LIMITED, PREFETCH])):
        spread([used[name] for name in names], first[pid], spent(pid))
    return used, (there, every)


def _times(times: dict[str, list[float]], hit: float, judged: bool) -> dict[str, Any]:
    """Return columns of the report.

    times   seconds of each step, by trainer
    hit     share of the keys with a row whose row was in host memory
    judged  whether there are targets for this work
    """
    means = {name: 1e3 * float(np.mean(each)) for name, each in times.items()}
    columns: dict[str, Any] = {"hits %": 100 * hit}
    columns |= {f"{name}: mean ms": mean for name, mean in means.items()}
    columns["limited: p99 ms"] = milliseconds(times[LIMITED])["p99 ms"]
    for name, prefetch in ((LIMITED, False), (PREFETCH, True)):
        ratio = means[WHOLE] / means[name]
        target = f" (>= {TARGETS[prefetch]})" if judged else ""
        columns["prefetch: ratio" if prefetch else "throughput ratio"] = f"{ratio:.3g}{target}"
    return columns
