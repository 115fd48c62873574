"""Close connections whose clients send large messages without finishing them.

gRPC buffers a message until it is complete, and has no limit for all connections together. So
clients could fill the memory with incomplete messages. The kernel counts the bytes that a
connection received, and the service counts the messages that arrived completely. The difference is
the size of incomplete messages. A thread computes it several times per second for each connection,
and closes

* a connection that has more than LARGE bytes of incomplete messages for longer than ``seconds``
* the connections with the oldest incomplete messages, if the incomplete messages of all connections
  together exceed ``most`` bytes

The client of a closed connection gets the status UNAVAILABLE and retries.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import structlog

from psserver.peers import counts, sockets

LARGE = 8 << 20  # bytes; more than gRPC's window, which fills if the service does not read
LOOK_SECONDS = 0.25  # minimum number of seconds between two checks
SHARE = 0.05  # maximum share of one core that the checks may use

log = structlog.get_logger()


@dataclass(slots=True)
class Connection:
    """Bytes received, sent and parsed on one connection, as of the last check."""

    since: float  # monotonic time of the last check at which ``unfinished`` was at most LARGE
    received: int = 0  # bytes received by the kernel
    sent: int = 0  # bytes that the peer acknowledged
    arrived: int = 0  # bytes of complete messages, including an estimate of their HTTP/2 frames
    unfinished: int = 0  # bytes of incomplete messages

    def update(self, received: int, sent: int, arrived: int) -> None:
        """Update the counts from new totals, which count from the opening of the connection.

        received  bytes received by the kernel
        sent      bytes acknowledged by the peer
        arrived   bytes of complete messages and their frames

        Received bytes that belong to no message are HTTP/2 window updates, estimated as 1 byte per
        512 bytes sent.
        """
        change = received - self.received - (arrived - self.arrived)
        frames = (sent - self.sent) // 512 + 1024
        self.unfinished = max(self.unfinished + change - frames, 0)
        self.received, self.sent, self.arrived = received, sent, arrived


class Connections:
    """Closes client connections to ``port`` of this process that have too many incomplete messages.

    most     limit for the incomplete messages of all connections together, in bytes
    seconds  maximum time for which a connection may have more than LARGE bytes of them
    clock    returns monotonic seconds

    counted  called after each check with the number of connections
    """

    def __init__(
        self, port: int, most: int, seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.unfinished = 0  # bytes of incomplete messages at the last check
        self.closed = 0  # connections closed since the start
        self.counted: Callable[[int], None] = lambda count: None
        self._port = port
        self._most = most
        self._seconds = seconds
        self._clock = clock
        self._arrived: dict[str, int] = {}  # peer, as gRPC names it -> bytes of complete messages
        self._known: dict[str, Connection] = {}  # by peer, as of the last check
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="connections", daemon=True)

    def open(self) -> None:
        """Start the thread that checks the connections."""
        self._thread.start()

    def close(self) -> None:
        """Stop the thread. No connection is closed."""
        self._stop.set()
        self._thread.join()

    @property
    def count(self) -> int:
        """Number of connections at the last check."""
        return len(self._known)

    def arrived(self, peer: str, size: int) -> None:
        """Count a complete message of ``size`` bytes. Must run on the event loop.

        peer  name of the client's connection, from gRPC's ``context.peer()``
        """
        # gRPC and HTTP/2 add 14 bytes to each 16 KiB, and headers
        self._arrived[peer] = self._arrived.get(peer, 0) + size + (size >> 6) + 256

    def look(self) -> None:
        """Check all connections once, and close those that exceed a limit."""
        now, seen = self._clock(), {}
        known = list(self._arrived)  # peers that appear while the sockets are listed stay
        for peer, connection in sockets(self._port):
            arrived = self._arrived.get(peer, 0)  # read before the kernel's count, to be smaller
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
        self.counted(len(seen))
        for peer in known:
            if peer not in seen:
                self._arrived.pop(peer, None)
        total = sum(each.unfinished for each in seen.values())
        if total > self._most:
            self._shed(total - self._most)
        self.unfinished = sum(each.unfinished for each in seen.values())

    def _shed(self, excess: int) -> None:
        """Close so many connections that at least ``excess`` bytes of incomplete messages are gone.

        Connections with the oldest incomplete messages are closed first.
        """
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
        """Close one connection and log why.

        connection  its socket, which belongs to gRPC
        peer        name of the connection, from gRPC's ``context.peer()``
        entry       its byte counts
        why         reason, for the log
        """
        log.warning("connection closed", peer=peer, unfinished_bytes=entry.unfinished, why=why)
        entry.unfinished = 0
        self.closed += 1
        with suppress(OSError):  # the client has closed it
            connection.shutdown(socket.SHUT_RDWR)

    def _run(self) -> None:
        pause = LOOK_SECONDS
        while not self._stop.wait(pause):
            start = time.thread_time()
            self.look()
            pause = max(LOOK_SECONDS, (time.thread_time() - start) / SHARE)
