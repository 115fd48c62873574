"""What gRPC may hold before the service sees it: options of the transport.

The bytes that this amounts to are in memory.py.
"""

from __future__ import annotations

from psserver.config import ServerConfig

SLACK = 64 << 10  # a message that is larger than the limit by this is read, to name the reason
WINDOW = 4 << 20  # bytes that a peer may send on a stream before the service reads
PENDING = 1 << 14  # calls that came and were not begun; gRPC refuses more with a bare CANCELLED


def options(config: ServerConfig) -> list[tuple[str, int]]:
    """Return the options of the gRPC server that limit what it holds."""
    return [
        ("grpc.max_receive_message_length", config.max_message_bytes + SLACK),
        ("grpc.max_send_message_length", -1),
        # by default a window grows with the speed of the link, up to 256 MiB on each stream
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", WINDOW),
        ("grpc.server.max_pending_requests", PENDING),
        ("grpc.server.max_pending_requests_hard_limit", PENDING),
        ("grpc.max_allowed_incoming_connections", config.max_connections),
    ]
