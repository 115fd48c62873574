"""The same-host lane into GPU memory: a server and clients on one GPU, each a process."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal

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
from psproto import cudaipc, lanes
from psproto import ps_pb2 as pb

DIMS = (5, 8, 128)
KEYS = 20_000  # of each table
KILLS = 3
PUSHES = 3000  # maximum number of pushes until rows are in GPU memory
DEVICES = [
    pytest.param("fake", marks=pytest.mark.slow),
    pytest.param("gpu", marks=pytest.mark.gpu),
]
Make = Callable[[tuple[int, ...]], Any]


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "gpu":
        if not pytest.importorskip("torch").cuda.is_available():
            pytest.skip("no CUDA device")
        yield "gpu"
        return
    if compiler() is None:
        pytest.skip("no g++, which compiles the kernels for the CPU")
    fake = FakeCudaGpu()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "cupy", fake_cupy())
        patch.setattr(cudaipc, "gpu", lambda number=0: fake)
        yield "fake"


@pytest.fixture(scope="module")
def makers(device: str) -> list[Make]:
    """Functions that return a new array on the device, full of NaN."""
    cupy: Any = pytest.importorskip("cupy")
    found: list[Make] = [lambda shape: cupy.full(shape, np.nan, np.float32)]
    if device == "gpu":
        import torch

        found.append(lambda shape: torch.full(shape, np.nan, device="cuda"))
    return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, device: str) -> Iterator[GpuServer]:
    flags = "--hbm-bytes", str(128 << 20), "--lane", "on"
    server = GpuServer(tmp_path_factory.mktemp("server"), device, *flags).start()
    yield server
    assert server.stop() == 0
    assert "Traceback" not in server.errors


@pytest.fixture(scope="module")
def client(server: GpuServer) -> Iterator[Client]:
    """A client of the lane, with tables that have rows in GPU memory and in host memory."""
    rng = np.random.default_rng(0)
    with Client(server.address, timeout=60.0, lane="require") as client:
        for dim in DIMS:
            table = client.create_table(f"t{dim}", dim, optimizer="adam", initializer="normal")
            keys = np.arange(KEYS)
            table.push(keys, rng.standard_normal((KEYS, dim), dtype=np.float32))
            one = np.full((1, dim), 0.1, np.float32)
            for _ in range(PUSHES):
                table.push([1], one)
                if in_gpu_memory(server, dim):
                    break
            assert in_gpu_memory(server, dim)
        yield client


def in_gpu_memory(server: GpuServer, dim: int) -> float:
    return server.metric("ps_table_rows", f"t{dim}", "hbm")


def regions_of(client: Client) -> Any:
    """The regions of GPU memory of the client's only lane."""
    (link,) = client._connect(client._deadline()).links
    return link._pipe.gpu_regions  # type: ignore[attr-defined]


def host(array: Any) -> Any:
    """A copy of an array in host memory."""
    return array.get() if hasattr(array, "get") else array.cpu().numpy()


def pulled(client: Client, table: str, keys: Any, make: Make) -> Any:
    """Pull into a new array on the device; return its contents."""
    out = make((*np.shape(keys), client.table(table).dim))
    assert client.table(table).pull(keys, out=out) is out
    return host(out)


def same_bits(got: Any, wanted: Any) -> None:
    assert_array_equal(got.view(np.uint32), wanted.view(np.uint32))


@pytest.mark.parametrize("dim", DIMS)
def test_rows_equal_those_of_a_pull_into_host_memory(
    client: Client, makers: list[Make], dim: int
) -> None:
    """From GPU memory, from host memory, and of keys without a row; distinct or not."""
    rng, table = np.random.default_rng(dim), f"t{dim}"
    for keys in (
        np.arange(KEYS),
        rng.integers(0, 2 * KEYS, 50_000),
        rng.integers(0, 50, (70, 9)),
        np.array([3]),
        np.arange(5 * KEYS, 5 * KEYS + 100),
    ):
        wanted = client.table(table).pull(keys)
        for make in makers * 2:
            same_bits(pulled(client, table, keys, make), wanted)
    assert regions_of(client).why == ""


