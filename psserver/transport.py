"""gRPC options that limit the memory for messages received but not yet read by the service.

memory.py computes this memory.
"""

from __future__ import annotations

from psserver.config import ServerConfig

SLACK = 64 << 10  # bytes by which a message may exceed the limit and still get MESSAGE_TOO_LARGE
WINDOW = 4 << 20  # bytes that a client may send on a stream before the service reads them
PENDING = 1 << 14  # maximum number of calls that wait to begin; gRPC cancels further ones


def options(config: ServerConfig) -> list[tuple[str, int]]:
    """Return the (name, value) options for the gRPC server."""
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
