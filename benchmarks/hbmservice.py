"""Measure what rows in GPU memory give a trainer that reaches its server by gRPC.

Each step pulls 100,000 distinct rows (dim 128, Adam) and pushes gradients to them, in one exchange.
One server has its rows in GPU memory, one in host memory. Their steps alternate in blocks.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import Contender, Report, interleave, milliseconds
from benchmarks.servers import Server
from psclient import Client

DIM, BATCH, ROWS = 128, 100_000, 1_000_000
HBM_BYTES = 4 << 30
SERVERS = {"host memory": [], "GPU memory": ["--hbm-bytes", str(HBM_BYTES)]}


def measure(report: Report, *, quick: bool) -> None:
    """Add a section for servers without and one for servers with a data directory."""
    rows, steps = (4 * BATCH, 12) if quick else (ROWS, 60)
    for durable in (False, True):
        with ExitStack() as stack, tempfile.TemporaryDirectory(prefix="ps-bench-") as directory:
            clients = {
                name: _client(stack, Path(directory, name), flags, durable=durable)
                for name, flags in SERVERS.items()
            }
            lines = _compare(clients, rows, steps)
        kind = "with" if durable else "without"
        title = f"exchange of {BATCH:,} rows over gRPC, dim {DIM}, Adam, {kind} a data directory"
        report.section(title, lines)


def _client(stack: ExitStack, directory: Path, flags: list[str], *, durable: bool) -> Client:
    """Start a server, which ends with ``stack``, and return a client."""
    server = Server(directory, *flags, durable=durable)
    server.start()
    stack.callback(server.stop)
    return stack.enter_context(Client([server.address], timeout=300, lane="never"))


def _compare(clients: dict[str, Client], rows: int, steps: int) -> list[dict[str, Any]]:
    """Return a line for each client, after steps of all of them in turns."""
    rng = np.random.default_rng(1)
    batches = [rng.permutation(rows)[:BATCH] for _ in range(8)]
    gradients = rng.standard_normal((BATCH, DIM), dtype=np.float32)
    contenders: dict[str, Contender] = {}
    for name, client in clients.items():
        table = client.create_table("t", DIM, optimizer="adam")
        for at in range(0, 3 * rows, BATCH):  # several times, so that rows move
            table.push(np.arange(at, at + BATCH) % rows, gradients)

        def step(number: int, table: Any = table) -> None:
            keys = batches[number % len(batches)]
            table.exchange(keys, (keys, gradients))

        contenders[name] = step
    before = {name: client.describe_table("t").tiers for name, client in clients.items()}
    times = interleave(contenders, steps=steps, rounds=4, warm=2)
    return [
        {
            "rows in": name,
            **milliseconds(times[name]),
            "million rows/s": BATCH / float(np.median(times[name])) / 1e6,
            "hits in GPU memory": _share(before[name], client.describe_table("t").tiers),
        }
        for name, client in clients.items()
    ]


def _share(before: Any, after: Any) -> float | None:
    """Return the share of the keys whose rows were in GPU memory."""
    if "hbm" not in after:
        return None
    hits = {name: after[name].hits - before[name].hits for name in after}
    return float(hits["hbm"] / max(1, sum(hits.values())))
