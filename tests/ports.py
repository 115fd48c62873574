"""Free ports for the servers of tests. No two processes of tests get the same ones."""

from __future__ import annotations

import fcntl
import os
import random
import socket
import tempfile
from pathlib import Path

BELOW_EPHEMERAL = range(12_000, 30_000)  # no outgoing connection takes a port from here
PARTS = 48  # processes that may run at once on a machine
LOCKS = Path(tempfile.gettempdir()) / "embedding-ps-test-ports"


def _claim() -> range:
    """Return a part of the ports that is this process's until it ends, by the lock of a file."""
    LOCKS.mkdir(exist_ok=True)
    each = len(BELOW_EPHEMERAL) // PARTS
    for part in range(PARTS):
        lock = os.open(LOCKS / str(part), os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        return BELOW_EPHEMERAL[part * each : (part + 1) * each]
    raise OSError(f"{PARTS} processes of tests run already")


MINE = _claim()


def free_ports(count: int) -> int:
    """Return the first of ``count`` consecutive local ports that are free at the moment."""
    for _ in range(1000):
        first = random.SystemRandom().choice(MINE[:-count])
        sockets = [socket.socket() for _ in range(count)]
        try:
            for at, listener in enumerate(sockets):
                listener.bind(("127.0.0.1", first + at))
        except OSError:
            continue
        finally:
            for listener in sockets:
                listener.close()
        return first
    raise OSError(f"found no {count} consecutive free ports")
