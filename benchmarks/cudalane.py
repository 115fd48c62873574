"""Measure pulls into an array on the GPU through the same-host lane.

All contenders pull the same rows into the same CUDA tensor, in turns.

    cuda lane          the server copies rows from GPU memory to GPU memory of the client
    shm lane           the same rows through shared memory of the host, then to the GPU
    shm lane, no GPU   the same, from a server whose rows are in host memory
    ..., batch         the distinct keys were found before (Client.batch)
    cuda lane, narrow  the same keys of a table of dim 4, batch: what keys and messages cost
    keys               only finds the distinct keys: what the client does before a pull
    copy               only copies so many rows from page-locked memory to the GPU

Then EmbeddingGroup.pipeline with device="cuda" and staleness 1 trains a sum of as many rows, with
rows through GPU memory ("cuda lane") and through shared memory and page-locked buffers ("shm
lane"). A step is the time from one batch to the next.
"""

from __future__ import annotations

import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import Report, arguments, interleave, milliseconds
from benchmarks.servers import Server
from psclient import Client, Table

DIM, NARROW, BATCH, ROWS = 128, 4, 100_000, 400_000
HBM_BYTES = 4 << 30
WARM = 5  # first steps of a pipeline, which are not measured
PUSHES = 60  # maximum number of pushes of all rows until they are in GPU memory
TARGET = 5.0  # rows per second of the cuda lane / those of the shm lane


def open_table(stack: ExitStack, directory: Path, *flags: str) -> tuple[str, Client]:
    """Start a server, which ends with ``stack``; return its address, and a client that uses
    its lane. The tables "t" and "narrow" are filled."""
    server = Server(directory, "--lane", str(directory), *flags, durable=False)
    server.start()
    stack.callback(server.stop)
    client = stack.enter_context(Client([server.address], timeout=300, lane="require"))
    for name, dim in (("t", DIM), ("narrow", NARROW)):
        fill(client.create_table(name, dim, optimizer="adagrad", initializer="normal"))
    return server.address, client


def fill(table: Table) -> None:
    """Push to all rows, until they are in GPU memory if the server has any."""
    gradients = np.random.default_rng(1).standard_normal((BATCH, table.dim), dtype=np.float32)
    for _ in range(PUSHES):
        for at in range(0, ROWS, BATCH):
            table.push(np.arange(at, at + BATCH), gradients)
        tiers = table.describe().tiers
        if "hbm" not in tiers or tiers["hbm"].rows == ROWS:
            break


def parts(table: Table, batches: list[Any], out: Any) -> str:
    """Return the median times of the parts of a pull."""
    seen = []
    for i in range(40):
        start = time.perf_counter()
        pending = table.start_pull(batches[i % 4], out=out)
        sent = time.perf_counter()
        assert pending._request is not None
        pending._request.wait()
        answered = time.perf_counter()
        pending.result()
        seen.append((sent - start, answered - sent, time.perf_counter() - answered))
    send, wait, copy = 1e3 * np.median(np.array(seen[10:]), axis=0)
    return f"send {send:.2f} ms, wait for the answer {wait:.2f} ms, copy to the array {copy:.2f} ms"


def step_times(client: Client, keys: list[Any], steps: int) -> list[float]:
    """Train on batches of keys, in turn; return the seconds of each step but the first ones."""
    import torch

    from psclient.torch import Embedding, EmbeddingGroup

    group = EmbeddingGroup(client, {"t": Embedding(client.table("t"))}).to("cuda")
    rows, seen = group.optimizer(), []
    loader = [keys[i % len(keys)] for i in range(steps + WARM)]
    options: dict[str, Any] = {"staleness": 1, "device": "cuda"}
    with group.pipeline(loader, lambda each: {"t": each}, **options) as batches:
        start = time.perf_counter()
        for _, outputs in batches:
            outputs["t"].sum().backward()  # type: ignore[no-untyped-call]
            rows.step()
            torch.cuda.synchronize()
            seen.append(time.perf_counter() - start)
            start = time.perf_counter()
    return seen[WARM:]


def pipelines(clients: dict[str, Client], keys: list[Any], steps: int) -> list[dict[str, Any]]:
    """Return a row for each way of the rows to the GPU; the ways take turns."""
    times: dict[str, list[float]] = {name: [] for name in clients}
    for _ in range(4):
        for name, client in clients.items():
            times[name] += step_times(client, keys, steps)
    return [
        {"contender": name, **milliseconds(each), "million rows/s": BATCH / np.median(each) / 1e6}
        for name, each in times.items()
    ]


