"""The pipeline of a group with rows on a device, beside modules that wait for each copy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("grpc")
pytest.importorskip("google.protobuf")
pytest.importorskip("pydantic")  # what a server needs may be missing where the GPU is
pytest.importorskip("lmdb")
pytest.importorskip("uvloop")

from gpuserver import GpuServer  # noqa: E402
from torch import nn  # noqa: E402

from psclient import Client  # noqa: E402
from psclient.torch import Embedding, EmbeddingBag, EmbeddingGroup  # noqa: E402

DIM, KEYS, BATCHES = 16, 400, 30
MORE = ("a", "b", "c", "d")  # further tables
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.slow),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return str(request.param)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    server = GpuServer(tmp_path_factory.mktemp("server"), "").start()
    with Client(server.address, timeout=60.0, lane="never") as client:
        yield client
    assert server.stop() == 0


def batches(device: str) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [
        {
            "user": torch.from_numpy(rng.integers(0, KEYS, 300)).to(device),
            "tags": torch.from_numpy(rng.integers(0, KEYS, (300, 3))),
            "y": torch.from_numpy(rng.random(300).astype(np.float32)).to(device),
        }
        for _ in range(BATCHES)
    ]


def keys_of(batch: dict[str, Any]) -> dict[str, Any]:
    more = {name: batch["user"] // (number + 2) for number, name in enumerate(MORE)}
    return {"user": batch["user"], "tags": batch["tags"], **more}


def train(client: Client, device: str, staleness: int | None) -> tuple[list[float], Any]:
    """Train with a scaler, clipping and accumulation; return the losses and the rows.

    There are more tables with rows of one length than pushes under way.

    staleness  None: without the pipeline
    """
    users = client.create_table("user", DIM, optimizer="adagrad", lr=0.1, initializer="normal")
    tags = client.create_table("tags", DIM, optimizer="sgd", lr=0.1, initializer="normal")
    more = [
        client.create_table(name, DIM, optimizer="sgd", lr=0.1, initializer="normal")
        for name in MORE
    ]
    features: Any = {"user": Embedding(users), "tags": EmbeddingBag(tags)}
    features |= {table.name: Embedding(table) for table in more}
    group = EmbeddingGroup(client, features)
    group.to(device)
    torch.manual_seed(0)
    net = nn.Linear(len(features) * DIM, 1).to(device)
    dense, rows = torch.optim.SGD(net.parameters(), lr=0.1), group.optimizer()
    scaler = torch.amp.GradScaler(device, init_scale=256.0)
    losses = []

    def step(number: int, batch: dict[str, Any], outputs: dict[str, Any]) -> None:
        assert outputs["user"].device.type == device
        logits = net(torch.cat([outputs[name] for name in features], 1))[:, 0]
        loss = nn.functional.binary_cross_entropy_with_logits(logits, batch["y"])
        losses.append(loss.detach())
        scaler.scale(loss).backward()
        if number < 10 or number % 2:
            for each in (dense, rows):
                scaler.unscale_(each)
            nn.utils.clip_grad_norm_(rows.leaves(), 0.5)
            for each in (dense, rows):
                scaler.step(each)
                each.zero_grad()
            scaler.update()

    data = batches(device)
    if staleness is None:
        for number, batch in enumerate(data):
            step(number, batch, group(keys_of(batch)))
    else:
        options: Any = {"staleness": staleness, "accumulate": 2, "device": device}
        with group.pipeline(data, keys_of, **options) as turns:
            for number, (batch, outputs) in enumerate(turns):
                step(number, batch, outputs)
    found = {table.name: table.pull(np.arange(KEYS)) for table in (users, tags, *more)}
    for name in found:
        client.drop_table(name)
    return [loss.item() for loss in losses], found


@pytest.mark.slow
def test_training_equals_modules_that_wait(client: Client, device: str) -> None:
    """With staleness 0 the same numbers, up to the order of sums on the device; else close ones."""
    wanted, rows = train(client, device, None)
    for staleness, tolerance in ((0, 1e-5), (1, 0.05), (3, 0.15)):
        losses, found = train(client, device, staleness)
        np.testing.assert_allclose(losses, wanted, rtol=tolerance)
        if not staleness:
            for name, mine in found.items():
                np.testing.assert_allclose(mine, rows[name], rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
def test_pulls_into_arrays_on_the_device(client: Client) -> None:
    """Of torch and CuPy, two at the same time."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    cupy = pytest.importorskip("cupy")
    table = client.create_table("t", DIM, initializer="normal")
    keys = [np.arange(count) % 900 for count in (1000, 70, 3000)]
    for make in (torch.empty, cupy.empty):
        options = {"device": "cuda"} if make is torch.empty else {}
        dtype = torch.float32 if make is torch.empty else np.float32
        out = [make((len(each), DIM), dtype=dtype, **options) for each in keys]
        pairs = list(zip(keys, out, strict=True))
        started = [table.start_pull(each, out=array) for each, array in pairs]
        for pending, (each, array) in zip(started, pairs, strict=True):
            assert pending.result() is array
            host = array.cpu().numpy() if make is torch.empty else array.get()
            np.testing.assert_array_equal(host, table.pull(each))