def test_rows_arrive_in_the_region(
    client: Client, makers: list[Make], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So no pull above has gone through host memory, once the server has mapped a region."""
    pulled(client, "t128", np.arange(100), makers[0])
    seen = []
    exchanged = lanes.exchanged

    def watched(*arguments: Any) -> Any:
        answer = exchanged(*arguments)
        seen.extend(each.gpu_room is not None for each in answer.pulls)
        return answer

    monkeypatch.setattr(lanes, "exchanged", watched)
    for make in makers:
        pulled(client, "t128", np.arange(100), make)
    client.table("t128").pull(np.arange(100))
    assert seen == [True] * len(makers) + [False]


def test_pulls_in_flight_have_memory_of_their_own(client: Client, makers: list[Make]) -> None:
    """Each gets its rows, whether it goes through GPU memory or through host memory."""
    rng = np.random.default_rng(7)
    keys = [rng.integers(0, KEYS, 3000) for _ in range(12)]
    table = client.table("t128")
    out = [makers[-1]((3000, 128)) for _ in keys]
    started = [table.start_pull(each, out=array) for each, array in zip(keys, out, strict=True)]
    for pending in started:
        pending.result()
    for each, array in zip(keys, out, strict=True):
        same_bits(host(array), table.pull(each))


def test_pulls_see_the_pushes_before_them(client: Client, makers: list[Make]) -> None:
    rng = np.random.default_rng(8)
    table = client.table("t128")
    for _ in range(20):
        keys = rng.choice(KEYS, 2000, replace=False)
        table.push(keys, rng.standard_normal((2000, 128), dtype=np.float32))
        got = pulled(client, "t128", keys, makers[-1])
        same_bits(got, table.pull(keys))


def register(client: Client, region: pb.LaneRegion) -> str:
    """Ask the server to map a region; return its reason to refuse, or "" if it did."""
    regions_of(client)  # opens the lane
    (link,) = client._connect(client._deadline()).links
    pipe = link._pipe  # type: ignore[attr-defined]
    answers: list[str] = []
    kept, pipe.gpu_regions.answered = pipe.gpu_regions.answered, answers.append
    try:
        message = pb.LaneRequest(id=lanes.REGISTRATION | region.region, regions=[region])
        pipe._put(lanes.framed(message.SerializeToString()), [])
        client.table("t8").pull(np.arange(10))
    finally:
        pipe.gpu_regions.answered = kept
    (answer,) = answers
    return answer


def test_other_memory_is_refused_by_name(client: Client, device: str) -> None:
    """Memory of another GPU, handles that are none, sizes that the memory has not, many regions."""
    gpu = cudaipc.gpu(0)
    address = gpu.allocate(4 << 20)
    whole: Any = {"kind": pb.LANE_KIND_CUDA, "gpu": gpu.uuid, "handle": gpu.handle_of(address)}

    def answer(number: int, size: int = 4 << 20, **other: Any) -> str:
        return register(client, pb.LaneRegion(region=number, size=size, **{**whole, **other}))

    assert "must be on the GPU of the server" in answer(90, gpu=b"x" * 16)
    assert "'handle' must have 64 bytes" in answer(90, handle=b"x")
    assert "cannot be mapped: cuIpcOpenMemHandle" in answer(90, handle=b"\x7f" * 64)
    assert "the memory has" in answer(90, size=1 << 40)
    if device == "fake":  # CUDA maps the same memory only once
        reasons = [answer(100 + i) for i in range(9)]
        assert "the limit" in reasons[-1]
    same_bits(client.table("t8").pull(np.arange(50)), client.table("t8").pull(np.arange(50)))


def test_without_gpu_memory_rows_go_through_host_memory(
    makers: list[Make], device: str, tmp_path: Path
) -> None:
    """The server takes no regions then, and the client allocates none."""
    server = GpuServer(tmp_path, "", "--lane", "on").start()
    try:
        with Client(server.address, timeout=60.0, lane="require") as client:
            client.create_table("t", 8, initializer="normal")
            for make in makers:
                got = pulled(client, "t", np.arange(1000), make)
                same_bits(got, client.table("t").pull(np.arange(1000)))
            assert "hbm_bytes=0" in regions_of(client).why
    finally:
        assert server.stop() == 0


def test_a_killed_client_does_no_harm(
    client: Client, server: GpuServer, makers: list[Make], device: str
) -> None:
    """It is killed while it pulls; the server unmaps its memory."""
    before = client.table("t128").pull(np.arange(1000))
    for _ in range(KILLS):
        with pulling(server.address[0], device, "t128", 10_000) as child:
            child.send_signal(signal.SIGKILL)
            child.wait(60)
        for make in makers:
            same_bits(pulled(client, "t128", np.arange(1000), make), before)
    for _ in range(1000):
        client.table("t128").pull(np.arange(10))
        if server.metric("ps_lane_clients") == 1:
            break
    assert server.metric("ps_lane_clients") == 1
