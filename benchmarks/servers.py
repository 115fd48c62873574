"""Run shards and bare echo servers as processes, and read their memory and CPU use."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import uvloop


def free_ports(count: int) -> int:
    """Return the first of ``count`` consecutive free ports on loopback."""
    for first in range(20_000 + os.getpid() % 10_000, 60_000, count):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise OSError(f"found no {count} consecutive free ports")


@contextmanager
def shards(
    count: int,
    *,
    durable: bool = False,
    busy_poll: float = 0.0,
    lane: bool = False,
    flags: Sequence[str] = (),
) -> Iterator[tuple[list[str], list[int]]]:
    """Run a cluster during a block; yield the addresses and process ids of its shards.

    count      number of shards
    durable    give each shard a data directory; without one it has no log, like the peers
    busy_poll  seconds for which a shard polls for the next request before it sleeps
    lane       let each shard offer a same-host lane
    flags      further flags of each shard
    """
    port = free_ports(count)
    addresses = [f"127.0.0.1:{port + shard}" for shard in range(count)]
    with tempfile.TemporaryDirectory(prefix="ps-bench-") as directory, ExitStack() as stack:
        processes = []
        for shard in range(count):
            command = [sys.executable, "-m", "psserver", "serve", "--metrics-port", "0"]
            command += ["--shard", str(shard), "--shards", str(count), "--port", str(port + shard)]
            command += ["--busy-poll-seconds", str(busy_poll), *flags]
            if lane:
                command += ["--lane", directory]
            if durable:
                command += ["--data-dir", f"{directory}/{shard}"]
            log = stack.enter_context(open(f"{directory}/{shard}.err", "wb"))
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
            stack.callback(_stop, process)
            processes.append(process)
        for process in processes:
            wait_until_ready(process)
        yield addresses, [process.pid for process in processes]


class Server:
    """The server process of a one-shard cluster. It can be started again.

    directory  for its data and for what it logs
    flags      further flags of ``psserver serve``; may be changed before a start
    address    "host:port", new at each start
    """

    def __init__(self, directory: Path, *flags: str, durable: bool = True) -> None:
        """Start nothing yet.

        durable  give it a data directory
        """
        self.directory = directory
        self.data = directory / "data"
        self.flags = [*(["--data-dir", str(self.data)] if durable else []), *flags]
        self.address = ""

    def start(self) -> None:
        """Start the server and wait until it is ready."""
        self.directory.mkdir(exist_ok=True)
        port = free_ports(1)
        self.address = f"127.0.0.1:{port}"
        command = [sys.executable, "-m", "psserver", "serve", "--port", str(port)]
        command += ["--metrics-port", "0", *self.flags]
        with (self.directory / "err").open("ab") as err:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=err, text=True)
        wait_until_ready(self.process)

    def stop(self) -> None:
        """Stop the server and wait for it."""
        _stop(self.process)

    def kill(self) -> None:
        """End the server without giving it the time to write anything."""
        self.process.kill()
        self.process.wait(60)

    def logged(self, event: str) -> dict[str, Any]:
        """Return the last event of this name that the server logged."""
        lines = (self.directory / "err").read_text().splitlines()
        return dict([json.loads(line) for line in lines if f'"event": "{event}"' in line][-1])


def _stop(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGTERM)
    process.wait(60)


@contextmanager
def echo(*files: str) -> Iterator[tuple[str, int]]:
    """Run a bare grpc.aio server on uvloop as a process during a block; yield its address and its
    process id.

    files  CAs of clients; key and certificate of the server. None: no TLS

    /Echo/Unary and /Echo/Stream reply to each message with zeros. The first four bytes of the
    message are the size of the reply, little-endian.
    """
    port = free_ports(1)
    command = [sys.executable, "-m", "benchmarks.servers", str(port), *files]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        wait_until_ready(process)
        yield f"127.0.0.1:{port}", process.pid
    finally:
        process.kill()
        process.wait()


@contextmanager
def helper(module: str, *words: str) -> Iterator[subprocess.Popen[str]]:
    """Run a module as a process during a block, which starts when the process prints "ready".

    module  for example "benchmarks.analyze"
    words   its arguments

    Its standard input and output are pipes. It is killed at the end of the block.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", module, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
    try:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise RuntimeError(f"{module} exited with status {process.wait(10)}")
        yield process
    finally:
        process.kill()
        process.communicate()  # closes the pipes


def wait_until_ready(process: subprocess.Popen[str]) -> None:
    """Wait until a server process prints "ready"; RuntimeError if it ends or prints other text."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line.startswith("ready"):
        raise RuntimeError(f"the server printed {line!r} and exited with {process.poll()}")


def rss(pid: int) -> int:
    """Return the bytes of memory that a process has in RAM (its resident set size)."""
    with open(f"/proc/{pid}/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def unshared(pid: int) -> int:
    """Return the bytes of memory of a process, without pages of files that it has mapped."""
    with open(f"/proc/{pid}/status") as status:
        sizes = dict(line.split(":", 1) for line in status)
    return 1024 * sum(int(sizes[name].split()[0]) for name in ("RssAnon", "RssShmem"))


def huge(pid: int) -> int:
    """Return the bytes of memory of a process that are in huge pages."""
    with open(f"/proc/{pid}/smaps_rollup") as maps:
        return next(int(line.split()[1]) * 1024 for line in maps if line.startswith("AnonHuge"))


def cpu(pid: int) -> float:
    """Return the processor time that a process has used, in seconds."""
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def _serve_echo(port: int, *files: str) -> None:
    replies: dict[int, bytes] = {}

    def reply(data: bytes) -> bytes:
        size = int.from_bytes(data[:4], "little")
        if size not in replies:
            replies[size] = b"\0" * size  # unlike bytes(size), not all in one page of zeros
        return replies[size]

    async def unary(data: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        return reply(data)

    async def stream(_: object, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        while (data := await context.read()) is not grpc.aio.EOF:
            await context.write(reply(data))

    server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1)])
    methods = {
        "Unary": grpc.unary_unary_rpc_method_handler(unary),
        "Stream": grpc.stream_stream_rpc_method_handler(stream),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("Echo", methods),))
    if files:
        ca, own = (Path(file).read_bytes() for file in files)
        credentials = grpc.ssl_server_credentials([(own, own)], ca, require_client_auth=True)
        server.add_secure_port(f"127.0.0.1:{port}", credentials)
    else:
        server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    print("ready", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    uvloop.run(_serve_echo(int(sys.argv[1]), *sys.argv[2:]))
