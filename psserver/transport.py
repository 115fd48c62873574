"""gRPC options that limit the memory of messages that the service has not seen yet.

memory.py computes how much memory that is.
"""

from __future__ import annotations

from psserver.config import ServerConfig

SLACK = 64 << 10  # bytes over the limit that are still read, to answer MESSAGE_TOO_LARGE
WINDOW = 4 << 20  # bytes that a peer may send on a stream before the service reads it
PENDING = 1 << 14  # calls that wait to begin; gRPC answers further ones CANCELLED without details


def options(config: ServerConfig) -> list[tuple[str, int]]:
    """Return the options of the gRPC server."""
    return [
        ("grpc.max_receive_message_length", config.max_message_bytes + SLACK),
        ("grpc.max_send_message_length", -1),
        # with bdp_probe, windows grow with the speed of the link, up to 256 MiB per stream
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", WINDOW),
        ("grpc.server.max_pending_requests", PENDING),
        ("grpc.server.max_pending_requests_hard_limit", PENDING),
        ("grpc.max_allowed_incoming_connections", config.max_connections),
    ]
