"""Other systems that do the standard work.

    torch in-process               an embedding and Adagrad in this process; no server, no keys
    torch in-process, training     the same with torch's autograd, which computes a gradient for
                                   every id, duplicates included
    redis                          redis-server on loopback; Adagrad in the client
    redis, one trainer             the same, but a push does not read the rows again: it uses those
                                   of the pull before it
    tensorflow remote ps           TensorFlow's C++ gRPC server, used eagerly: a step does not wait
                                   for its push
    tensorflow remote ps, session  the same server, used by a graph session that waits for pushes

All peers start from ``initial_rows`` and take the same Adagrad step, so their rows are equal after
each step.

To add a peer, write a subclass of Peer in a new file, and add it to PEERS at the end of this file.
Its constructor imports the library, and raises Unavailable if that is not installed.
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
