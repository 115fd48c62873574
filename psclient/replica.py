"""Copies in memory of all tables of one shard, built from the changes that the shard sends.

A replica keeps changes whose ``more`` is set in a list, where they are not visible. A change
without ``more`` is a commit mark: it makes itself and all changes in the list visible together.
"""

from __future__ import annotations

import time

from psclient.changes import Change
from psclient.copies import Copy
from psclient.errors import LogDiverged
from psclient.signals import Condition
from psclient.versions import History

MAX_PAST = 4096  # maximum number of epochs to remember that restores undid


class State:
    """Copies of all tables of a shard, as of one version of the shard.

    tables  {name of a table: copy of its rows}
    listed  names of the tables that the snapshot or catch-up in progress has sent so far; None:
            neither is in progress
    """

    def __init__(self) -> None:
        """Create a state without tables."""
        self.tables: dict[str, Copy] = {}
        self.listed: set[str] | None = None

    def apply(self, change: Change) -> None:
        """Apply one change. Changes to tables that do not exist here are ignored.

        The end of a snapshot or catch-up deletes the tables that it did not contain.
        """
        table = self.tables.get(change.table)
        match change.kind:
            case "rows" if table is not None:
                assert change.rows is not None
                table.put(change.keys, change.versions, change.rows)
            case "deletes" if table is not None:
                table.remove(change.keys, change.versions)
            case "created":
                self._create(change, table)
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

    def _create(self, change: Change, table: Copy | None) -> None:
        """Apply a change of kind "created".

        table  copy of the table that has this name here; None: there is none. It is replaced if it
               is older than the table that the change created
        """
        schema = change.schema
        assert schema is not None
        if table is None or table.created < change.version:
            copy = Copy(schema.dim, schema.serving_default, change.version)
            self.tables[change.table] = copy
        else:
            table.default = schema.serving_default
        if self.listed is not None:
            self.listed.add(change.table)


class ShardReplica:
    """Replica of one shard: the state that readers see, and changes that wait for a commit mark.

    version   version of the visible state; -1: nothing is visible yet
    head      newest durable version of the shard, as its last message reported
    latency   seconds from when the server applied the newest visible change until it was visible
    history   epochs of the visible state (random numbers of server starts); None: unknown
    state     the visible state
    building  state that a snapshot in progress builds; None: no snapshot is in progress
    """

    def __init__(self) -> None:
        """Create a replica that has not received anything."""
        self.version = -1
        self.head = 0
        self.latency = 0.0
        self.history: History | None = None
        self.state = State()
        self.building: State | None = None
        self._next_history: History | None = None
        self._past: dict[int, None] = {}  # epochs that restores undid, oldest first
        self._waiting: list[Change] = []
        self._kept = 0  # how many of ``_waiting`` precede the last token; they are not sent again
        self._stream = 0

    def take(self, change: Change, lock: Condition) -> bool:
        """Accept a change: keep it, or make it visible if it is a commit mark.

        lock  held while the visible state changes; threads that wait on it are notified afterwards

        Returns whether the visible state changed.
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
        """Return whether the visible state includes all changes up to a version of the shard.

        version  the version
        epoch    random number of the server start during which the shard reached the version; 0:
                 unknown, so that only the version numbers are compared

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
        """Make the waiting changes visible together. ``change`` is the last, the commit mark."""
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
        """Adopt the shard's new epochs; remember old epochs that it lacks: a restore undid them."""
        if self.history is not None:
            gone = (epoch for epoch in self.history.epochs if epoch not in history.epochs)
            self._past.update(dict.fromkeys(gone))
            while len(self._past) > MAX_PAST:
                del self._past[next(iter(self._past))]
        self.history = history

    def _apply(self, state: State) -> None:
        """Apply the waiting changes to ``state`` and remove them from the list."""
        for change in self._waiting:
            state.apply(change)
        self._waiting.clear()
