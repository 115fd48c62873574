"""What gRPC may hold before the service sees it: the transport's options, and bytes in all."""

from __future__ import annotations

from psserver.config import ServerConfig

SLACK = 64 << 10  # a message that is larger than the limit by this is read, to name the reason
WINDOW = 4 << 20  # bytes that a peer may send on a stream before the service reads
PENDING = 1 << 14  # calls that came and were not begun; gRPC refuses more with a bare CANCELLED
CALL_BYTES = 16 << 10  # about, of a call in progress: tasks, buffers, headers
PROCESS = 256 << 20  # code, threads, caches, heaps; measured: 150 MiB


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


def unfinished_bytes(config: ServerConfig) -> int:
    """Return the bytes of unfinished messages beyond which connections are closed."""
    return max(config.max_inflight_bytes, 64 << 20)


def beyond_tables(config: ServerConfig) -> int:
    """Return the bytes of memory that a server needs at most beside its tables and its log.

    Requests and replies in flight, unfinished messages that gRPC holds, one message twice while it
    is handed over, the calls in progress, and the process itself.
    """
    messages = config.max_inflight_bytes + unfinished_bytes(config) + config.max_message_bytes
    return messages + config.max_calls * CALL_BYTES + PROCESS
