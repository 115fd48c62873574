"""Measure the standard work through the public client, against the peers that are installed.

A step pulls B rows in the order drawn, duplicates included, and pushes gradients for the distinct
ids. A step includes finding the distinct keys and copying their rows to all positions of the batch.
All contenders take turns. The peers (redis, torch, tensorflow) are described in peers/__init__.py.

    table      the same work on a table in this process, without messages; no service can be faster
               than echo + table
    echo       a bare gRPC stream that moves as many bytes as an exchange
    exchange   one message with the gradients of the last step and the keys of this step
    training   an exchange with a gradient for every id, duplicates included, as a network computes
    stream     a pull, then a push, on the stream
    unary      a pull, then a push, as unary calls
    busy       an exchange with a server that polls for 2 ms before it sleeps
    durable    an exchange with a server that keeps a log; the other servers and the peers keep none
"""

from __future__ import annotations

from contextlib import ExitStack, closing
from queue import SimpleQueue
from typing import Any, NamedTuple

import grpc
import numpy as np

from benchmarks.peers import PEERS, Peer, Unavailable
from benchmarks.report import Contender, Report, arguments, interleave, milliseconds
from benchmarks.servers import echo, shards
from benchmarks.work import Ids, Step, Work, keys_of, of_every_id, standard_work
from psclient import Client, Table
from psclient.batch import Batch
from psproto import routing
from storage.arena import Budget
from storage.initializers import make_initializer
from storage.optimizers import make_optimizer
from storage.schema import TableSchema
from storage.table import Table as LocalTable

CHUNK = 10_000  # keys per message while a table is filled
BUSY_POLL = 0.002  # seconds of polling; longer than a trainer takes between two steps


class Trainer:
    """Does the steps of the standard work on one table through one client.

    keys   int64[rows], the key of each id
    steps  steps of the work, used in a cycle
    wire   number type in messages: "float32" or "bfloat16"
    """

    def __init__(self, table: Table, keys: Ids, steps: list[Step], wire: Any) -> None:
        self._table = table
        self._steps = [(keys[ids], keys[distinct], grads) for ids, distinct, grads in steps]
        self._every = [of_every_id(step) for step in steps]
        self._wire = wire

    def exchange(self, i: int) -> None:
        """Push the gradients of the last step and pull the rows of this step."""
        ids, _, _ = self._steps[i % len(self._steps)]
        _, distinct, grads = self._steps[(i - 1) % len(self._steps)]
        self._table.exchange(ids, (distinct, grads), step=i, wire=self._wire)

    def training(self, i: int) -> None:
        """Do the same as ``exchange``, but with a gradient for every id, duplicates included."""
        ids, _, _ = self._steps[i % len(self._steps)]
        last = (i - 1) % len(self._steps)
        push = self._steps[last][0], self._every[last]
        self._table.exchange(ids, push, step=i, wire=self._wire)

    def pull_push(self, i: int) -> None:
        """Pull the rows of this step, then push its gradients."""
        ids, distinct, grads = self._steps[i % len(self._steps)]
        self._table.pull(ids, wire=self._wire)
        self._table.push(distinct, grads, step=i, wire=self._wire)


class Echo:
    """Sends to an echo server, and receives, messages as large as those of an exchange.

    item  bytes per number of an embedding or gradient
    """

    def __init__(self, address: str, steps: list[Step], dim: int, item: int) -> None:
        self._channel = grpc.insecure_channel(
            address, options=[("grpc.max_receive_message_length", -1)]
        )
        self._outbox: SimpleQueue[bytes | None] = SimpleQueue()
        self._replies = self._channel.stream_stream("/Echo/Stream")(iter(self._outbox.get, None))
        distinct = [len(step[1]) for step in steps]
        self._messages = [
            (n * dim * item).to_bytes(4, "little") + bytes(n * (8 + 4 + dim * item) + n * 8)
            for n in distinct
        ]

    def step(self, i: int) -> None:
        """Send a message of the size for step ``i``, and wait for the reply."""
        self._outbox.put(self._messages[i % len(self._messages)])
        next(self._replies)

    def close(self) -> None:
        """End the stream."""
        self._outbox.put(None)
        self._channel.close()


def fill(table: Table, keys: Ids) -> None:
    """Create a row for every key by pushing gradients of zero."""
    zero = np.zeros((CHUNK, table.dim), np.float32)
    for at in range(0, len(keys), CHUNK):
        part = keys[at : at + CHUNK]
        table.push(part, zero[: len(part)])


def local_table(keys: Ids, dim: int) -> LocalTable:
    """Return a table in this process with a row for every key."""
    optimizer = make_optimizer("adagrad", 0.05, {})
    initializer = make_initializer("uniform", {})
    schema = TableSchema(name="local", dim=dim, optimizer=optimizer, initializer=initializer)
    table = LocalTable(schema, Budget(8 << 30))
    zero, ones = np.zeros((CHUNK, dim), np.float32), np.ones(CHUNK, np.uint32)
    for at in range(0, len(keys), CHUNK):
        part = keys[at : at + CHUNK].view(np.uint64)
        table.push(part, zero[: len(part)], ones[: len(part)], version=1, step=0)
    return table


