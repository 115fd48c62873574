"""The interface of a peer (another system to compare with), and constants for all peers."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from typing import Protocol

from benchmarks.work import Ids, Rows, Step

LEARNING_RATE = 0.05
EPSILON = 1e-10  # added to the square root of the accumulator, which starts at 0

CHUNK = 10_000  # rows per message while a table is filled
START_TIMEOUT = 60.0  # seconds until a server must answer


class Unavailable(Exception):
    """Raised if a peer is not installed; the message is the command to install it."""


class Peer(Protocol):
    """A table of another system, for one trainer.

    The constructor starts the system and fills the table with ``initial_rows``.
    """

    name: str

    def step(self, ids: Ids, distinct: Ids, grads: Rows) -> Rows:
        """Pull rows, then push gradients; return the pulled rows, float32[B, dim].

        ids       int64[B]         rows to pull, with duplicates
        distinct  int64[u]         their distinct ids
        grads     float32[u, dim]  gradients of the distinct ids
        """
        ...

    def run(self, steps: Sequence[Step]) -> list[float]:
        """Run steps one after the other; return the seconds of each."""
        seconds = []
        for ids, distinct, grads in steps:
            start = time.perf_counter()
            self.step(ids, distinct, grads)
            seconds.append(time.perf_counter() - start)
        return seconds

    def close(self) -> None:
        """Stop the peer's processes and free its memory."""
        ...


def free_port() -> int:
    """Return a free port on loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
