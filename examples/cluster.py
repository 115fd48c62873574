"""Run a parameter-server cluster for the duration of an example, and parse its options."""

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from psclient import Client

READY_SECONDS = 120.0  # limit for the start; the first one compiles the kernels
STOP_SECONDS = 60.0


class ClusterFailed(RuntimeError):
    """Raised if `psserver up` ends early, is not ready in time, or does not stop cleanly."""

    def __init__(self, what: str, log: Path) -> None:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        super().__init__(f"psserver {what}; the end of its output:\n{tail}")


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that every example has.

    description  docstring of the example, shown by --help
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shards",
        type=int,
        default=2,
        metavar="N",
        help="Number of shards of the cluster that the example starts (default: %(default)s).",
    )
    parser.add_argument(
        "--servers",
        metavar="HOST:PORT,...",
        help="Addresses of all shards of a running cluster. Default: start a new cluster, and stop"
        " it at the end.",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="Seed of all random numbers (default: %(default)s).",
    )
    return parser


def require_empty(ps: Client, *tables: str) -> None:
    """End the example with an error unless the tables have no rows."""
    for table in tables:
        if ps.describe_table(table).rows:
            sys.exit(
                f"table {table!r} has rows of an earlier run; drop it with psctl drop, or run the"
                " example without --servers"
            )


@contextmanager
def servers(given: str | None, shards: int) -> Iterator[list[str]]:
    """Yield the addresses of a cluster during a block.

    given   addresses of a running cluster, "host:port,host:port"; None or "": start a new one
    shards  number of shards of a new cluster
    """
    if given:
        yield given.split(",")
    else:
        with local_cluster(shards) as addresses:
            yield addresses


@contextmanager
def local_cluster(shards: int, *flags: str) -> Iterator[list[str]]:
    """Run ``shards`` servers on free local ports during a block; yield their addresses.

    flags  further flags of ``psserver up``

    Their data is in a temporary directory, which is deleted at the end. The servers run in their
    own session, so Ctrl-C interrupts only the trainer. During the block, SIGTERM has the same
    effect as Ctrl-C. In both cases the servers are stopped before the trainer ends.
    """
    port = free_ports(shards)
    with tempfile.TemporaryDirectory(prefix="ps-example-") as directory, ExitStack() as stack:
        log = Path(directory, "up.log")
        command = [sys.executable, "-u", "-m", "psserver", "up"]
        command += ["--shards", str(shards), "--port", str(port)]
        command += ["--metrics-port", "0", "--data-dir", str(Path(directory, "data"))]
        command += flags
        previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
        stack.callback(signal.signal, signal.SIGTERM, previous)
        output = stack.enter_context(log.open("wb"))
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            wait_until_ready(process, log)
            yield [f"127.0.0.1:{port + shard}" for shard in range(shards)]
        finally:
            stop(process)
        if process.returncode not in (0, -signal.SIGTERM):
            raise ClusterFailed(f"ended with status {process.returncode}", log)


def wait_until_ready(process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until the cluster has printed "ready" to its log.

    Raises ClusterFailed if it ends, or is not ready after READY_SECONDS.
    """
    deadline = time.monotonic() + READY_SECONDS
    while not any(line.startswith(b"ready") for line in log.read_bytes().splitlines()):
        if process.poll() is not None:
            raise ClusterFailed(f"ended at start with status {process.returncode}", log)
        if time.monotonic() > deadline:
            raise ClusterFailed(f"was not ready after {READY_SECONDS:.0f} s", log)
        time.sleep(0.05)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Stop a cluster with SIGTERM. If it still runs after STOP_SECONDS, kill it and its shards."""
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def free_ports(count: int) -> int:
    """Return the first of ``count`` consecutive free local ports."""
    for _ in range(100):
        with ExitStack() as stack:
            try:
                first = bind(stack, 0)
                for port in range(first + 1, first + count):
                    bind(stack, port)
            except (OSError, OverflowError):
                continue
            return first
    raise OSError(f"found no {count} consecutive free ports")


def bind(stack: ExitStack, port: int) -> int:
    """Occupy a local port until ``stack`` is closed; return its number. Port 0: any free port."""
    listener = stack.enter_context(socket.socket())
    listener.bind(("127.0.0.1", port))
    return int(listener.getsockname()[1])
