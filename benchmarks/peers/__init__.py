"""Other systems that do the standard work.

    torch in-process               an embedding and Adagrad in this process; no server, no keys
    torch in-process, training     the same through autograd, which has a gradient for every id
    redis                          redis-server on loopback; Adagrad in the client
    redis, one trainer             the same; a push reuses the rows that its pull read
    tensorflow remote ps           TensorFlow's C++ gRPC server, eager; nobody waits for a push
    tensorflow remote ps, session  the same server from a graph session, which waits for a push

All peers start from ``initial_rows`` and take the same Adagrad step, so they agree on every row.

To add one, write a subclass of Peer in a file of its own and add it to PEERS at the foot. A peer
imports its library when it is made. It raises Unavailable if the library is not installed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks.peers.in_process import Torch
from benchmarks.peers.peer import Peer, Unavailable
from benchmarks.peers.redis_server import Redis
from benchmarks.peers.tensorflow_server import TensorFlow
from benchmarks.work import Work

__all__ = ["PEERS", "Peer", "Unavailable"]

PEERS: dict[str, Callable[[Work], Peer]] = {
    "torch in-process": Torch,
    "torch in-process, training": partial(Torch, training=True),
    "redis": Redis,
    "redis, one trainer": partial(Redis, reread=False),
    "tensorflow remote ps": TensorFlow,
    "tensorflow remote ps, session": partial(TensorFlow, eager=False),
}
