"""Subscribers that are attached while shards are killed, and whose rows must equal the shards'."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from psclient import Client, Follower, Subscriber, Table
from psclient.replica import State

NOWHERE = [-1]  # a key that no trainer pushes
TIMEOUT = 90.0  # seconds


class Resumer:
    """A subscriber that stores its tokens with its rows, stops, and continues from the tokens."""

    def __init__(self, addresses: list[str]) -> None:
        self.resumed = -1
        self._addresses = addresses
        self._tokens: tuple[bytes, ...] | None = None
        self._states = [State() for _ in addresses]
        self._building: list[State | None] = [None for _ in addresses]
        self._versions = [-1 for _ in addresses]
        self._changed = threading.Condition()
        self._failure: BaseException | None = None

    def resume(self) -> None:
        self.resumed += 1
        self._subscriber = Subscriber(
            self._addresses, tokens=self._tokens, timeout=TIMEOUT, chunk_bytes=4096
        ).open()
        self._thread = threading.Thread(target=self._run, args=(self._subscriber,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._subscriber.close()
        self._thread.join()
        self._tokens = self._subscriber.tokens()

    def wait_for(self, versions: Sequence[int], timeout: float) -> None:
        def there() -> bool:
            pairs = zip(self._versions, versions, strict=True)
            return self._failure is not None or all(at >= version for at, version in pairs)

        with self._changed:
            assert self._changed.wait_for(there, timeout), f"at {self._versions}, not {versions}"
        if self._failure is not None:
            raise self._failure

    def rows(self, table: str) -> Held:
        copies = [state.tables[table] for state in self._states]
        return sorted_rows(
            *(
                np.concatenate([getattr(copy, name)[: copy.count] for copy in copies])
                for name in ("keys", "versions", "rows")
            )
        )

    def defaults(self, table: str) -> list[float]:
        return [state.tables[table].default for state in self._states]

    def _run(self, changes: Subscriber) -> None:
        try:
            for change in changes:
                shard = change.shard
                if change.kind == "snapshot":
                    self._building[shard] = State()
                (self._building[shard] or self._states[shard]).apply(change)
                if change.more:
                    continue
                with self._changed:
                    self._states[shard] = self._building[shard] or self._states[shard]
                    self._building[shard] = None
                    self._versions[shard] = max(self._versions[shard], change.version)
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._failure = error
                self._changed.notify_all()


class Held(NamedTuple):
    """Return the rows of a table, by key."""

    keys: np.ndarray
    versions: np.ndarray
    rows: np.ndarray


def sorted_rows(keys: np.ndarray, versions: np.ndarray, rows: np.ndarray) -> Held:
    order = np.argsort(keys)
    return Held(keys[order], versions[order], rows[order])


class Watchers:
    """Three subscribers: one sees every change, one coalesces, one disconnects and comes back."""

    def __init__(self, addresses: list[str]) -> None:
        self.compared = 0  # rows
        self.resumer = Resumer(addresses)
        self._followers = {
            "every change": Follower(addresses),
            "coalesced": Follower(addresses, coalesce_ms=30),
        }

    def __enter__(self) -> Watchers:
        self.resumer.resume()
        for follower in self._followers.values():
            follower.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.resumer.stop()
        for follower in self._followers.values():
            follower.close()

    def differ(self, client: Client, name: str, default: float) -> list[str]:
        """Return the differences between the subscribers' rows and the shards'. Nobody may push.

        default  serving default that the table was given last
        """
        versions = client.wait_durable()
        table, wrong = client.table(name), []
        there = [table.describe().serving_default]
        for title, follower in self._followers.items():
            follower.wait_for(versions, TIMEOUT)
            keys = follower.keys(name)
            held = sorted_rows(keys, follower.row_versions(name, keys), follower.pull(name, keys))
            wrong += self._compare(table, title, held)
            there += follower.pull(name, NOWHERE)[:, 0].tolist()
        self.resumer.wait_for(versions, TIMEOUT)
        there += self.resumer.defaults(name)
        if set(there) != {default}:
            wrong.append(f"serving defaults {there}, not {default} everywhere")
        return wrong + self._compare(table, "the one that resumes", self.resumer.rows(name))

    def _compare(self, table: Table, title: str, held: Held) -> list[str]:
        there, wrong = table.describe().rows, []
        if len(held.keys) != there:
            wrong.append(f"{title}: holds {len(held.keys)} rows, the shards {there}")
        got = table.pull_rows(held.keys)
        self.compared += len(held.keys)
        same = got.found & (got.versions == held.versions) & (got.embeddings == held.rows).all(1)
        if not same.all():
            some = held.keys[~same][:5].tolist()
            wrong.append(f"{title}: {(~same).sum()} rows differ, those of {some} among them")
        return wrong
