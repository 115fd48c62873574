"""The standard work (docs/benchmarks.md), and what others reach on it.

    torch in-process               an embedding and Adagrad in this process; no server, no keys
    torch in-process, training     the same behind autograd, which has a gradient for every id
    redis                          redis-server on loopback; Adagrad in the client
    redis, one trainer             the same, and a push trusts the rows its pull read
    tensorflow remote ps           TensorFlow's C++ gRPC server, eager; a push is not waited for
    tensorflow remote ps, session  the same server from a graph session; a push is waited for

All of them start from ``initial_rows`` and take the same Adagrad step, so they agree on every row.
To add one: write a subclass of Peer, add it to PEERS at the foot. Nothing is imported before a
peer is made, and a peer that cannot be made says what it needs (Unavailable).

TensorFlow runs in other processes, under the interpreter that PEERS_TF_PYTHON names: this file is
their program, so it imports nothing of ours.
"""

from __future__ import annotations

import atexit
import dataclasses
import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Rows = NDArray[np.float32]
Step = tuple[Ids, Ids, Rows]  # ids [B] with duplicates, the distinct ones ascending, their grads

LEARNING_RATE = 0.05
EPSILON = 1e-10  # added to the root of the accumulator, which starts at 0

CHUNK = 10_000  # rows a message while a table is filled
START_TIMEOUT = 60.0  # seconds a server has to answer


class Unavailable(Exception):
    """The peer is not installed here; the message says how to get it."""


@dataclass(frozen=True)
class Work:
    """One table and how it is drawn from."""

    rows: int = 2_000_000
    dim: int = 32
    batch: int = 10_000  # ids a step, duplicates included
    zipf: float = 1.05  # exponent; rank r is drawn with probability proportional to r ** -zipf
    seed: int = 0


def standard_work(work: Work, steps: int) -> list[Step]:
    """The first ``steps`` steps of ``work``: the same ones in every process and on every call.

    Ids are 0..rows-1; which of them are frequent is a fixed permutation.
    """
    mass = np.cumsum(np.arange(1, work.rows + 1, dtype=np.float64) ** -work.zipf)
    mass /= mass[-1]
    order = np.random.default_rng((work.seed, 1)).permutation(work.rows)
    rng = np.random.default_rng((work.seed, 2))
    drawn: list[Step] = []
    for _ in range(steps):
        ids = order[np.searchsorted(mass, rng.random(work.batch), side="right")]
        distinct = np.unique(ids)
        grads = rng.standard_normal((len(distinct), work.dim), dtype=np.float32)
        drawn.append((ids, distinct, grads))
    return drawn


def of_every_id(step: Step) -> Rows:
    """float32[B, dim]: gradients as a network has them, one for each of the ids, whose sums over
    equal ids are those of the step.
    """
    ids, distinct, grads = step
    _, inverse, counts = np.unique(ids, return_inverse=True, return_counts=True)
    assert len(counts) == len(distinct)
    share: Rows = np.reciprocal(counts.astype(np.float32))
    return grads[inverse] * share[inverse, None]


def keys_of(ids: Ids, seed: int = 0) -> Ids:
    """A random 63-bit key for every id: a bijection, so distinct ids have distinct keys.

    The splitmix64 generator (Steele, Lea, Flood, 2014) modulo 2**63, where its multiplications by
    odd numbers and its shifts can be undone as well.
    """
    low = np.uint64((1 << 63) - 1)
    offset = np.uint64(np.random.default_rng((seed, 3)).integers(1 << 63))
    x = (ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + offset) & low
    x ^= x >> np.uint64(30)
    x = x * np.uint64(0xBF58476D1CE4E5B9) & low
    x ^= x >> np.uint64(27)
    x = x * np.uint64(0x94D049BB133111EB) & low
    x ^= x >> np.uint64(31)
    return x.view(np.int64)


def initial_rows(work: Work) -> Rows:
    """float32[rows, dim] that every peer starts from."""
    rng = np.random.default_rng((work.seed, 4))
    return rng.standard_normal((work.rows, work.dim), dtype=np.float32) * np.float32(0.01)


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


