"""Measure what counting costs: the share of an exchange that the metrics take.

client    the standard exchange through the public client, with a server that has a log, wall time
counting  the calls that count one exchange, alone: of its request, tables, sizes, clients and
          freshness, and of the engine's time
without   exchanges on a server in this process, without gRPC: decode, check, apply gradients, read
          rows, encode. The functions that count do nothing. Processor time
with      the same exchanges, counted. Both alternate with each exchange
scrape    one request of Prometheus for /metrics, at several numbers of tables

"share" is the time of counting divided by that of the standard exchange.
"""

from __future__ import annotations

import asyncio
import gc
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from prometheus_client import generate_latest

from benchmarks.report import Report, arguments, interleave
from benchmarks.servers import shards
from benchmarks.step import Trainer, fill
from benchmarks.work import Work, keys_of, standard_work
from psclient import Client
from psproto import codec
from psproto import ps_pb2 as pb
from psserver.config import load
from psserver.engine import Engine, _outcome
from psserver.exchange import Exchanges
from psserver.schemas import read_schema
from psserver.server import Server
from psserver.stats import ServiceStats
from storage.histogram import Histogram

PORT = 7391
ROWS = 200_000  # of the table; the time of an exchange hardly depends on it
BATCHES = (10_000, 1_000)  # ids per exchange
TABLES = (1, 100, 4096)
CALLS = 20_000  # calls that count, timed together
WARM = 50


def schema(name: str, dim: int) -> pb.TableSchema:
    """Return the schema of a table that is updated with SGD."""
    return pb.TableSchema(
        name=name,
        dim=dim,
        optimizer=pb.Rule(name="sgd", parameters={"lr": 0.05}),
        initializer=pb.Rule(name="zeros"),
    )


def messages(work: Work, steps: int) -> list[bytes]:
    """Return encoded exchanges: each pushes gradients, and pulls rows of the next step."""
    keys, made = keys_of(np.arange(work.rows)), []
    drawn = standard_work(work, steps)
    for at, (_, distinct, gradients) in enumerate(drawn):
        pulled = drawn[(at + 1) % steps][1]
        push = pb.PushHeader(table="t", dtype=pb.DTYPE_FLOAT32)
        made.append(
            codec.encode_exchange(
                codec.Exchange(
                    [codec.PushMessage(push, keys[distinct].astype(np.uint64), None, gradients)],
                    [codec.PullMessage(pb.PullHeader(table="t"), keys[pulled].astype(np.uint64))],
                )
            )
        )
    return made


@contextmanager
def uncounted() -> Iterator[None]:
    """Make the functions that count requests do nothing while the block runs."""
    saved = (Exchanges._count, Engine._execute)

    def plain(self: Any, call: Callable[[], Any], deadline: float, since: float) -> Any:
        return _outcome(call, deadline, since)

    Exchanges._count = lambda *_: None  # type: ignore[method-assign]
    Engine._execute = plain  # type: ignore[method-assign]
    try:
        yield
    finally:
        Exchanges._count, Engine._execute = saved  # type: ignore[method-assign]


class Local:
    """Runs encoded exchanges on the server of this process."""

    def __init__(self, server: Server) -> None:
        self.exchanges = server._service._exchanges
        self._limits = server._service._limits

    async def run(self, data: bytes) -> tuple[codec.Exchange, codec.Exchanged]:
        """Run one exchange and encode its reply. Returns (exchange, result)."""
        start = time.perf_counter()
        reservation = self._limits.admit(len(data))
        try:
            read = self.exchanges.read_at_once(_decode, data, len(data))
            assert read is not None
            begun = self.exchanges.begin(read[1], start, math.inf, reservation)
            done = await self.exchanges.finish(begun)
            codec.encode_exchanged(done)
        finally:
            reservation.release()
        assert begun[1] is not None
        return begun[1], done


def _decode(data: bytes, budget: int) -> tuple[None, codec.Exchange]:
    return None, codec.decode_exchange(data, budget)