class Local:
    """Does the standard work on a table in this process.

    A step includes finding the distinct keys and copying their rows to all positions of the batch.

    keys   int64[rows], the key of each id
    steps  steps of the standard work, used in a cycle
    """

    def __init__(self, table: LocalTable, keys: Ids, steps: list[Step]) -> None:
        self._table = table
        self._map = routing.even_map(1)
        self._steps = [(keys[ids], keys[distinct], grads) for ids, distinct, grads in steps]

    def step(self, i: int) -> None:
        """Push the gradients of the last step and pull the rows of this step."""
        ids, _, _ = self._steps[i % len(self._steps)]
        _, distinct, grads = self._steps[(i - 1) % len(self._steps)]
        dim = grads.shape[1]
        push, pull = Batch(distinct, self._map), Batch(ids, self._map)
        sums = push.sum(grads, "local", dim)
        self._table.push(push.keys, sums, push.split.counts, version=i, step=i)
        rows = np.empty((len(pull.keys), dim), np.float32)
        self._table.pull(pull.keys, "train", rows)
        routing.scatter(rows, 0, pull.split.inverse, np.empty((len(ids), dim), np.float32))


class Tables(NamedTuple):
    """The same table in each place where the standard work is measured."""

    stream: Table  # on a server, through a stream
    unary: Table  # the same table, through unary calls
    busy: Table  # on a server that polls
    durable: Table  # on a server with a log
    local: LocalTable  # in this process


def tables(stack: ExitStack, work: Work, keys: Ids) -> Tables:
    """Start three servers, and create and fill a table on each and in this process.

    stack  stops the servers when it is closed
    keys   int64[rows], the key of each id
    """

    def table(addresses: list[str]) -> Table:
        client = stack.enter_context(Client(addresses))
        new = client.create_table("standard", work.dim, optimizer="adagrad", lr=0.05)
        fill(new, keys)
        return new

    addresses, _ = stack.enter_context(shards(1))
    durable, _ = stack.enter_context(shards(1, durable=True))
    busy, _ = stack.enter_context(shards(1, busy_poll=BUSY_POLL))
    stream = table(addresses)
    unary = stack.enter_context(Client(addresses, transport="unary")).table("standard")
    return Tables(stream, unary, table(busy), table(durable), local_table(keys, work.dim))


def contenders_for(
    stack: ExitStack, tables: Tables, address: str, keys: Ids, steps: list[Step]
) -> dict[str, Contender]:
    """Return our contenders by name (see the module docstring).

    stack    closes the streams to the echo server
    address  of the echo server
    keys     int64[rows], the key of each id
    steps    steps of the standard work, used in a cycle
    """
    dim = tables.stream.dim
    contenders: dict[str, Contender] = {"table": Local(tables.local, keys, steps).step}
    for wire, item in (("float32", 4), ("bfloat16", 2)):
        trainer = Trainer(tables.stream, keys, steps, wire)
        limit = Echo(address, steps, dim, item)
        stack.callback(limit.close)
        contenders[f"echo {wire}"] = limit.step
        contenders[f"exchange {wire}"] = trainer.exchange
        contenders[f"training {wire}"] = trainer.training
        contenders[f"stream {wire}"] = trainer.pull_push
        contenders[f"unary {wire}"] = Trainer(tables.unary, keys, steps, wire).pull_push
    trainer = Trainer(tables.busy, keys, steps, "float32")
    contenders["exchange busy"] = trainer.exchange
    contenders["training busy"] = trainer.training
    contenders["stream busy"] = trainer.pull_push
    contenders["exchange durable"] = Trainer(tables.durable, keys, steps, "float32").exchange
    return contenders


def measure_peers(
    peers: dict[str, Peer], contenders: dict[str, Contender], steps: list[Step], count: int
) -> dict[str, list[float]]:
    """Run each peer, and then our exchange; return the seconds of each step, by name.

    count  steps of each peer

    The exchange runs next to each peer, so that both see the same minute of the machine.
    """
    times: dict[str, list[float]] = {}
    for name, peer in peers.items():
        peer.run(steps[:20])
        times[name] = peer.run((steps * 4)[:count])
        ours = "training" if "training" in name else "exchange"
        again = {each: contenders[each] for each in (f"{ours} float32", f"{ours} busy")}
        for each, seconds in interleave(again, steps=60, rounds=2).items():
            times[f"{each}, next to {name}"] = seconds
    return times


def lines(times: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Return the rows of the report. ``times`` has the seconds of each step, by contender."""
    base = np.median(times["exchange float32"])
    bound = np.median(times["echo float32"]) + np.median(times["table"])
    return [
        {
            "contender": name,
            **milliseconds(seconds),
            "x exchange float32": float(np.median(seconds) / base),
            "x (echo + table)": float(np.median(seconds) / bound),
            "steps": len(seconds),
        }
        for name, seconds in times.items()
    ]


def main() -> None:
    """Run the benchmark and print its tables."""
    parser = arguments(__doc__)
    parser.add_argument(
        "--peers",
        default=";".join(PEERS),
        help="Names of the peers to run, separated by semicolons; an empty string runs none."
        ' Default: "%(default)s".',
    )
    options = parser.parse_args()
    report = Report("step", options.json)
    work = Work(rows=200_000) if options.quick else Work()
    count = 60 if options.quick else 300
    keys = keys_of(np.arange(work.rows))
    with ExitStack() as stack:
        ours = tables(stack, work, keys)
        address, _ = stack.enter_context(echo())
        peers: dict[str, Peer] = {}
        for name in filter(None, options.peers.split(";")):
            try:
                peers[name] = stack.enter_context(closing(PEERS[name](work)))
            except Unavailable as reason:
                report.note(f"{name} is left out: {reason}")
        for batch in (10_000, 1_000):
            steps = standard_work(Work(rows=work.rows, batch=batch), 64)
            contenders = contenders_for(stack, ours, address, keys, steps)
            times = interleave(contenders, steps=count, rounds=6)
            times |= measure_peers(peers, contenders, steps, max(count * 2 // 3, 20))
            report.section(
                f"step, B = {batch:,} ({np.mean([len(s[1]) for s in steps]):,.0f} distinct),"
                f" {work.rows:,} rows, 1 shard",
                lines(times),
            )
    report.close()


if __name__ == "__main__":
    main()
