"""Reasons for refusing a request. Clients see these errors and those of storage, and no others.

A token is a subscriber's position in the version log, the shard's record of every change.

* Refused
  - BadRequest        the request is invalid; ``reason`` names the violated rule
  - Unauthenticated   the call has no valid credential
  - PermissionDenied  the policy does not allow this to the principal
  - BudgetExceeded    the principal uses more than its budget; retry later
  - WrongShard        a key belongs to another shard
  - NotAlterable      the field of a table is fixed at the table's creation
  - StepTooFar        a push has a step too far ahead of the table's largest step
  - SessionExpired    the shard no longer knows whether it has applied this push
  - VersionInFuture   the request names a version that the shard has not reached
  - NoLog             the shard has no data directory, and therefore no version log
  - LogDiverged       the token or version does not belong to this log's history
  - VersionCompacted  the shard no longer has all changes since the token
  - NoCheckpointUrl   the setting checkpoint_url is not set
  - CheckpointExists  a checkpoint of this name exists already
  - CheckpointUnfit   the checkpoint cannot be used for this operation
  - BarrierMissed     the barrier that a checkpoint waits for came too early or not in time
  - CheckpointBusy    another operation on checkpoints is running on this shard
  - NotEmpty          the operation would overwrite existing rows
  - RestoreConflict   another restore is in progress, or the restore is not ready for this step
  - TableLoading      the table is being filled from a checkpoint
  - CheckpointNeeded  the checkpoint to delete is the parent of a remaining checkpoint
  - UnknownCall       no call with this id waits for a Continue request
  - Restoring         the shard is blocked by a restore
  - TooLarge          the request exceeds a limit of this server
  - Overloaded        too many requests are in flight; retry later
  - Busy              too many long operations are running; retry later
  - Starting          the shard is not ready yet
  - NotAShard         the server has a number that no shard of the cluster has
  - OtherShard        the call was meant for a different shard or cluster
  - Draining          the server is stopping, or the client has gone away
  - DeadlinePassed    the deadline passed before the request began; nothing was applied
"""

from __future__ import annotations


class Refused(Exception):
    """Base class of all reasons for refusing a request.

    reason       constant name of the reason, sent to the client
    retry_after  seconds after which a retry may succeed; None: do not retry
    """

    reason = ""
    retry_after: float | None = None

    @property
    def metadata(self) -> dict[str, str]:
        """Return details for the client: the field ``metadata`` of a google.rpc.ErrorInfo."""
        return {}


class BadRequest(Refused):
    """The request is invalid; ``reason`` names the violated rule."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Unauthenticated(Refused):
    """The call has no valid credential."""

    reason = "UNAUTHENTICATED"


class PermissionDenied(Refused):
    """The policy does not allow this to the principal.

    verb   verb that the principal lacks; "any": each verb would be enough
    table  table for which it lacks it; "": the verb is not about a table; "*": about all tables
    """

    reason = "PERMISSION_DENIED"

    def __init__(self, principal: str, verb: str, table: str) -> None:
        on = f" on table {table[:200]!r}" if table not in ("", "*") else ""
        on = " on all tables (pattern *)" if table == "*" else on
        lacks = "has no right" if verb == "any" else f"lacks the verb {verb!r}"
        super().__init__(f"principal {principal!r} {lacks}{on}: ask for it in the policy file")
        self._metadata = {"principal": principal, "verb": verb, "table": table[:200]}

    @property
    def metadata(self) -> dict[str, str]:
        return self._metadata


class BudgetExceeded(Refused):
    """The principal uses more than its budget; retry after ``seconds``."""

    reason = "BUDGET_EXCEEDED"

    def __init__(self, message: str, seconds: float) -> None:
        super().__init__(message)
        self.retry_after = seconds


class WrongShard(Refused):
    """A key belongs to another shard.

    epoch  version number of the shard map of the shard that refuses
    """

    reason = "WRONG_SHARD"

    def __init__(self, table: str, key: int, belongs: int, shard: int, epoch: int) -> None:
        super().__init__(
            f"table {table!r}: key {key} belongs to shard {belongs}, but was sent to shard {shard}"
            f" (shard map of epoch {epoch})"
        )
        self.epoch = epoch

    @property
    def metadata(self) -> dict[str, str]:
        return {"epoch": str(self.epoch)}


class NotAlterable(Refused):
    """The field of a table is fixed at the table's creation."""

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
    """A push has a step too far ahead of the table's largest step.

    at     largest step that was pushed to the table
    ahead  max_step_ahead, the table's limit
    """

    reason = "STEP_TOO_FAR"

    def __init__(self, table: str, step: int, at: int, ahead: int) -> None:
        super().__init__(
            f"table {table!r} is at step {at}: a push of step {step} is {step - at} steps ahead,"
            f" but max_step_ahead is {ahead}; if the step is right, alter the table's"
            " max_step_ahead"
        )
        self.at, self.ahead = at, ahead

    @property
    def metadata(self) -> dict[str, str]:
        return {"table_step": str(self.at), "max_step_ahead": str(self.ahead)}


