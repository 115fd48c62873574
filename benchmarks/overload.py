"""Measure a shard that gets three times the requests that it can serve.

The server runs in a memory cgroup of 1 GiB and on one core, the generators (flood.py) on the other
cores. So they do not take processor time from the server, at the peak or during the flood. Needs
root, for the cgroup.

    peak      the largest goodput: requests served before their deadline (1 s), per second, beside
              the calls of quiet and admin
    flood     3 x the peak. Clients wait as psclient does, by its code; those of the last flood do
              not: they send everything
    reading   processor time that a bare gRPC server takes to read the requests of a flood
    quiet     a client that pulls 1,000 rows 40 times per second, alone and during a flood. It has
              real-time priority, as if it had a machine of its own
    admin     health checks, GetServerInfo, GetStatus and ListTables, alone and during the flood
    recovery  time after the flood until 20 pulls in a row are as quick as before
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from benchmarks.flood import DIM, HELD, OPTIONS, ROWS, TABLE, Flood, messages
from benchmarks.report import Report, arguments, milliseconds
from benchmarks.servers import cpu, echo, free_ports, helper, rss, wait_until_ready
from benchmarks.step import fill
from benchmarks.work import keys_of
from psclient import Client
from psclient.errors import PsError

LIMIT = 1 << 30  # bytes of the cgroup
DEADLINE = 1.0
ADMIN = {
    "health": "/grpc.health.v1.Health/Check",
    "GetServerInfo": "/ps.v1.InfoService/GetServerInfo",
    "GetStatus": "/ps.v1.InfoService/GetStatus",
    "ListTables": "/ps.v1.TableService/ListTables",
}
FLOODS: dict[str, dict[str, Any]] = {  # name: fields of Flood
    "2 connections of 4 streams": {"streams": 4},
    "2 connections of 32 streams": {"streams": 32},
    "64 connections of 1 stream": {"connections": 64, "streams": 1},
    "unary calls on 2 connections": {"streams": 0},
    "everything is sent, 2 connections of 32 streams": {"streams": 32, "patient": False},
}
Row = dict[str, Any]


class Generator:
    """A process that sends floods to one server."""

    def __init__(self, process: subprocess.Popen[str], address: str) -> None:
        self._process, self._address = process, address

    def run(self, rate: float, seconds: float, **more: Any) -> dict[str, Any]:
        """Send a flood, and return what became of each request as NumPy arrays."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        flood = {"address": self._address, "rate": rate, "seconds": seconds, "deadline": DEADLINE}
        self._process.stdin.write(json.dumps(flood | more) + "\n")
        line = self._process.stdout.readline()
        if not line.endswith("\n"):
            status = self._process.wait(10)
            raise RuntimeError(f"the generator ended with status {status} in its answer")
        found = json.loads(line)
        return {name: np.array(values) for name, values in found.items()}


def row(name: str, found: dict[str, Any]) -> Row:
    """Return a line of the report about one flood."""
    seconds = found["intended"][-1] - found["intended"][0]
    latency = found["answered"] - found["intended"]
    outcome = found["outcome"]
    good = (outcome == "served") & (latency <= DEADLINE)
    refused = (outcome == HELD) | (outcome == "OVERLOADED")
    return {
        "flood": name,
        "offered/s": len(outcome) / seconds,
        "goodput/s": float(good.sum() / seconds),
        "p99 of goodput ms": float(np.quantile(latency[good], 0.99) * 1e3),
        "refused": int(refused.sum()),
        "of these by the server": int((outcome == "OVERLOADED").sum()),
        "refusal p99 ms": float(np.quantile(latency[refused], 0.99) * 1e3) if refused.any() else 0,
        "late or lost": int(len(outcome) - good.sum() - refused.sum()),
    }


class Watch:
    """Times the calls of a quiet client and of an administrator in threads, during a block."""

    def __init__(self, address: str) -> None:
        self.quiet: list[float] = []
        self.admin: dict[str, list[float]] = {name: [] for name in ADMIN}
        self._channel = grpc.insecure_channel(address, options=OPTIONS)
        self._client = Client([address], lane="never", timeout=10.0)
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._repeat, args=(0.025, self._pull)),
            threading.Thread(target=self._repeat, args=(0.05, self._ask)),
        ]

    def __enter__(self) -> Watch:
        self._table, self._keys = self._client.table(TABLE), keys_of(np.arange(1000))
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._client.close()
        self._channel.close()

    def _repeat(self, pause: float, call: Callable[[], None]) -> None:
        while not self._stop.wait(pause):
            call()

    def _pull(self) -> None:
        start = time.perf_counter()
        try:
            self._table.pull(self._keys)
        except PsError:
            self.quiet.append(float("inf"))
        else:
            self.quiet.append(time.perf_counter() - start)

    def _ask(self) -> None:
        for name, method in ADMIN.items():
            start = time.perf_counter()
            self._channel.unary_unary(method)(b"", timeout=30)
            self.admin[name].append(time.perf_counter() - start)


