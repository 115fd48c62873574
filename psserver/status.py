"""Convert errors to gRPC statuses. One table maps every error to a code and a reason."""

from __future__ import annotations

import grpc
from google.protobuf.any_pb2 import Any as Detail
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from psproto import codec
from psserver.errors import (
    BadRequest,
    BarrierMissed,
    BudgetExceeded,
    Busy,
    CheckpointBusy,
    CheckpointExists,
    CheckpointNeeded,
    CheckpointUnfit,
    DeadlinePassed,
    Draining,
    LogDiverged,
    NoCheckpointUrl,
    NoLog,
    NotAlterable,
    NotAShard,
    NotEmpty,
    OtherShard,
    Overloaded,
    PermissionDenied,
    Refused,
    RestoreConflict,
    Restoring,
    SessionExpired,
    Starting,
    StepTooFar,
    TableLoading,
    TooLarge,
    Unauthenticated,
    UnknownCall,
    VersionCompacted,
    VersionInFuture,
    WrongShard,
)
from storage.errors import (
    Compacted,
    Corrupt,
    DiskFull,
    LogFailed,
    NoRoom,
    OutOfMemory,
    RowOverflow,
    SchemaMismatch,
    StoreFailed,
    UnknownCheckpoint,
    UnknownFormat,
    UnknownTable,
)

MESSAGE = 1024  # maximum bytes of an error message: it is sent twice, and gRPC limits both to 8 KiB

Code = grpc.StatusCode
CODES: dict[type[Exception], tuple[grpc.StatusCode, str]] = {
    codec.Malformed: (Code.INVALID_ARGUMENT, "MALFORMED_MESSAGE"),
    BadRequest: (Code.INVALID_ARGUMENT, ""),  # an empty reason: the error has its own
    Unauthenticated: (Code.UNAUTHENTICATED, ""),
    PermissionDenied: (Code.PERMISSION_DENIED, ""),
    BudgetExceeded: (Code.RESOURCE_EXHAUSTED, ""),
    UnknownTable: (Code.NOT_FOUND, "TABLE_NOT_FOUND"),
    SchemaMismatch: (Code.FAILED_PRECONDITION, "SCHEMA_MISMATCH"),
    WrongShard: (Code.FAILED_PRECONDITION, ""),
    SessionExpired: (Code.FAILED_PRECONDITION, ""),
    NoLog: (Code.FAILED_PRECONDITION, ""),
    LogDiverged: (Code.FAILED_PRECONDITION, ""),
    UnknownCheckpoint: (Code.NOT_FOUND, "CHECKPOINT_NOT_FOUND"),
    CheckpointExists: (Code.ALREADY_EXISTS, ""),
    NoCheckpointUrl: (Code.FAILED_PRECONDITION, ""),
    CheckpointUnfit: (Code.FAILED_PRECONDITION, ""),
    BarrierMissed: (Code.FAILED_PRECONDITION, ""),
    NotEmpty: (Code.FAILED_PRECONDITION, ""),
    RestoreConflict: (Code.FAILED_PRECONDITION, ""),
    NotAShard: (Code.FAILED_PRECONDITION, ""),
    NotAlterable: (Code.FAILED_PRECONDITION, ""),
    CheckpointNeeded: (Code.FAILED_PRECONDITION, ""),
    UnknownCall: (Code.NOT_FOUND, ""),
    StepTooFar: (Code.OUT_OF_RANGE, ""),
    VersionInFuture: (Code.OUT_OF_RANGE, ""),
    VersionCompacted: (Code.OUT_OF_RANGE, ""),
    Compacted: (Code.OUT_OF_RANGE, "VERSION_COMPACTED"),
    TooLarge: (Code.RESOURCE_EXHAUSTED, ""),
    RowOverflow: (Code.INVALID_ARGUMENT, "ROW_OVERFLOW"),
    OutOfMemory: (Code.RESOURCE_EXHAUSTED, "OUT_OF_MEMORY"),
    NoRoom: (Code.RESOURCE_EXHAUSTED, "OUT_OF_MEMORY"),
    DiskFull: (Code.RESOURCE_EXHAUSTED, "DISK_FULL"),
    Overloaded: (Code.RESOURCE_EXHAUSTED, ""),
    Busy: (Code.RESOURCE_EXHAUSTED, ""),
    CheckpointBusy: (Code.RESOURCE_EXHAUSTED, ""),
    DeadlinePassed: (Code.DEADLINE_EXCEEDED, ""),
    Corrupt: (Code.DATA_LOSS, "DATA_LOSS"),
    UnknownFormat: (Code.DATA_LOSS, "DATA_LOSS"),
    Starting: (Code.UNAVAILABLE, ""),
    OtherShard: (Code.UNAVAILABLE, ""),
    Draining: (Code.UNAVAILABLE, ""),
    Restoring: (Code.UNAVAILABLE, ""),
    TableLoading: (Code.UNAVAILABLE, ""),
    StoreFailed: (Code.UNAVAILABLE, "STORE_FAILED"),
    LogFailed: (Code.UNAVAILABLE, "DRAINING"),  # the process is about to end
}
RETRY_AFTER: dict[type[Exception], float] = {DiskFull: 1.0, LogFailed: 1.0}  # seconds


