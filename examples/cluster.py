"""A parameter-server cluster for the duration of an example."""

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

READY_SECONDS = 120.0  # the first start compiles the kernels
STOP_SECONDS = 60.0


class ClusterFailed(RuntimeError):
    """`psserver up` ended early, was not ready in time, or did not stop cleanly."""

    def __init__(self, what: str, log: Path) -> None:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        super().__init__(f"psserver {what}; the end of its output:\n{tail}")


@contextmanager
def servers(given: str | None, shards: int) -> Iterator[list[str]]:
    """Yield the addresses ``given`` as host:port,host:port, or those of a new cluster."""
    if given:
        yield given.split(",")
    else:
        with local_cluster(shards) as addresses:
            yield addresses


@contextmanager
def local_cluster(shards: int) -> Iterator[list[str]]:
    """Start ``shards`` servers on free local ports; yield their addresses; stop them at the end.

    Rows are in a temporary directory, which is deleted at the end. The servers run in a session of
    their own, so Ctrl-C reaches only the trainer. Meanwhile SIGTERM is treated like Ctrl-C. In both
    cases the servers are stopped before the trainer ends.
    """
    port = free_ports(shards)
    with tempfile.TemporaryDirectory(prefix="ps-example-") as directory, ExitStack() as stack:
        log = Path(directory, "up.log")
        command = [sys.executable, "-u", "-m", "psserver", "up"]
        command += ["--shards", str(shards), "--port", str(port)]
        command += ["--metrics-port", "0", "--data-dir", str(Path(directory, "data"))]
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
    deadline = time.monotonic() + READY_SECONDS
    while not any(line.startswith(b"ready") for line in log.read_bytes().splitlines()):
        if process.poll() is not None:
            raise ClusterFailed(f"ended at start with status {process.returncode}", log)
        if time.monotonic() > deadline:
            raise ClusterFailed(f"was not ready after {READY_SECONDS:.0f} s", log)
        time.sleep(0.05)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Stop a cluster with SIGTERM; kill it, shards included, if it does not stop in time."""
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
    listener = stack.enter_context(socket.socket())
    listener.bind(("127.0.0.1", port))
    return int(listener.getsockname()[1])
