"""What can go wrong for a trainer.

* PsError
  - InvalidArgument    an argument breaks a rule. Nothing was applied
  - TableNotFound      the table does not exist, on at least one shard
  - SchemaMismatch     the table has another schema, or was created anew with another one
  - WrongShard         a shard refused a key of another shard, by the newest shard map too
  - SessionExpired     a push cannot be checked against earlier attempts, which may have succeeded
  - ResourceExhausted  the server is over one of its limits, or out of memory or disk space
  - DeadlineExceeded   no answer arrived in time. A push may have taken effect
  - Unavailable        the server could not be reached in time. A push may have taken effect
  - VersionInFuture    the shard has not reached the requested version
  - VersionCompacted   the shard no longer has the changes after a token: take a snapshot
  - LogDiverged        a token belongs to another history of the shard: take a snapshot
  - NoLog              the shard has no data directory, so it keeps no version log
  - CheckpointNotFound the checkpoint does not exist
  - CheckpointExists   a checkpoint of that name exists already
  - CheckpointUnfit    the checkpoint, or the server's configuration, does not allow this operation
  - CheckpointNeeded   another checkpoint builds on this one and cannot be read without it
  - NotEmpty           the operation would delete rows
  - RestoreConflict    another restore is in progress, or another step of this one comes first
  - DataLoss           stored bytes are damaged. Never retried
  - ServerFailure      the server answered with any other error
"""

from __future__ import annotations

from psproto import ps_pb2 as pb


class PsError(Exception):
    """Root of all errors that psclient raises."""

    reason = ""  # machine-readable, from the server: "TABLE_NOT_FOUND"
    retry_after: float | None = None  # seconds after which the server asks to try again


class InvalidArgument(PsError, ValueError):
    """An argument breaks a rule. Nothing was applied."""


class TableNotFound(PsError, LookupError):
    """The table does not exist, on at least one shard."""


class SchemaMismatch(PsError):
    """The table exists with another schema, or was created anew with another one."""


class WrongShard(PsError):
    """A shard refused a key that belongs to another shard, by the newest shard map too."""


class SessionExpired(PsError):
    """A push cannot be checked against earlier attempts; it may have taken effect.

    It was sent again so late that the server no longer remembers the first attempt. Or a client id
    was used again with an incarnation that did not grow.
    """


class ResourceExhausted(PsError):
    """The server is over one of its limits, or out of memory or disk space."""


class DeadlineExceeded(PsError, TimeoutError):
    """No answer arrived in time. A push may have taken effect."""


class Unavailable(PsError, ConnectionError):
    """The server could not be reached in time. A push may have taken effect."""


class VersionInFuture(PsError):
    """The shard has not reached the requested version."""


class VersionCompacted(PsError):
    """The shard no longer has the changes after a token: take a snapshot."""


class LogDiverged(PsError):
    """A token belongs to another history of the shard: take a snapshot."""


class NoLog(PsError):
    """The shard has no data directory, so it keeps no version log."""


class CheckpointNotFound(PsError, LookupError):
    """The checkpoint does not exist."""


class CheckpointExists(PsError):
    """A checkpoint of that name exists already."""


class CheckpointUnfit(PsError):
    """The checkpoint, or the server's configuration, does not allow this operation."""


class CheckpointNeeded(PsError):
    """Another checkpoint builds on this one and cannot be read without it."""


class NotEmpty(PsError):
    """The operation would delete rows."""


class RestoreConflict(PsError):
    """Another restore is in progress, or another step of this one comes first."""


class DataLoss(PsError):
    """Stored bytes are damaged. Never retried."""


class ServerFailure(PsError):
    """The server answered with any other error."""


REASONS: dict[str, type[PsError]] = {
    "TABLE_NOT_FOUND": TableNotFound,
    "SCHEMA_MISMATCH": SchemaMismatch,
    "DIM_MISMATCH": SchemaMismatch,  # the client had an old dim of the table
    "WRONG_SHARD": WrongShard,
    "SESSION_EXPIRED": SessionExpired,
    "STEP_TOO_FAR": InvalidArgument,
    "NOT_ALTERABLE": InvalidArgument,
    "VERSION_IN_FUTURE": VersionInFuture,
    "VERSION_COMPACTED": VersionCompacted,
    "LOG_DIVERGED": LogDiverged,
    "NO_LOG": NoLog,
    "CHECKPOINT_NOT_FOUND": CheckpointNotFound,
    "CHECKPOINT_EXISTS": CheckpointExists,
    "CHECKPOINT_UNFIT": CheckpointUnfit,
    "NO_CHECKPOINT_URL": CheckpointUnfit,
    "CHECKPOINT_NEEDED": CheckpointNeeded,
    "NOT_EMPTY": NotEmpty,
    "RESTORE_CONFLICT": RestoreConflict,
}
CODES: dict[int, type[PsError]] = {  # of google.rpc.Code
    1: Unavailable,  # a server that starts or stops, or is over a limit of gRPC
    3: InvalidArgument,
    4: DeadlineExceeded,
    8: ResourceExhausted,
    14: Unavailable,
    15: DataLoss,
}


def error_of(status: pb.Status, where: str) -> PsError:
    """Return the exception for a status. ``where`` names the server."""
    info, delay = pb.ErrorInfo(), None
    for detail in status.details:
        if detail.type_url.endswith("/google.rpc.ErrorInfo"):
            info = pb.ErrorInfo.FromString(detail.value)
        elif detail.type_url.endswith("/google.rpc.RetryInfo"):
            retry = pb.RetryInfo.FromString(detail.value).retry_delay
            delay = retry.seconds + retry.nanos / 1e9
    kind = REASONS.get(info.reason) or CODES.get(status.code, ServerFailure)
    error = kind(f"{where}: {status.message}")
    error.reason = info.reason
    error.retry_after = delay
    return error
