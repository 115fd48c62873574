"""A server that has loaded its kernels compiles nothing more, whatever clients and restarts ask."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from servers import free_ports

from psclient import Client, Follower, admin
from psclient.tools.analysis import analyze
from psclient.tools.keys import inspect
from psserver.warm import warm
from storage import cache, slots
from storage.arena import Budget
from storage.initializers import make_initializer
from storage.optimizers import OPTIMIZERS, make_optimizer
from storage.schema import TableSchema
from storage.table import Table

SERVE = """
import sys
from psproto.kernelcache import KernelCache
from psserver import cli, process

warm, load = process.warm, KernelCache._load_overload

def report(cache, signature, target):
    print("COLD", cache._py_func.__module__, cache._py_func.__name__, signature, file=sys.stderr)
    return load(cache, signature, target)

def warm_and_report():
    warm()
    KernelCache._load_overload = report

process.warm = warm_and_report
sys.argv = ["psserver", "serve", *sys.argv[1:]]
cli.main()
"""
POLICIES = [
    {"admission": "counter", "admission_args": {"threshold": 2}},
    {"admission": "sketch", "admission_args": {"threshold": 2, "expected_keys": 1000}},
    {"admission": "probability", "admission_args": {"p": 0.5}},
    {"eviction": {"step_ttl": {"steps": 5}, "norm": {"threshold": 1e-9}}},
    {"eviction": {"capacity_lru": {"max_rows": 50}}},
    {"eviction": {"capacity_lfu": {"max_rows": 50}}},
    {"eviction": {"time_ttl": {"seconds": 3600.0}}},
]
TABLES = [{"optimizer": name} for name in OPTIMIZERS] + [
    {"optimizer": "sgd", **p} for p in POLICIES
]


class Server:
    """A server process that writes a line on stderr for each kernel that it lacks."""

    def __init__(self, directory: Path, port: int) -> None:
        flags = ["--port", str(port), "--metrics-port", "0", "--flush-seconds", "0.5"]
        flags += ["--data-dir", str(directory / "data")]
        flags += ["--checkpoint-url", f"file://{directory}/checkpoints"]
        self.errors = directory / "stderr"
        with self.errors.open("ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SERVE, *flags], stdout=subprocess.PIPE, stderr=errors
            )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"ready\n"

    def stop(self, number: int) -> None:
        self.process.send_signal(number)
        self.process.wait(30)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def cold(self) -> list[str]:
        lines = self.errors.read_text().splitlines()
        return sorted({line for line in lines if line.startswith("COLD")})


def use(client: Client) -> None:
    """Call everything that works on rows."""
    keys = np.arange(200, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for number, settings in enumerate(TABLES):
        table = client.create_table(f"t{number}", 3, **settings)  # type: ignore[arg-type]
        for step in range(3):
            gradients = np.ones((len(keys), 3), np.float32)
            table.push(keys, gradients, step=step, wire=("float32", "bfloat16", "float16")[step])
            name = f"t{number}"
            client.exchange({name: (keys[:9], gradients[:9])}, {name: keys[5:20]}, step=step)
        for wire in ("float32", "bfloat16", "float16"):
            for mode in ("train", "serve"):
                table.pull(keys, mode=mode, wire=wire)  # type: ignore[arg-type]
        table.pull_rows(keys[:20])
        table.delete(keys[:3])
        client.evict(f"t{number}", dry_run=True)
        client.evict(f"t{number}")
        analyze(client, f"t{number}")
        inspect(client, f"t{number}", keys[:5].tolist())
        list(admin.read_rows(client, f"t{number}"))
        width = table.describe().width if hasattr(table.describe(), "width") else 3
        for columns in {3, width}:
            admin.write_rows(client, f"t{number}", keys[:7], np.ones((7, columns), np.float32))
    client.barrier("b")


@pytest.mark.slow
def test_nothing_is_compiled_after_the_start(tmp_path: Path) -> None:
    port = free_ports(1)
    address = [f"127.0.0.1:{port}"]
    warnings.simplefilter("ignore")
    server = Server(tmp_path, port)
    try:
        with Client(address, timeout=60) as client, Follower(address) as follower:
            use(client)
            client.wait_durable()
            follower.wait_for(client.wait_durable())
            follower.pull("t2", np.arange(3))
            admin.checkpoint(client, "full")
            client.table("t0").push(np.arange(50), np.ones((50, 3), np.float32))
            admin.checkpoint(client, "next", parent="full")
            admin.verify(client, "next")
            list(admin.read_rows(client, "t1", checkpoint="next"))
            analyze(client, "t1", checkpoint="next")
            admin.warm_start(client, "next", "t1", "copy")
            admin.restore(client, "next", replace=True)
            use(client)
        for number in (9, 15):  # recovery of log and base, then of the base alone
            server.stop(number)
            server = Server(tmp_path, port)
            with Client(address, timeout=60) as client:
                use(client)
    finally:
        server.stop(15)
    assert "\n".join(server.cold()) == ""
    assert os.path.exists(tmp_path / "checkpoints")


def test_nothing_is_compiled_when_a_table_gives_memory_back() -> None:
    """Another table takes the memory, which happens late in the life of a server."""
    warm()
    kernels = cache._tail, slots._cut
    compiled = [list(each.signatures) for each in kernels]
    assert all(compiled)
    optimizer, initializer = make_optimizer("sgd", None, {}), make_initializer("zeros", {})
    schema = TableSchema(name="t", dim=3, optimizer=optimizer, initializer=initializer)
    table = Table(schema, Budget(64 << 20))
    keys, counts = np.arange(100, dtype=np.uint64), np.ones(100, np.uint32)
    table.push(keys, np.ones((100, 3), np.float32), counts, version=1, step=0)
    table.store.shrink(1)
    assert [list(each.signatures) for each in kernels] == compiled
