"""What can go wrong for a trainer.

* PsError
  - InvalidArgument    an argument breaks a rule; nothing was applied
  - TableNotFound      no such table; a shard that lost its memory says so too
  - SchemaMismatch     the table exists with another schema, or was created anew with another one
  - WrongShard         a key went to a shard that does not own it, by the newest shard map too
  - SessionExpired     a repeated push whose first attempt can no longer be told; it may have taken
                       effect or not; or a client id whose incarnation did not grow
  - ResourceExhausted  a limit of the server, or its memory
  - DeadlineExceeded   no answer in time; a push may have taken effect
  - Unavailable        no server reached in time; a push may have taken effect
  - VersionInFuture    the shard has not reached the version
  - VersionCompacted   the shard no longer has the changes behind a token; take a snapshot
  - LogDiverged        a token of another history of the shard; take a snapshot
  - NoLog              the shard keeps no log
  - CheckpointNotFound  no such checkpoint
  - CheckpointExists   there is a checkpoint of that name
  - CheckpointUnfit    the checkpoint, or the server's configuration, cannot serve this purpose
  - CheckpointNeeded   another checkpoint cannot be read without this one
  - NotEmpty           rows would be lost
  - RestoreConflict    another restore, or another step of it, is due
  - DataLoss           stored bytes are damaged; never retried
  - ServerFailure      anything else that a server answers
"""

from __future__ import annotations

from psproto import ps_pb2 as pb


class PsError(Exception):
    """Root of everything that psclient raises on purpose."""

    reason = ""  # as the server named it
    retry_after: float | None = None  # seconds, where the server asks to try again


class InvalidArgument(PsError, ValueError):
    """An argument breaks a rule; nothing was applied."""


class TableNotFound(PsError, LookupError):
    """No such table."""


class SchemaMismatch(PsError):
    """The table exists with another schema."""


class WrongShard(PsError):
    """A key went to a shard that does not own it."""


class SessionExpired(PsError):
    """A repeated push whose first attempt can no longer be told."""


class ResourceExhausted(PsError):
    """A limit of the server, or its memory."""


class DeadlineExceeded(PsError, TimeoutError):
    """No answer in time; a push may have taken effect."""


class Unavailable(PsError, ConnectionError):
    """No server reached in time; a push may have taken effect."""


class VersionInFuture(PsError):
    """The shard has not reached the version."""


class VersionCompacted(PsError):
    """The shard no longer has the changes behind a token; take a snapshot."""


class LogDiverged(PsError):
    """A token of another history of the shard; take a snapshot."""


class NoLog(PsError):
    """The shard keeps no log."""


class CheckpointNotFound(PsError, LookupError):
    """No such checkpoint."""


class CheckpointExists(PsError):
    """There is a checkpoint of that name."""


class CheckpointUnfit(PsError):
    """The checkpoint, or the server's configuration, cannot serve this purpose."""


class CheckpointNeeded(PsError):
    """Another checkpoint cannot be read without this one."""


class NotEmpty(PsError):
    """Rows would be lost."""


class RestoreConflict(PsError):
    """Another restore, or another step of it, is due."""


class DataLoss(PsError):
    """Stored bytes are damaged; never retried."""


class ServerFailure(PsError):
    """Anything else that a server answers."""


REASONS: dict[str, type[PsError]] = {
    "TABLE_NOT_FOUND": TableNotFound,
    "SCHEMA_MISMATCH": SchemaMismatch,
    "DIM_MISMATCH": SchemaMismatch,  # gradients had the dim that this client was told before
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
    1: Unavailable,  # a server that ends, or starts, cancels what it does not answer
    3: InvalidArgument,
    4: DeadlineExceeded,
    8: ResourceExhausted,
    14: Unavailable,
    15: DataLoss,
}


def error_of(status: pb.Status, where: str) -> PsError:
    """The exception for a status; ``where`` names the server."""
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
