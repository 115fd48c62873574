"""Connections whose peers send much and do not finish it.

gRPC collects a message until it is complete and reports nothing meanwhile, so a peer could have the
server hold a message of almost the limit on every connection, for ever. The kernel counts the bytes
that each connection received, and the service counts the messages that arrived. The difference is
what gRPC holds of unfinished messages. A thread looks at it a few times per second, and closes

* connections that have had more than LARGE bytes of unfinished messages for longer than ``seconds``
* the oldest of those with unfinished messages, while all together have more than ``most`` bytes

The peer of a closed connection gets UNAVAILABLE, and sends the same message again.
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

LARGE = 8 << 20  # bytes; more than gRPC's window, which fills where the service does not read
LOOK_SECONDS = 0.25  # between two looks
SHARE = 0.05  # of a core, the most that looks may take
_TCP_INFO_BYTES = 256
_RECEIVED = struct.Struct("=QQ")  # bytes that the peer acknowledged, bytes received
_AT = 120  # of these two in struct tcp_info of linux/tcp.h

log = structlog.get_logger()


@dataclass(slots=True)
class Connection:
    """What one connection had received and sent at the last look."""

    since: float  # monotonic seconds: the unfinished messages are LARGE since then
    received: int = 0  # bytes
    sent: int = 0
    arrived: int = 0  # bytes that arrived in whole messages, with the frames around them
    unfinished: int = 0  # bytes

    def update(self, received: int, sent: int, arrived: int) -> None:
        """Note the counts of a look.

        Frames that carry no message are window updates, for the most part, and fewer than a byte
        for each 512 that were sent.
        """
        change = received - self.received - (arrived - self.arrived)
        frames = (sent - self.sent) // 512 + 1024
        self.unfinished = max(self.unfinished + change - frames, 0)
        self.received, self.sent, self.arrived = received, sent, arrived


class Connections:
    """The connections of the server on ``port``.

    most     bytes of unfinished messages, all connections together
    seconds  for a large message to arrive
    """

    def __init__(
        self, port: int, most: int, seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.unfinished = 0  # bytes, at the last look
        self.closed = 0  # connections, ever
        self._port = port
        self._most = most
        self._seconds = seconds
        self._clock = clock
        self._arrived: dict[str, int] = {}  # by peer, as gRPC writes it
        self._known: dict[str, Connection] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="connections", daemon=True)

    def open(self) -> None:
        """Start to look."""
        self._thread.start()

    def close(self) -> None:
        """Look no more."""
        self._stop.set()
        self._thread.join()

    def arrived(self, peer: str, size: int) -> None:
        """Count a message of ``size`` bytes that arrived from a peer; called on the event loop."""
        # gRPC and HTTP/2 add 14 bytes to each 16 KiB, and headers
        self._arrived[peer] = self._arrived.get(peer, 0) + size + (size >> 6) + 256

    def look(self) -> None:
        """Compare what was received with what arrived, and close connections that have too much."""
        now, seen = self._clock(), {}
        for peer, connection, received, sent in sockets(self._port):
            entry = self._known.get(peer) or Connection(now)
            entry.update(received, sent, self._arrived.get(peer, 0))
            if entry.unfinished <= LARGE:
                entry.since = now
            if now - entry.since > self._seconds:
                self._shut(connection, peer, entry, "not finished in time")
            seen[peer] = entry
        self._known = seen
        for peer in [each for each in list(self._arrived) if each not in seen]:
            self._arrived.pop(peer, None)
        total = sum(each.unfinished for each in seen.values())
        if total > self._most:
            self._shed(total - self._most)
        self.unfinished = sum(each.unfinished for each in seen.values())

    def _shed(self, excess: int) -> None:
        """Close the connections with the oldest unfinished messages: ``excess`` bytes of them."""
        order = sorted(self._known, key=lambda peer: self._known[peer].since)
        chosen = set()
        for peer in order:
            if excess > 0 and self._known[peer].unfinished:
                excess -= self._known[peer].unfinished
                chosen.add(peer)
        for peer, connection, _, _ in sockets(self._port):
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


def sockets(port: int) -> Iterator[tuple[str, socket.socket, int, int]]:
    """Yield this process's connections to its own ``port``: the peer as gRPC writes it, the socket,
    bytes received, bytes acknowledged by the peer. The socket is gRPC's: it must not be closed.
    """
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            connection = socket.socket(fileno=int(name))
        except OSError:  # closed meanwhile
            continue
        try:
            found = _counts(connection, port)
            if found is not None:
                yield found[0], connection, found[1], found[2]
        finally:
            connection.detach()


def _counts(connection: socket.socket, port: int) -> tuple[str, int, int] | None:
    """Return peer, bytes received, bytes acknowledged; None if not of a connection to ``port``."""
    if connection.family not in (socket.AF_INET, socket.AF_INET6):
        return None
    try:
        if connection.getsockname()[1] != port:
            return None
        peer = peer_name(connection.getpeername())
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
        sent, received = _RECEIVED.unpack_from(info, _AT)
    except (OSError, struct.error):  # it listens, is no TCP socket, or belongs to an old kernel
        return None
    return peer, received, sent


def peer_name(address: tuple[str, int] | tuple[str, int, int, int]) -> str:
    """Return an address as gRPC's ``context.peer()`` writes it."""
    host, port = address[:2]
    mapped = host.removeprefix("::ffff:")
    if "." in mapped:
        return f"ipv4:{mapped}:{port}"
    return f"ipv6:%5B{host}%5D:{port}"
