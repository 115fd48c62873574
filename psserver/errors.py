"""Reasons for refusing a request. Clients see these errors and those of storage, and no others.

* Refused
  - BadRequest        the request is invalid; its reason names the rule
  - WrongShard        a key belongs to another shard
  - NotAlterable      the field of a table is fixed at its creation
  - StepTooFar        the step of a push is too far ahead of the table's
  - SessionExpired    the shard can no longer tell whether it applied this push before
  - VersionInFuture   the shard has not reached this version
  - NoLog             the shard has no data directory, and therefore no version log
  - LogDiverged       the token belongs to another lineage
  - VersionCompacted  the shard no longer has all changes since the token
  - NoCheckpointUrl   the server has no checkpoint_url
  - CheckpointExists  a checkpoint of this name exists
  - CheckpointUnfit   the checkpoint cannot be used for this purpose
  - CheckpointBusy    the shard works on another checkpoint or restore
  - NotEmpty          the operation would overwrite existing rows
  - RestoreConflict   another restore is in progress, or the steps are out of order
  - TableLoading      the table is being filled from a checkpoint
  - CheckpointNeeded  another checkpoint cannot be read without this one
  - UnknownCall       no call of this id waits for a Continue
  - Restoring         the shard is blocked by a restore
  - TooLarge          the request exceeds a limit of this server
  - Overloaded        too many requests are in flight; retry later
  - Busy              too many long operations are running; retry later
  - Starting          the shard is not ready yet
  - Draining          the server is stopping
  - DeadlinePassed    the deadline passed before the request began; nothing was applied
"""

from __future__ import annotations


class Refused(Exception):
    """Base class. ``retry_after``: seconds until a retry can succeed; None: do not retry."""

    reason = ""
    retry_after: float | None = None

    @property
    def metadata(self) -> dict[str, str]:
        """Return the metadata of google.rpc.ErrorInfo."""
        return {}


class BadRequest(Refused):
    """The request is invalid; ``reason`` names the rule."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class WrongShard(Refused):
    """A key belongs to another shard."""

    reason = "WRONG_SHARD"

    def __init__(self, table: str, key: int, belongs: int, shard: int, epoch: int) -> None:
        super().__init__(
            f"table {table!r}: key {key} belongs to shard {belongs}, this is shard {shard}"
            f" (shard map of epoch {epoch})"
        )
        self.epoch = epoch

    @property
    def metadata(self) -> dict[str, str]:
        return {"epoch": str(self.epoch)}


class NotAlterable(Refused):
    """The field of a table is fixed at its creation."""

    reason = "NOT_ALTERABLE"

    def __init__(self, table: str, field: str, why: str, alterable: str) -> None:
        super().__init__(
            f"table {table[:200]!r}: {field} cannot be altered: {why}; alterable are: {alterable}"
        )
        self.field = field

    @property
    def metadata(self) -> dict[str, str]:
        return {"field": self.field}


class StepTooFar(Refused):
    """The step of a push is too far ahead of the table's."""

    reason = "STEP_TOO_FAR"

    def __init__(self, table: str, step: int, at: int, ahead: int) -> None:
        super().__init__(
            f"table {table!r} is at step {at}: a push of step {step} is {step - at} steps ahead,"
            f" max_step_ahead is {ahead}; if the step is right, alter the table's max_step_ahead"
        )
        self.at, self.ahead = at, ahead

    @property
    def metadata(self) -> dict[str, str]:
        return {"table_step": str(self.at), "max_step_ahead": str(self.ahead)}


class SessionExpired(Refused):
    """The shard can no longer tell whether it applied this push before."""

    reason = "SESSION_EXPIRED"


class VersionInFuture(Refused):
    """The shard has not reached this version."""

    reason = "VERSION_IN_FUTURE"


class NoLog(Refused):
    """The shard has no data directory, and therefore no version log."""

    reason = "NO_LOG"

    def __init__(self) -> None:
        super().__init__("this shard has no version log: the server was started without data_dir")


class LogDiverged(Refused):
    """The token belongs to another lineage."""

    reason = "LOG_DIVERGED"


class VersionCompacted(Refused):
    """The shard no longer has all changes since the token.

    log_horizon        the log has all changes above this version
    tombstone_horizon  the shard has all deletes above this version
    """

    reason = "VERSION_COMPACTED"

    def __init__(self, version: int, log_horizon: int, tombstone_horizon: int) -> None:
        super().__init__(
            f"changes above version {version} are no longer complete: the log has changes above"
            f" {log_horizon}, deletes are known above {tombstone_horizon}; take a snapshot"
        )
        self.log_horizon = log_horizon
        self.tombstone_horizon = tombstone_horizon

    @property
    def metadata(self) -> dict[str, str]:
        return {
            "log_horizon": str(self.log_horizon),
            "tombstone_horizon": str(self.tombstone_horizon),
        }


class NoCheckpointUrl(Refused):
    """The server has no checkpoint_url."""

    reason = "NO_CHECKPOINT_URL"

    def __init__(self) -> None:
        super().__init__("this server has no checkpoint_url")


class CheckpointExists(Refused):
    """A checkpoint of this name exists."""

    reason = "CHECKPOINT_EXISTS"


class CheckpointUnfit(Refused):
    """The checkpoint cannot be used for this purpose."""

    reason = "CHECKPOINT_UNFIT"


class CheckpointBusy(Refused):
    """The shard works on another checkpoint or restore."""

    reason = "CHECKPOINT_BUSY"


class NotEmpty(Refused):
    """The operation would overwrite existing rows."""

    reason = "NOT_EMPTY"


class RestoreConflict(Refused):
    """Another restore is in progress, or the steps are out of order."""

    reason = "RESTORE_CONFLICT"


class TableLoading(Refused):
    """The table is being filled from a checkpoint."""

    reason = "TABLE_LOADING"
    retry_after = 1.0

    def __init__(self, table: str) -> None:
        super().__init__(f"table {table!r} is being filled from a checkpoint; try again later")


class CheckpointNeeded(Refused):
    """Another checkpoint cannot be read without this one."""

    reason = "CHECKPOINT_NEEDED"


class UnknownCall(Refused):
    """No call of this id waits for a Continue."""

    reason = "CALL_NOT_FOUND"


class Restoring(Refused):
    """The shard is blocked by a restore."""

    reason = "RESTORING"
    retry_after = 0.5

    def __init__(self) -> None:
        super().__init__("the shard is blocked by a restore; retry later")


class TooLarge(Refused):
    """The request exceeds a limit of this server; ``reason`` names the limit."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Overloaded(Refused):
    """Too many requests are in flight; retry later."""

    reason = "OVERLOADED"
    retry_after = 0.1


class Busy(Refused):
    """Too many long operations are running; retry later."""

    reason = "BUSY"
    retry_after = 1.0


class Starting(Refused):
    """The shard is not ready yet."""

    reason = "STARTING"
    retry_after = 0.5

    def __init__(self) -> None:
        super().__init__("the shard is starting and loads its data; retry later")


class Draining(Refused):
    """The server is stopping."""

    reason = "DRAINING"
    retry_after = 1.0


class DeadlinePassed(Refused):
    """The deadline passed before the request began; nothing was applied."""

    reason = "DEADLINE_EXCEEDED"
