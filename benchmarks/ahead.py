"""Measure eight workers whose pipelines pull four batches ahead, beside a quiet client.

Each worker is a process with a connection of its own. It computes nothing between two batches, so
it sends requests as fast as they are answered: more than any trainer. A worker does not repeat a
request that is refused: it ends, and its error is reported.

The server runs on one core, the workers and the quiet client on the other cores, as in overload.py,
which needs root. The server, the quiet client and the health checks come first on their cores:
other programs of the machine do not delay them.

    quiet   a client that pulls 1,000 rows 40 times per second by gRPC, alone and beside the workers
    health  health checks, alone and beside the workers
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from contextlib import ExitStack, suppress
from typing import Any

import numpy as np

from benchmarks.flood import DIM, ROWS, TABLE
from benchmarks.overload import Watch, start
from benchmarks.report import Report, arguments, milliseconds
from benchmarks.step import fill
from benchmarks.work import Work, keys_of, standard_work
from psclient import Client, Pipeline

WORKERS, AHEAD = 8, 4
SECONDS = 4.0  # time for which the workers train
WAIT = 120.0  # maximum time until all workers are ready
LANES = {"stream": "never", "lane": "require"}  # how requests arrive: argument of Client
Done = tuple[int, str]  # batches that a worker trained, and its error; "": none


def work(address: str, lane: Any, batch: int, seed: int, together: Any, out: Any) -> None:
    """Train in this process for SECONDS, and put a Done into the queue ``out``.

    together  barrier at which all workers wait before they train
    """
    keys, done, error = keys_of(np.arange(ROWS)), 0, ""
    steps = standard_work(Work(rows=ROWS, dim=DIM, batch=batch, seed=seed), 8)
    batches = [keys[ids] for ids, _, _ in steps]
    try:
        with Client([address], lane=lane, retry_refused=False) as client:
            pipe = Pipeline(client, {"f": TABLE}, lookahead=AHEAD, staleness=AHEAD)
            client.table(TABLE).pull(keys[:1])
            together.wait(WAIT)
            end = time.monotonic() + SECONDS

            def loader() -> Any:
                while time.monotonic() < end:
                    yield batches[done % len(batches)]

            with pipe:
                for ticket in pipe.over(lambda batch: {"f": batch}, loader()):
                    count = len(ticket.keys[TABLE].keys)
                    pipe.push(ticket, {TABLE: np.full((count, DIM), 1e-4, np.float32)})
                    done += 1
    except Exception as found:
        error = f"{type(found).__name__}: {found}"
    out.put((done, error))


def come_first(policy: int, priority: int, process: int) -> None:
    """Set the scheduling policy of all threads of a process, those of gRPC included."""
    for thread in os.listdir(f"/proc/{process}/task"):
        with suppress(ProcessLookupError):
            os.sched_setscheduler(int(thread), policy, os.sched_param(priority))


def crowd(address: str, lane: str, batch: int) -> tuple[int, list[str], Watch]:
    """Run all workers at once. Returns (batches trained, errors, calls of others meanwhile)."""
    context = multiprocessing.get_context("spawn")
    out, together = context.Queue(), context.Barrier(WORKERS + 1)
    processes = [
        context.Process(target=work, args=(address, lane, batch, seed, together, out))
        for seed in range(WORKERS)
    ]
    for process in processes:
        process.start()
    together.wait(WAIT)
    with Watch(address) as watch:
        come_first(os.SCHED_FIFO, 1, os.getpid())
        found: list[Done] = [out.get() for _ in processes]
    come_first(os.SCHED_OTHER, 0, os.getpid())
    for process in processes:
        process.join()
    return sum(done for done, _ in found), [error for _, error in found if error], watch


def main() -> None:
    """Run the benchmark and print its tables."""
    options = arguments(__doc__).parse_args()
    report = Report("ahead", options.json)
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="ps-bench-"))
        group, server, address = start(stack, "--lane", directory)
        come_first(os.SCHED_FIFO, 1, server.pid)
        os.sched_setaffinity(0, set(range(1, os.cpu_count() or 2)) or {0})
        with Client([address], lane="never") as client:
            fill(client.create_table(TABLE, DIM, optimizer="adagrad"), keys_of(np.arange(ROWS)))
        with Watch(address) as alone:
            time.sleep(SECONDS)
        lines, calls = [], [("idle", alone)]
        for batch in (1_000,) if options.quick else (1_000, 10_000):
            for name, lane in LANES.items():
                done, errors, watch = crowd(address, lane, batch)
                line = {"workers": f"{WORKERS} by {name}", "B": f"{batch:,}"}
                lines.append(line | {"batches/s": done / SECONDS, "refused": len(errors)})
                calls.append((f"{name}, B = {batch:,}", watch))
                for error in errors:
                    report.note(f"{name}, B = {batch:,}: {error}")
        report.section(f"{WORKERS} workers, {AHEAD} batches ahead", lines)
        of_others = [
            {"calls": call, "while": name} | milliseconds(times)
            for name, watch in calls
            for call, times in (("quiet client", watch.quiet), ("health", watch.admin["health"]))
        ]
        report.section("calls of others", of_others)
        report.note(f"processes killed by the kernel: {group.kills}")
    report.close()


if __name__ == "__main__":
    main()