def without_gpu_regions(client: Client) -> None:
    """Make a client use shared memory of the host only."""
    for link in client._connect(client._deadline()).links:
        link._pipe.gpu_regions.forget()  # type: ignore[attr-defined]


def main() -> int:
    """Run the benchmark and print its table; return the exit status."""
    options = arguments(__doc__).parse_args()
    try:
        import torch
    except ImportError as error:
        print(f"pulls into CUDA tensors are not measured without torch: {error}", file=sys.stderr)
        return 0
    if not torch.cuda.is_available():
        print("no CUDA device, nothing to measure", file=sys.stderr)
        return 1
    report = Report("cudalane", options.json)
    rng = np.random.default_rng(2)
    keys = [rng.permutation(ROWS)[:BATCH] for _ in range(4)]
    out = torch.empty((BATCH, DIM), device="cuda")
    pinned = torch.empty((BATCH, DIM), pin_memory=True)

    def copy(_: int) -> None:
        out.copy_(pinned, non_blocking=True)
        torch.cuda.synchronize()

    with ExitStack() as stack, tempfile.TemporaryDirectory(prefix="ps-bench-") as directory:
        flags = "--hbm-bytes", str(HBM_BYTES)
        address, near = open_table(stack, Path(directory, "gpu"), *flags)
        _, far = open_table(stack, Path(directory, "host"))
        other = stack.enter_context(Client([address], timeout=300, lane="require"))
        other.table("t").pull(keys[0][:10])
        without_gpu_regions(other)
        clients = {"cuda lane": near, "shm lane": other, "shm lane, no GPU": far}
        check(clients, keys[0], out)
        contenders: dict[str, Any] = {}
        for name, client in clients.items():
            table, batches = client.table("t"), [client.batch(each) for each in keys]
            contenders[name] = lambda i, t=table: t.pull(keys[i % 4], out=out)
            contenders[f"{name}, batch"] = lambda i, t=table, b=batches: t.pull(b[i % 4], out=out)
        narrow, thin = near.table("narrow"), torch.empty((BATCH, NARROW), device="cuda")
        batches = [near.batch(each) for each in keys]
        contenders["cuda lane, narrow"] = lambda i: narrow.pull(batches[i % 4], out=thin)
        contenders["keys"] = lambda i: near.batch(keys[i % 4])
        contenders["copy"] = copy
        times = interleave(contenders, steps=12 if options.quick else 40, rounds=4, warm=3)
        shares = {
            "cuda lane, batch": parts(near.table("t"), batches, out),
            "cuda lane, narrow": parts(narrow, batches, thin),
            "shm lane, batch": parts(other.table("t"), batches, out),
        }
        ways = {name: clients[name] for name in ("cuda lane", "shm lane")}
        steps = pipelines(ways, keys, 12 if options.quick else 40)
        in_gpu = near.describe_table("t").tiers["hbm"].rows
    medians = {name: float(np.median(each)) for name, each in times.items()}
    rows = [
        {"contender": name, **milliseconds(each), "million rows/s": BATCH / medians[name] / 1e6}
        for name, each in times.items()
    ]
    report.section(f"pull of {BATCH:,} distinct rows of dim {DIM} into a CUDA tensor", rows)
    report.section(f"step of a pipeline with {BATCH:,} rows of dim {DIM}, staleness 1", steps)
    for name, text in shares.items():
        report.note(f"{name}: {text}")
    report.note(f"{in_gpu:,} of {ROWS:,} rows in GPU memory")
    for name in ("", ", batch"):
        for base in ("shm lane", "shm lane, no GPU"):
            gain = medians[base + name] / medians["cuda lane" + name]
            report.note(f"cuda lane{name}: {gain:.2f} x the rows/s of {base}, target {TARGET}")
    report.close()
    return 0


def check(clients: dict[str, Client], keys: Any, out: Any) -> None:
    """Check that all contenders of a server pull the same rows."""
    for client in clients.values():
        table = client.table("t")
        wanted = table.pull(keys)
        for _ in range(2):
            table.pull(keys, out=out)
            assert np.array_equal(out.cpu().numpy(), wanted)


if __name__ == "__main__":
    sys.exit(main())
