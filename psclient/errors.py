"""Exceptions that psclient raises.

* PsError
  - InvalidArgument    an argument breaks a rule. Nothing was applied
  - TableNotFound      the table does not exist, on at least one shard
  - SchemaMismatch     the schema of the table is not the expected one, or differs between shards
  - Unauthenticated    the call had no valid credential: set token_file or a client certificate
  - PermissionDenied   the server's policy does not allow this to the caller
  - WrongShard         a shard refused a key, even after the client fetched the newest shard map
  - SessionExpired     the server no longer knows whether it applied an earlier attempt of a push
  - ResourceExhausted  the server is over one of its limits, or out of memory or disk space
  - DeadlineExceeded   no answer arrived in time. A push may have taken effect
  - Unavailable        the server could not be reached in time. A push may have taken effect
  - TlsError           no TLS connection to the server is possible, and a retry does not help: a
                       certificate is wrong, or only one side uses TLS
  - VersionInFuture    the shard has not reached the requested version
  - VersionCompacted   the shard has deleted changes that a subscriber still needs: subscribe again
                       with start="snapshot"
  - LogDiverged        the shard was restored to an older state; the subscription's token or the
                       version belongs to changes that were undone: subscribe again with
                       start="snapshot"
  - NoLog              the shard has no data directory, so it keeps no version log
  - CheckpointNotFound the checkpoint does not exist
  - CheckpointExists   a checkpoint of that name exists already
  - CheckpointUnfit    the checkpoint, or the server's configuration, does not allow this operation
  - CheckpointNeeded   another checkpoint builds on this one and cannot be read without it
  - BarrierMissed      the barrier at which a checkpoint was to end came too early or not in time
  - TrainerBehind      a trainer and the servers do not stand at the same training step: choose a
                       policy of Checkpointer.resume
  - NotEmpty           the operation would delete rows
  - RestoreConflict    another restore is in progress, or this restore must first take another step
  - NoLane             lane="require", but the same-host lane to a shard cannot be used
  - DataLoss           stored bytes are damaged. Never retried
  - PushFailed         a push of a Pipeline failed; it may have taken effect on some shards
  - StepsDisagree      ranks of one job push with different training steps
  - RankFailed         another rank of the job failed, or did not answer in time
  - ServerFailure      the server answered with an error that no other class describes
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from psproto import ps_pb2 as pb

Answer = TypeVar("Answer", bound=Message)


class PsError(Exception):
    """Base class of all errors that psclient raises."""

    reason = ""  # code of the error from the server, such as "TABLE_NOT_FOUND"; "": none
    retry_after: float | None = None  # seconds after which the server asks to try again


class StepsDisagree(PsError):
    """Ranks of one torch.distributed job push with different training steps."""


class RankFailed(PsError):
    """Another rank of a torch.distributed job failed, or did not answer in time."""


class InvalidArgument(PsError, ValueError):
    """An argument breaks a rule. Nothing was applied."""


class TableNotFound(PsError, LookupError):
    """The table does not exist, on at least one shard."""


class SchemaMismatch(PsError):
    """The schema of the table is not the expected one, or differs between shards.

    For example, the table was dropped and created anew with a different dim.
    """


class Unauthenticated(PsError):
    """The call had no valid credential: a bearer token or a client certificate. Never retried.

    Nothing was applied, unless the credential was revoked while a stream was in use.
    """


class PermissionDenied(PsError, PermissionError):
    """The server's policy does not allow this to the caller. Never retried.

    The message names the principal, the verb that it lacks, and the table. Nothing was applied,
    unless a right was revoked while a stream was in use.
    """


class WrongShard(PsError):
    """A shard refused a key, even after the client fetched the newest shard map."""


class SessionExpired(PsError):
    """The server no longer knows whether it applied an earlier attempt of a push.

    The push may have taken effect. Either the client repeated it so late that the server has
    forgotten the first attempt, or a client_id was used again without a larger incarnation.
    """


class ResourceExhausted(PsError):
    """The server is over one of its limits, or out of memory or disk space."""


class NoLane(PsError):
    """The client was created with lane="require", but the lane to a shard cannot be used."""


class DeadlineExceeded(PsError, TimeoutError):
    """No answer arrived in time. A push may have taken effect."""


class Unavailable(PsError, ConnectionError):
    """The server could not be reached in time. A push may have taken effect."""


class TlsError(PsError, ConnectionError):
    """No TLS connection to the server is possible; the client does not retry.

    The attribute ``reason`` is one of

    * TLS_SERVER_UNTRUSTED  no CA that the client trusts signed the server's certificate
    * TLS_SERVER_NAME       the server's certificate is for other names
    * TLS_SERVER_EXPIRED    the server's certificate has expired, or is not valid yet
    * TLS_SERVER_PLAINTEXT  the client uses TLS, and the server does not
    * TLS_SERVER_TLS        the server uses TLS, and the client does not
    * TLS_CLIENT_MISSING    the server requires a certificate, and the client has none
    * TLS_CLIENT_REFUSED    the server does not trust the client's certificate
    * TLS_CLIENT_EXPIRED    the client's certificate has expired, or is not valid yet
    * TLS_FILES             the client's own files cannot be used
    * TLS_HANDSHAKE         anything else, for example no common version of TLS
    """


class VersionInFuture(PsError):
    """The shard has not reached the requested version."""


class VersionCompacted(PsError):
    """The shard has deleted changes that a subscriber still needs.

    Subscribe again with start="snapshot", or use when_lost="snapshot".
    """


class LogDiverged(PsError):
    """The shard was restored to an older state, which undid changes.

    The subscription's token, or the requested version, belongs to changes that were undone.
    Subscribe again with start="snapshot", or use when_lost="snapshot".
    """


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


class BarrierMissed(PsError):
    """The barrier at which a checkpoint was to end came too early, or not in time."""


class TrainerBehind(PsError):
    """A trainer and the servers do not stand at the same training step.

    Choose how to go on with the argument ``policy`` of ``Checkpointer.resume``.
    """


class NotEmpty(PsError):
    """The operation would delete rows."""


class RestoreConflict(PsError):
    """Another restore is in progress, or this restore must first take another step."""


class DataLoss(PsError):
    """Stored bytes are damaged. Never retried."""


class ServerFailure(PsError):
    """The server answered with an error that no other class describes."""


class PushFailed(PsError):
    """A push of a Pipeline failed. It may have taken effect on some shards, and not on others.

    step    training step of the push
    tables  names of the tables that it pushed to; ``table`` is the one that the error names, or
            the first one

    ``__cause__`` is the original error.
    """

    def __init__(self, step: int, tables: Sequence[str], why: BaseException) -> None:
        named = [name for name in tables if repr(name) in str(why)]
        self.step, self.tables = step, tuple(tables)
        self.table = (named or tables)[0]
        shown = f"table {self.table!r}" if named or len(tables) == 1 else f"tables {list(tables)}"
        super().__init__(f"the push of step {step} to {shown} failed: {why}")
        self.reason = getattr(why, "reason", "")

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.step, self.tables, self.__cause__ or Exception(str(self)))


REASONS: dict[str, type[PsError]] = {
    "UNAUTHENTICATED": Unauthenticated,
    "PERMISSION_DENIED": PermissionDenied,
    "TABLE_NOT_FOUND": TableNotFound,
    "SCHEMA_MISMATCH": SchemaMismatch,
    "DIM_MISMATCH": SchemaMismatch,  # the client remembered the dim of a table that was recreated
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
    "BARRIER_MISSED": BarrierMissed,
    "NOT_EMPTY": NotEmpty,
    "RESTORE_CONFLICT": RestoreConflict,
}
CODES: dict[int, type[PsError]] = {  # by number of google.rpc.Code, for errors without a reason
    1: Unavailable,  # the server starts or stops, or reached a limit of gRPC
    3: InvalidArgument,
    4: DeadlineExceeded,
    7: PermissionDenied,
    8: ResourceExhausted,
    14: Unavailable,
    15: DataLoss,
    16: Unauthenticated,
}


def error_of(status: pb.Status, where: str) -> PsError:
    """Convert the error status of a reply to a PsError, with its reason and retry_after.

    where  name of the server, which the error message starts with

    Details that are not valid messages are ignored: then the status code decides the class.
    """
    info, delay = pb.ErrorInfo(), None
    for detail in status.details:
        if detail.type_url.endswith("/google.rpc.ErrorInfo"):
            info = decoded(pb.ErrorInfo, detail.value) or info
        elif detail.type_url.endswith("/google.rpc.RetryInfo"):
            retry = decoded(pb.RetryInfo, detail.value)
            if retry is not None:
                delay = max(retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9, 0.0)
    kind = REASONS.get(info.reason) or CODES.get(status.code, ServerFailure)
    error = kind(f"{where}: {status.message}")
    error.reason = info.reason
    error.retry_after = delay
    return error


def decoded(kind: type[Answer], data: bytes) -> Answer | None:
    """Decode a protobuf message of class ``kind``; return None if ``data`` is not one."""
    try:
        message: Answer = kind.FromString(data)
    except DecodeError:
        return None
    return message


def answer_of(kind: type[Answer], data: bytes, where: str) -> Answer:
    """Decode the reply to a call, a protobuf message of class ``kind``.

    where  name of the server, which the error message starts with

    Raises ServerFailure if ``data`` is not such a message.
    """
    answer = decoded(kind, data)
    if answer is None:
        raise ServerFailure(
            f"{where}: its answer is not a valid message {kind.__name__}: it is not a parameter"
            " server, or a proxy has damaged the answer"
        )
    return answer
