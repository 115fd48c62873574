"""Versions: every change of a shard gets the next one, its record in the log and its session."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from psserver.errors import LogDiverged, Overloaded
from psserver.requests import Change
from psserver.sessions import Sessions
from storage.records import Kind, Origin
from storage.versionlog import VersionLog

MAX_BACKLOG = 256 << 20  # bytes of memory of records appended and not yet written; the default
RECORD = 64  # bytes of a record besides its arrays; a barrier's name needs less than the rest


class Sequencer:
    """The version of a shard, and the log that its changes are appended to.

    now  seconds since 1970, recorded with each change
    log  None: the shard keeps nothing on disk
    max_backlog  bytes in the log's queue above which changes are refused
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
        """Reserve room in the log for records of these sizes, in bytes.

        Raises DiskFull or Overloaded, and reserves nothing then.
        """
        if self.log is None or not sizes:
            return
        if self.log.memory > self.max_backlog:
            raise Overloaded(
                f"the disk is slow: records that wait to be written take {self.log.memory} bytes of"
                f" memory, the limit is {self.max_backlog}; retry later"
            )
        self.log.reserve(*sizes)

    def origin(self, change: Change | None = None, step: int = 0) -> Origin:
        """Return who asked for a change, and when, as the log records it."""
        now = max(int(self.now() * 1e6), 0)  # a clock before 1970 is wrong, and no reason to fail
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
        """Return the version under which a change was applied before, or None."""
        if not change.client:
            return None
        return self.sessions.applied(
            change.client, change.incarnation, change.sequence, change.acknowledged
        )

    def require(self, version: int, epoch: int) -> None:
        """Raise LogDiverged if a version of an epoch is of a history that was abandoned."""
        if self.log is not None and not self.log.history.contains(epoch, version):
            raise LogDiverged(
                f"min_version {version} of epoch {epoch:016x} is not part of this shard's history:"
                " the shard was restored to an older state"
            )

    def append(self, kind: Kind, parts: Sequence[Any], change: Change | None = None) -> None:
        """Give the change that was just applied its version, its record and its session."""
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
