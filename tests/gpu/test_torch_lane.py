"""Modules and pipelines on the server's GPU: rows go through the lane, from GPU memory to tensors.

On a simulated GPU (faketorch.py, fakeipc.py, fakedevice.py), or on a real one.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("grpc")
pytest.importorskip("google.protobuf")
pytest.importorskip("pydantic")  # what a server needs may be missing where the GPU is
pytest.importorskip("lmdb")
pytest.importorskip("uvloop")

import faketorch  # noqa: E402
from cpukernels import compiler  # noqa: E402
from fakeipc import FakeCudaGpu  # noqa: E402
from gpuserver import GpuServer  # noqa: E402

from psclient import Client  # noqa: E402
from psclient.errors import InvalidArgument, PushFailed  # noqa: E402
from psclient.gpuregions import GpuRegions  # noqa: E402
from psclient.multihash import KHash  # noqa: E402
from psclient.torch import (  # noqa: E402
    Embedding,
    EmbeddingBag,
    EmbeddingGroup,
    MultiHashEmbedding,
)
from psclient.torch.transfer import CudaTransfer  # noqa: E402
from psproto import cudaipc, lanes  # noqa: E402

KEYS, SIZE, BATCHES = 300, 64, 25
DIMS = {"one": 1, "odd": 5, "wide": 128, "hashed": 3}  # by table
GPU = "cuda:0"
FAKE = [pytest.param(mode, marks=pytest.mark.slow) for mode in faketorch.MODES]
DEVICES = [*FAKE, pytest.param("gpu", marks=pytest.mark.gpu)]

World = Callable[[str], tuple[GpuServer, Client]]
Result = tuple[list[float], dict[str, Any]]  # losses; rows by table


@contextmanager
def on(device: str) -> Iterator[None]:
    """Use a GPU, or a simulated one in this mode."""
    if device != "gpu":
        with faketorch.fake_gpu(device):
            yield
        return
    yield


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Returns, for a device, a server with GPU memory and a client of its lane."""
    found: dict[str, tuple[GpuServer, Client]] = {}
    with ExitStack() as stack:

        def world(device: str) -> tuple[GpuServer, Client]:
            kind = "gpu" if device == "gpu" else "fake"
            if kind == "gpu" and not torch.cuda.is_available():
                pytest.skip("no CUDA device")
            if kind == "fake" and compiler() is None:
                pytest.skip("no g++, which compiles the kernels for the CPU")
            if kind not in found:
                found[kind] = make(kind)
            return found[kind]

        def make(kind: str) -> tuple[GpuServer, Client]:
            if kind == "fake":
                fake = FakeCudaGpu()
                patch = stack.enter_context(pytest.MonkeyPatch.context())
                patch.setattr(cudaipc, "gpu", lambda number=0: fake)
            flags = "--hbm-bytes", str(64 << 20), "--lane", "on"
            server = GpuServer(tmp_path_factory.mktemp("server"), kind, *flags).start()
            stack.callback(server.stop)
            client = Client(server.address, timeout=60.0, lane="require")
            return server, stack.enter_context(client)

        yield world
    for server, _ in found.values():
        assert server.process.returncode == 0
        assert "Traceback" not in server.errors


def features(client: Client, exact: bool = True) -> dict[str, Any]:
    """Modules over tables of several dims. Two use one table, and one uses one table twice.

    exact  whether every table is trained; otherwise rows of "one" count the pushes
    """
    table = {
        name: client.create_table(name, dim, optimizer="adagrad", lr=0.1, initializer="normal")
        for name, dim in DIMS.items()
        if exact or name != "one"
    }
    if not exact:
        options: Any = {"optimizer": "sgd", "lr": 1.0, "initializer": "zeros"}
        table["one"] = client.create_table("one", DIMS["one"], **options)
    return {
        "one": Embedding(table["one"]),
        "odd": Embedding(table["odd"], padding_idx=3),
        "bag": EmbeddingBag(table["wide"], "mean"),
        "wide": Embedding(table["wide"]),
        "hashed": MultiHashEmbedding(KHash(table["hashed"], [29, 31], "add")),
    }


