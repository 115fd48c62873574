"""Measure how much background eviction slows pushes.

Two servers have equal tables of 5 million rows. They receive the same pushes in alternating turns,
each with some new keys. One server has no eviction rule, so its table grows. The other has a step
TTL: it evicts rows that were not pushed for that many steps. The TTL is chosen from the push rate
so that as many rows expire as are new. The target (0.95 of the push rate) holds for a table in
which 1 % of the rows are replaced per minute. The tables here have 10 % or more replaced, and so
are swept more often: the measured cost is an upper bound.
"""

from __future__ import annotations

import itertools
import time
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.report import Report, arguments
from benchmarks.servers import shards
from benchmarks.work import Work, keys_of, standard_work
from psclient import Client, Table

CHUNK = 10_000  # keys per message while a table is filled
DIM = 32
TARGET = 0.95
TURNOVERS = {0.1: 10.0, 0.6: 4.0}  # share of the rows replaced per minute: seconds of a turn
ROUNDS = 5


class Trainer:
    """Pushes the gradients of the standard work, and of new keys, to one table.

    fresh  new keys per push
    times  seconds of each push so far
    """

    def __init__(self, table: Table, work: Work, fresh: int) -> None:
        self.table = table
        self.times: list[float] = []
        self._fresh = fresh
        self._keys = keys_of(np.arange(work.rows))
        self._steps = standard_work(work, 64)
        self._new = itertools.count(1 << 62)  # no key of the work has only this bit set
        self._at = 0

    def fill(self, ttl: int) -> None:
        """Create all rows. Their last steps are spread evenly over -ttl..0.

        So equally many of them expire at each step.
        """
        chunk = min(CHUNK, len(self._keys) // 100)  # a hundredth of the TTL is due early in a run
        gradients = np.ones((chunk, DIM), np.float32)
        for start in range(0, len(self._keys), chunk):
            keys = self._keys[start : start + chunk]
            step = -ttl + ttl * (start + chunk) // len(self._keys)
            self.table.push(keys, gradients[: len(keys)], step=step, durability="applied")

    def push(self) -> None:
        """Send the next push: gradients of a step of the work, and of new keys."""
        self._at += 1
        _, distinct, gradients = self._steps[self._at % len(self._steps)]
        new: NDArray[np.int64] = np.fromiter(self._new, np.int64, self._fresh)
        keys = np.concatenate([self._keys[distinct], new])
        gradients = np.concatenate([gradients, np.ones((self._fresh, DIM), np.float32)])
        start = time.perf_counter()
        self.table.push(keys, gradients, step=self._at)
        self.times.append(time.perf_counter() - start)

    def turn(self, seconds: float) -> None:
        """Push for ``seconds``, one push after the other."""
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            self.push()

    def line(self, name: str, base: float) -> dict[str, Any]:
        """Return the row of the report for this table.

        name  name of the table
        base  mean seconds of a push to the table without eviction
        """
        left = self.table.describe().rows
        mean = float(np.mean(self.times))
        return {
            "table": name,
            "pushes/s": 1 / mean,
            "x without": base / mean,
            "target": TARGET if name == "evicts" else None,
            "p50 ms": float(np.median(self.times) * 1e3),
            "p99.9 ms": float(np.quantile(self.times, 0.999) * 1e3),
            "rows": left,
            "evicted": len(self._keys) + self._fresh * self._at - left,
        }


def rate_of(work: Work) -> float:
    """Return pushes per second without an eviction rule, measured on a new server."""
    with ExitStack() as stack:
        addresses, _ = stack.enter_context(shards(1, durable=True))
        client = stack.enter_context(Client(addresses))
        trainer = Trainer(client.create_table("rate", DIM, lr=0.05), work, 0)
        trainer.turn(3.0)
        return 1 / float(np.median(trainer.times[20:]))


def compare(work: Work, ttl: int, fresh: int, seconds: float, rounds: int) -> list[dict[str, Any]]:
    """Push to a table without and one with eviction, in turns; return the rows of the report.

    ttl      step TTL of the second table
    fresh    new keys per push
    seconds  duration of a turn
    rounds   turns of each table
    """
    with ExitStack() as stack:
        trainers = {}
        for name, rules in (("grows", {}), ("evicts", {"step_ttl": {"steps": ttl}})):
            addresses, _ = stack.enter_context(shards(1, durable=True))
            client = stack.enter_context(Client(addresses, timeout=60.0))
            table = client.create_table(name, DIM, lr=0.05, eviction=rules)
            trainers[name] = Trainer(table, work, fresh)
            trainers[name].fill(ttl)
        for trainer in trainers.values():
            trainer.turn(1.0)
            trainer.times.clear()
        for _ in range(rounds):
            for trainer in trainers.values():
                trainer.turn(seconds)
        base = float(np.mean(trainers["grows"].times))
        return [trainer.line(name, base) for name, trainer in trainers.items()]


def main() -> None:
    """Run the benchmark and print its tables."""
    options = arguments(__doc__).parse_args()
    report = Report("eviction", options.json)
    work = Work(rows=500_000 if options.quick else 5_000_000, batch=10_000)
    rate = rate_of(work)
    for turnover, seconds in TURNOVERS.items():
        ttl = round(60 * rate / turnover)
        fresh = round(turnover * work.rows / 60 / rate)
        turn, rounds = (seconds / 4, 2) if options.quick else (seconds, ROUNDS)
        report.section(
            f"{work.rows:,} rows, {turnover:.0%} of them new per minute, {fresh} per push;"
            f" TTL {ttl:,} steps",
            compare(work, ttl, fresh, turn, rounds),
        )
    report.close()


if __name__ == "__main__":
    main()
