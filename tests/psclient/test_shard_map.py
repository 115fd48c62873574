"""A client whose shard map is old finds the keys all the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from servers import Cluster
from tables import DIM, integers, summing

from psclient import Client
from psclient.errors import (
    TableNotFound,
    WrongShard,
)
from psproto import routing


class TestShardMap:
    """A client whose shard map is old finds the keys all the same."""

    KEYS = np.arange(300)

    @pytest.fixture(params=["stream", "unary", "lane"])
    def astray(
        self, request: pytest.FixtureRequest, cluster3: Cluster, connect: Any
    ) -> Callable[[], Client]:
        """astray(): a client that sends most keys to shards that do not own them."""
        client = connect(cluster3, transport=request.param)
        true = client._connect().shard_map

        def lead() -> Client:
            table = np.roll(true.shard_of_bucket, 1000)
            client._cluster.shard_map = routing.ShardMap(true.epoch - 1, true.shards, table)
            return client

        return lead

    def test_pushes_and_pulls_are_sent_again_where_the_keys_are(
        self, astray: Callable[[], Client], name: str
    ) -> None:
        table, other = (summing(astray(), f"{name}.{dim}", dim) for dim in (DIM, 2))
        gradients = integers(17, 300, DIM)
        astray()
        table.push(np.r_[self.KEYS, 7, 7], np.r_[gradients, np.ones((2, DIM), np.float32)], step=5)
        gradients[7] += 2
        rows = table.pull_rows(self.KEYS)
        astray()
        again = table.pull_rows(self.KEYS, min_version=table.describe().versions)
        assert_array_equal(again.embeddings, -gradients)
        for field in ("embeddings", "found", "versions", "steps", "frequencies"):
            assert_array_equal(getattr(again, field), getattr(rows, field))
        assert rows.frequencies.tolist() == [3 if key == 7 else 1 for key in self.KEYS]
        client = astray()
        push = {table.name: (self.KEYS, gradients), other.name: (self.KEYS, gradients[:, :2])}
        pulled = client.exchange(push, {other.name: self.KEYS[::-1], table.name: self.KEYS})
        assert_array_equal(pulled[table.name], -2 * gradients)
        assert_array_equal(pulled[other.name], -gradients[::-1, :2])

    def test_the_map_is_fetched_once(
        self, astray: Callable[[], Client], name: str, messages: list[Any]
    ) -> None:
        table = summing(astray(), name)
        table.push([5], np.ones((1, DIM), np.float32))
        assert table.client._connect().shard_map.epoch == 1
        assert len(messages) == 2
        table.push([5], np.ones((1, DIM), np.float32))
        assert len(messages) == 3
        assert_array_equal(table.pull([5]), np.full((1, DIM), -2, np.float32))

    def test_a_batch_made_before_is_sent_again_too(
        self, astray: Callable[[], Client], name: str
    ) -> None:
        table = summing(astray(), name)
        batch, rows = table.pull_distinct(self.KEYS)
        assert_array_equal(rows, np.zeros((300, DIM)))
        gradients = integers(18, 300, DIM)
        for _ in range(2):
            table.client.push_distinct({name: (batch, gradients)})
        assert_array_equal(table.pull(batch.keys), -2 * gradients)

    def test_deletes_are_sent_again_too(self, astray: Callable[[], Client], name: str) -> None:
        table = summing(astray(), name)
        table.push(self.KEYS, integers(19, 300, DIM))
        astray()
        assert table.delete(self.KEYS[:290]) == 290
        assert table.describe().rows == 10

    def test_a_request_that_failed_sends_nothing_again_when_it_is_asked_again(
        self, astray: Callable[[], Client], name: str, messages: list[Any]
    ) -> None:
        client = astray()
        true, old = routing.even_map(3), client._connect().shard_map
        taken, owned = (routing.owners(self.KEYS.astype(np.uint64), each) for each in (old, true))
        pushed = int(np.flatnonzero(taken != owned)[0])
        pulled = int(np.flatnonzero(taken != taken[pushed])[0])
        table, gone = summing(client, name), f"{name}.gone"
        client._dims[gone] = DIM
        push = {name: ([pushed], np.ones((1, DIM), np.float32))}
        pending = client.start_exchange(push, {gone: [pulled]})
        with pytest.raises(TableNotFound, match=gone):
            pending.result()
        del messages[:]
        with pytest.raises((TableNotFound, WrongShard)):
            pending.result()
        assert messages == []
        assert_array_equal(table.pull([pushed]), -np.ones((1, DIM), np.float32))

    def test_a_second_refusal_is_an_error(
        self, astray: Callable[[], Client], name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        client = astray()
        table = summing(client, name)
        monkeypatch.setattr(client._connect(), "refresh", lambda deadline: [])
        for call in (
            lambda: table.pull(self.KEYS),
            lambda: table.push(self.KEYS, integers(20, 300, DIM)),
            lambda: table.delete(self.KEYS),
        ):
            with pytest.raises(WrongShard, match="belongs to shard") as caught:
                call()
            assert caught.value.reason == "WRONG_SHARD"