def batches(count: int = BATCHES) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [
        {
            "one": rng.integers(0, KEYS, SIZE),
            "odd": rng.integers(0, KEYS, SIZE),
            "bag": rng.integers(0, KEYS, (SIZE, 3)),
            "wide": rng.integers(0, KEYS, SIZE // (1 + number % 3)),
            "hashed": rng.integers(0, 1000, SIZE),
        }
        for number in range(count)
    ]


def loss_of(outputs: dict[str, Any]) -> Any:
    return sum((each.square() * 0.5 + each).mean() for each in outputs.values())


def skipped(number: int) -> bool:
    """Several batches in a row, too, so that their buffers are used again."""
    return number % 8 >= 4


def finished(client: Client, losses: list[Any]) -> Result:
    """Return the losses, and the rows of all tables; drop the tables."""
    rows = {name: client.table(name).pull(np.arange(2 * KEYS)) for name in DIMS}
    drop(client)
    return [each.item() for each in losses], rows


def drop(client: Client) -> None:
    for name in DIMS:
        client.drop_table(name)


def in_a_pipeline(
    client: Client,
    device: str | None,
    *,
    pulls: bool = False,
    between: Callable[[int], Any] = lambda number: None,
    staleness: int = 0,
    **options: Any,
) -> Result:
    """Train with a pipeline, and leave some batches out.

    device   of the outputs; None: host memory
    pulls    whether each turn also pulls other rows, which waits for the device
    between  called in each turn

    The result is always the same. With a staleness, rows of some batches may or may not have the
    last push. Then only the table "one" is trained, by whole numbers, and is not in the losses.
    """
    exact = staleness == 0
    group, losses = EmbeddingGroup(client, features(client, exact)), []
    group.to(device)
    rows = group.optimizer()
    options |= {"staleness": staleness, "device": device}
    with group.pipeline(batches(), lambda each: each, **options) as turns:
        for number, (_, outputs) in enumerate(turns):
            trained = outputs if exact else {"one": outputs.pop("one")}
            loss = loss_of(outputs)
            losses.append(loss.detach())
            between(number)
            if pulls and device is not None:
                for name, dim in DIMS.items():
                    out = torch.empty((SIZE, dim), device=device)
                    client.table(name).pull(np.arange(SIZE) + 10 * KEYS, out=out)
            if not skipped(number):
                (loss if exact else trained["one"].sum()).backward()
                rows.step()
    return finished(client, losses)


def with_modules(client: Client, device: str | None) -> Result:
    """Train with modules that wait for each pull and push; use some batches for evaluation."""
    group, losses = EmbeddingGroup(client, features(client)), []
    group.to(device)
    rows = group.optimizer()
    for number, batch in enumerate(batches()):
        group.train(not skipped(number))
        outputs = group(batch)
        assert all(each.device.type == (device or "cpu")[:4] for each in outputs.values())
        loss = loss_of(outputs)
        losses.append(loss.detach())
        if group.training:
            loss.backward()
            rows.step()
    return finished(client, losses)


def equal(got: Result, wanted: Result, device: str) -> bool:
    """Return whether all bits are equal; on a GPU, where sums have any order, nearly equal."""
    if device == "gpu":
        pairs = [(got[1][name], wanted[1][name]) for name in DIMS]
        rows = all(np.allclose(mine, other, rtol=1e-4, atol=1e-6) for mine, other in pairs)
        return rows and np.allclose(got[0], wanted[0], rtol=1e-5)
    return got[0] == wanted[0] and all(
        got[1][name].tobytes() == wanted[1][name].tobytes() for name in DIMS
    )


@contextmanager
def ways() -> Iterator[list[bool]]:
    """Note for each pull that is answered whether its rows are in GPU memory."""
    seen: list[bool] = []
    exchanged = lanes.exchanged

    def watched(*arguments: Any) -> Any:
        answer = exchanged(*arguments)
        seen.extend(each.gpu_room is not None for each in answer.pulls)
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lanes, "exchanged", watched)
        yield seen


@contextmanager
def through(way: str) -> Iterator[None]:
    """Let pulls find GPU memory in the lane, or at random, or never: then they use host memory."""
    chance, room = random.Random(1), GpuRegions.room
    share = {"lane": 1.0, "both": 0.5, "host": 0.0}[way]

    def found(self: GpuRegions, device: int, size: int) -> Any:
        return room(self, device, size) if chance.random() < share else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GpuRegions, "room", found)
        yield


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", ["lane", "both", "host"])
def test_a_pipeline_trains_as_one_with_rows_in_host_memory(
    world: World, device: str, way: str
) -> None:
    client = world(device)[1]
    for options in ({"lookahead": 1}, {"lookahead": 3, "pulls": True}, {"staleness": 1}):
        wanted = in_a_pipeline(client, None, **options)
        with on(device), through(way), ways() as seen:
            assert equal(in_a_pipeline(client, GPU, **options), wanted, device), options
        share = sum(seen) / len(seen)
        assert share > 0.8 if way == "lane" else share < 0.8 * (way == "both") + 1e-9


@pytest.mark.parametrize("device", DEVICES)
def test_modules_train_as_those_with_rows_in_host_memory(world: World, device: str) -> None:
    client = world(device)[1]
    wanted = with_modules(client, None)
    for way in ("lane", "both", "host"):
        with on(device), through(way), ways() as seen:
            assert equal(with_modules(client, GPU), wanted, device), way
        assert any(seen) == (way != "host")


@pytest.mark.parametrize("device", DEVICES)
def test_modules_of_one_table_may_be_on_different_devices(world: World, device: str) -> None:
    client = world(device)[1]
    table = client.create_table("apart", 4, optimizer="sgd", lr=1.0, initializer="zeros")
    keys = np.array([5, 6, 5])
    with on(device):
        group = EmbeddingGroup(client, {"here": Embedding(table).to(GPU), "near": Embedding(table)})
        outputs = group({"here": keys, "near": keys})
        assert outputs["here"].device == torch.device(GPU)
        assert outputs["near"].device.type == "cpu"
        (outputs["here"].sum().cpu() + outputs["near"].sum()).backward()
        group.optimizer().step()
    np.testing.assert_array_equal(table.pull(keys)[:, 0], [-4, -2, -4])
    client.drop_table("apart")


