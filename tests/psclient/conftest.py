"""Clients of one shard and of three, over streams and unary calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from servers import Cluster

from psclient import Client
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


@pytest.fixture(params=["stream", "unary"])
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
