"""Convert errors of gRPC calls to PsErrors, and repeat failed calls after pauses."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import grpc

from psclient.channel import Channel
from psclient.errors import PsError, Unavailable, decoded, error_of
from psproto import ps_pb2 as pb

FIRST_PAUSE = 0.02  # seconds to pause after the first failed attempt; doubles with each attempt
LONGEST_PAUSE = 1.0  # seconds
RETRYABLE = (  # status codes of a broken stream after which the client opens a new one
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
)


def backoff(attempts: int) -> float:
    """Return the seconds to pause after ``attempts`` failed attempts to reach a server."""
    return min(FIRST_PAUSE * 2.0 ** min(attempts, 8), LONGEST_PAUSE)


def asked_pause(error: PsError) -> float | None:
    """Return the seconds to pause that the server asked for; None if it did not ask.

    It is at least FIRST_PAUSE, so that a server that asks for 0 is not called without end.
    """
    return None if error.retry_after is None else max(error.retry_after, FIRST_PAUSE)


def pause_after(error: PsError, attempts: int) -> float | None:
    """Return the seconds to pause before the next attempt, or None if ``error`` is final.

    attempts  number of failed attempts before the one that failed with ``error``
    """
    if (pause := asked_pause(error)) is not None:
        return pause
    return backoff(attempts) if isinstance(error, Unavailable) else None


def retry(attempt: Callable[[float], Any], channel: Channel, where: str, deadline: float) -> Any:
    """Call ``attempt`` until it succeeds or fails for good; return its result.

    attempt   called as attempt(seconds until the deadline); raises grpc.RpcError if it fails
    channel   connection of the attempts
    where     name of the server, for errors
    deadline  monotonic seconds

    Raises a PsError if the error of an attempt is final, or if the next attempt would start after
    the deadline.
    """
    attempts = 0
    while True:
        left = deadline - time.monotonic()
        try:
            return attempt(max(left, 0.001))
        except grpc.RpcError as error:
            failure = rpc_error(error, channel, where)
        pause = pause_after(failure, attempts)
        if pause is None or time.monotonic() + pause >= deadline:
            raise failure
        attempts += 1
        time.sleep(pause)


def rpc_error(error: grpc.RpcError, channel: Channel, where: str) -> PsError:
    """Convert the error of a failed gRPC call to a PsError.

    channel  connection of the call. If it was not established, this function may try a TLS
             handshake, for seconds, to find out whether TLS is the reason
    where    name of the server, which the error message starts with

    If the details that the server sent are not a valid message, those of gRPC are used.
    """
    if (found := channel.explain(error)) is not None:
        return found.error(where)
    trailers = dict(error.trailing_metadata() or ())
    status = pb.Status(code=error.code().value[0], message=error.details() or "")
    details = trailers.get("grpc-status-details-bin")
    if details:
        status = decoded(pb.Status, details) or status
    return error_of(status, where)