@pytest.mark.parametrize("device", DEVICES)
def test_a_server_may_be_killed_while_a_pipeline_runs(
    world: World, device: str, tmp_path: Path
) -> None:
    """Each push takes effect once, and rows come through the lane again afterwards."""
    world(device)  # skips the test if there is no device
    kind = "gpu" if device == "gpu" else "fake"
    flags = "--hbm-bytes", str(64 << 20), "--lane", "on"
    server = GpuServer(tmp_path, kind, *flags).start()

    def kill(number: int) -> None:
        if number in (9, 18):
            server.stop(signal.SIGKILL)
            server.start()

    try:
        with Client(server.address, timeout=60.0) as client:
            for staleness in (0, 1):
                wanted = in_a_pipeline(client, None, staleness=staleness)
                with on(device), ways() as seen:
                    got = in_a_pipeline(client, GPU, staleness=staleness, between=kill)
                    assert equal(got, wanted, device)
                assert any(seen[-30:])
    finally:
        server.stop()


# ---- faults that must be seen


def rooms_are_free_too_early(patch: pytest.MonkeyPatch) -> None:
    rows = CudaTransfer.rows

    def forgetful(self: CudaTransfer, *arguments: Any) -> Any:
        copied = rows(self, *arguments)
        self._copying.clear()
        return copied

    patch.setattr(CudaTransfer, "rows", forgetful)


def buffers_are_free_too_early(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CudaTransfer, "finish", lambda self: None)


def kernels_do_not_wait_for_rows(patch: pytest.MonkeyPatch) -> None:
    leave_out(patch, faketorch.Stream, "wait_stream", lambda self, other: is_default(self))


def copies_do_not_wait_for_gradients(patch: pytest.MonkeyPatch) -> None:
    leave_out(patch, faketorch.Stream, "wait_stream", lambda self, other: is_default(other))


def kernels_lose_the_rows(patch: pytest.MonkeyPatch) -> None:
    leave_out(patch, faketorch.Fake, "record_stream", lambda self, other: is_default(other))


def copies_lose_the_gradients(patch: pytest.MonkeyPatch) -> None:
    leave_out(patch, faketorch.Fake, "record_stream", lambda self, other: not is_default(other))


def gradients_are_sent_too_early(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(faketorch.Event, "synchronize", lambda self: None)


def pulls_do_not_wait_for_their_rows(patch: pytest.MonkeyPatch) -> None:
    """Those of modules, whose rooms are free once the pull returns."""
    leave_out(patch, faketorch.Stream, "synchronize", lambda self: is_default(self))


def is_default(stream: Any) -> bool:
    return stream is stream._machine.streams[0]


def leave_out(patch: pytest.MonkeyPatch, kind: Any, name: str, where: Callable[..., bool]) -> None:
    """Let calls of a method do nothing if ``where`` says so."""
    kept = getattr(kind, name)

    def changed(*arguments: Any) -> Any:
        return None if where(*arguments) else kept(*arguments)

    patch.setattr(kind, name, changed)


FAULTS: list[Any] = [  # (fault, mode in which it is seen, way, staleness); some need more pulls
    (rooms_are_free_too_early, "late", "lane", 0),
    (buffers_are_free_too_early, "late", "host", 0),
    (kernels_do_not_wait_for_rows, "late", "lane", 0),
    (kernels_do_not_wait_for_rows, "random", "lane", 1),
    (copies_do_not_wait_for_gradients, "late", "lane", 1),
    (kernels_lose_the_rows, "late", "lane", 0),
    (copies_lose_the_gradients, "random", "lane", 0),
    (gradients_are_sent_too_early, "late", "lane", 0),
    (pulls_do_not_wait_for_their_rows, "late", "lane", 0),
]
WITH_PULLS = rooms_are_free_too_early, pulls_do_not_wait_for_their_rows


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "mode", "way", "staleness"), FAULTS)
def test_a_fault_is_seen(world: World, fault: Any, mode: str, way: str, staleness: int) -> None:
    """In one of a few runs: the numbers are wrong, or gradients or rows are not finite."""
    client, options = world(mode)[1], {"staleness": staleness, "pulls": fault in WITH_PULLS}
    wanted = in_a_pipeline(client, None, **options)
    for seed in range(4):
        with through(way), pytest.MonkeyPatch.context() as patch:
            fault(patch)
            try:
                with faketorch.fake_gpu(mode, seed):
                    if not equal(in_a_pipeline(client, GPU, **options), wanted, mode):
                        return
            except (InvalidArgument, PushFailed) as error:
                drop(client)
                if "finite" in str(error) or "NaN" in str(error):
                    return
                raise
    pytest.fail("the fault was not seen")
