"""gRPC options with which client and server notice that a quiet connection is broken.

A client pings its server on a connection without other traffic, and closes the connection if a ping
is not answered. The server also pings, and so closes connections of machines that are gone. A
server refuses a client that pings more often than it allows (GOAWAY "too_many_pings"), so the
options of both sides are defined together here.

gRPC core pings at most once per second. Its HTTP/2 transport has a second ping timeout of 60 s,
which overrides a shorter ``keepalive_timeout_ms``. Therefore both timeouts are set.
"""

from __future__ import annotations

PING_SECONDS = 10.0  # time between two pings of a client on a quiet connection
ANSWER_SECONDS = 5.0  # a client closes the connection if a ping is not answered within this time
LEAST_SECONDS = 5.0  # shortest time between pings that a server accepts; less than PING_SECONDS
SERVER_PING_SECONDS = 60.0  # time between two pings of a server
SERVER_ANSWER_SECONDS = 20.0  # like ANSWER_SECONDS, for a server; longer, as trainers can be busy

Options = tuple[tuple[str, int], ...]


def client_options(scale: float = 1.0) -> Options:
    """Return the gRPC options of a client's channel.

    scale  factor for all times, for tests
    """
    return (
        ("grpc.keepalive_time_ms", _ms(PING_SECONDS, scale)),
        ("grpc.keepalive_timeout_ms", _ms(ANSWER_SECONDS, scale)),
        ("grpc.http2.ping_timeout_ms", _ms(ANSWER_SECONDS, scale)),
        ("grpc.keepalive_permit_without_calls", 0),
        ("grpc.http2.max_pings_without_data", 0),  # no limit: the stream may be quiet for hours
    )


def server_options(scale: float = 1.0) -> Options:
    """Return the gRPC options of a server whose clients use ``client_options(scale)``.

    scale  factor for all times, for tests
    """
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
    """Return ``scale * seconds`` in whole milliseconds, at least 1."""
    return max(round(1000 * seconds * scale), 1)
