"""Measure pulls into an array on the GPU through the same-host lane.

All contenders pull the same rows into the same CUDA tensor, in turns.

    cuda lane          the server copies rows from GPU memory to GPU memory of the client
    shm lane           the same rows through shared memory of the host, then to the GPU
    shm lane, no GPU   the same, from a server whose rows are in host memory
    ..., batch         the distinct keys were found before (Client.batch)
    keys               only finds the distinct keys: what the client does before a pull
    copy               only copies so many rows from page-locked memory to the GPU
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import Report, arguments, interleave, milliseconds
from benchmarks.servers import Server
from psclient import Client

DIM, BATCH, ROWS = 128, 100_000, 400_000
HBM_BYTES = 4 << 30
PUSHES = 60  # maximum number of pushes of all rows until they are in GPU memory
TARGET = 5.0  # rows per second of the cuda lane / those of the shm lane


def open_table(stack: ExitStack, directory: Path, *flags: str) -> tuple[str, Client]:
    """Start a server, which ends with ``stack``; return its address, and a client that uses
    its lane. The table "t" is filled."""
    server = Server(directory, "--lane", str(directory), *flags, durable=False)
    server.start()
    stack.callback(server.stop)
    client = stack.enter_context(Client([server.address], timeout=300, lane="require"))
    table = client.create_table("t", DIM, optimizer="adagrad", initializer="normal")
    gradients = np.random.default_rng(1).standard_normal((BATCH, DIM), dtype=np.float32)
    for _ in range(PUSHES if flags else 1):
        for at in range(0, ROWS, BATCH):
            table.push(np.arange(at, at + BATCH), gradients)
        tiers = client.describe_table("t").tiers
        if "hbm" in tiers and tiers["hbm"].rows == ROWS:
            break
    return server.address, client


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
        contenders["keys"] = lambda i: near.batch(keys[i % 4])
        contenders["copy"] = copy
        times = interleave(contenders, steps=12 if options.quick else 40, rounds=4, warm=3)
        in_gpu = near.describe_table("t").tiers["hbm"].rows
    medians = {name: float(np.median(each)) for name, each in times.items()}
    rows = [
        {"contender": name, **milliseconds(each), "million rows/s": BATCH / medians[name] / 1e6}
        for name, each in times.items()
    ]
    report.section(f"pull of {BATCH:,} distinct rows of dim {DIM} into a CUDA tensor", rows)
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