async def compare(local: Local, made: list[bytes], steps: int) -> tuple[list[float], list[float]]:
    """Return (seconds of processor time of counted exchanges, of exchanges that are not)."""
    counted: list[float] = []
    plain: list[float] = []
    gc.disable()
    for at in range(2 * (steps + WARM)):
        data = made[at // 2 % len(made)]
        if (at + at // 2) % 2:  # 0, 1, 1, 0: neither is always the first to use a message
            start = time.process_time()
            await local.run(data)
            counted.append(time.process_time() - start)
        else:
            with uncounted():
                start = time.process_time()
                await local.run(data)
                plain.append(time.process_time() - start)
    gc.enable()
    return counted[WARM:], plain[WARM:]


async def counting(local: Local, server: Server, data: bytes) -> float:
    """Return the seconds that the calls take which count one exchange."""
    exchange, done = await local.run(data)
    count, execute = local.exchanges._count, server._engine._execute
    begun = time.perf_counter()

    def seconds(call: Callable[..., object], *arguments: object) -> float:
        start = time.thread_time()
        for _ in range(CALLS):
            call(*arguments)
        return (time.thread_time() - start) / CALLS

    engine = seconds(execute, _nothing, math.inf, begun) - seconds(_outcome, _nothing, math.inf, 0)
    return seconds(count, exchange, done, begun, "stream") + engine


def _nothing() -> None:
    pass


def through_the_client(steps: int) -> dict[int, float]:
    """Return the median seconds of a standard exchange, by number of ids."""
    found = {}
    keys = keys_of(np.arange(ROWS))
    with shards(1, durable=True) as (addresses, _), Client(addresses) as client:
        table = client.create_table("t", Work().dim, optimizer="sgd", lr=0.05)
        fill(table, keys)
        for batch in BATCHES:
            drawn = standard_work(Work(rows=ROWS, batch=batch), 16)
            trainer = Trainer(table, keys, drawn, "float32")
            times = interleave({"exchange": trainer.exchange}, steps=steps, rounds=2)
            found[batch] = float(np.median(times["exchange"]))
    return found


async def measure(report: Report, steps: int, client: dict[int, float]) -> None:
    """Compare exchanges of each size, then time scrapes.

    client  seconds of an exchange through the client, by number of ids
    """
    with tempfile.TemporaryDirectory() as directory:
        flags = ["--port", str(PORT), "--metrics-port", "0", "--data-dir", directory]
        server = Server(load(flags), lambda: None)
        await server.listen()
        await server.open()
        work, rows = Work(rows=ROWS), []
        shard, engine = server._shard, server._engine
        await engine.submit(lambda: shard.create_table(read_schema(schema("t", work.dim))))
        local = Local(server)
        for batch in BATCHES:
            made = messages(Work(rows=ROWS, batch=batch), 16)
            counted, plain = await compare(local, made, steps)
            alone = await counting(local, server, made[0])
            median = float(np.median(plain))
            rows.append(
                {
                    "B": f"{batch:,}",
                    "client ms": client[batch] * 1e3,
                    "counting us": alone * 1e6,
                    "share %": 100 * alone / client[batch],
                    "without ms": median * 1e3,
                    "with ms": float(np.median(counted)) * 1e3,
                    "with / without": float(np.median(counted)) / median,
                }
            )
        report.section("Cost of counting", rows)
        await scrapes(report, server)
        await server.close()


async def scrapes(report: Report, server: Server) -> None:
    """Time scrapes at several numbers of tables, each of which served requests."""
    shard, registry, rows = server._shard, server._metrics.registry, []
    stats: ServiceStats = server._stats
    for tables in TABLES:
        for at in range(len(shard.tables()), tables):
            made = read_schema(schema(f"t{at}", 4))
            await server._engine.submit(partial(shard.create_table, made))
            for method in ("Pull", "Push"):
                stats.used(method, made.name, 1, 8)
            stats.waits[made.name] = Histogram()
        seconds = []
        for _ in range(5):
            start = time.thread_time()
            page = generate_latest(registry)
            seconds.append(time.thread_time() - start)
        lines = [line for line in page.decode().splitlines() if not line.startswith("#")]
        rows.append({"tables": str(tables), "ms": 1e3 * min(seconds), "series": len(lines)})
    report.section("Scrape, processor time", rows)


def main() -> None:
    """Run the benchmark with the options of the command line."""
    options = arguments(__doc__).parse_args()
    report = Report("metrics", options.json)
    steps = 100 if options.quick else 1500
    asyncio.run(measure(report, steps, through_the_client(steps)))
    report.close()


if __name__ == "__main__":
    main()