def peak(generator: Generator, seconds: float, **more: Any) -> float:
    """Return the largest goodput of rates that grow until the server does not keep up.

    more  fields of Flood
    """
    rate, best, failed = 500.0, 0.0, 0
    while failed < 2:  # once may be a coincidence
        goodput = float(row("", generator.run(rate, seconds, **more))["goodput/s"])
        best = max(best, goodput)
        if goodput < 0.9 * rate:
            failed += 1
        else:
            rate, failed = rate * 1.3, 0
    return best


def recovery(address: str, usual: float) -> float:
    """Return the seconds until 20 pulls in a row take at most three times as long as usual."""
    with Client([address], lane="never") as client:
        table, keys, start, quick = client.table(TABLE), keys_of(np.arange(1000)), time.time(), 0
        while quick < 20:
            begin = time.perf_counter()
            table.pull(keys)
            quick = quick + 1 if time.perf_counter() - begin <= 3 * usual else 0
        return time.time() - start


def reading(count: int = 3000) -> float:
    """Return the processor seconds that a bare gRPC server takes to read one request of a flood and
    to answer it with 4 bytes.
    """
    flood = Flood(address="", rate=1, seconds=1, deadline=DEADLINE)
    message = (4).to_bytes(4, "little") + messages(flood)[0]
    with echo() as (address, pid), grpc.insecure_channel(address, options=OPTIONS) as channel:
        before = cpu(pid)
        for _ in channel.stream_stream("/Echo/Stream")(iter([message] * count)):
            pass
        return (cpu(pid) - before) / count


def watched(name: str, watch: Watch) -> list[Row]:
    """Return lines of the report about the calls of a Watch."""
    calls = {"quiet client": watch.quiet, **watch.admin}
    return [{"calls": each, "while": name, **milliseconds(found)} for each, found in calls.items()]


def start(stack: ExitStack, *flags: str) -> tuple[Any, subprocess.Popen[str], str]:
    """Start a server in a cgroup, on the first core; return (cgroup, process, address).

    flags  further flags of the server
    """
    sys.path.append(str(Path(__file__).parents[1] / "tests" / "fault"))
    cgroups: Any = importlib.import_module("cgroups")
    group, port = stack.enter_context(cgroups.limited(LIMIT)), free_ports(1)

    def enter() -> None:
        group.enter()
        os.sched_setaffinity(0, {0})

    command = [sys.executable, "-m", "psserver", "serve", "--metrics-port", "0", *flags]
    process = subprocess.Popen(
        [*command, "--port", str(port)], stdout=subprocess.PIPE, text=True, preexec_fn=enter
    )
    stack.callback(process.wait)
    stack.callback(process.terminate)
    wait_until_ready(process)
    return group, process, f"127.0.0.1:{port}"


def main() -> None:
    """Run the benchmark and print its tables."""
    options = arguments(__doc__).parse_args()
    report, seconds = Report("overload", options.json), 2.0 if options.quick else 6.0
    with ExitStack() as stack:
        group, process, address = start(stack)
        os.sched_setaffinity(0, set(range(1, os.cpu_count() or 2)) or {0})
        with Client([address], lane="never") as client:
            fill(client.create_table(TABLE, DIM, optimizer="adagrad"), keys_of(np.arange(ROWS)))
        generator = Generator(stack.enter_context(helper("benchmarks.flood")), address)
        with Watch(address):
            best = peak(generator, seconds / 3)
        each = reading()
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
        with Watch(address) as alone:
            time.sleep(seconds)
        floods, calls = [], watched("idle", alone)
        usual = float(np.quantile(alone.quiet, 0.99))
        for name, more in FLOODS.items():
            most = best
            if "unary" in name:
                with Watch(address):
                    most = peak(generator, seconds / 3, streams=0)
            with Watch(address) as watch:
                found = generator.run(3 * most, seconds, **more)
            line = row(name, found)
            shares = {"x peak": line["goodput/s"] / most, "recovery s": recovery(address, usual)}
            floods.append(line | shares | {"server MiB": rss(process.pid) >> 20})
            calls += watched(name, watch)
        report.section(f"floods of 3 x the peak; peak {best:,.0f} requests/s", floods)
        report.section("calls of others", calls)
        report.note(
            f"a bare gRPC server takes {each * 1e6:.0f} us of processor time to read a request:"
            f" {3 * best * each:.2f} cores for a flood"
        )
        report.note(f"processes killed by the kernel: {group.kills}")
    report.close()


if __name__ == "__main__":
    main()
