"""Look up all addresses of a DNS name, with the resolver of the operating system."""

from __future__ import annotations

import os
import socket
import threading

FORK_PATIENCE = 2.0  # maximum time that a fork waits for look-ups in progress, in seconds


def look_up(name: str) -> list[str]:
    """Return all addresses of ``name`` as a sorted list of "host:port", without duplicates.

    name  "host:port"; the host may be a name, an IPv4 address or an IPv6 address in brackets

    May take as long as the operating system waits for an answer. Raises OSError if the name cannot
    be resolved.
    """
    host, _, port = name.rpartition(":")
    with _running:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    addresses = {sockaddr[0] for _, _, _, _, sockaddr in found}
    return sorted(
        f"[{each}]:{port}" if ":" in str(each) else f"{each}:{port}" for each in addresses
    )


class _Running:
    """Counts the look-ups in progress, so that a fork can wait for their end.

    A child that is forked in the middle of a look-up might find the resolver's locks locked.
    """

    def __init__(self) -> None:
        self._count = 0
        self._changed = threading.Condition()

    def __enter__(self) -> None:
        with self._changed:
            self._count += 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._count -= 1
            self._changed.notify_all()

    def wait(self) -> None:
        """Block new look-ups, and wait for those in progress, at most FORK_PATIENCE seconds."""
        self._changed.acquire()
        self._changed.wait_for(lambda: not self._count, FORK_PATIENCE)

    def resume(self) -> None:
        """Permit look-ups again, in the process that called ``wait``."""
        self._changed.release()


_running = _Running()


def _in_child() -> None:
    """Count the look-ups of a forked child anew: the threads of its parent do not run in it."""
    global _running
    _running = _Running()


os.register_at_fork(
    before=lambda: _running.wait(),
    after_in_parent=lambda: _running.resume(),
    after_in_child=_in_child,
)
