"""Number the changes of a shard: each gets the next version, a log record and, for retries, an
entry in its client's session.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from psserver.errors import LogDiverged, Overloaded
from psserver.requests import Change
from psserver.sessions import Sessions
from storage.records import Kind, Origin
from storage.versionlog import VersionLog

MAX_BACKLOG = 256 << 20  # default for the memory of records not yet written to disk, in bytes
RECORD = 64  # upper bound for the size of a log record without its arrays, in bytes


class Sequencer:
    """Holds the version of a shard, its log and its sessions (records of applied pushes).

    now          returns seconds since 1970, recorded with each change
    log          None: the shard stores nothing on disk
    max_backlog  refuse changes while more bytes than this wait to be written to the log
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
        """Reserve disk space in the log for records.

        sizes  upper bound for the size of each record, in bytes

        Raises DiskFull if space is missing, Overloaded if too many records wait to be written. Then
        nothing is reserved.
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
        """Return the client, step and time to store in the log record of a change.

        change  request of a client; None: the server makes the change itself
        step    training step of the change
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
        """Raise LogDiverged unless ``version``, assigned in ``epoch``, belongs to this log's
        history.

        epoch  random number that identifies a start of the server

        A restore abandons the versions after the restored one, and so does a crash those not yet on
        disk.
        """
        if self.log is not None and not self.log.history.contains(epoch, version):
            raise LogDiverged(
                f"min_version {version} of epoch {epoch:016x} is not part of this shard's history:"
                " the shard was restored to an older state"
            )

    def append(self, kind: Kind, parts: Sequence[Any], change: Change | None = None) -> None:
        """Record the change that was just applied: raise the version, append a log record, and
        note it in the client's session.

        kind    kind of log record
        parts   encoded record, as buffers to join
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