class SessionExpired(Refused):
    """The shard no longer knows whether it has applied this push, so it does not apply it."""

    reason = "SESSION_EXPIRED"


class VersionInFuture(Refused):
    """The request names a version that the shard has not reached."""

    reason = "VERSION_IN_FUTURE"


class NoLog(Refused):
    """The shard has no data directory, and therefore no version log."""

    reason = "NO_LOG"

    def __init__(self) -> None:
        super().__init__("this shard has no version log: start the server with data_dir")


class LogDiverged(Refused):
    """The token or version of a request does not belong to the history of this shard's log."""

    reason = "LOG_DIVERGED"


class VersionCompacted(Refused):
    """The shard no longer has all changes since the token of the request.

    log_horizon        the log contains all changes newer than this version
    tombstone_horizon  the shard remembers all deletes newer than this version
    """

    reason = "VERSION_COMPACTED"

    def __init__(self, version: int, log_horizon: int, tombstone_horizon: int) -> None:
        super().__init__(
            f"the shard no longer has all changes newer than version {version}: its log has"
            f" changes newer than {log_horizon}, and it remembers deletes newer than"
            f" {tombstone_horizon}; subscribe again with a snapshot"
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
    """The setting checkpoint_url is not set, so the server has no checkpoints."""

    reason = "NO_CHECKPOINT_URL"

    def __init__(self) -> None:
        super().__init__("the server was started without checkpoint_url: set it to use checkpoints")


class CheckpointExists(Refused):
    """A checkpoint of this name exists already."""

    reason = "CHECKPOINT_EXISTS"

    def __init__(self, name: str) -> None:
        super().__init__(f"checkpoint {name!r} exists already: choose a different name")


class CheckpointUnfit(Refused):
    """The checkpoint cannot be used for this operation; the message contains the reason."""

    reason = "CHECKPOINT_UNFIT"


class BarrierMissed(Refused):
    """The barrier that a checkpoint waits for came too early, or not in time."""

    reason = "BARRIER_MISSED"


class CheckpointBusy(Refused):
    """Another operation on checkpoints is running on this shard; the message names it."""

    reason = "CHECKPOINT_BUSY"


class NotEmpty(Refused):
    """The operation would overwrite existing rows."""

    reason = "NOT_EMPTY"


class RestoreConflict(Refused):
    """Another restore is in progress, or the restore is not ready for this step."""

    reason = "RESTORE_CONFLICT"


class TableLoading(Refused):
    """The table is being filled from a checkpoint."""

    reason = "TABLE_LOADING"
    retry_after = 1.0

    def __init__(self, table: str) -> None:
        super().__init__(f"table {table!r} is being filled from a checkpoint; try again later")


class CheckpointNeeded(Refused):
    """The checkpoint to delete is the parent of a checkpoint that would remain."""

    reason = "CHECKPOINT_NEEDED"


class UnknownCall(Refused):
    """No call with this id waits for a Continue request."""

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


class NotAShard(Refused):
    """The server's number is not below the number of shards, so it stores no rows."""

    reason = "NOT_A_SHARD"

    def __init__(self, shard: int, shards: int) -> None:
        super().__init__(
            f"this server has number {shard}, but the cluster has {shards} shards, numbered from 0"
            f" to {shards - 1}: it stores no rows and answers no requests; start only {shards}"
            f" servers (kubectl scale --replicas={shards}). To get more shards: take a checkpoint"
            " (psctl checkpoint), start a new cluster with a larger setting shards and new data"
            " directories, then restore the checkpoint there (psctl restore)"
        )
        self._numbers = {"shard": str(shard), "shards": str(shards)}

    @property
    def metadata(self) -> dict[str, str]:
        return self._numbers


class OtherShard(Refused):
    """The call was meant for a different shard or cluster.

    here      identity of this server: "shard 1 of 3 of cluster 'prod'"
    expected  the same of the server that the client expected
    """

    reason = "OTHER_SHARD"
    retry_after = 0.5

    def __init__(self, here: str, expected: str) -> None:
        super().__init__(
            f"this server is {here}, but the client expected {expected}: the address now leads to"
            " a different server"
        )


class Draining(Refused):
    """The server is stopping, or the client that waits for the result has gone away."""

    reason = "DRAINING"
    retry_after = 1.0


class DeadlinePassed(Refused):
    """The deadline passed before the request began; nothing was applied."""

    reason = "DEADLINE_EXCEEDED"
