"""The interface of a peer, and what all peers share."""

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
    """The peer is not installed; the message says how to install it."""


class Peer(Protocol):
    """A table that a trainer pulls from and pushes to. It has all rows when it is constructed."""

    name: str

    def step(self, ids: Ids, distinct: Ids, grads: Rows) -> Rows:
        """Return the rows of ``ids`` [B, dim], then apply ``grads`` to the rows of ``distinct``."""
        ...

    def run(self, steps: Sequence[Step]) -> list[float]:
        """Take the steps one after the other; return the seconds of each."""
        seconds = []
        for ids, distinct, grads in steps:
            start = time.perf_counter()
            self.step(ids, distinct, grads)
            seconds.append(time.perf_counter() - start)
        return seconds

    def close(self) -> None:
        """Stop its processes and free its memory."""
        ...


def free_port() -> int:
    """Return a free port on loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
