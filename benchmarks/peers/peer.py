"""What a peer does, and what all peers have in common."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from typing import Protocol

from benchmarks.work import Ids, Rows, Step

LEARNING_RATE = 0.05
EPSILON = 1e-10  # added to the root of the accumulator, which starts at 0

CHUNK = 10_000  # rows a message while a table is filled
START_TIMEOUT = 60.0  # seconds a server has to answer


class Unavailable(Exception):
    """The peer is not installed here; the message says how to get it."""


class Peer(Protocol):
    """A table that a trainer pulls from and pushes to, filled when it is made."""

    name: str

    def step(self, ids: Ids, distinct: Ids, grads: Rows) -> Rows:
        """Return the rows of ``ids`` [B, dim], then apply ``grads`` to the rows of ``distinct``."""
        ...

    def run(self, steps: Sequence[Step]) -> list[float]:
        """Take the steps back to back; return the seconds each took."""
        seconds = []
        for ids, distinct, grads in steps:
            start = time.perf_counter()
            self.step(ids, distinct, grads)
            seconds.append(time.perf_counter() - start)
        return seconds

    def close(self) -> None:
        """Stop its processes and return its memory."""
        ...


def free_port() -> int:
    """A loopback port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
