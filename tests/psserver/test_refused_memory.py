"""A refused request is freed at once, not at Python's next garbage collection."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from servers import environment, free_ports

from psproto import ps_pb2 as pb

SERVE = "import gc; gc.disable(); from psserver.cli import main; main()"
SIZE = 8 << 20  # bytes of a request; each gets memory of its own from the system
TIMES = 30
ALLOWED = 8 * SIZE  # growth of the server's memory


def push() -> bytes:
    """A push to a table that does not exist."""
    rows = np.ones((SIZE // 256, 64), np.float32)
    keys = np.arange(len(rows), dtype="<u8")
    header = pb.PushHeader(table="none", dtype=pb.DTYPE_FLOAT32)
    request = pb.PushRequest(header=header, keys=keys.tobytes(), gradients=rows.tobytes())
    return bytes(request.SerializeToString())


def junk() -> bytes:
    return b"\xff" * SIZE


def message() -> bytes:
    """A message that is too large for a method without arrays."""
    return bytes(pb.DropTableRequest(name="x" * SIZE).SerializeToString())


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[int, grpc.Channel]]:
    """A server that never collects garbage: (process id, channel)."""
    port = free_ports(1)
    flags = ["serve", "--port", str(port), "--metrics-port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, *flags],
        stdout=subprocess.PIPE,
        env=environment(),
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield process.pid, channel
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)


def anonymous(pid: int) -> int:
    """Return the bytes of heaps and stacks of a process that are in memory."""
    found = re.search(r"^RssAnon:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.M)
    assert found
    return int(found[1]) << 10


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    ("method", "request_of", "code"),
    [
        ("RowService/Push", push, "NOT_FOUND"),
        ("RowService/Push", junk, "INVALID_ARGUMENT"),
        ("RowService/Exchange", junk, "INVALID_ARGUMENT"),
        ("RowService/Delete", junk, "INVALID_ARGUMENT"),
        ("TableService/DropTable", message, "RESOURCE_EXHAUSTED"),
        ("CheckpointService/WriteCheckpoint", junk, "RESOURCE_EXHAUSTED"),
        ("LogService/Subscribe", junk, "RESOURCE_EXHAUSTED"),
        ("AnalysisService/Analyze", junk, "RESOURCE_EXHAUSTED"),
    ],
)
def test_a_refused_request_leaves_nothing(
    server: tuple[int, grpc.Channel], method: str, request_of: Callable[[], bytes], code: str
) -> None:
    pid, channel = server
    data = request_of()
    for name in (f"/ps.v1.{method}", "/grpc.health.v1.Health/Check"):
        call = channel.unary_unary(name)
        before = 0
        for number in range(TIMES + 5):
            if number == 5:
                before = anonymous(pid)
            with pytest.raises(grpc.RpcError) as caught:
                call(data, timeout=60)
            if name.endswith(method):
                assert caught.value.code().name == code
        assert anonymous(pid) - before < ALLOWED
