"""Why a request is refused. Together with storage's tree, all that a client is ever told.

* Refused
  - BadRequest        the request breaks a rule; the reason says which
  - WrongShard        a key belongs to another shard
  - NotAlterable      a field of a table that is fixed at its creation
  - StepTooFar        the step of a push is too far ahead of the table's
  - SessionExpired    a push whose repetition could no longer be noticed
  - VersionInFuture   a version that this shard has not reached
  - NoLog             the shard has no data directory, and so no log
  - LogDiverged       a token of another history of this shard
  - VersionCompacted  a token that stands before what this shard still knows of its changes
  - NoCheckpointUrl   the configuration names no place for checkpoints
  - CheckpointExists  there is a checkpoint of that name
  - CheckpointUnfit   the checkpoint cannot serve this purpose
  - CheckpointBusy    one piece of work at a time
  - NotEmpty          rows would be lost
  - RestoreConflict   another restore, or another step of it, is due
  - TableLoading      the table is being filled from a checkpoint
  - CheckpointNeeded  another checkpoint cannot be read without this one
  - UnknownCall       no call of this id waits for a Continue
  - Restoring         between two steps of a restore
  - TooLarge          over a limit of this server
  - Overloaded        too much is in flight; later is fine
  - Busy              too much long work is under way
  - Starting          not ready yet
  - Draining          the server is stopping; another one will answer
  - DeadlinePassed    the caller no longer waits; nothing was applied
"""

from __future__ import annotations


class Refused(Exception):
    """Root of the refusals. ``retry_after`` in seconds, where trying again makes sense."""

    reason = ""
    retry_after: float | None = None

    @property
    def metadata(self) -> dict[str, str]:
        """Facts for ErrorInfo."""
        return {}


class BadRequest(Refused):
    """The request breaks a rule."""

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
    """A field of a table that is fixed at its creation."""

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
    """A push whose repetition could no longer be noticed."""

    reason = "SESSION_EXPIRED"


class VersionInFuture(Refused):
    """A version that this shard has not reached."""

    reason = "VERSION_IN_FUTURE"


class NoLog(Refused):
    """The shard has no data directory, and so no log."""

    reason = "NO_LOG"

    def __init__(self) -> None:
        super().__init__("this shard keeps no log: it was started without a data directory")


class LogDiverged(Refused):
    """A token of another history of this shard."""

    reason = "LOG_DIVERGED"


class VersionCompacted(Refused):
    """A token that stands before what this shard still knows of its changes.

    log_horizon        the log holds the changes above this version
    tombstone_horizon  deletes above this version are remembered; rows always are
    """

    reason = "VERSION_COMPACTED"

    def __init__(self, version: int, log_horizon: int, tombstone_horizon: int) -> None:
        super().__init__(
            f"changes behind version {version} asked for; the log holds those behind version"
            f" {log_horizon}, and deletes are remembered behind version {tombstone_horizon}"
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
    """The configuration names no place for checkpoints."""

    reason = "NO_CHECKPOINT_URL"

    def __init__(self) -> None:
        super().__init__("this shard was started without a checkpoint_url")


class CheckpointExists(Refused):
    """There is a checkpoint of that name."""

    reason = "CHECKPOINT_EXISTS"


class CheckpointUnfit(Refused):
    """The checkpoint cannot serve this purpose."""

    reason = "CHECKPOINT_UNFIT"


class CheckpointBusy(Refused):
    """One piece of work at a time."""

    reason = "CHECKPOINT_BUSY"


class NotEmpty(Refused):
    """Rows would be lost."""

    reason = "NOT_EMPTY"


class RestoreConflict(Refused):
    """Another restore, or another step of it, is due."""

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
    """Between two steps of a restore."""

    reason = "RESTORING"
    retry_after = 0.5

    def __init__(self) -> None:
        super().__init__("the shard is held by a restore")


class TooLarge(Refused):
    """Over a limit of this server."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Overloaded(Refused):
    """Too much is in flight."""

    reason = "OVERLOADED"
    retry_after = 0.1


class Busy(Refused):
    """Too much long work is under way."""

    reason = "BUSY"
    retry_after = 1.0


class Starting(Refused):
    """Not ready yet."""

    reason = "STARTING"
    retry_after = 0.5

    def __init__(self) -> None:
        super().__init__("the shard is starting: it brings back what it held")


class Draining(Refused):
    """The server is stopping."""

    reason = "DRAINING"
    retry_after = 1.0


class DeadlinePassed(Refused):
    """The caller no longer waits; nothing was applied."""

    reason = "DEADLINE_EXCEEDED"
