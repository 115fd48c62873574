"""Every kind of client, each of which calls all shards again and again and counts its errors.

    python callers.py DIRECTORY NAME LIST

NAME is one name with a port that leads to all shards, LIST the addresses of all shards. When
DIRECTORY/stop exists, the callers end, and DIRECTORY/report.json has for each its errors, number
of calls, and its pauses: the times at which it had no answer for more than a second.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from psclient import Client, Follower, Subscriber, admin
from psclient.aio import AsyncClient
from psclient.status import status

KEYS = np.arange(64)  # they belong to all shards
ONES = -np.ones((64, 1), np.float32)  # gradients that add 1 to a row
TIMEOUT = 120.0
PAUSE = 0.05  # seconds between two calls: others need the machine too
NOTABLE = 1.0  # seconds without an answer that are reported

Call = Callable[[], object]


class Caller:
    """A thread that makes one kind of call until it is stopped."""

    def __init__(self, kind: str, call: Call) -> None:
        self.kind = kind
        self.calls = 0
        self.errors: list[str] = []
        self.pauses: list[tuple[float, float]] = []  # begin and end, in seconds since 1970
        self._call = call
        self._stop = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        self._stop = True
        self._thread.join()

    def report(self) -> dict[str, Any]:
        return {"calls": self.calls, "errors": self.errors, "pauses": self.pauses}

    def _run(self) -> None:
        last = time.time()
        while not self._stop:
            try:
                self._call()
                self.calls += 1
            except Exception as error:
                self.errors.append(f"{type(error).__name__}: {error}")
            now = time.time()
            if now - last > NOTABLE:
                self.pauses.append((last, now))
            last = now
            time.sleep(PAUSE)


def summing(client: Client, kind: str) -> Any:
    table = client.create_table(kind, 1, optimizer="sgd", lr=1.0, initializer="zeros")
    table.push(KEYS, 0 * ONES)
    return table


def prefetched(table: Any) -> None:
    pending = table.client.start_pull({table.name: KEYS})
    pending.result()


def awaited(client: AsyncClient, name: str) -> Call:
    """Pushes from a coroutine of one event loop."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()

    def call() -> None:
        asyncio.run_coroutine_threadsafe(client.push({name: (KEYS, ONES)}), loop).result()

    return call


def changed(changes: Subscriber) -> Call:
    """Waits until each shard has reported a change, or that there was none."""

    def call() -> None:
        seen: set[int] = set()
        while len(seen) < 2:
            change = changes.next(TIMEOUT)
            assert change is not None
            seen.add(change.shard)

    return call


def followed(follower: Follower, client: Client) -> Call:
    return lambda: follower.wait_for(client.wait_durable(), timeout=TIMEOUT)


def served(where: Any) -> None:
    while not all(each.ready for each in status(where, timeout=2.0)):
        time.sleep(0.1)


def main(directory: Path, name: str, addresses: list[str]) -> None:
    ways: dict[str, Any] = {"name": name, "list": addresses}
    callers, pushing = [], {}
    for way, where in ways.items():
        for transport in ("stream", "unary"):
            kind = f"push.{transport}.{way}"
            table = summing(Client(where, timeout=TIMEOUT, transport=transport), kind)  # type: ignore[arg-type]
            pushing[kind] = table
            callers.append(Caller(kind, lambda table=table: table.push(KEYS, ONES)))
        client = Client(where, timeout=TIMEOUT)
        kind = f"push.async.{way}"
        pushing[kind] = summing(client, kind)
        callers.append(Caller(kind, awaited(AsyncClient(where, timeout=TIMEOUT), kind)))
        callers.append(Caller(f"prefetch.{way}", lambda table=pushing[kind]: prefetched(table)))
        callers.append(Caller(f"tables.{way}", client.list_tables))
        callers.append(Caller(f"checkpoints.{way}", lambda c=client: admin.checkpoints(c)))
        follower = Follower(Client(where, timeout=TIMEOUT), tables=[kind]).open()
        callers.append(Caller(f"follow.{way}", followed(follower, client)))
        changes = Subscriber(where, tables=[kind], timeout=TIMEOUT).open()
        callers.append(Caller(f"subscribe.{way}", changed(changes)))
        callers.append(Caller(f"status.{way}", lambda where=where: served(where)))
    print("calling", flush=True)
    while not (directory / "stop").exists():
        time.sleep(0.1)
    for caller in callers:
        caller.stop()
    report = {caller.kind: caller.report() for caller in callers}
    for kind, table in pushing.items():
        report[kind]["sums"] = sorted(set(table.pull(KEYS).ravel().tolist()))
    (directory / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3].split(","))
