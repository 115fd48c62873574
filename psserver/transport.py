"""Set the gRPC options that limit what clients can occupy: connections, and gRPC's own buffers.

The buffers have messages that gRPC has received, but not yet passed to the service. memory.py
computes the size of this memory.
"""

from __future__ import annotations

from psserver.config import ServerConfig

SLACK = 64 << 10  # the service, not gRPC, refuses messages that exceed the limit by at most this
WINDOW = 4 << 20  # bytes that a client may send on a stream before the service reads them
STREAMS = 128  # calls in progress on one connection; a client's gRPC lets further ones wait
HANDSHAKE_SECONDS = 10.0  # maximum time for a new connection to begin to speak HTTP/2
PENDING = 1 << 14  # maximum number of calls that wait to begin; gRPC cancels further ones


def options(config: ServerConfig) -> list[tuple[str, int]]:
    """Return the options for the gRPC server, as pairs (name, value)."""
    return [
        ("grpc.max_receive_message_length", config.max_message_bytes + SLACK),
        ("grpc.max_send_message_length", -1),
        # with bdp_probe, windows grow with the speed of the link, up to 256 MiB per stream
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", WINDOW),
        ("grpc.max_concurrent_streams", STREAMS),
        # silent connections count to max_connections
        ("grpc.server_handshake_timeout_ms", round(1000 * HANDSHAKE_SECONDS)),
        # otherwise gRPC ends calls that a client began before it knew the limit
        ("grpc.http.overload_protection", 0),
        ("grpc.server.max_pending_requests", PENDING),
        ("grpc.server.max_pending_requests_hard_limit", PENDING),
        ("grpc.max_allowed_incoming_connections", config.max_connections),
    ]