def status_of(error: Exception) -> Status:
    """Return the google.rpc.Status for an exception: code, message, ErrorInfo and, if a retry can
    succeed, RetryInfo.

    An exception that is not listed in CODES gets code INTERNAL, and its message only names its
    type.
    """
    code, reason = next(
        (found for kind in type(error).__mro__ if (found := CODES.get(kind))),
        (Code.INTERNAL, "INTERNAL"),
    )
    message = str(error) if reason != "INTERNAL" else f"internal error: {type(error).__name__}"
    if len(text := message.encode(errors="replace")) > MESSAGE:
        message = text[: MESSAGE - 3].decode(errors="ignore") + "..."
    info = ErrorInfo(reason=reason, domain="ps.v1")
    status = Status(code=code.value[0], message=message)
    if isinstance(error, Refused):
        info.reason = reason or error.reason
        info.metadata.update(error.metadata)
    status.details.append(_detail(info))
    again = error.retry_after if isinstance(error, Refused) else RETRY_AFTER.get(type(error))
    if again is not None:
        delay = Duration(nanos=round(again % 1 * 1e9), seconds=int(again))
        status.details.append(_detail(RetryInfo(retry_delay=delay)))
    return status


def _detail(message: Message) -> Detail:
    """Pack a message into a protobuf Any."""
    detail = Detail()
    detail.Pack(message)
    return detail


def code_of(status: Status) -> grpc.StatusCode:
    """Return the code of a status as a grpc.StatusCode."""
    return next(code for code in Code if code.value[0] == status.code)


def reason_of(status: Status) -> str:
    """Return the ErrorInfo reason of a status made by ``status_of``."""
    return str(ErrorInfo.FromString(status.details[0].value).reason)


def _forget_traceback(error: BaseException) -> None:
    """Remove the tracebacks of an error and of the errors that led to it."""
    todo, seen = [error], set[int]()
    while todo:
        each = todo.pop()
        if id(each) not in seen:
            seen.add(id(each))
            each.__traceback__ = None
            todo += [other for other in (each.__cause__, each.__context__) if other is not None]


async def abort(context: grpc.aio.ServicerContext[bytes, bytes], error: Exception) -> None:
    """End a gRPC call with the status for ``error``. Always raises gRPC's AbortError.

    gRPC's objects for a failed call refer to each other, so they stay in memory until Python's next
    garbage collection, and with them the local variables of all functions in tracebacks. So this
    function removes the traceback of ``error``. The caller must delete its variables that refer to
    the request.
    """
    _forget_traceback(error)
    status = status_of(error)
    context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
    await context.abort(code_of(status), status.message)
