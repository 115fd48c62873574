"""GPU memory that client and server share returns when one of them is killed."""

from __future__ import annotations

import gc
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("grpc")
pytest.importorskip("google.protobuf")
pytest.importorskip("pydantic")  # what a server needs may be missing where the GPU is
pytest.importorskip("lmdb")
pytest.importorskip("uvloop")

from cpukernels import compiler
from fakeipc import FakeCudaGpu, fake_cupy
from gpuserver import GpuServer
from puller import pulling

from psclient import Client
from psclient.errors import PsError
from psproto import cudaipc

DIM, ROWS = 128, 100_000  # 51 MB
LEAST = 50 << 20  # bytes that the pulls of a client take at least, beside its array
SLACK = 32 << 20  # bytes by which memory in use may differ
SECONDS = 60.0  # until the memory must be free
DEVICES = [
    pytest.param("fake", marks=pytest.mark.slow),
    pytest.param("gpu", marks=pytest.mark.gpu),
]


@contextmanager
def prepared(device: str) -> Iterator[Callable[[], Any]]:
    """Yields a function that makes an array on the device, which may be simulated."""
    if device == "gpu":
        torch = pytest.importorskip("torch")
        pytest.importorskip("cupy")
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        yield lambda: torch.zeros((ROWS, DIM), device="cuda")
        return
    if compiler() is None:
        pytest.skip("no g++, which compiles the kernels for the CPU")
    fake, cupy = FakeCudaGpu(), fake_cupy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "cupy", cupy)
        patch.setattr(cudaipc, "gpu", lambda number=0: fake)
        yield lambda: cupy.full((ROWS, DIM), 0, np.float32)


def in_use(device: str, *processes: int) -> int:
    """Return the bytes of GPU memory in use: of all, or of shared fake memory in some processes."""
    if device == "gpu":
        import torch

        free, total = torch.cuda.mem_get_info(0)
        return int(total - free)
    found: dict[str, int] = {}  # by inode
    for process in processes:
        path = Path(f"/proc/{process}/maps")
        for line in path.read_text().splitlines() if path.exists() else []:
            if "memfd:fake-gpu" in line:
                start, end = re.split("[- ]", line)[:2]
                found[line.split()[4]] = int(end, 16) - int(start, 16)
    return sum(found.values())


def wait_until_free(used: Callable[[], int], most: int) -> None:
    end = time.monotonic() + SECONDS
    while used() > most + SLACK:
        assert time.monotonic() < end, f"{used():,} bytes are in use, {most:,} were before"
        gc.collect()  # the traceback of a call that failed keeps its memory
        time.sleep(0.1)


def server_of(device: str, directory: Path) -> GpuServer:
    return GpuServer(directory, device, "--hbm-bytes", str(64 << 20), "--lane", "on")


@pytest.mark.parametrize("device", DEVICES)
def test_it_returns_when_a_client_is_killed(tmp_path: Path, device: str) -> None:
    """Also what the server has mapped."""
    with prepared(device):
        server = server_of(device, tmp_path).start()
        try:
            with server.connect() as client:
                client.create_table("t", DIM, initializer="normal")
            with pulling(server.address[0], device, "t", ROWS):
                pass  # now the server has all memory that it takes for itself

            def used() -> int:
                return in_use(device, server.process.pid)

            time.sleep(2.0)  # the memory of the first client returns
            before = used()
            with pulling(server.address[0], device, "t", ROWS) as child:
                assert used() > before + LEAST
                child.send_signal(signal.SIGKILL)
                child.wait(60)
                wait_until_free(used, before)
        finally:
            assert server.stop() == 0


@pytest.mark.parametrize("device", DEVICES)
def test_it_returns_when_a_server_is_killed(tmp_path: Path, device: str) -> None:
    """The client frees its memory once a call has failed and the garbage is collected."""
    with prepared(device) as make:
        out = make()
        cudaipc.gpu(0)

        def used() -> int:
            return in_use(device, os.getpid(), server.process.pid)

        server = server_of(device, tmp_path)
        before = in_use(device, os.getpid())
        server.start()
        try:
            with Client(server.address, timeout=5.0, lane="require") as client:
                table = client.create_table("t", DIM, initializer="normal")
                for _ in range(4):
                    table.pull(np.arange(ROWS), out=out)
                assert used() > before + LEAST
                server.stop(signal.SIGKILL)
                with pytest.raises(PsError):
                    table.pull(np.arange(ROWS), out=out)
                wait_until_free(used, before)
        finally:
            server.process.kill()
