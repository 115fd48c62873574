"""Clients of one shard and of three, over streams, unary calls and same-host lanes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from features import SIZES, every_row, summing
from servers import Cluster

from psclient import Client
from psclient.multihash import MultiHash
from psclient.stream import StreamLink
from psclient.unary import UnaryLink


@pytest.fixture(params=[1, 3], ids=["1 shard", "3 shards"])
def cluster(request: pytest.FixtureRequest) -> Cluster:
    return request.getfixturevalue(f"cluster{request.param}")


@pytest.fixture(scope="module")
def small() -> Iterator[Cluster]:
    """A server with small limits."""
    cluster = Cluster(1, "--max-message-bytes", "65536", "--max-keys", "1000").start()
    yield cluster
    assert cluster.stop() == 0


@pytest.fixture
def client(cluster: Cluster, connect: Any) -> Client:
    return connect(cluster)


@pytest.fixture(params=["stream", "unary", "lane"])
def any_client(request: pytest.FixtureRequest, cluster: Cluster, connect: Any) -> Client:
    return connect(cluster, transport=request.param)


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every exchange that a client submits to a shard from now on."""
    sent: list[Any] = []
    for kind in (StreamLink, UnaryLink):

        def submit(
            self: Any, call: Any, *, inner: Callable[..., None] = kind.submit, **rest: Any
        ) -> None:
            sent.append(call.exchange)
            inner(self, call, **rest)

        monkeypatch.setattr(kind, "submit", submit)
    return sent


@pytest.fixture(params=["a table a part", "one table"])
def make(request: pytest.FixtureRequest, client: Client, name: str) -> Callable[..., MultiHash]:
    """make(kind, combine): a feature of three parts whose rows are small integers."""
    shared = request.param == "one table"

    def build(kind: Any, combine: str, **options: Any) -> MultiHash:
        dims = (4, 4, 4) if shared or combine != "concatenate" else (2, 3, 1)
        tables = [summing(client, f"{name}.{part}", dim) for part, dim in enumerate(dims)]
        feature: MultiHash = kind(tables[0] if shared else tables, SIZES, combine, **options)
        seed = np.random.default_rng(7)
        for table, keys in zip(feature.tables, every_row(feature), strict=True):
            table.push(keys, -seed.integers(1, 4, (len(keys), table.dim)).astype(np.float32))
        return feature

    return build
