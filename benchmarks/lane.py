"""Measure the same-host lane against the gRPC stream and against torch in this process.

All contenders of a section do the same steps of the standard work (docs/benchmarks.md), in turns.

    stream     an exchange through gRPC: gradients of the last step, keys of this step
    lane       the same exchange through the same-host lane
    durable    the same two with a server that keeps a log
    torch      torch.nn.Embedding and Adagrad in this process, given a gradient per distinct key
    table      the work on a table in this process, without a server
    switch     a message of 100 bytes over a Unix socket to an asyncio server, and its reply
    bound      table + switch: what no client of a Python server on this machine can beat

Further sections: wide rows, two shards, and eight trainers at once, each in its own process.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import numpy as np
import uvloop

from benchmarks.peers import PEERS, Unavailable
from benchmarks.report import Report, arguments, interleave, milliseconds
from benchmarks.servers import helper, shards
from benchmarks.step import Local, Trainer, fill, local_table
from benchmarks.work import Ids, Step, Work, keys_of, standard_work
from psclient import Client, Table

TRAINERS = 8
SECONDS = 5.0  # time that the trainers of one measurement run
TARGETS = {10_000: (0.5, 0.6), 1_000: (0.4, 0.6)}  # by B: lane / stream, lane / torch
WIDE = 3.0  # target: rows per second of the lane / those of the stream
MESSAGE = 100  # bytes of the messages of ``switch``


class Switch:
    """Sends a message over a Unix socket to a server process, and waits for the reply."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)

    def step(self, _: int) -> None:
        self._socket.send(bytes(MESSAGE))
        self._socket.recv(MESSAGE)

    def close(self) -> None:
        self._socket.close()


@contextmanager
def switch() -> Iterator[Switch]:
    """Run the server of a Switch as a process during a block."""
    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/switch"
        with helper("benchmarks.lane", "--switch", path), closing(Switch(path)) as client:
            yield client


