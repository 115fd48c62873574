"""List the client connections of this process, with the numbers of bytes that the kernel counted.

A peer is the client at the other end of a connection. Its name is the one that gRPC uses.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator

_TCP_INFO_BYTES = 256
_RECEIVED = struct.Struct("=QQ")  # bytes that the peer acknowledged, bytes received
_AT = 120  # offset of these two numbers in struct tcp_info of linux/tcp.h


def sockets(port: int) -> Iterator[tuple[str, socket.socket]]:
    """Yield (name of the peer, socket) for each open connection to ``port`` of this process.

    The name is that of gRPC's ``context.peer()``. A socket belongs to gRPC and must not be closed.
    It is valid only until the next item.
    """
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            connection = socket.socket(fileno=int(name))
        except OSError:  # closed meanwhile
            continue
        try:
            peer = _peer(connection, port)
            if peer is not None:
                yield peer, connection
        finally:
            connection.detach()


def _peer(connection: socket.socket, port: int) -> str | None:
    """Return the name of the peer, as gRPC writes it; None if this is no connection to ``port``."""
    if connection.family not in (socket.AF_INET, socket.AF_INET6):
        return None
    try:
        if connection.getsockname()[1] != port:
            return None
        return peer_name(connection.getpeername())
    except OSError:  # a listening socket, or closed meanwhile
        return None


def counts(connection: socket.socket) -> tuple[int, int] | None:
    """Return (bytes received, bytes acknowledged by the peer) since a connection was opened.

    Returns None if the kernel has no counts.
    """
    try:
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
        sent, received = _RECEIVED.unpack_from(info, _AT)
    except (OSError, struct.error):  # closed meanwhile, not TCP, or an old kernel
        return None
    return received, sent


def peer_name(address: tuple[str, int] | tuple[str, int, int, int]) -> str:
    """Return the name that gRPC's ``context.peer()`` gives to an address (host, port, ...)."""
    host, port = address[:2]
    mapped = host.removeprefix("::ffff:")
    if "." in mapped:
        return f"ipv4:{mapped}:{port}"
    return f"ipv6:%5B{host}%5D:{port}"
