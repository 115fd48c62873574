"""Measure a shard that gets three times the requests that it can serve.

The server runs in a memory cgroup of 1 GiB and on one core, the generators (flood.py) on the other
cores. So they do not take processor time from the server, at the peak or during the flood. Needs
root, for the cgroup.

    peak      the largest goodput: requests served before their deadline (1 s), per second, beside
              the calls of quiet and admin. What is served after the last request arrived does not
              count: the requests that wait then would make a short run look better
    flood     3 x the peak. Clients wait as psclient does, by its code; those of the last flood do
              not: they send everything
    reading   processor time that a bare gRPC server takes to read the requests of a flood
    bare      a gRPC server that does nothing for a request (bare.py), on the same core, and a
              quiet client of it. It gets as many requests as the shard served during the flood, on
              the same streams; then the whole flood
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
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import grpc
import numpy as np

from benchmarks.flood import DIM, HELD, OPTIONS, ROWS, STREAM, TABLE, Flood, enveloped, messages
from benchmarks.report import Report, arguments, milliseconds
from benchmarks.servers import cpu, echo, free_ports, helper, rss, wait_until_ready
from benchmarks.step import fill
from benchmarks.work import keys_of
from psclient import Client
from psclient.errors import PsError
from psproto import ps_pb2 as pb

LIMIT = 1 << 30  # bytes of the cgroup
DEADLINE = 1.0
PULLED = 1000  # rows of a pull of the quiet client
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
        if not line:
            raise RuntimeError(f"the generator ended with status {self._process.wait(10)}")
        path = Path(line.strip())
        found = json.loads(path.read_text())
        path.unlink()
        return {name: np.array(values) for name, values in found.items()}


def row(name: str, found: dict[str, Any]) -> Row:
    """Return a line of the report about one flood."""
    seconds = found["intended"][-1] - found["intended"][0]
    latency = found["answered"] - found["intended"]
    outcome = found["outcome"]
    good = (outcome == "served") & (latency <= DEADLINE)
    early = good & (found["answered"] <= found["intended"][-1])
    refused = (outcome == HELD) | (outcome == "OVERLOADED")
    return {
        "flood": name,
        "offered/s": len(outcome) / seconds,
        "goodput/s": float(early.sum() / seconds),
        "p99 of goodput ms": float(np.quantile(latency[good], 0.99) * 1e3),
        "refused": int(refused.sum()),
        "of these by the server": int((outcome == "OVERLOADED").sum()),
        "refusal p99 ms": float(np.quantile(latency[refused], 0.99) * 1e3) if refused.any() else 0,
        "late or lost": int(len(outcome) - good.sum() - refused.sum()),
    }


class Repeated:
    """Repeats a call in a thread, during a block.

    pause  seconds between two calls
    """

    def __init__(self, pause: float, call: Callable[[], None]) -> None:
        self._pause, self._call = pause, call
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._pause):
            self._call()


class Watch:
    """Times the calls of a quiet client and of an administrator in threads, during a block."""

    def __init__(self, address: str) -> None:
        self.quiet: list[float] = []
        self.admin: dict[str, list[float]] = {name: [] for name in ADMIN}
        self._address = address
        self._stack = ExitStack()

    def __enter__(self) -> Watch:
        self._channel = self._stack.enter_context(
            grpc.insecure_channel(self._address, options=OPTIONS)
        )
        client = self._stack.enter_context(Client([self._address], lane="never", timeout=10.0))
        self._table, self._keys = client.table(TABLE), keys_of(np.arange(PULLED))
        for pause, call in ((0.025, self._pull), (0.05, self._ask)):
            self._stack.enter_context(Repeated(pause, call))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

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


@contextmanager
def quiet_stream(address: str) -> Iterator[list[float]]:
    """Time requests to a bare server, as large as those of the quiet client, during a block.

    Yields the list to which the seconds are added.
    """
    found: list[float] = []
    head = pb.StreamRequestHeader(id=1).SerializeToString()
    message = enveloped(head, bytes(8 * PULLED))
    outbox: SimpleQueue[bytes | None] = SimpleQueue()

    def call() -> None:
        start = time.perf_counter()
        outbox.put(message)
        next(answers)
        found.append(time.perf_counter() - start)

    with grpc.insecure_channel(address, options=OPTIONS) as channel:
        answers = channel.stream_stream(STREAM)(iter(outbox.get, None))
        with Repeated(0.025, call):
            yield found
        outbox.put(None)


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
        table, keys, start, quick = client.table(TABLE), keys_of(np.arange(PULLED)), time.time(), 0
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
    """Start a shard in a cgroup, on the first core; return (cgroup, process, address).

    flags  further flags of the shard
    """
    command = [sys.executable, "-m", "psserver", "serve", "--metrics-port", "0", *flags, "--port"]
    return start_process(stack, command)


def start_process(stack: ExitStack, command: list[str]) -> tuple[Any, subprocess.Popen[str], str]:
    """Start a server in a cgroup, on the first core; return (cgroup, process, address).

    command  the program and its arguments; the port is added to it
    """
    sys.path.append(str(Path(__file__).parents[1] / "tests" / "fault"))
    cgroups: Any = importlib.import_module("cgroups")
    group, port = stack.enter_context(cgroups.limited(LIMIT)), free_ports(1)

    def enter() -> None:
        group.enter()
        os.sched_setaffinity(0, {0})

    process = subprocess.Popen(
        [*command, str(port)], stdout=subprocess.PIPE, text=True, preexec_fn=enter
    )
    stack.callback(process.wait)
    stack.callback(process.terminate)
    wait_until_ready(process)
    return group, process, f"127.0.0.1:{port}"


def main() -> None:
    """Run the benchmark and print its tables."""
    options = arguments(__doc__).parse_args()
    report, seconds = Report("overload", options.json), 2.0 if options.quick else 10.0
    with ExitStack() as stack:
        group, process, address = start(stack)
        os.sched_setaffinity(0, set(range(1, os.cpu_count() or 2)) or {0})
        with Client([address], lane="never") as client:
            fill(client.create_table(TABLE, DIM, optimizer="adagrad"), keys_of(np.arange(ROWS)))
        generator = Generator(stack.enter_context(helper("benchmarks.flood")), address)
        with Watch(address):
            best = peak(generator, seconds / 5)
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
                    most = peak(generator, seconds / 5, streams=0)
            with Watch(address) as watch:
                found = generator.run(3 * most, seconds, **more)
            line = row(name, found)
            shares = {"x peak": line["goodput/s"] / most, "recovery s": recovery(address, usual)}
            floods.append(line | shares | {"server MiB": rss(process.pid) >> 20})
            calls += watched(name, watch)
        with ExitStack() as bare:
            _, _, there = start_process(bare, [sys.executable, "-m", "benchmarks.bare"])
            generator = Generator(bare.enter_context(helper("benchmarks.flood")), there)
            with quiet_stream(there) as pulls:
                time.sleep(seconds)
            calls.append({"calls": "bare gRPC", "while": "idle", **milliseconds(pulls)})
            for line in floods[:3]:  # the bare server has no unary calls
                name = line["flood"]
                for server, rate in (
                    ("bare gRPC, the requests served", line["goodput/s"]),
                    ("bare gRPC, the whole flood", line["offered/s"]),
                ):
                    with quiet_stream(there) as pulls:
                        generator.run(rate, seconds, **FLOODS[name])
                    calls.append({"calls": server, "while": name, **milliseconds(pulls)})
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