async def _serve_switch(path: str) -> None:
    class Echo(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            self._transport = transport

        def data_received(self, data: bytes) -> None:
            self._transport.write(data)

    server = await asyncio.get_running_loop().create_unix_server(Echo, path)
    print("ready", flush=True)
    await server.serve_forever()


def open_tables(stack: ExitStack, work: Work, keys: Ids, count: int, *, durable: bool) -> list[Any]:
    """Start servers, and fill a table on them.

    stack  stops the servers when it is closed
    keys   int64[rows], the key of each id
    count  number of shards

    Returns [the table through gRPC, the same through the lane, addresses].
    """
    addresses, _ = stack.enter_context(shards(count, durable=durable, lane=True))
    stream = stack.enter_context(Client(addresses, lane="never"))
    table = stream.create_table("standard", work.dim, optimizer="adagrad", lr=0.05)
    fill(table, keys)
    lane = stack.enter_context(Client(addresses, lane="require"))
    return [table, lane.table("standard"), addresses]


def standard(report: Report, work: Work, count: int) -> None:
    """Measure exchanges of the standard work with one shard and with two.

    count  steps of each contender
    """
    keys = keys_of(np.arange(work.rows))
    with ExitStack() as stack:
        one = open_tables(stack, work, keys, 1, durable=False)
        kept = open_tables(stack, work, keys, 1, durable=True)
        two = open_tables(stack, work, keys, 2, durable=False)
        local, pause = local_table(keys, work.dim), stack.enter_context(switch())
        for batch in (10_000, 1_000):
            steps = standard_work(Work(rows=work.rows, dim=work.dim, batch=batch), 64)
            contenders = {
                "stream": Trainer(one[0], keys, steps, "float32").exchange,
                "lane": Trainer(one[1], keys, steps, "float32").exchange,
                "stream, durable": Trainer(kept[0], keys, steps, "float32").exchange,
                "lane, durable": Trainer(kept[1], keys, steps, "float32").exchange,
                "stream, 2 shards": Trainer(two[0], keys, steps, "float32").exchange,
                "lane, 2 shards": Trainer(two[1], keys, steps, "float32").exchange,
                "table": Local(local, keys, steps).step,
                "switch": pause.step,
            }
            if (torch := torch_step(work, steps)) is not None:
                contenders["torch"] = torch
            times = interleave(contenders, steps=count, rounds=6)
            report.section(f"exchange, B = {batch:,}, dim {work.dim}", lines(times))
            conclude(report, batch, {name: float(np.median(each)) for name, each in times.items()})


def torch_step(work: Work, steps: list[Step]) -> Any:
    """Return a function that does a step with torch in this process; None without torch."""
    try:
        peer = PEERS["torch in-process"](work)
    except Unavailable:
        return None
    return lambda i: peer.step(*steps[i % len(steps)])


def lines(times: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Return the rows of a section. ``times`` has the seconds of each step, by contender."""
    stream = float(np.median(times["stream"]))
    return [
        {"contender": name, **milliseconds(each), "x stream": float(np.median(each) / stream)}
        for name, each in times.items()
    ]


def conclude(report: Report, batch: int, medians: dict[str, float]) -> None:
    """Compare the lane with its targets; where one is missed, print what bounds it."""
    bound = medians["table"] + medians["switch"]
    for name, target in zip(("stream", "torch"), TARGETS[batch], strict=True):
        if name in medians:
            ratio = medians["lane"] / medians[name]
            text = f"B = {batch:,}: lane / {name} = {ratio:.2f}, target {target}"
            if ratio > target:
                text += (
                    f": missed; the bound (table + switch) / {name} is {bound / medians[name]:.2f}"
                )
            report.note(text)


def wide(report: Report, *, quick: bool) -> None:
    """Measure pulls and exchanges of 100,000 distinct rows of dim 128."""
    n = 10_000 if quick else 100_000
    work = Work(rows=2 * n, dim=128)
    keys = keys_of(np.arange(work.rows))
    rng = np.random.default_rng(3)
    batches = [keys[rng.choice(work.rows, n, replace=False)] for _ in range(4)]
    grads = rng.standard_normal((n, work.dim), dtype=np.float32)
    with ExitStack() as stack:
        stream, lane, _ = open_tables(stack, work, keys, 1, durable=False)

        def pull(table: Table) -> Any:
            return lambda i: table.pull(batches[i % 4])

        def exchange(table: Table) -> Any:
            return lambda i: table.exchange(batches[i % 4], (batches[(i + 1) % 4], grads), step=i)

        times = interleave(
            {
                "stream pull": pull(stream),
                "lane pull": pull(lane),
                "stream exchange": exchange(stream),
                "lane exchange": exchange(lane),
            },
            steps=12 if quick else 40,
            rounds=4,
            warm=2,
        )
    rows = [
        {
            "contender": name,
            **milliseconds(each),
            "million rows/s": n * (2 if "exchange" in name else 1) / np.median(each) / 1e6,
        }
        for name, each in times.items()
    ]
    report.section(f"{n:,} distinct rows of dim {work.dim}", rows)
    for kind in ("pull", "exchange"):
        gain = float(np.median(times[f"stream {kind}"]) / np.median(times[f"lane {kind}"]))
        report.note(f"{kind}: {gain:.2f} x the rows/s of the stream, target {WIDE}")


TURNS = [(batch, lane) for batch in (10_000, 1_000) for lane in ("never", "require") * 2]


def train(addresses: list[str], seed: int, rows: int, together: Any, out: Any) -> None:
    """Exchange for SECONDS in each of TURNS, in this process.

    together  barrier at which all trainers wait before each turn
    out       queue that receives (number of the turn, steps done)
    """
    keys = keys_of(np.arange(rows))
    with Client(addresses, lane="never") as stream, Client(addresses, lane="require") as lane:
        tables = {"never": stream.table("standard"), "require": lane.table("standard")}
        for turn, (batch, which) in enumerate(TURNS):
            steps = standard_work(Work(rows=rows, batch=batch, seed=seed), 8)
            trainer = Trainer(tables[which], keys, steps, "float32")
            for i in range(10):
                trainer.exchange(i)
            together.wait()
            done, end = 0, time.monotonic() + SECONDS
            while time.monotonic() < end:
                trainer.exchange(done)
                done += 1
            out.put((turn, done))


def trainers(report: Report, work: Work) -> None:
    """Measure eight trainers at once, each in its own process, on one shard."""
    context = multiprocessing.get_context("spawn")
    keys = keys_of(np.arange(work.rows))
    with ExitStack() as stack:
        _, _, addresses = open_tables(stack, work, keys, 1, durable=False)
        together, out = context.Barrier(TRAINERS), context.Queue()
        several = [
            context.Process(target=train, args=(addresses, seed, work.rows, together, out))
            for seed in range(TRAINERS)
        ]
        for each in several:
            each.start()
        done = [0] * len(TURNS)
        for _ in range(TRAINERS * len(TURNS)):
            turn, steps = out.get()
            done[turn] += steps
        for each in several:
            each.join()
    names = {"never": "stream", "require": "lane"}
    report.section(
        f"{TRAINERS} trainers at once, {os.cpu_count()} cores",
        [
            {
                "B": f"{batch:,}",
                "contender": names[which],
                "steps/s": done[turn] / SECONDS,
                # each turn of the lane follows one of the stream
                "x stream": done[turn] / done[turn - 1] if which == "require" else 1.0,
            }
            for turn, (batch, which) in enumerate(TURNS)
        ],
    )


def main() -> None:
    """Run the benchmark and print its tables."""
    if sys.argv[1:2] == ["--switch"]:
        uvloop.run(_serve_switch(sys.argv[2]))
        return
    parser = arguments(__doc__)
    parser.add_argument(
        "--only", choices=["standard", "wide", "trainers"], help="Run this section alone."
    )
    options = parser.parse_args()
    report = Report("lane", options.json)
    work = Work(rows=200_000) if options.quick else Work()
    if options.only in (None, "standard"):
        standard(report, work, 60 if options.quick else 300)
    if options.only in (None, "wide"):
        wide(report, quick=options.quick)
    if options.only in (None, "trainers"):
        trainers(report, work)
    report.close()


if __name__ == "__main__":
    main()
