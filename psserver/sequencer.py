"""Number the changes of a shard. Each change gets the next version and a log record.

A change that a client requested also gets an entry in the client's session, so that the shard
recognizes a retry.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from psserver.errors import LogDiverged, Overloaded
from psserver.requests import Change
from psserver.sessions import Sessions
from storage.records import Kind, Origin
from storage.versionlog import VersionLog

MAX_BACKLOG = 256 << 20  # default limit of the memory of records not yet written, in bytes
RECORD = 64  # upper bound for the size of a log record without its arrays, in bytes


class Sequencer:
    """Holds the version of a shard, its log, and its sessions (records of applied pushes).

    now          returns seconds since 1970; each log record has the time of its change
    log          version log; None: the shard stores nothing on disk
    max_backlog  refuse changes while log records not yet written take more bytes than this
    version      version of the newest change; 0 before the first
    """

    def __init__(
        self,
        sessions: Sessions,
        now: Callable[[], float],
        log: VersionLog | None,
        max_backlog: int = MAX_BACKLOG,
    ) -> None:
        self.sessions = sessions
        self.now = now
        self.log = log
        self.max_backlog = max_backlog
        self.version = 0

    def reserve(self, sizes: Sequence[int]) -> None:
        """Reserve disk space in the log for the records of the next changes.

        sizes  upper bound for the size of each record, in bytes

        Raises DiskFull if the disk lacks the space, Overloaded if log records that wait to be
        written take more than max_backlog bytes. After an error nothing is reserved.
        """
        if self.log is None or not sizes:
            return
        if self.log.memory > self.max_backlog:
            raise Overloaded(
                f"the disk is slow: log records that wait to be written take {self.log.memory}"
                f" bytes of memory, more than the limit of {self.max_backlog}; retry later"
            )
        self.log.reserve(*sizes)

    def origin(self, change: Change | None = None, step: int = 0) -> Origin:
        """Return the origin to store in a change's log record: client, training step and time.

        change  request of a client; None: the server makes the change itself
        step    training step of the change; 0 if it has none
        """
        now = max(int(self.now() * 1e6), 0)  # must not fail if the clock is set before 1970
        if change is None:
            return Origin(step=step, time_us=now)
        return Origin(
            client=change.client,
            incarnation=change.incarnation,
            sequence=change.sequence,
            acknowledged=change.acknowledged,
            step=step,
            time_us=now,
        )

    def applied(self, change: Change) -> int | None:
        """Return the version of a change if it was applied before (this is a retry), else None.

        Raises the errors of ``Sessions.applied``.
        """
        if not change.client:
            return None
        return self.sessions.applied(
            change.client, change.incarnation, change.sequence, change.acknowledged
        )

    def require(self, version: int, epoch: int) -> None:
        """Raise LogDiverged unless a version that a client has seen belongs to the history of this
        log. Without a log, does nothing.

        epoch  random number of the server start in which ``version`` was assigned

        Two events remove versions from the history: a restore to an older state, and a crash before
        they were on disk.
        """
        if self.log is not None and not self.log.history.contains(epoch, version):
            raise LogDiverged(
                f"min_version {version} of epoch {epoch:016x} is not part of this shard's history:"
                " the shard was restored to an older state"
            )

    def append(self, kind: Kind, parts: Sequence[Any], change: Change | None = None) -> None:
        """Record a change that was just applied: increase ``version`` by 1, append the change to
        the log, and add it to the client's session.

        kind    kind of log record
        parts   buffers that together are the encoded record
        change  request of a client; None: the server made the change itself
        """
        self.version += 1
        if self.log is not None:
            self.log.append(self.version, kind, parts)
        if change is not None and change.client:
            self.sessions.record(
                change.client,
                change.incarnation,
                change.sequence,
                change.acknowledged,
                self.version,
            )
