"""A load on a cluster that lets every metric have values: trainers, a subscriber, checkpoints,
eviction, rows that are on disk only, and requests that are refused.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

from psclient import Client, Subscriber, Table, Tls, admin
from psclient.errors import PsError

KEYS = 400_000  # of the table "user", whose rows do not fit into memory
BATCH = 2_000
DIM = 16
CROWD = 6  # clients that pull many rows at the same time
PAUSE = 0.1  # seconds between two steps of a trainer


class Load:
    """Threads that use a cluster, from ``start`` to ``stop``.

    addresses   of the shards
    tls         certificates of the clients
    seconds     after how many seconds something that is rare happens again, such as a checkpoint
    """

    def __init__(self, addresses: Sequence[str], tls: Tls, seconds: float) -> None:
        self._addresses, self._tls, self._seconds = list(addresses), tls, seconds
        self._ended = threading.Event()
        self.errors: list[BaseException] = []
        self.steps = 0
        self.changes = 0
        self.overloaded = 0

    def start(self) -> Load:
        """Create and fill the tables, then start the threads."""
        with self._client() as client:
            client.create_table("user", DIM, lr=0.05, eviction={"step_ttl": {"steps": 5}})
            client.create_table(
                "item",
                DIM,
                admission="counter",
                admission_args={"threshold": 3},
                durability="fsync",
            )
            self._push(client.table("user"), KEYS)
        jobs = (self._train, self._exchange, self._follow, self._operate, self._exceed, self._fill)
        self._threads = [threading.Thread(target=self._run, args=(job,)) for job in jobs]
        for thread in self._threads:
            thread.start()
        return self

    def stop(self) -> None:
        """Stop the threads. Raises the first error that one of them had."""
        self._ended.set()
        for thread in self._threads:
            thread.join()
        if self.errors:
            raise self.errors[0]

    def _client(self, **options: Any) -> Client:
        return Client(self._addresses, timeout=60, tls=self._tls, **options)

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:  # raised by ``stop``
            self.errors.append(error)

    def _keys(self, rng: np.random.Generator) -> np.ndarray:
        """Return keys of which few are frequent and some are on disk only."""
        frequent = rng.zipf(1.3, BATCH - BATCH // 10).astype(np.int64) % KEYS
        return np.concatenate([frequent, rng.integers(0, KEYS, BATCH // 10)])

    def _train(self) -> None:
        """Pull, push and sometimes delete."""
        rng = np.random.default_rng(1)
        with self._client() as client:
            user, item = client.table("user"), client.table("item")
            while not self._ended.wait(PAUSE):
                keys = self._keys(rng)
                rows = user.pull(keys)
                user.push(keys, rows, step=2 + self.steps // 10)
                item.push(keys[:200], rows[:200], step=2 + self.steps // 10)
                if self.steps % 10 == 0:
                    item.delete(keys[:10])
                self.steps += 1

    def _exchange(self) -> None:
        """Push the gradients of one step and pull the rows of the next in one message."""
        rng = np.random.default_rng(2)
        with self._client() as client:
            user = client.table("user")
            keys = self._keys(rng)
            rows = user.pull(keys)
            while not self._ended.wait(PAUSE):
                following = self._keys(rng)
                rows = user.exchange(following, (keys, rows))
                keys = following

    def _follow(self) -> None:
        """Receive all changes of all tables, from now on."""
        with (
            self._client() as client,
            Subscriber(client, start="latest") as subscriber,
        ):
            while not self._ended.is_set():
                if subscriber.next(timeout=0.2) is not None:
                    self.changes += 1

    def _operate(self) -> None:
        """Write checkpoints, and evict rows."""
        with self._client() as client:
            for number in range(1000):
                admin.checkpoint(client, f"c{number}")
                client.evict("user")
                if self._ended.wait(self._seconds):
                    return

    def _exceed(self) -> None:
        """Pull more rows without the same-host lane than the shards can have in flight, and do what
        they refuse.
        """
        with ExitStack() as stack:
            crowd = [
                stack.enter_context(self._client(lane="never", retry_refused=False))
                for _ in range(CROWD)
            ]
            client, pool = crowd[0], stack.enter_context(ThreadPoolExecutor(CROWD))
            tables, keys = [each.table("user") for each in crowd], np.arange(120_000)
            sketch = {"expected_keys": 100_000_000}
            while not self._ended.wait(self._seconds / 4):
                pulls = [pool.submit(table.pull, keys) for table in tables]
                errors = [error for pull in pulls if (error := pull.exception())]
                assert {getattr(each, "reason", None) for each in errors} <= {"OVERLOADED"}, errors
                self.overloaded += len(errors)
                self._refused(
                    "OUT_OF_MEMORY",
                    lambda: client.create_table(
                        "large", DIM, admission="sketch", admission_args=sketch
                    ),
                )
                self._refused("TABLE_NOT_FOUND", lambda: client.pull({"absent": [1]}))

    def _fill(self) -> None:
        """Push new keys until the disk is full, then drop their table."""
        if self._ended.wait(self._seconds):
            return
        with self._client(retry_refused=False) as client:
            extra = client.create_table("extra", DIM)
            self._refused("DISK_FULL", lambda: self._push(extra, KEYS * 4))
        with self._client() as client:
            client.drop_table("extra")

    def _push(self, table: Table, count: int) -> None:
        """Push the keys up to ``count`` in several batches."""
        for keys in np.array_split(np.arange(count), count // (5 * BATCH)):
            table.push(keys, np.ones((len(keys), DIM), np.float32), step=1)

    def _refused(self, reason: str, act: Callable[[], object]) -> None:
        with pytest.raises(PsError) as caught:
            act()
        assert caught.value.reason == reason, caught.value
