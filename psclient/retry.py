"""Calls that failed: what went wrong, and when to try again."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import grpc

from psclient.errors import PsError, Unavailable, error_of
from psproto import ps_pb2 as pb

FIRST_PAUSE = 0.02  # seconds before the second attempt to reach a server; doubles
LONGEST_PAUSE = 1.0
RETRYABLE = (  # codes of a broken stream after which a new one is opened
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
)


def backoff(attempts: int) -> float:
    """Return the seconds to wait after so many attempts to reach a server."""
    return min(FIRST_PAUSE * 2.0 ** min(attempts, 8), LONGEST_PAUSE)


def pause_after(error: PsError, attempts: int) -> float | None:
    """Return the seconds to wait before another attempt; None: it would not help."""
    if error.retry_after is not None:
        return error.retry_after
    return backoff(attempts) if isinstance(error, Unavailable) else None


def retry(attempt: Callable[[float], Any], where: str, deadline: float) -> Any:
    """Call ``attempt(seconds left)`` until it succeeds, fails for good, or time is over."""
    attempts = 0
    while True:
        left = deadline - time.monotonic()
        try:
            return attempt(max(left, 0.001))
        except grpc.RpcError as error:
            failure = rpc_error(error, where)
        pause = pause_after(failure, attempts)
        if pause is None or time.monotonic() + pause >= deadline:
            raise failure
        attempts += 1
        time.sleep(pause)


def rpc_error(error: grpc.RpcError, where: str) -> PsError:
    """Return the exception for a failed unary call."""
    trailers = dict(error.trailing_metadata() or ())
    status = pb.Status(code=error.code().value[0], message=error.details() or "")
    details = trailers.get("grpc-status-details-bin")
    if details:
        status = pb.Status.FromString(details)
    return error_of(status, where)
