"""Measure the cost of durable pushes: do the standard work at each level of durability.

First, one pusher sends pushes one after the other, alternating between the three levels. Then eight
pushers (four threads in each of two processes) push at the same time, so that pushes at level
``fsync`` share disk syncs.
"""

from __future__ import annotations

import multiprocessing
import threading
import time
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np

from benchmarks.report import Contender, Report, arguments, interleave, milliseconds
from benchmarks.servers import shards
from benchmarks.step import fill
from benchmarks.work import Ids, Step, Work, keys_of, standard_work
from psclient import Client, Table

LEVELS: tuple[Any, ...] = ("applied", "log", "fsync")
TARGETS = {"log": 0.88, "fsync": 0.6}
PROCESSES, THREADS = 2, 4


def push(table: Table, keys: Ids, steps: list[Step], level: Any, i: int) -> None:
    """Push the gradients of step ``i``.

    keys   int64[rows], the key of each id
    steps  steps of the standard work, used in a cycle
    level  durability of the push: "applied", "log" or "fsync"
    """
    _, distinct, gradients = steps[i % len(steps)]
    table.push(keys[distinct], gradients, step=i, durability=level)


def _pusher(addresses: list[str], work: Work, count: int, barrier: Any, answers: Any) -> None:
    """Run THREADS pushers at each level of durability, three times. The body of a process.

    count    pushes per pusher, level and run
    barrier  lets all processes start a level at the same time
    answers  queue that receives (level, start, end) of each run, in seconds
    """
    steps, keys = standard_work(work, 32), keys_of(np.arange(work.rows))
    with ExitStack() as stack:
        clients = [stack.enter_context(Client(addresses)) for _ in range(THREADS)]
        tables = [client.table("durability") for client in clients]

        def run(table: Table, level: str, first: int) -> None:
            for i in range(first, first + count):
                push(table, keys, steps, level, i)

        for table in tables:
            run(table, "applied", 0)
        for _ in range(3):
            for level in LEVELS:
                threads = [
                    threading.Thread(target=run, args=(table, level, 7 * at))
                    for at, table in enumerate(tables)
                ]
                barrier.wait()
                start = time.perf_counter()
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                answers.put((level, start, time.perf_counter()))


def together(addresses: list[str], work: Work, count: int) -> dict[str, float]:
    """Return the pushes per second of eight concurrent pushers together, by level.

    count  pushes per pusher, level and run

    Each number is the median of three runs.
    """
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(PROCESSES), context.Queue()
    processes = [
        context.Process(target=_pusher, args=(addresses, work, count, barrier, answers))
        for _ in range(PROCESSES)
    ]
    for process in processes:
        process.start()
    rates: dict[str, list[float]] = {level: [] for level in LEVELS}
    for _ in range(3):
        for level in LEVELS:
            spans = [answers.get(timeout=300) for _ in processes]
            assert {each[0] for each in spans} == {level}
            elapsed = max(end for _, _, end in spans) - min(start for _, start, _ in spans)
            rates[level].append(PROCESSES * THREADS * count / elapsed)
    for process in processes:
        process.join()
    return {level: float(np.median(each)) for level, each in rates.items()}


def main() -> None:
    """Run the benchmark and print its tables."""
    options = arguments(__doc__).parse_args()
    report = Report("durability", options.json)
    rows, count = (100_000, 40) if options.quick else (2_000_000, 300)
    keys = keys_of(np.arange(rows))
    with ExitStack() as stack:
        addresses, _ = stack.enter_context(shards(1, durable=True))
        client = stack.enter_context(Client(addresses))
        table = client.create_table("durability", 32, lr=0.05)
        fill(table, keys)
        for batch in (10_000, 1_000):
            work = Work(rows=rows, batch=batch)
            steps = standard_work(work, 64)
            contenders: dict[str, Contender] = {
                level: partial(push, table, keys, steps, level) for level in LEVELS
            }
            times = interleave(contenders, steps=count, rounds=10)
            title = f"B = {batch:,} ({np.mean([len(s[1]) for s in steps]):,.0f} distinct)"
            report.section(f"one pusher, {title}", _alone(times))
            rates = together(addresses, work, count // 4)
            report.section(f"eight pushers, {title}", _eight(rates))
    report.close()


def _alone(times: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Return the rows of the report for one pusher. ``times``: seconds of each push, by level."""
    base = float(np.median(times["applied"]))
    return [
        {
            "level": level,
            **milliseconds(times[level]),
            "pushes, x applied": base / float(np.median(times[level])),
        }
        for level in LEVELS
    ]


def _eight(rates: dict[str, float]) -> list[dict[str, Any]]:
    """Return the rows of the report for eight pushers. ``rates``: pushes per second, by level."""
    return [
        {
            "level": level,
            "pushes/s": rates[level],
            "x applied": rates[level] / rates["applied"],
            "target": TARGETS.get(level),
        }
        for level in LEVELS
    ]


if __name__ == "__main__":
    main()
