"""Copies of all tables of one shard in memory, built from the shard's changes.

A replica holds back changes while ``Change.more`` is set. A change without ``more`` is a commit
mark: it makes all changes up to it visible together.
"""

from __future__ import annotations

import time

from psclient.changes import Change
from psclient.copies import Copy
from psclient.errors import LogDiverged
from psclient.signals import Condition
from psclient.versions import History

MAX_PAST = 4096  # maximum number of abandoned epochs to remember


class State:
    """Copies of the tables of a shard, as of one version.

    tables  by name
    listed  names received since the snapshot or catch-up in progress began; None: none in progress
    """

    def __init__(self) -> None:
        """Create a state without tables."""
        self.tables: dict[str, Copy] = {}
        self.listed: set[str] | None = None

    def apply(self, change: Change) -> None:
        """Apply one change; changes to unknown tables are ignored.

        At the end of a snapshot or catch-up, tables that it did not contain are deleted.
        """
        table = self.tables.get(change.table)
        match change.kind:
            case "rows" if table is not None:
                assert change.rows is not None
                table.put(change.keys, change.versions, change.rows)
            case "deletes" if table is not None:
                table.remove(change.keys, change.versions)
            case "created":
                schema = change.schema
                assert schema is not None
                if table is None or table.created < change.version:
                    copy = Copy(schema.dim, schema.serving_default, change.version)
                    self.tables[change.table] = copy
                else:
                    table.default = schema.serving_default
                if self.listed is not None:
                    self.listed.add(change.table)
            case "altered" if table is not None:
                assert change.schema is not None
                table.default = change.schema.serving_default
            case "dropped" if table is not None and table.created < change.version:
                del self.tables[change.table]
            case "snapshot" | "catch_up":
                self.listed = set()
            case "snapshot_end" if self.listed is not None:
                for name in self.tables.keys() - self.listed:
                    del self.tables[name]
                self.listed = None


class ShardReplica:
    """Replica of one shard: its visible state, and changes held back until the next commit mark.

    version   version of the visible state; -1: there is no state yet
    head      newest durable version of the shard, as of its last message
    latency   seconds between the newest visible change on the server and its visibility here
    history   epochs that the visible state belongs to; None: unknown
    state     the visible state
    building  state that a snapshot in progress builds; None: no snapshot in progress
    """

    def __init__(self) -> None:
        """Create a replica without a state."""
        self.version = -1
        self.head = 0
        self.latency = 0.0
        self.history: History | None = None
        self.state = State()
        self.building: State | None = None
        self._next_history: History | None = None
        self._past: dict[int, None] = {}  # epochs that restores undid, oldest first
        self._waiting: list[Change] = []
        self._kept = 0  # how many of them precede the last token, so that no stream repeats them
        self._stream = 0

    def take(self, change: Change, lock: Condition) -> bool:
        """Accept a change. Returns whether the visible state changed.

        lock  taken while the visible state changes, and notified afterwards
        """
        if change.stream != self._stream:  # a new stream repeats the changes after the last token
            self._stream = change.stream
            del self._waiting[self._kept :]
        self.head = change.head
        if change.history is not None:
            self._next_history = change.history
        if change.kind == "snapshot":
            self.building = State()
            self._waiting.clear()
        if change.kind != "progress":
            self._waiting.append(change)
        if change.more:
            if change.token:
                if self.building is not None:
                    self._apply(self.building)
                self._kept = len(self._waiting)
            return False
        with lock:
            self._commit(change)
            lock.notify_all()
        return True

    def reached(self, version: int, epoch: int) -> bool:
        """Return whether the visible state includes ``version``, which the shard gave out in
        ``epoch``.

        epoch  random number of a server start; 0: unknown, so version numbers are compared

        Raises LogDiverged if a restore to an older state undid the version.
        """
        history = self.history
        if epoch and history is not None:
            known = history.contains(epoch, version)
            if known is False or (known is None and epoch in self._past):
                raise LogDiverged(
                    f"version {version} of epoch {epoch:016x} no longer exists: the shard was"
                    " restored to an older state"
                )
            if known is None:  # probably a later epoch, which has not arrived here yet
                return False
        return self.version >= version

    def _commit(self, change: Change) -> None:
        """Make all changes up to this one visible."""
        if self.building is not None:  # its versions may be lower, after a restore
            self._apply(self.building)
            self.state, self.building = self.building, None
            self.version = change.version
        self._apply(self.state)
        self._kept = 0
        self.version = max(self.version, change.version)
        if change.time:
            self.latency = time.time() - change.time
        if self._next_history is not None:
            self._replace_history(self._next_history)
            self._next_history = None

    def _replace_history(self, history: History) -> None:
        """Adopt the epochs of the new state; remember epochs that are no longer part of it."""
        if self.history is not None:
            gone = (epoch for epoch in self.history.epochs if epoch not in history.epochs)
            self._past.update(dict.fromkeys(gone))
            while len(self._past) > MAX_PAST:
                del self._past[next(iter(self._past))]
        self.history = history

    def _apply(self, state: State) -> None:
        """Apply the held-back changes to a state and forget them."""
        for change in self._waiting:
            state.apply(change)
        self._waiting.clear()
