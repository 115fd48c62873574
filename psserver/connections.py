"""Close connections whose peers send large messages without finishing them.

gRPC buffers a message until it is complete, and provides no limit for all connections together. So
peers could fill the memory with incomplete messages. The kernel counts the bytes that a connection
received, and the service counts the messages that arrived. The difference is the size of incomplete
messages. A thread computes it several times per second, and closes

* a connection that has more than LARGE bytes of incomplete messages for longer than ``seconds``
* the connections with the oldest incomplete messages, if all together exceed ``most`` bytes

The client of a closed connection gets UNAVAILABLE and retries.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import structlog

LARGE = 8 << 20  # bytes; above gRPC's window, which fills if the service does not read
LOOK_SECONDS = 0.25  # between two checks
SHARE = 0.05  # of one core: the most that the checks may use
_TCP_INFO_BYTES = 256
_RECEIVED = struct.Struct("=QQ")  # bytes that the peer acknowledged, bytes received
_AT = 120  # of these two in struct tcp_info of linux/tcp.h

log = structlog.get_logger()


@dataclass(slots=True)
class Connection:
    """The counts of one connection at the last check."""

    since: float  # monotonic seconds since which it has more than LARGE unfinished bytes
    received: int = 0  # bytes
    sent: int = 0
    arrived: int = 0  # bytes of complete messages and their frames
    unfinished: int = 0  # bytes of incomplete messages

    def update(self, received: int, sent: int, arrived: int) -> None:
        """Store new counts.

        Other frames are mostly window updates: less than one byte per 512 bytes sent.
        """
        change = received - self.received - (arrived - self.arrived)
        frames = (sent - self.sent) // 512 + 1024
        self.unfinished = max(self.unfinished + change - frames, 0)
        self.received, self.sent, self.arrived = received, sent, arrived


class Connections:
    """The connections of the server on ``port``.

    most     limit for the incomplete messages of all connections, in bytes
    seconds  time for a large message to arrive
    """

    def __init__(
        self, port: int, most: int, seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.unfinished = 0  # bytes of incomplete messages at the last check
        self.closed = 0  # connections closed since the start
        self._port = port
        self._most = most
        self._seconds = seconds
        self._clock = clock
        self._arrived: dict[str, int] = {}  # by peer, as gRPC writes it
        self._known: dict[str, Connection] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="connections", daemon=True)

    def open(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """Stop the thread."""
        self._stop.set()
        self._thread.join()

    def arrived(self, peer: str, size: int) -> None:
        """Count a complete message of ``size`` bytes. Called on the event loop."""
        # gRPC and HTTP/2 add 14 bytes to each 16 KiB, and headers
        self._arrived[peer] = self._arrived.get(peer, 0) + size + (size >> 6) + 256

    def look(self) -> None:
        """Check all connections once."""
        now, seen = self._clock(), {}
        known = list(self._arrived)  # before the sockets are listed: others may be new ones
        for peer, connection in sockets(self._port):
            arrived = self._arrived.get(peer, 0)  # first, so that it is never ahead of the kernel
            found = counts(connection)
            if found is None:
                continue
            entry = self._known.get(peer) or Connection(now)
            entry.update(*found, arrived)
            if entry.unfinished <= LARGE:
                entry.since = now
            if now - entry.since > self._seconds:
                self._shut(connection, peer, entry, "not finished in time")
            seen[peer] = entry
        self._known = seen
        for peer in known:
            if peer not in seen:
                self._arrived.pop(peer, None)
        total = sum(each.unfinished for each in seen.values())
        if total > self._most:
            self._shed(total - self._most)
        self.unfinished = sum(each.unfinished for each in seen.values())

    def _shed(self, excess: int) -> None:
        """Close the connections with the oldest incomplete messages, until ``excess`` is gone."""
        order = sorted(self._known, key=lambda peer: self._known[peer].since)
        chosen = set()
        for peer in order:
            if excess > 0 and self._known[peer].unfinished:
                excess -= self._known[peer].unfinished
                chosen.add(peer)
        for peer, connection in sockets(self._port):
            if peer in chosen:
                self._shut(connection, peer, self._known[peer], "too many bytes in all")

    def _shut(self, connection: socket.socket, peer: str, entry: Connection, why: str) -> None:
        log.warning("connection closed", peer=peer, unfinished_bytes=entry.unfinished, why=why)
        entry.unfinished = 0
        self.closed += 1
        with suppress(OSError):  # gone by itself
            connection.shutdown(socket.SHUT_RDWR)

    def _run(self) -> None:
        pause = LOOK_SECONDS
        while not self._stop.wait(pause):
            start = time.thread_time()
            self.look()
            pause = max(LOOK_SECONDS, (time.thread_time() - start) / SHARE)


def sockets(port: int) -> Iterator[tuple[str, socket.socket]]:
    """Yield the connections of clients to ``port`` of this process: name of the peer, and socket.

    The socket belongs to gRPC and must not be closed.
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
    """Return the name of the peer; None if this is not a connection to ``port``."""
    if connection.family not in (socket.AF_INET, socket.AF_INET6):
        return None
    try:
        if connection.getsockname()[1] != port:
            return None
        return peer_name(connection.getpeername())
    except OSError:  # a listening socket, or closed meanwhile
        return None


def counts(connection: socket.socket) -> tuple[int, int] | None:
    """Return bytes received and bytes that the peer acknowledged; None if the kernel has none."""
    try:
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
        sent, received = _RECEIVED.unpack_from(info, _AT)
    except (OSError, struct.error):  # closed meanwhile, not TCP, or an old kernel
        return None
    return received, sent


def peer_name(address: tuple[str, int] | tuple[str, int, int, int]) -> str:
    """Return the name that gRPC's ``context.peer()`` gives to an address."""
    host, port = address[:2]
    mapped = host.removeprefix("::ffff:")
    if "." in mapped:
        return f"ipv4:{mapped}:{port}"
    return f"ipv6:%5B{host}%5D:{port}"
