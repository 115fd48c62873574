"""Program of the TensorFlow processes: a parameter server, and a worker that runs the steps.

It runs under another Python interpreter, so it imports only NumPy, TensorFlow, peer.py and work.py.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.peers.peer import CHUNK, EPSILON, LEARNING_RATE
from benchmarks.work import Ids, Rows, Work, initial_rows


def say(answer: dict[str, Any]) -> None:
    """Send an answer to the parent process."""
    print(json.dumps(answer), flush=True)


def tensorflow_server(options: dict[str, Any]) -> None:
    """Run a TensorFlow parameter server until standard input closes."""
    tf: Any = importlib.import_module("tensorflow")
    server = tf.distribute.Server(options["cluster"], job_name="ps", task_index=0)
    say({"ready": server.target})
    sys.stdin.read()
    os._exit(0)  # the server has no way to stop


def tensorflow_worker(options: dict[str, Any]) -> None:
    """Create the table on the server, then run steps as ordered on standard input.

    An order is a line of JSON: "steps" (file with arrays), "count" (number of steps), "rows" (file
    to write the last pulled rows to).
    """
    work = Work(**options["work"])
    connect = tensorflow_eager if options["eager"] else tensorflow_session
    pull, push, fill = connect(options["cluster"], work)
    rows = initial_rows(work)
    for start in range(0, work.rows, CHUNK):
        chunk = rows[start : start + CHUNK]
        fill(np.arange(start, start + len(chunk)), chunk)
    del rows
    say({"ready": True})
    for line in sys.stdin:
        order = json.loads(line)
        with np.load(order["steps"]) as arrays:
            steps = [
                (arrays[f"ids{i}"], arrays[f"distinct{i}"], arrays[f"grads{i}"])
                for i in range(order["count"])
            ]
        seconds = []
        for i, (ids, distinct, grads) in enumerate(steps):
            start_time = time.perf_counter()
            pulled = pull(ids)
            push(distinct, grads)
            if i == len(steps) - 1:
                pull(ids[:1])  # after the last push, no other pull waits for it
            seconds.append(time.perf_counter() - start_time)
        np.save(order["rows"], pulled)
        say({"seconds": seconds})
    os._exit(0)  # a session's server has no way to stop


TensorFlowCalls = tuple[
    Callable[[Ids], Rows],  # pull
    Callable[[Ids, Rows], None],  # push
    Callable[[Ids, Rows], None],  # write rows
]


def tensorflow_eager(cluster: dict[str, list[str]], work: Work) -> TensorFlowCalls:
    """Return functions (pull, push, write rows) that send eager operations to the server.

    The server runs the operations in order; only a pull waits for its result.
    """
    tf: Any = importlib.import_module("tensorflow")
    tf.config.experimental_connect_to_host(cluster["ps"][0], job_name="ps")
    device = "/job:ps/replica:0/task:0/device:CPU:0"
    with tf.device(device):
        table = tf.Variable(tf.zeros([work.rows, work.dim]))
        accumulator = tf.Variable(tf.zeros([work.rows, work.dim]))
        rate, epsilon = tf.constant(LEARNING_RATE), tf.constant(EPSILON)

    def pull(ids: Ids) -> Rows:
        with tf.device(device):
            pulled = tf.raw_ops.ResourceGather(resource=table.handle, indices=ids, dtype=tf.float32)
        rows: Rows = pulled.numpy()
        return rows

    def push(distinct: Ids, grads: Rows) -> None:
        with tf.device(device):
            tf.raw_ops.ResourceSparseApplyAdagradV2(
                var=table.handle,
                accum=accumulator.handle,
                lr=rate,
                epsilon=epsilon,
                grad=grads,
                indices=distinct,
            )

    def fill(ids: Ids, rows: Rows) -> None:
        with tf.device(device):
            tf.raw_ops.ResourceScatterUpdate(resource=table.handle, indices=ids, updates=rows)

    return pull, push, fill


def tensorflow_session(cluster: dict[str, list[str]], work: Work) -> TensorFlowCalls:
    """Return functions (pull, push, write rows) that run a graph in a session.

    The graph's variables are on the server; this process is a worker of the cluster.
    """
    tf: Any = importlib.import_module("tensorflow")
    v1 = tf.compat.v1
    v1.disable_eager_execution()
    worker = tf.distribute.Server(cluster, job_name="worker", task_index=0)
    shape = [work.rows, work.dim]
    with v1.device("/job:ps/task:0/device:CPU:0"):
        zeros = v1.zeros_initializer()
        table = v1.get_variable("table", shape, initializer=zeros, use_resource=True)
        accumulator = v1.get_variable("accumulator", shape, initializer=zeros, use_resource=True)
    with v1.device("/job:worker/task:0/device:CPU:0"):
        ids = v1.placeholder(tf.int64, [None])
        grads = v1.placeholder(tf.float32, [None, work.dim])
    with v1.device("/job:ps/task:0/device:CPU:0"):
        pulled = tf.gather(table, ids)
        pushed = tf.raw_ops.ResourceSparseApplyAdagradV2(
            var=table.handle,
            accum=accumulator.handle,
            lr=LEARNING_RATE,
            epsilon=EPSILON,
            grad=grads,
            indices=ids,
        )
        written = tf.raw_ops.ResourceScatterUpdate(
            resource=table.handle, indices=ids, updates=grads
        )
    session = v1.Session(worker.target)
    session.run(v1.global_variables_initializer())
    return (
        session.make_callable(pulled, [ids]),
        session.make_callable(pushed, [ids, grads]),
        session.make_callable(written, [ids, grads]),
    )


ROLES: dict[str, Callable[[dict[str, Any]], None]] = {
    "tensorflow-server": tensorflow_server,
    "tensorflow-worker": tensorflow_worker,
}

if __name__ == "__main__":
    ROLES[sys.argv[1]](json.loads(sys.argv[2]))