class Torch(Peer):
    """``torch.nn.Embedding`` and ``torch.optim.Adagrad`` with torch's default threads.

    The gradient is handed over as the coalesced sparse tensor that it is: the optimizer need not
    sort it again, and no backward pass builds it. With ``training`` a backward pass does build it,
    of a gradient for every id, and the optimizer sums those of equal ids: torch as it is used.
    """

    def __init__(self, work: Work, *, training: bool = False) -> None:
        self.name = "torch in-process, training" if training else "torch in-process"
        self._training = training
        try:
            self._torch: Any = importlib.import_module("torch")
        except ImportError as error:
            raise Unavailable("pip install torch") from error
        # The optimizer makes sparse tensors without saying so, which torch warns about.
        self._torch.sparse.check_sparse_tensor_invariants.disable()
        # Its own copy: from_numpy would keep the page size and the placement of the array.
        weight = self._torch.from_numpy(initial_rows(work)).clone()
        self._embedding = self._torch.nn.Embedding.from_pretrained(
            weight, freeze=False, sparse=True
        )
        self._optimizer = self._torch.optim.Adagrad(
            self._embedding.parameters(), lr=LEARNING_RATE, eps=EPSILON
        )

    def run(self, steps: Sequence[Step]) -> list[float]:
        if self._training:
            steps = [(step[0], step[1], of_every_id(step)) for step in steps]
        return super().run(steps)

    def step(self, ids: Ids, distinct: Ids, grads: Rows) -> Rows:
        torch = self._torch
        if self._training:
            self._optimizer.zero_grad()
            pulled = self._embedding(torch.from_numpy(ids))
            pulled.backward(torch.from_numpy(grads))
            self._optimizer.step()
            return pulled.detach().numpy()  # type: ignore[no-any-return]
        with torch.no_grad():
            rows: Rows = self._embedding(torch.from_numpy(ids)).numpy()
        weight = self._embedding.weight
        weight.grad = torch.sparse_coo_tensor(
            torch.from_numpy(distinct).unsqueeze(0),
            torch.from_numpy(grads),
            weight.shape,
            check_invariants=False,
            is_coalesced=True,
        )
        self._optimizer.step()
        return rows

    def close(self) -> None:
        del self._embedding, self._optimizer


