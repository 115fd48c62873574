"""Rows pulled and pushed, of every 64-bit key."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from servers import Cluster
from tables import DIM, integers, summing, sums_by_key

from psclient import Client
from psclient.errors import (
    InvalidArgument,
    VersionInFuture,
)
from psproto import routing

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
EXTREME = np.array([-1, -2, 0, 1, INT64_MIN, INT64_MIN + 1, INT64_MAX, INT64_MAX - 1])


class TestRows:
    @pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (3, 5), (2, 0, 3), (2, 3, 4)])
    def test_any_shape_of_keys(self, any_client: Client, name: str, shape: tuple[int, ...]) -> None:
        table = summing(any_client, name)
        keys = np.random.default_rng(0).integers(0, 10, shape)
        gradients = integers(1, *shape, DIM)
        table.push(keys, gradients)
        pulled = table.pull(keys)
        assert (pulled.shape, pulled.dtype) == ((*shape, DIM), np.float32)
        distinct, sums = sums_by_key(keys, gradients)
        assert_array_equal(pulled, -sums[np.searchsorted(distinct, keys)])

    @pytest.mark.parametrize("shape", [(), (0,), (2, 3)])
    def test_what_is_known_of_rows_has_the_shape_of_the_keys(
        self, any_client: Client, name: str, shape: tuple[int, ...]
    ) -> None:
        table = summing(any_client, name)
        rows = table.pull_rows(np.full(shape, 5))
        assert rows.embeddings.shape == (*shape, DIM)
        assert rows.found.shape == rows.versions.shape == rows.frequencies.shape == shape

    def test_gradients_of_equal_keys_are_summed_exactly(
        self, any_client: Client, name: str
    ) -> None:
        table = summing(any_client, name)
        keys = np.random.default_rng(2).integers(0, 500, 20_000)
        gradients = integers(3, 20_000, DIM)
        table.push(keys, gradients)
        distinct, sums = sums_by_key(keys, gradients)
        assert_array_equal(table.pull(distinct), -sums)

    def test_equal_keys_take_one_optimizer_step(self, client: Client, name: str) -> None:
        table = client.create_table(
            name,
            1,
            optimizer="adagrad",
            lr=1.0,
            optimizer_args={"initial_accumulator": 0.0, "eps": 1e-30},
            initializer="zeros",
        )
        table.push([5, 5], [[1.0], [2.0]])
        assert_array_equal(table.pull([5]), [[-1.0]])  # 3 / sqrt(3^2)

    def test_an_exchange_pulls_what_it_pushed(self, any_client: Client, name: str) -> None:
        table = summing(any_client, name)
        keys = np.arange(100)
        gradients = integers(4, 100, DIM)
        assert_array_equal(table.exchange(keys[::-1], (keys, gradients)), -gradients[::-1])

    @pytest.mark.parametrize(
        "keys",
        [EXTREME, EXTREME.view(np.uint64), np.array([2**63, 2**63 + 1, 2**64 - 3], np.uint64)],
        ids=["int64", "uint64", "above 2^63"],
    )
    def test_every_64_bit_key_is_valid(
        self, any_client: Client, name: str, keys: np.ndarray
    ) -> None:
        table = summing(any_client, name)
        gradients = np.arange(1, len(keys) + 1, dtype=np.float32)[:, None].repeat(DIM, 1)
        table.push(keys, gradients)
        rows = table.pull_rows(keys)
        assert_array_equal(rows.embeddings, -gradients)
        assert_array_equal(rows.found, np.full(len(keys), True))
        assert table.describe().rows == len(keys)

    @pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.int64])
    def test_signed_keys_of_any_width_are_the_same_keys(
        self, client: Client, name: str, dtype: Any
    ) -> None:
        table = summing(client, name)
        gradients = integers(5, 4, DIM)
        table.push(np.array([-1, -2, 0, 7], np.int64), gradients)
        assert_array_equal(table.pull(np.array([-1, -2, 0, 7], dtype)), -gradients)
        assert_array_equal(
            table.pull(np.array([2**64 - 1, 2**64 - 2, 0, 7], np.uint64)), -gradients
        )

    @pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.uint64])
    def test_unsigned_keys_of_any_width_are_the_same_keys(
        self, client: Client, name: str, dtype: Any
    ) -> None:
        table = summing(client, name)
        gradients = integers(6, 2, DIM)
        table.push([200, 7], gradients)
        assert_array_equal(table.pull(np.array([200, 7], dtype)), -gradients)

    def test_keys_and_gradients_may_be_strided_and_read_only(
        self, client: Client, name: str
    ) -> None:
        table = summing(client, name)
        keys, gradients = np.arange(40)[::-4], integers(7, DIM, 10).T
        keys.flags.writeable = gradients.flags.writeable = False
        table.push(keys, gradients)
        assert_array_equal(table.pull(keys), -gradients)

    def test_keys_without_a_row_get_what_they_will_start_from(
        self, any_client: Client, name: str
    ) -> None:
        table = any_client.create_table(
            name, DIM, optimizer="sgd", lr=1.0, initializer="normal", serving_default=9.0
        )
        keys = np.arange(50)
        first = table.pull(keys)
        assert len(np.unique(first)) == first.size
        assert_array_equal(table.pull(keys, mode="serve"), np.full((50, DIM), 9, np.float32))
        assert table.describe().rows == 0
        table.push(keys, np.zeros((50, DIM), np.float32))
        assert_array_equal(table.pull(keys), first)
        assert_array_equal(table.pull(keys, mode="serve"), first)

    def test_initial_values_do_not_depend_on_the_number_of_shards(
        self, cluster1: Cluster, cluster3: Cluster, connect: Any, name: str
    ) -> None:
        one, three = (
            connect(cluster)
            .create_table(name, 16, initializer="truncated_normal", seed=7)
            .pull(EXTREME)
            for cluster in (cluster1, cluster3)
        )
        assert_array_equal(one, three)

    def test_a_learning_rate_may_come_with_the_push(self, any_client: Client, name: str) -> None:
        table = summing(any_client, name)
        table.push([1, 2], np.ones((2, DIM), np.float32), lr=0.5)
        table.push([2, 3], np.ones((2, DIM), np.float32))
        expected = np.array([-0.5, -1.5, -1.0], np.float32)[:, None].repeat(DIM, 1)
        assert_array_equal(table.pull([1, 2, 3]), expected)

    def test_pull_rows_tells_what_the_servers_know(self, any_client: Client, name: str) -> None:
        table = summing(any_client, name)
        before = table.describe().versions
        table.push([10, 11, 10, 10], np.ones((4, DIM), np.float32), step=-3)
        table.push([[10, 12]], np.ones((1, 2, DIM), np.float32), step=5)
        after = table.describe().versions
        keys = np.array([[10, 11], [12, 13]])
        rows = table.pull_rows(keys)
        assert_array_equal(rows.embeddings, np.array([[[-4], [-1]], [[-1], [0]]]).repeat(DIM, 2))
        assert_array_equal(rows.found, [[True, True], [True, False]])
        assert_array_equal(rows.steps, [[5, -3], [5, 0]])
        assert_array_equal(rows.frequencies, [[4, 1], [1, 0]])
        assert rows.versions[1, 1] == 0
        assert rows.versions[0, 0] in after  # the last push of its shard
        assert min(before) < rows.versions[:, 0].min()

    def test_min_version_reads_your_writes_or_says_that_it_cannot(
        self, any_client: Client, name: str
    ) -> None:
        table = summing(any_client, name)
        table.push(np.arange(100), np.ones((100, DIM), np.float32))
        versions = table.describe().versions
        rows = table.pull_rows(np.arange(100), min_version=versions)
        assert_array_equal(rows.embeddings, -np.ones((100, DIM), np.float32))
        ahead = [version + 1_000_000 for version in versions]
        with pytest.raises(
            VersionInFuture,
            match=r"'min_version' is \d+, but the newest version of shard \d+ is \d+",
        ) as caught:
            table.pull_rows(np.arange(100), min_version=ahead)
        assert caught.value.reason == "VERSION_IN_FUTURE"

    def test_min_version_is_given_for_each_shard(self, client: Client, name: str) -> None:
        table = summing(client, name)
        shards = len(client._addresses)
        with pytest.raises(InvalidArgument, match=f"each of {shards} shards, got {shards + 1}"):
            table.pull_rows([1], min_version=[0] * (shards + 1))

    def test_distinct_rows_come_and_gradients_go_once_a_key(
        self, any_client: Client, name: str
    ) -> None:
        table = summing(any_client, name)
        keys = np.array([[3, 1, 3], [2, 3, 1]])
        table.push([1, 2, 3], integers(8, 3, DIM))
        batch, rows = table.pull_distinct(keys)
        assert sorted(batch.keys.tolist()) == [1, 2, 3]
        assert_array_equal(batch.spread(rows), table.pull(keys))
        any_client.push_distinct({name: (batch, np.ones((3, DIM), np.float32))}, step=2)
        after = table.pull_rows(keys)
        assert_array_equal(after.embeddings, batch.spread(rows) - 1)
        assert_array_equal(after.frequencies, [[4, 3, 4], [2, 4, 3]])  # 1 + occurrences in keys
        assert_array_equal(after.steps, np.full((2, 3), 2))

    def test_a_batch_serves_several_calls(self, any_client: Client, name: str) -> None:
        table = summing(any_client, name)
        batch = any_client.batch([[4, 4, 5]])
        table.push(batch, np.ones((1, 3, DIM), np.float32))
        assert_array_equal(table.pull(batch)[..., 0], [[-2, -2, -1]])
        assert any_client.batch(batch) is batch


class TestSpread:
    @pytest.mark.parametrize(
        "keys",
        [
            np.arange(100_000),
            -np.arange(1, 100_001),
            np.arange(100_000) << 20,
            np.arange(100_000).astype(np.uint64) + np.uint64(2**63),
            np.uint64(2**64 - 1) - np.arange(100_000, dtype=np.uint64),
            np.arange(100_000) * 4,
            np.random.default_rng(0).integers(INT64_MIN, INT64_MAX, 100_000),
        ],
        ids=["0..", "..-1", "strided 2^20", "2^63..", "..2^64-1", "strided 4", "random"],
    )
    def test_keys_spread_evenly_over_shards(self, keys: np.ndarray) -> None:
        split = routing.split(keys.astype(np.uint64), routing.even_map(4))
        sizes = np.diff(split.bounds)
        assert sizes.sum() == 100_000
        assert sizes.max() / sizes.mean() <= 1.1
