"""How client and server notice a lost peer on a quiet connection: the gRPC options of both sides.

A client pings each server on a connection without other traffic, and gives the connection up when a
ping stays unanswered. A server closes a connection that pings more often than it allows (GOAWAY
"too_many_pings"), so both sides take their numbers from here. A server pings too, and so drops the
connections of clients whose machine is gone.

gRPC core pings once a second at most. Its HTTP/2 transport has a ping timeout of its own, 60 s,
which hides a shorter ``keepalive_timeout_ms``; both are set.
"""

from __future__ import annotations

PING_SECONDS = 10.0  # between two pings of a client on a quiet connection
ANSWER_SECONDS = 5.0  # for the answer to a ping; then the connection counts as lost
LEAST_SECONDS = 5.0  # between two pings that a server allows; below PING_SECONDS
SERVER_PING_SECONDS = 60.0  # between two pings of a server
SERVER_ANSWER_SECONDS = 20.0  # for a client's answer: a trainer may be busy

Options = tuple[tuple[str, int], ...]


def client_options(scale: float = 1.0) -> Options:
    """Return the options for a client's channel; a test shortens all times by ``scale``."""
    return (
        ("grpc.keepalive_time_ms", _ms(PING_SECONDS, scale)),
        ("grpc.keepalive_timeout_ms", _ms(ANSWER_SECONDS, scale)),
        ("grpc.http2.ping_timeout_ms", _ms(ANSWER_SECONDS, scale)),
        ("grpc.keepalive_permit_without_calls", 0),
        ("grpc.http2.max_pings_without_data", 0),  # no limit: the stream may be quiet for hours
    )


def server_options(scale: float = 1.0) -> Options:
    """Return the options for a server that suits ``client_options(scale)``."""
    return (
        ("grpc.keepalive_time_ms", _ms(SERVER_PING_SECONDS, scale)),
        ("grpc.keepalive_timeout_ms", _ms(SERVER_ANSWER_SECONDS, scale)),
        ("grpc.http2.ping_timeout_ms", _ms(SERVER_ANSWER_SECONDS, scale)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", _ms(LEAST_SECONDS, scale)),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", _ms(LEAST_SECONDS, scale)),
        ("grpc.http2.max_pings_without_data", 0),
    )


def _ms(seconds: float, scale: float) -> int:
    return max(round(1000 * seconds * scale), 1)
