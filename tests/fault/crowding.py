"""Fill the tables of one shard beyond its memory, under a limit whose excess the kernel kills.

    python tests/fault/crowding.py --gib 2            rows leave memory: with a data directory
    python tests/fault/crowding.py --gib 2 --memory   rows cannot leave it: without one

The server has default settings in a cgroup with the limit. Outside, PROCESSES clients push new
keys from so many threads that requests exceed max_inflight_bytes several times; their pushes are
refused and sent again. Two subscribers follow the changes, one of which never reads. Checkpoints
are written one after the other, and psctl runs in the cgroup of the server again and again.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / each) for each in ("proto", "", "tests", "tests/fault")]

from cgroups import Group, limited  # noqa: E402
from servers import free_ports, serve_in  # noqa: E402
from squeeze import environment  # noqa: E402

from psclient import Client, PsError, Subscriber, admin  # noqa: E402
from psclient.errors import ResourceExhausted  # noqa: E402
from psclient.status import status  # noqa: E402

GIB = 1 << 30
PROCESSES, THREADS = 3, 8  # of clients that push
BATCH = 20_000  # keys of a push
DIM = 64
ROW = 2 * 4 * DIM  # bytes of embedding and optimizer state


@dataclass
class Found:
    """What happened to the server."""

    limit: int
    rows: int = 0
    table_bytes: int = 0  # that the server may use for tables
    refused: int = 0  # pushes that ended with OUT_OF_MEMORY
    checkpoints: int = 0
    changes: int = 0  # that the subscriber received
    tools: int = 0  # psctl that ran in the cgroup
    anonymous: int = 0  # maximum of bytes that the kernel cannot reclaim
    kills: int = 0
    status: int | None = None  # exit status of the server; None: it was alive to the end
    errors: list[str] = field(default_factory=list)  # that clients had, and should not


def pusher(address: str, number: int, stop: Any, results: Any) -> None:
    """Push new keys, and pull and push old ones, until ``stop`` is set.

    number   of the process, from 0
    results  queue for (pushes refused with OUT_OF_MEMORY, list of other errors)
    """
    refused, errors = [0], list[str]()

    def work(thread: int) -> None:
        gradients = np.ones((BATCH, DIM), np.float32)
        start = (number * THREADS + thread) << 40
        transport = ("stream", "unary")[thread % 2]
        with Client([address], timeout=120, transport=transport) as client:
            table = client.table("t")
            at = start
            while not stop.is_set():
                keys = np.arange(at, at + BATCH, dtype=np.uint64)
                old = max(at - BATCH * (thread + 1), start)
                try:
                    table.push(keys, gradients)
                    at += BATCH
                    table.pull(np.arange(old, old + BATCH, dtype=np.uint64))
                except ResourceExhausted as error:
                    if error.reason == "OUT_OF_MEMORY":
                        refused[0] += 1
                    elif error.reason != "OVERLOADED":
                        errors.append(f"{error.reason}: {error}")
                    stop.wait(0.05)
                except PsError as error:
                    errors.append(f"{type(error).__name__}: {error}")
                    stop.wait(0.2)

    threads = [threading.Thread(target=work, args=(each,)) for each in range(THREADS)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    results.put((refused[0], errors))


class Crowd:
    """The clients of one server, and what they found.

    group  cgroup of the server
    """

    def __init__(self, address: str, found: Found, checkpoints: bool, group: Group) -> None:
        self._address, self._found, self._group = address, found, group
        context = multiprocessing.get_context("spawn")
        self._stop, self._results = context.Event(), context.Queue()
        self._processes = [
            context.Process(target=pusher, args=(address, each, self._stop, self._results))
            for each in range(PROCESSES)
        ]
        kinds = (self._follow, self._ignore, self._save) if checkpoints else ()
        kinds = (*kinds, self._operate)
        self._threads = [threading.Thread(target=each, daemon=True) for each in kinds]

    def start(self) -> None:
        for each in (*self._processes, *self._threads):
            each.start()

    def finish(self) -> None:
        """Stop all clients, and collect their results."""
        self._stop.set()
        for _ in self._processes:
            refused, errors = self._results.get(timeout=180)
            self._found.refused += refused
            self._found.errors += errors
        for each in (*self._processes, *self._threads):
            each.join(60)

    def _follow(self) -> None:
        """Receive all changes."""
        with suppress(PsError), Subscriber([self._address], start="snapshot") as changes:
            while not self._stop.is_set():
                if changes.next(1.0) is not None:
                    self._found.changes += 1

    def _ignore(self) -> None:
        """Open a subscription, and read nothing."""
        with suppress(PsError), Subscriber([self._address], start="earliest"):
            self._stop.wait()

    def _operate(self) -> None:
        """Run psctl in the container of the server, as ``kubectl exec`` does.

        A shell enters the cgroup: a fork of this process would cancel the calls of its clients.
        """
        code = "from psclient.tools.ctl import main; main()"
        command = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', f"{self._group.inner}/cgroup.procs"]
        command += [sys.executable, "-c", code, "status", "--servers", self._address]
        while not self._stop.is_set():
            done = subprocess.run(
                command, capture_output=True, text=True, env=environment(), check=False
            )
            if done.returncode:
                self._found.errors.append(f"psctl: {done.returncode}: {done.stderr}")
            self._found.tools += 1
            self._stop.wait(1.0)

    def _save(self) -> None:
        """Write checkpoints, and delete each when the next is complete."""
        with Client([self._address], timeout=120) as client:
            while not self._stop.is_set():
                name = f"c{self._found.checkpoints}"
                try:
                    admin.checkpoint(client, name)
                    if self._found.checkpoints:
                        admin.delete(client, f"c{self._found.checkpoints - 1}")
                except PsError as error:
                    if not self._stop.is_set():
                        self._found.errors.append(f"checkpoint: {error}")
                    return
                self._found.checkpoints += 1
                self._stop.wait(1.0)


def crowd(
    group: Group,
    limit: int,
    directory: Path | None,
    beyond: float,
    seconds: float,
    say: Callable[[str], None] = lambda _: None,
) -> Found:
    """Fill a server in ``group`` until its rows exceed its memory, and return what happened.

    directory  for data and checkpoints; None: the server keeps its rows in memory alone
    beyond     with a directory: stop when the rows have this multiple of the memory for tables
    seconds    stop after this time; without a directory, stop a fifth of it after the first refusal
    """
    port, found = free_ports(1), Found(limit)
    flags = ["--port", str(port), "--metrics-port", "0"]
    if directory is not None:
        flags += ["--data-dir", str(directory / "data"), "--flush-seconds", "5"]
        flags += ["--checkpoint-url", f"file://{directory}/checkpoints"]
        flags += ["--log-keep-bytes", str(256 << 20)]
    process = serve_in(group.enter, *flags)
    address = f"127.0.0.1:{port}"
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with Client([address], timeout=60) as client:
            client.create_table("t", dim=DIM, optimizer="adagrad", lr=0.1)
            clients = Crowd(address, found, directory is not None, group)
            clients.start()
            _watch(address, group, found, beyond if directory else None, seconds, say, process)
            clients.finish()
            found.kills, found.status = group.kills, process.poll()
    finally:
        process.kill()
        process.communicate()
    return found


def _watch(
    address: str,
    group: Group,
    found: Found,
    beyond: float | None,
    seconds: float,
    say: Callable[[str], None],
    process: Any,
) -> None:
    """Record the sizes of the server until it has been filled; the arguments are those of crowd."""
    end, told = time.monotonic() + seconds, 0.0
    while time.monotonic() < end and process.poll() is None:
        found.anonymous = max(found.anonymous, group.anonymous)
        info = status([address])[0]
        if info.rows and info.memory_bytes and info.memory_budget_bytes:
            found.rows, found.table_bytes = info.rows, info.memory_budget_bytes
            full = info.memory_bytes > 0.97 * info.memory_budget_bytes
            if beyond is None and full:
                end = min(end, time.monotonic() + seconds / 5)
                beyond = float("inf")
            if beyond is not None and found.rows * ROW > beyond * found.table_bytes:
                return
        if time.monotonic() - told > 10:
            told = time.monotonic()
            say(str(found))
        time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=1.0, help="memory limit of the cgroup")
    parser.add_argument("--memory", action="store_true", help="without a data directory")
    parser.add_argument("--beyond", type=float, default=2.0, help="rows / memory for tables")
    parser.add_argument("--seconds", type=float, default=900.0, help="maximum time")
    given = parser.parse_args()
    directory = None if given.memory else Path(tempfile.mkdtemp(prefix="ps-crowd-"))
    try:
        with limited(int(given.gib * GIB)) as group:
            print(crowd(group, int(given.gib * GIB), directory, given.beyond, given.seconds, print))
    finally:
        if directory is not None:
            shutil.rmtree(directory)


if __name__ == "__main__":
    main()
