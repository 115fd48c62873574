"""The event loop of a server: uvloop, which handles all events of gRPC in each round.

For each event, gRPC's own thread writes one byte into a pair of sockets, to wake the event loop.
Each time the loop finds bytes there, gRPC handles all events so far, but reads only one byte. So a
busy loop leaves more and more bytes, until the pair is full. From then on gRPC's thread waits for
room, and the loop gets one event per round: it sees requests late that have long arrived. Therefore
this loop takes the other bytes away.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVarTuple

import uvloop

HANDLER = "PollerCompletionQueue"  # gRPC's class whose method handles the events
MOST_BYTES = 4096  # the pair of sockets has room for fewer
Args = TypeVarTuple("Args")


class Loop(uvloop.Loop):
    """Event loop of a server."""

    def add_reader(self, fd: Any, callback: Callable[[*Args], Any], *args: *Args) -> None:
        """Call ``callback(*args)`` whenever ``fd`` can be read."""
        if isinstance(fd, socket.socket) and _is_of_grpc(callback):
            super().add_reader(fd, partial(_handle, fd, callback), *args)
        else:
            super().add_reader(fd, callback, *args)


def _is_of_grpc(callback: Any) -> bool:
    """Return whether a function is the one with which gRPC handles its events."""
    method = getattr(callback, "func", callback)  # of a functools.partial
    return type(getattr(method, "__self__", None)).__name__ == HANDLER


def _handle(waker: socket.socket, callback: Callable[..., Any], *args: Any) -> None:
    """Let gRPC handle its events.

    waker  end of the pair of sockets; an event is ready for each of its bytes

    Takes all bytes but the last one, which ``callback`` reads.
    """
    count = len(waker.recv(MOST_BYTES, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    if count > 1:
        waker.recv(count - 1)
    callback(*args)