def free_port() -> int:
    """A loopback port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Message:
    """Redis values or commands of equal parts, in one buffer whose constant bytes are written once.

    ``parts[field]`` is what varies; the head of each message goes right before the first part.
    """

    ROOM = 32  # bytes kept free for the head

    def __init__(self, capacity: int, fields: list[tuple[str, Any]]) -> None:
        """``fields`` in order: a name and either a dtype or the constant bytes."""
        dtype = np.dtype(
            [(name, f"S{len(kind)}" if isinstance(kind, bytes) else kind) for name, kind in fields]
        )
        self._bytes = np.empty(self.ROOM + capacity * dtype.itemsize, np.uint8)
        self.parts: NDArray[Any] = self._bytes[self.ROOM :].view(dtype)
        self.constants = {name: kind for name, kind in fields if isinstance(kind, bytes)}
        for name, constant in self.constants.items():
            self.parts[name] = constant

    def bytes(self, head: bytes, count: int) -> memoryview:
        """The message of ``head`` and the first ``count`` parts, to send or to receive into."""
        start = self.ROOM - len(head)
        self._bytes[start : self.ROOM] = np.frombuffer(head, np.uint8)
        return self._bytes.data[start : self.ROOM + count * self.parts.itemsize]


class Redis(Peer):
    """One redis-server without persistence; a value is the row and its accumulator.

    Pull is one MGET of the distinct keys. Push is Adagrad in this process: one MGET to read the
    rows again and one MSET, or with ``reread=False`` the MSET alone, which loses the updates of
    other trainers between pull and push. (The first way loses fewer; redis has no Adagrad.)
    """

    def __init__(self, work: Work, *, reread: bool = True) -> None:
        self.name = "redis" if reread else "redis, one trainer"
        program = shutil.which("redis-server")
        if program is None:
            raise Unavailable("apt-get install redis-server")
        self._dim = work.dim
        self._reread = reread
        self._keys = keys_of(np.arange(work.rows), work.seed)
        self._place = np.empty(work.rows, np.int64)  # of an id among the distinct ones of a step
        length = 8 * work.dim
        value = ("value", ("<f4", 2 * work.dim))
        capacity = max(work.batch, CHUNK)
        self._get = Message(capacity, [("head", b"$8\r\n"), ("key", "<i8"), ("end", b"\r\n")])
        self._set = Message(
            capacity,
            [
                ("head", b"$8\r\n"),
                ("key", "<i8"),
                ("middle", b"\r\n$%d\r\n" % length),
                value,
                ("end", b"\r\n"),
            ],
        )
        self._got = Message(capacity, [("head", b"$%d\r\n" % length), value, ("end", b"\r\n")])
        port = free_port()
        options = ["--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        self._server = subprocess.Popen(
            [program, "--port", str(port), *options], stdout=subprocess.DEVNULL
        )
        atexit.register(self._server.kill)
        try:
            self._socket = self._connect(port)
            self._fill(initial_rows(work))
        except BaseException:
            self._stop()
            raise

    def step(self, ids: Ids, distinct: Ids, grads: Rows) -> Rows:
        keys = self._keys[distinct]
        values = self._mget(keys)
        self._place[distinct] = np.arange(len(distinct))
        rows = np.take(values[:, : self._dim], self._place[ids], axis=0)
        if self._reread:
            values = self._mget(keys)
        accumulator = values[:, self._dim :]
        accumulator += grads * grads
        values[:, : self._dim] -= LEARNING_RATE * grads / (np.sqrt(accumulator) + EPSILON)
        self._send_mset(keys, values)
        self._receive_ok()
        return rows

    def close(self) -> None:
        self._socket.close()
        self._stop()

    def _stop(self) -> None:
        atexit.unregister(self._server.kill)
        self._server.kill()
        self._server.wait()

    def _connect(self, port: int) -> socket.socket:
        deadline = time.monotonic() + START_TIMEOUT
        while True:
            try:
                connection = socket.create_connection(("127.0.0.1", port), timeout=START_TIMEOUT)
                break
            except ConnectionRefusedError as error:
                if self._server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"redis-server does not listen on port {port}") from error
                time.sleep(0.01)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def _fill(self, rows: Rows) -> None:
        """Load all rows with an accumulator of zeros, a command in flight while one is built."""
        for start in range(0, len(rows), CHUNK):
            chunk = rows[start : start + CHUNK]
            self._send_mset(
                self._keys[start : start + CHUNK], np.hstack([chunk, np.zeros_like(chunk)])
            )
            if start:
                self._receive_ok()
        self._receive_ok()

    def _mget(self, keys: Ids) -> Rows:
        """The values float32[u, 2 * dim] of present keys."""
        count = len(keys)
        self._get.parts["key"][:count] = keys
        self._socket.sendall(self._get.bytes(b"*%d\r\n$4\r\nMGET\r\n" % (count + 1), count))
        head = b"*%d\r\n" % count
        self._receive(self._got.bytes(head, count), head)
        parts = self._got.parts[:count]
        if not (parts["head"] == self._got.constants["head"]).all():
            raise RuntimeError("MGET: a value of another length")
        return np.array(parts["value"])

    def _send_mset(self, keys: Ids, values: Rows) -> None:
        count = len(keys)
        self._set.parts["key"][:count] = keys
        self._set.parts["value"][:count] = values
        self._socket.sendall(self._set.bytes(b"*%d\r\n$4\r\nMSET\r\n" % (2 * count + 1), count))

    def _receive_ok(self) -> None:
        self._receive(memoryview(bytearray(5)), b"+OK\r\n")

    def _receive(self, into: memoryview, head: bytes) -> None:
        """Fill ``into`` with a reply that begins with ``head``."""
        got = 0
        while got < len(into):
            size = self._socket.recv_into(into[got:])
            if size == 0:
                raise RuntimeError("redis-server closed the connection")
            got += size
            start = bytes(into[: min(got, len(head))])
            if not head.startswith(start):
                answer = bytes(into[: min(got, 80)])
                raise RuntimeError(f"expected {head!r}, redis answered {answer!r}")


class TensorFlow(Peer):
    """A process with ``tf.distribute.Server`` as job ps, which holds the table and runs the
    kernels, and a worker process with the timed loop, whose batches arrive in a file before it.

    The worker talks to the server in one of two ways. Eager, it streams operations: a push
    returns when it is queued, and the next pull waits for it. By a graph session, both are waited
    for.
    """

    def __init__(self, work: Work, *, eager: bool = True) -> None:
        self.name = "tensorflow remote ps" if eager else "tensorflow remote ps, session"
        hint = "PEERS_TF_PYTHON=<a python in whose environment pip installed tensorflow-cpu>"
        python = os.environ.get("PEERS_TF_PYTHON")
        if not python or shutil.which(python) is None:
            raise Unavailable(hint)
        look = "import importlib.util as u; raise SystemExit(u.find_spec('tensorflow') is None)"
        if subprocess.run([python, "-c", look], check=False).returncode:
            raise Unavailable(hint)
        self._directory = tempfile.TemporaryDirectory(prefix="peers-")
        self._files = Path(self._directory.name)
        self._children: list[subprocess.Popen[str]] = []
        cluster = {
            "ps": [f"127.0.0.1:{free_port()}"],
            "worker": [f"127.0.0.1:{free_port()}"],
        }
        try:
            self._start(python, "tensorflow-server", {"cluster": cluster})
            self._worker = self._start(
                python,
                "tensorflow-worker",
                {"cluster": cluster, "work": dataclasses.asdict(work), "eager": eager},
            )
        except BaseException:
            self.close()
            raise

    def step(self, ids: Ids, distinct: Ids, grads: Rows) -> Rows:
        self.run([(ids, distinct, grads)])
        rows: Rows = np.load(self._files / "rows.npy")
        return rows

    def run(self, steps: Sequence[Step]) -> list[float]:
        arrays = {
            f"{name}{i}": array
            for i, step in enumerate(steps)
            for name, array in zip(("ids", "distinct", "grads"), step, strict=True)
        }
        # mypy takes the names in ** for the other parameter of savez.
        np.savez(self._files / "steps.npz", **arrays)  # type: ignore[arg-type, unused-ignore]
        order = {
            "steps": str(self._files / "steps.npz"),
            "count": len(steps),
            "rows": str(self._files / "rows.npy"),
        }
        print(json.dumps(order), file=self._worker.stdin, flush=True)
        seconds: list[float] = self._answer(self._worker)["seconds"]
        return seconds

    def close(self) -> None:
        for child in reversed(self._children):
            atexit.unregister(child.kill)
            child.kill()
            child.wait()
            for stream in (child.stdin, child.stdout):
                if stream is not None:
                    stream.close()
        self._directory.cleanup()

    def _start(self, python: str, role: str, options: dict[str, Any]) -> subprocess.Popen[str]:
        """Start this file as ``role`` and wait until it says that it is ready."""
        environment = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
        environment |= {"TF_CPP_MIN_LOG_LEVEL": "2", "CUDA_VISIBLE_DEVICES": ""}
        with open(self._files / f"{role}.log", "wb") as log:
            child = subprocess.Popen(
                [python, __file__, role, json.dumps(options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                text=True,
            )
        atexit.register(child.kill)
        self._children.append(child)
        self._answer(child)
        return child

    def _answer(self, child: subprocess.Popen[str]) -> dict[str, Any]:
        line = child.stdout.readline() if child.stdout else ""
        if not line:
            logs = "\n".join(path.read_text()[-2000:] for path in self._files.glob("*.log"))
            raise RuntimeError(f"{self.name}: a process of it ended\n{logs}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def say(answer: dict[str, Any]) -> None:
    """Answer the process that started this one."""
    print(json.dumps(answer), flush=True)


def tensorflow_server(options: dict[str, Any]) -> None:
    """Serve as the parameter server until standard input closes."""
    tf: Any = importlib.import_module("tensorflow")
    server = tf.distribute.Server(options["cluster"], job_name="ps", task_index=0)
    say({"ready": server.target})
    sys.stdin.read()
    os._exit(0)  # the server has no way to stop


def tensorflow_worker(options: dict[str, Any]) -> None:
    """Make the table on the server, then take the steps of each file named on standard input."""
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
                pull(ids[:1])  # the last push has no next pull to wait for it
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
    """Operations streamed to the server one by one, in order."""
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
    """A graph with its variables on the server, run from a server of job worker in this process."""
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


PEERS: dict[str, Callable[[Work], Peer]] = {
    "torch in-process": Torch,
    "torch in-process, training": partial(Torch, training=True),
    "redis": Redis,
    "redis, one trainer": partial(Redis, reread=False),
    "tensorflow remote ps": TensorFlow,
    "tensorflow remote ps, session": partial(TensorFlow, eager=False),
}

ROLES: dict[str, Callable[[dict[str, Any]], None]] = {
    "tensorflow-server": tensorflow_server,
    "tensorflow-worker": tensorflow_worker,
}

if __name__ == "__main__":
    ROLES[sys.argv[1]](json.loads(sys.argv[2]))
