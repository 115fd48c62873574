"""The client against real servers: one shard and three, streams and unary calls."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from numpy.testing import assert_allclose, assert_array_equal
from servers import Cluster, free_ports

from psclient import Client, PsError, Table, hash_keys
from psclient.aio import AsyncClient, AsyncTable
from psclient.errors import (
    DeadlineExceeded,
    InvalidArgument,
    SchemaMismatch,
    TableNotFound,
    Unavailable,
    VersionInFuture,
    WrongShard,
)
from psclient.stream import Link
from psclient.unary import UnaryLink
from psproto import ps_pb2 as pb
from psproto import routing
from storage.initializers import INITIALIZERS
from storage.optimizers import OPTIMIZERS

DIM = 4
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
EXTREME = np.array([-1, -2, 0, 1, INT64_MIN, INT64_MIN + 1, INT64_MAX, INT64_MAX - 1])


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


def summing(client: Client, name: str, dim: int = DIM) -> Table:
    """A table whose rows are minus the sums of the gradients pushed."""
    return client.create_table(name, dim, optimizer="sgd", lr=1.0, initializer="zeros")


def create_on(client: Client, shard: int, name: str, dim: int) -> None:
    """Create the table of ``summing`` on one shard only."""
    schema = pb.TableSchema(name=name, dim=dim)
    schema.optimizer.name, schema.optimizer.parameters["lr"] = "sgd", 1.0
    schema.initializer.name = "zeros"
    message = pb.CreateTableRequest(schema=schema).SerializeToString()
    client._connect().links[shard].channel.call("/ps.v1.TableService/CreateTable", message, 20.0)


def integers(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-9, 10, shape).astype(np.float32)


def sums_by_key(keys: np.ndarray, gradients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct keys and the sum of the gradients of each."""
    distinct, inverse = np.unique(keys.reshape(-1), return_inverse=True)
    sums = np.zeros((len(distinct), gradients.shape[-1]), np.float32)
    np.add.at(sums, inverse, gradients.reshape(-1, gradients.shape[-1]))
    return distinct, sums


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every exchange that a client submits to a shard from now on."""
    sent: list[Any] = []
    for kind in (Link, UnaryLink):

        def submit(
            self: Any, call: Any, *, inner: Callable[..., None] = kind.submit, **rest: Any
        ) -> None:
            sent.append(call.exchange)
            inner(self, call, **rest)

        monkeypatch.setattr(kind, "submit", submit)
    return sent


class TestTables:
    def test_creating_describes_every_parameter(self, client: Client, name: str) -> None:
        client.create_table(
            name,
            8,
            optimizer="adagrad",
            lr=0.5,
            optimizer_args={"eps": 1e-8},
            initializer="uniform",
            initializer_args={"low": -0.5, "high": 0.5},
            seed=2**64 - 1,
            serving_default=-1.0,
        )
        info = client.describe_table(name)
        shards = len(client._addresses)
        assert (info.name, info.dim, info.seed, info.serving_default) == (name, 8, 2**64 - 1, -1.0)
        assert info.optimizer == "adagrad"
        assert {"lr": 0.5, "eps": 1e-8}.items() <= info.optimizer_args.items()
        assert info.initializer == "uniform"
        assert info.initializer_args == {"low": -0.5, "high": 0.5}
        assert (info.rows, info.shard_rows) == (0, (0,) * shards)
        assert len(info.versions) == len(info.shard_bytes) == shards
        assert info.bytes == sum(info.shard_bytes)

    def test_rows_are_counted_over_all_shards(self, client: Client, name: str) -> None:
        table = summing(client, name)
        table.push(np.arange(1000), np.ones((1000, DIM), np.float32))
        info = table.describe()
        assert info.rows == sum(info.shard_rows) == 1000
        assert min(info.shard_rows) > 0

    def test_keys_that_wait_for_a_row_are_counted(self, client: Client, name: str) -> None:
        table = client.create_table(name, DIM, admission="counter", admission_args={"threshold": 2})
        table.push([*range(1000), 1, 2, 3], np.ones((1003, DIM), np.float32))
        info = table.describe()
        assert (info.rows, info.waiting) == (3, 997)
        assert 997 * 16 < info.counter_bytes < info.bytes

    def test_an_equal_table_is_left_alone(self, client: Client, name: str) -> None:
        table = summing(client, name)
        table.push([1], np.ones((1, DIM), np.float32))
        again = summing(client, name)
        assert_array_equal(again.pull([1]), -np.ones((1, DIM), np.float32))

    @pytest.mark.parametrize(
        ("field", "change"),
        [
            ("dim", {"dim": 5}),
            ("optimizer", {"optimizer": "adam"}),
            ("optimizer", {"lr": 0.25}),
            ("initializer", {"initializer": "uniform"}),
            ("seed", {"seed": 1}),
            ("serving_default", {"serving_default": 1.0}),
        ],
    )
    def test_another_schema_is_refused_by_field(
        self, client: Client, name: str, field: str, change: dict[str, Any]
    ) -> None:
        schema = {"dim": DIM, "optimizer": "sgd", "lr": 1.0, "initializer": "zeros"}
        client.create_table(name, **schema)  # type: ignore[arg-type]
        with pytest.raises(SchemaMismatch, match=f"table '{name}' exists with {field} ") as caught:
            client.create_table(name, **{**schema, **change})  # type: ignore[arg-type]
        assert caught.value.reason == "SCHEMA_MISMATCH"

    def test_an_unknown_optimizer_is_refused_with_the_known_ones(
        self, client: Client, name: str
    ) -> None:
        with pytest.raises(InvalidArgument, match="no optimizer 'sgdd'") as caught:
            client.create_table(name, DIM, optimizer="sgdd")
        assert ", ".join(OPTIMIZERS) in str(caught.value)

    def test_an_unknown_initializer_is_refused_with_the_known_ones(
        self, client: Client, name: str
    ) -> None:
        with pytest.raises(InvalidArgument, match="no initializer 'ones'") as caught:
            client.create_table(name, DIM, initializer="ones")
        assert ", ".join(INITIALIZERS) in str(caught.value)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"optimizer": "sgd", "optimizer_args": {"beta1": 1.0}}, "'sgd' has no parameter"),
            ({"initializer": "constant", "initializer_args": {"low": 1}}, "it has: value"),
            ({"optimizer": "sgd", "lr": -1.0}, "lr must be >= 0"),
            ({"dim": 0}, r"dim must be an integer in 1\.\.8192, got 0"),
            ({"dim": 8193}, r"dim must be an integer in 1\.\.8192, got 8193"),
            ({"dim": 2.5}, r"dim must be an integer in 1\.\.8192, got 2\.5"),
            ({"seed": -1}, r"seed must be an integer in 0\.\.2\^64-1, got"),
            ({"seed": 2**64}, r"seed must be an integer in 0\.\.2\^64-1, got"),
            ({"lr": "a"}, "optimizer lr must be a number, got 'a'"),
            ({"optimizer": None}, "optimizer must be text in Unicode, got None"),
            ({"optimizer_args": {"eps": [1]}}, r"optimizer eps must be a number, got \[1\]"),
            ({"initializer_args": {5: 1}}, "parameter of .* must be text in Unicode, got 5"),
            ({"admission_args": 3}, "admission must come with a mapping .*, got 3"),
            ({"eviction": "step_ttl"}, "eviction must come with a mapping .*, got 'step_ttl'"),
            ({"serving_default": "0"}, "serving_default must be a number, got '0'"),
            ({"serving_default": float("nan")}, "serving_default must be finite, got nan"),
            ({"name": 5}, "name must be text in Unicode, got 5"),
            ({"name": "\ud800"}, r"name must be text in Unicode, got '\\ud800'"),
            ({"name": ""}, "table name must be 1..128"),
            ({"name": "-x"}, "table name must be 1..128"),
            ({"name": "a b"}, "table name must be 1..128"),
            ({"name": "x" * 129}, "table name must be 1..128"),
        ],
    )
    def test_a_bad_schema_is_refused(
        self, client: Client, name: str, arguments: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(InvalidArgument, match=message):
            client.create_table(**{"name": name, "dim": DIM, **arguments})
        assert name not in [info.name for info in client.list_tables()]

    def test_whoever_creates_on_the_first_shard_first_gets_its_way(
        self, cluster3: Cluster, connect: Any, name: str
    ) -> None:
        slow, fast = connect(cluster3), connect(cluster3)
        create_on(slow, 0, name, 4)
        with pytest.raises(SchemaMismatch, match="exists with dim"):
            summing(fast, name, 5)
        summing(slow, name, 4).push(np.arange(9), np.ones((9, 4), np.float32))
        assert fast.describe_table(name).rows == 9

    def test_the_first_shard_drops_last(self, cluster3: Cluster, connect: Any, name: str) -> None:
        client = connect(cluster3)
        summing(client, name, 4)
        calls: list[str] = []
        for link in client._connect().links:

            def call(*args: Any, where: str = link.where, inner: Any = link.channel.call) -> bytes:
                calls.append(where.split(" at ")[0])
                return inner(*args)

            link.channel.call = call
        client.drop_table(name)
        assert sorted(calls[:2]) == ["shard 1", "shard 2"]
        assert calls[2:] == ["shard 0"]

    def test_a_table_that_is_not_the_same_on_all_shards_is_refused_until_it_is_dropped(
        self, cluster3: Cluster, connect: Any, name: str
    ) -> None:
        client = connect(cluster3)
        for shard, dim in enumerate((4, 4, 5)):
            create_on(client, shard, name, dim)
        said = f"table '{name}' has another dim on shard 2 than on shard 0; drop it"
        for call in (lambda: client.table(name), client.list_tables):
            with pytest.raises(SchemaMismatch, match=said):
                call()
        client.drop_table(name)
        summing(client, name, 5)
        assert client.describe_table(name).dim == 5

    def test_tables_are_listed_by_name(self, client: Client, name: str) -> None:
        for letter in "cab":
            summing(client, f"{name}.{letter}")
        listed = [info.name for info in client.list_tables() if info.name.startswith(name)]
        assert listed == [f"{name}.a", f"{name}.b", f"{name}.c"]

    def test_dropping_forgets_rows_and_schema(self, any_client: Client, name: str) -> None:
        table = summing(any_client, name)
        table.push([1], np.ones((1, DIM), np.float32))
        any_client.drop_table(name)
        with pytest.raises(TableNotFound, match=name):
            any_client.describe_table(name)
        with pytest.raises(TableNotFound, match=name):
            any_client.drop_table(name)
        wider = summing(any_client, name, dim=2)
        assert_array_equal(wider.pull([1]), np.zeros((1, 2), np.float32))

    def test_a_table_that_is_not_there_is_named(self, any_client: Client, name: str) -> None:
        for call in (
            lambda: any_client.table(name),
            lambda: any_client.pull({name: [1]}),
            lambda: any_client.push({name: ([1], np.ones((1, 1), np.float32))}),
        ):
            with pytest.raises(TableNotFound, match=f"no table '{name}' on this shard") as caught:
                call()
            assert caught.value.reason == "TABLE_NOT_FOUND"

    def test_a_table_dropped_by_another_client_is_not_found(
        self, any_client: Client, cluster: Cluster, connect: Any, name: str
    ) -> None:
        table = summing(any_client, name)
        connect(cluster).drop_table(name)
        with pytest.raises(TableNotFound, match=name):
            table.pull([1])
        with pytest.raises(TableNotFound, match=name):
            table.push([1], np.ones((1, DIM), np.float32))

    def test_a_table_created_anew_with_another_dim_is_noticed_once(
        self, any_client: Client, cluster: Cluster, connect: Any, name: str
    ) -> None:
        other = connect(cluster)
        table, keys = summing(any_client, name), np.arange(20)
        for dim, use in (
            (2, lambda: table.pull(keys)),
            (6, lambda: table.push(keys, np.ones((20, 2), np.float32))),
            (3, lambda: table.exchange(keys, (keys, np.ones((20, 6), np.float32)))),
            (5, lambda: table.pull_rows(keys)),
        ):
            other.drop_table(name)
            summing(other, name, dim)
            with pytest.raises(SchemaMismatch, match=name):
                use()
            again = any_client.table(name)
            assert again.dim == dim
            again.push(keys, np.ones((20, dim), np.float32))
            assert_array_equal(again.pull(keys), -np.ones((20, dim), np.float32))


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
        with pytest.raises(VersionInFuture, match=r"min_version \d+ asked for") as caught:
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


class TestWire:
    @pytest.mark.parametrize(("wire", "limit"), [("bfloat16", 256), ("float16", 2048)])
    def test_numbers_that_a_wire_holds_travel_exactly(
        self, any_client: Client, name: str, wire: Any, limit: int
    ) -> None:
        table = summing(any_client, name)
        gradients = np.random.default_rng(0).integers(-limit, limit + 1, (100, DIM))
        table.push(np.arange(100), gradients.astype(np.float32), wire=wire)
        assert_array_equal(table.pull(np.arange(100), wire=wire), -gradients)
        assert_array_equal(table.pull(np.arange(100)), -gradients)

    @pytest.mark.parametrize(
        ("wire", "error"), [("float32", 0.0), ("bfloat16", 2**-8), ("float16", 2**-11)]
    )
    def test_other_numbers_are_rounded_to_the_nearest(
        self, cluster: Cluster, connect: Any, name: str, wire: Any, error: float
    ) -> None:
        client = connect(cluster, wire=wire)
        table = summing(client, name)
        gradients = np.random.default_rng(1).standard_normal((500, DIM)).astype(np.float32)
        table.push(np.arange(500), gradients, wire="float32")
        exact = table.pull(np.arange(500), wire="float32")
        assert_array_equal(exact, -gradients)
        assert_allclose(table.pull(np.arange(500)), exact, rtol=error, atol=0)
        table.push(np.arange(500, 1000), gradients)
        pushed = table.pull(np.arange(500, 1000), wire="float32")
        assert_allclose(pushed, exact, rtol=error, atol=0)

    @pytest.mark.parametrize(("wire", "large"), [("float16", 70_000.0), ("bfloat16", 3.4e38)])
    def test_a_gradient_too_large_for_the_wire_is_applied_nowhere(
        self, any_client: Client, name: str, wire: Any, large: float
    ) -> None:
        table = summing(any_client, name)
        gradients = np.ones((100, DIM), np.float32)
        gradients[42, 1] = -large
        with pytest.raises(InvalidArgument, match=f"'{name}': the gradient of key 42 is -.* at"):
            table.push(np.arange(100), gradients, wire=wire)
        assert table.describe().rows == 0


class TestRefusals:
    @pytest.fixture
    def table(self, any_client: Client, name: str) -> Iterator[Table]:
        table = summing(any_client, name)
        yield table
        assert table.describe().rows == 0  # nothing was applied

    @pytest.mark.parametrize("keys", [[1.0, 2.0], np.array(["a", "b"]), [True, False], [None, 1]])
    def test_keys_that_are_no_integers(self, table: Table, keys: Any) -> None:
        with pytest.raises(InvalidArgument, match="keys must be integers, got dtype"):
            table.pull(keys)
        with pytest.raises(InvalidArgument, match="keys must be integers, got dtype"):
            table.push(keys, np.ones((2, DIM), np.float32))

    @pytest.mark.parametrize("shape", [(2,), (2, DIM + 1), (3, DIM), (2, DIM, 1), (2 * DIM,)])
    def test_gradients_of_another_shape(self, table: Table, shape: tuple[int, ...]) -> None:
        with pytest.raises(InvalidArgument) as caught:
            table.push([1, 2], np.ones(shape, np.float32))
        assert f"gradients must have shape [2, {DIM}], got {list(shape)}" in str(caught.value)
        assert table.name in str(caught.value)

    def test_gradients_that_are_no_floats(self, table: Table) -> None:
        with pytest.raises(InvalidArgument, match="gradients must be floats, got int64"):
            table.push([1, 2], np.ones((2, DIM), np.int64))

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_a_gradient_that_is_not_finite_is_named(self, table: Table, bad: float) -> None:
        gradients = np.ones((100, DIM), np.float32)
        gradients[77, 2] = bad
        with pytest.raises(InvalidArgument) as caught:
            table.push(np.arange(1000, 1100), gradients)
        assert f"table '{table.name}': the gradient of key 1077 is {bad} at position 2;" in str(
            caught.value
        )

    def test_finite_gradients_whose_sum_is_not(self, table: Table) -> None:
        with pytest.raises(InvalidArgument, match="the gradient of key 5 is inf at position 0"):
            table.push([5, 5], np.full((2, DIM), 3e38, np.float32))

    def test_an_unknown_mode(self, table: Table) -> None:
        with pytest.raises(InvalidArgument, match="mode must be one of train, serve, got 'eval'"):
            table.pull([1], mode="eval")  # type: ignore[arg-type]

    def test_an_unknown_wire(self, table: Table) -> None:
        names = "float32, bfloat16, float16"
        with pytest.raises(InvalidArgument, match=f"wire must be one of {names}, got 'int8'"):
            table.pull([1], wire="int8")  # type: ignore[arg-type]

    @pytest.mark.parametrize("step", [2**47, -(2**47) - 1, 1.5, "1", None])
    def test_a_step_out_of_range(self, table: Table, step: Any) -> None:
        with pytest.raises(InvalidArgument) as caught:
            table.push([1], np.ones((1, DIM), np.float32), step=step)
        assert str(caught.value) == f"step must be an integer in -2^47..2^47-1, got {step!r}"

    @pytest.mark.parametrize("lr", ["a", "0.1", [0.1]])
    def test_a_learning_rate_that_is_no_number(self, table: Table, lr: Any) -> None:
        with pytest.raises(InvalidArgument) as caught:
            table.push([1], np.ones((1, DIM), np.float32), lr=lr)
        assert str(caught.value) == f"lr must be a number, got {lr!r}"

    @pytest.mark.parametrize("version", [-1, 2**64, 0.5])
    def test_a_version_that_cannot_be(self, table: Table, version: Any) -> None:
        with pytest.raises(InvalidArgument) as caught:
            table.pull_rows([1], min_version=[version] * len(table.client._addresses))
        rule = "min_version must be an integer in 0..2^64-1"
        assert str(caught.value) == f"{rule}, got {version!r}"

    @pytest.mark.parametrize("wrong", [5, None, "\udfff"])
    def test_a_name_that_is_no_text(self, table: Table, wrong: Any) -> None:
        client = table.client
        for call in (
            lambda: client.pull({wrong: [1]}),
            lambda: client.push({wrong: ([1], np.ones((1, DIM), np.float32))}),
            lambda: client.table(wrong),
            lambda: client.evict(wrong),
            lambda: client.drop_table(wrong),
            lambda: client.barrier(wrong),
        ):
            with pytest.raises(InvalidArgument) as caught:
                call()
            assert str(caught.value).endswith(f" must be text in Unicode, got {wrong!r}")

    @pytest.mark.parametrize(
        ("offsets", "weights", "message"),
        [
            (["a"], None, "offsets must be integers, got dtype <U1"),
            ([0.0, 1.0], None, "offsets must be integers, got dtype float64"),
            ([0, 1], ["a"], "weights must be numbers, got dtype <U1"),
        ],
    )
    def test_bags_that_are_no_numbers(
        self, table: Table, offsets: Any, weights: Any, message: str
    ) -> None:
        with pytest.raises(InvalidArgument) as caught:
            table.pull_pooled([1], offsets, weights=weights)
        assert str(caught.value) == message

    @pytest.mark.parametrize("lr", [float("nan"), float("inf")])
    def test_a_learning_rate_that_is_not_finite(self, table: Table, lr: float) -> None:
        with pytest.raises(InvalidArgument, match="lr must be "):
            table.push([1], np.ones((1, DIM), np.float32), lr=lr)

    def test_one_bad_table_keeps_the_others_from_being_pushed(self, table: Table) -> None:
        good = np.ones((50, DIM), np.float32)
        with pytest.raises(PsError):
            table.client.push({table.name: (np.arange(50), good), "no/such": ([1], good[:1])})

    def test_offsets_and_weights_that_do_not_fit(self, table: Table) -> None:
        for offsets in ([], [1, 3], [0, 2], [0, 2, 1, 3], [[0, 3]]):
            with pytest.raises(InvalidArgument, match="offsets must ascend from 0 to 3"):
                table.pull_pooled([1, 2, 3], offsets)
        with pytest.raises(InvalidArgument, match=r"weights must have shape \[3\], got \[2\]"):
            table.pull_pooled([1, 2, 3], [0, 3], weights=[1.0, 2.0])
        with pytest.raises(InvalidArgument, match="mode must be one of sum, mean, sqrtn"):
            table.pull_pooled([1, 2, 3], [0, 3], pooling="max")


class TestPooling:
    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.parametrize("pooling", ["sum", "mean", "sqrtn"])
    def test_bags_equal_numpy(
        self, client: Client, name: str, pooling: str, weighted: bool
    ) -> None:
        table = client.create_table(name, DIM, initializer="normal")
        random = np.random.default_rng(11)
        sizes = np.array([3, 0, 1, 7, 0, 12, 0])
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        keys = random.integers(0, 9, sizes.sum())
        weights = random.uniform(0.1, 2, len(keys)).astype(np.float32) if weighted else None
        pooled = table.pull_pooled(keys, offsets, pooling=pooling, weights=weights)

        rows = table.pull(keys).astype(np.float64)
        by = np.ones(len(keys)) if weights is None else weights.astype(np.float64)
        expected = np.zeros((len(sizes), DIM))
        for bag, (low, high) in enumerate(itertools.pairwise(offsets)):
            total = (by[low:high, None] * rows[low:high]).sum(0)
            divisor = {
                "sum": 1.0,
                "mean": by[low:high].sum(),
                "sqrtn": np.sqrt((by[low:high] ** 2).sum()),
            }[pooling]
            expected[bag] = total / divisor if high > low else 0
        assert pooled.dtype == np.float32
        assert_allclose(pooled, expected, rtol=1e-5, atol=1e-6)

    def test_no_bags_and_only_empty_bags(self, client: Client, name: str) -> None:
        table = client.create_table(name, DIM, initializer="normal")
        assert table.pull_pooled([], [0]).shape == (0, DIM)
        assert_array_equal(table.pull_pooled([], [0, 0, 0]), np.zeros((2, DIM)))


class TestPrefetch:
    def test_results_come_in_any_order(self, any_client: Client, name: str) -> None:
        table = summing(any_client, name)
        keys = np.arange(1000)
        gradients = np.arange(1000, dtype=np.float32)[:, None].repeat(DIM, 1)
        table.push(keys, gradients)
        pending = [table.start_pull(keys[at : at + 10]) for at in range(0, 1000, 10)]
        order = np.random.default_rng(0).permutation(100)
        for at in order:
            assert_array_equal(pending[at].result(), -gradients[10 * at : 10 * at + 10])
        assert_array_equal(pending[3].result(), -gradients[30:40])  # again

    def test_blocking_calls_go_on_meanwhile(self, any_client: Client, name: str) -> None:
        table = summing(any_client, name)
        pending = table.start_pull([1])
        table.push([1], np.ones((1, DIM), np.float32))
        assert_array_equal(table.pull([1]), -np.ones((1, DIM), np.float32))
        assert_array_equal(pending.result(), np.zeros((1, DIM), np.float32))

    def test_a_prefetch_may_be_forgotten(self, any_client: Client, name: str) -> None:
        table = summing(any_client, name)
        for _ in range(200):
            table.start_pull(np.arange(100))
        assert_array_equal(table.pull([1]), np.zeros((1, DIM), np.float32))

    def test_an_exchange_may_be_started_too(self, any_client: Client, name: str) -> None:
        table = summing(any_client, name)
        pending = [
            any_client.start_exchange({name: ([7], np.ones((1, DIM), np.float32))}, {name: [7]})
            for _ in range(20)
        ]
        seen = [float(item.result()[name][0, 0]) for item in pending]
        assert sorted(seen) == [-float(n) for n in range(20, 0, -1)]
        assert_array_equal(table.pull([7]), np.full((1, DIM), -20, np.float32))

    def test_an_error_waits_for_the_result(self, any_client: Client, name: str) -> None:
        table = summing(any_client, name)
        any_client.drop_table(name)
        any_client._dims[name] = DIM  # what a client that has not heard of the drop believes
        pending = table.start_pull([1])
        for _ in range(2):
            with pytest.raises(TableNotFound, match=name):
                pending.result()


class TestRoundTrips:
    def test_many_tables_travel_in_one_message_a_shard(
        self, any_client: Client, name: str, messages: list[Any]
    ) -> None:
        tables = [summing(any_client, f"{name}.{n}", dim=n) for n in (1, 2, 3)]
        keys = np.arange(300)
        push = {table.name: (keys, np.ones((300, table.dim), np.float32)) for table in tables}
        shards = len(any_client._addresses)
        del messages[:]
        any_client.push(push)
        assert [len(message.pushes) for message in messages] == [3] * shards
        del messages[:]
        pulled = any_client.pull({table.name: keys for table in tables})
        assert [len(message.pulls) for message in messages] == [3] * shards
        for table in tables:
            assert_array_equal(pulled[table.name], -np.ones((300, table.dim), np.float32))
        del messages[:]
        any_client.exchange(push, {tables[0].name: keys})
        assert [(len(m.pushes), len(m.pulls)) for m in messages] == [(3, 1)] * shards

    def test_a_shard_without_keys_gets_no_message(
        self, cluster3: Cluster, connect: Any, name: str, messages: list[Any]
    ) -> None:
        table = summing(connect(cluster3), name)
        table.pull([1])
        assert len(messages) == 1
        table.pull([])
        table.push([], np.empty((0, DIM), np.float32))
        assert len(messages) == 1


class TestFrameworks:
    def test_torch_tensors_are_keys_and_gradients(self, client: Client, name: str) -> None:
        table = summing(client, name)
        keys = torch.arange(12).reshape(3, 4)
        gradients = torch.randn(3, 4, DIM, requires_grad=True)
        table.push(keys, gradients)
        table.push(keys.int(), gradients.detach())
        assert_array_equal(table.pull(keys), -2 * gradients.detach().numpy())

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
    def test_gradients_of_other_float_dtypes(self, client: Client, name: str, dtype: Any) -> None:
        table = summing(client, name)
        table.push([1], torch.full((1, DIM), 0.5, dtype=dtype))
        assert_array_equal(table.pull([1]), np.full((1, DIM), -0.5, np.float32))

    def test_gradients_of_bfloat16(self, client: Client, name: str) -> None:
        table = summing(client, name)
        gradients = torch.randn(5, DIM).to(torch.bfloat16).requires_grad_()
        table.push(np.arange(5), gradients)
        assert_array_equal(table.pull(np.arange(5)), -gradients.detach().float().numpy())
        with pytest.raises(InvalidArgument, match="no array in host memory"):
            table.push([1], torch.ones(1, DIM, device="meta", dtype=torch.bfloat16))

    def test_results_become_torch_tensors_without_a_copy(self, client: Client, name: str) -> None:
        table = client.create_table(name, DIM, initializer="normal")
        pulled = table.pull([1, 2])
        tensor = torch.from_dlpack(pulled)
        tensor += 1
        assert tensor.data_ptr() == pulled.ctypes.data
        assert_array_equal(pulled, table.pull([1, 2]) + 1)

    def test_an_array_that_numpy_cannot_read_is_refused(self, client: Client, name: str) -> None:
        table = summing(client, name)
        meta = torch.ones(1, DIM, device="meta")
        with pytest.raises(InvalidArgument, match=f"'{name}': gradients: no array in host memory"):
            table.push([1], meta)


class TestStrings:
    def test_keys_of_strings_are_xxh64(self) -> None:
        random = np.random.default_rng(12)
        strings: list[Any] = ["", "a", "male", "ж", "日本語", "🙂" * 9, b"\0", b"\xff\xfe"]
        strings += [random.bytes(n) for n in range(100)]
        encoded = [s.encode() if isinstance(s, str) else s for s in strings]
        expected = [xxhash.xxh64_intdigest(s) for s in encoded]
        keys = hash_keys(strings)
        assert keys.dtype == np.uint64
        assert keys.tolist() == expected

    @pytest.mark.parametrize(
        "strings", ["male", b"ab", [1, 2], [b"a", None], ["\ud800"], [bytearray(2)]]
    )
    def test_what_is_no_list_of_strings_is_refused(self, strings: Any) -> None:
        with pytest.raises(InvalidArgument, match="strings must be "):
            hash_keys(strings)

    def test_no_strings_give_no_keys(self) -> None:
        assert hash_keys([]).shape == (0,)


class TestShardMap:
    """A client whose shard map is old finds the keys all the same."""

    KEYS = np.arange(300)

    @pytest.fixture(params=["stream", "unary"])
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


class TestLimits:
    """A request over the limits of a server is sent in pieces."""

    @pytest.mark.parametrize("transport", ["stream", "unary"])
    @pytest.mark.parametrize(
        ("dim", "keys"), [(64, 3000), (1, 5000), (64, 240), (8192, 3), (8192, 40), (1, 1001)]
    )
    def test_a_large_request_is_sent_in_pieces(
        self,
        small: Cluster,
        connect: Any,
        name: str,
        dim: int,
        keys: int,
        transport: str,
        messages: list[Any],
    ) -> None:
        table = summing(connect(small, transport=transport), name, dim)
        gradients = integers(13, keys, dim)
        table.push(np.arange(keys), gradients)
        assert len(messages) > 1
        assert_array_equal(table.pull(np.arange(keys)), -gradients)
        rows = table.pull_rows(np.arange(keys))
        assert_array_equal(rows.embeddings, -gradients)
        assert_array_equal(rows.frequencies, np.ones(keys))
        assert table.describe().rows == keys

    def test_several_tables_and_an_exchange_are_split_too(
        self, small: Cluster, connect: Any, name: str
    ) -> None:
        client = connect(small)
        tables = [summing(client, f"{name}.{dim}", dim) for dim in (3, 100)]
        keys = np.arange(2500)
        push = {table.name: (keys, integers(14, 2500, table.dim)) for table in tables}
        pulled = client.exchange(push, {table.name: keys for table in tables})
        for table in tables:
            assert_array_equal(pulled[table.name], -push[table.name][1])

    @pytest.mark.parametrize("transport", ["stream", "unary"])
    @pytest.mark.parametrize("background", [False, True])
    def test_an_exchange_in_pieces_pulls_once_every_push_is_answered(
        self,
        small: Cluster,
        connect: Any,
        name: str,
        transport: str,
        background: bool,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Else a push that the server asks to send again (OVERLOADED) would come after the pull."""
        client = connect(small, transport=transport)
        table = summing(client, name)
        (link,) = client._connect().links
        events: list[str] = []
        deadlines: dict[bool, set[float]] = {False: set(), True: set()}

        def submit(call: Any, *, inner: Any = link.submit, **rest: Any) -> None:
            deadlines[bool(call.exchange.pulls)].add(call.deadline)
            events.append("push" if call.exchange.pushes else "pull")
            inner(call, **rest)

        def wait(call: Any, *, inner: Any = link.wait) -> Any:
            answer = inner(call)
            events.append("pushed" if call.exchange.pushes else "pulled")
            return answer

        monkeypatch.setattr(link, "submit", submit)
        monkeypatch.setattr(link, "wait", wait)
        keys = np.arange(3000)
        gradients = integers(15, 3000, DIM)
        exchange = client.start_exchange if background else client.exchange
        result = exchange({name: (keys, gradients)}, {name: keys})
        pulled = (result.result() if background else result)[name]
        pieces = len(events) // 4
        assert pieces > 1
        assert events == [
            each for each in ("push", "pushed", "pull", "pulled") for _ in range(pieces)
        ]
        fresh = min(deadlines[True]) > max(deadlines[False])  # a prefetch may be awaited late
        assert fresh == background
        assert_array_equal(pulled, -gradients)
        assert_array_equal(table.pull(keys), -gradients)

    def test_an_exchange_in_pieces_whose_push_fails_pulls_nothing(
        self, small: Cluster, connect: Any, name: str, messages: list[Any]
    ) -> None:
        client = connect(small)
        table = summing(client, name)
        client.drop_table(name)
        client._dims[name] = DIM  # what a client that has not heard of the drop believes
        with pytest.raises(TableNotFound, match=name):
            table.exchange(np.arange(3000), (np.arange(3000), integers(16, 3000, DIM)))
        assert {len(message.pulls) for message in messages} == {0}


class TestThreads:
    def test_pushes_of_eight_threads_add_up(self, any_client: Client, name: str) -> None:
        table = summing(any_client, name)
        keys = [np.random.default_rng(n).integers(0, 100, 200) for n in range(8)]
        failures: list[BaseException] = []

        def push(number: int) -> None:
            try:
                for _ in range(20):
                    table.push(keys[number], np.ones((200, DIM), np.float32))
                    table.pull(keys[number])
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=push, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        counts = 20.0 * np.bincount(np.concatenate(keys), minlength=100)
        assert_array_equal(table.pull(np.arange(100)), -counts[:, None].repeat(DIM, 1))

    def test_closing_fails_what_waits_and_what_comes(
        self, cluster: Cluster, connect: Any, name: str
    ) -> None:
        client = connect(cluster)
        table = summing(client, name)
        client.close()
        client.close()
        for call in (lambda: table.pull([1]), client.list_tables, lambda: client.batch([1])):
            with pytest.raises(InvalidArgument, match="the client is closed"):
                call()


class TestAsyncio:
    def test_pulls_and_pushes_run_concurrently(self, cluster: Cluster, name: str) -> None:
        async def train() -> np.ndarray:
            async with AsyncClient(cluster.addresses, timeout=20.0) as ps:
                table = await ps.create_table(
                    name, DIM, optimizer="sgd", lr=1.0, initializer="zeros"
                )
                ones = np.ones((50, DIM), np.float32)
                await asyncio.gather(*(table.push(np.arange(50), ones) for _ in range(40)))
                pulls = await asyncio.gather(*(table.pull([n]) for n in range(50)))
                assert (await table.describe()).rows == 50
                assert name in [info.name for info in await ps.list_tables()]
                rows = await (await ps.table(name)).pull_rows([0])
                assert rows.frequencies.tolist() == [40]
                await ps.drop_table(name)
                with pytest.raises(TableNotFound):
                    await ps.describe_table(name)
                return np.concatenate(pulls)

        assert_array_equal(asyncio.run(train()), np.full((50, DIM), -40, np.float32))

    @pytest.mark.parametrize(("blocking", "awaited"), [(Client, AsyncClient), (Table, AsyncTable)])
    def test_every_call_has_its_counterpart(self, blocking: type, awaited: type) -> None:
        started = {"start_pull", "start_exchange"}  # tasks of asyncio are that
        calls = {name for name in vars(blocking) if not name.startswith("_")} - started
        assert calls <= set(vars(awaited))

    def test_deletes_barriers_and_durability(self, cluster: Cluster, name: str) -> None:
        async def work() -> None:
            async with AsyncClient(cluster.addresses, timeout=20.0) as ps:
                table = await ps.create_table(name, DIM)
                await table.push(np.arange(50), np.ones((50, DIM), np.float32))
                assert await table.delete(np.arange(40)) == 40
                marks = await ps.barrier("epoch")
                on_disk = await ps.wait_durable()
                assert all(disk >= mark for disk, mark in zip(on_disk, marks, strict=True))

        asyncio.run(work())

    def test_the_event_loop_goes_on_while_a_call_waits(self, cluster: Cluster, name: str) -> None:
        async def unreachable() -> int:
            ticks = 0

            async def tick() -> None:
                nonlocal ticks
                while True:
                    ticks += 1
                    await asyncio.sleep(0)

            async with AsyncClient([f"127.0.0.1:{free_ports(1)}"], timeout=0.3) as ps:
                ticking = asyncio.create_task(tick())
                with pytest.raises(Unavailable):
                    await ps.list_tables()
                ticking.cancel()
            return ticks

        assert asyncio.run(unreachable()) > 10


class TestAddresses:
    @pytest.mark.parametrize("addresses", [[], "127.0.0.1:7000", "", [7000]])
    def test_must_be_a_list(self, addresses: Any) -> None:
        with pytest.raises(InvalidArgument, match="addresses must be a list of 'host:port'"):
            Client(addresses)

    @pytest.mark.parametrize(
        "options",
        [
            {"transport": "udp"},
            {"wire": "int8"},
            {"wire": None},
            *({"timeout": value} for value in (0, float("nan"), float("inf"), "1")),
            *({"client_id": value} for value in (-1, 2**64, 1.5)),
            *({"incarnation": value} for value in (-1, 2**63, "1")),
        ],
        ids=repr,
    )
    def test_options_are_checked_at_birth(self, options: dict[str, Any]) -> None:
        with pytest.raises(InvalidArgument, match=next(iter(options))):
            Client(["127.0.0.1:1"], **options)

    def test_in_another_order_are_refused(self, cluster2: Cluster) -> None:
        first, second = cluster2.addresses
        with (
            Client([second, first], timeout=20) as client,
            pytest.raises(InvalidArgument) as caught,
        ):
            client.list_tables()
        assert str(caught.value) == f"addresses: shard 0 at {second} serves shard 1"

    def test_too_few_or_too_many_are_refused(self, cluster2: Cluster) -> None:
        first, second = cluster2.addresses
        for given in ([first], [first, second, second]):
            with (
                Client(given, timeout=20) as client,
                pytest.raises(InvalidArgument) as caught,
            ):
                client.list_tables()
            assert str(caught.value) == (
                f"addresses: shard 0 at {first} is one of 2 shards,"
                f" {len(given)} addresses were given"
            )

    @pytest.mark.parametrize("transport", ["stream", "unary"])
    def test_where_nothing_listens_are_named(self, transport: Any) -> None:
        address = f"127.0.0.1:{free_ports(1)}"
        started = time.monotonic()
        with (
            Client([address], timeout=0.5, transport=transport) as client,
            pytest.raises(Unavailable) as caught,
        ):
            client.list_tables()
        assert time.monotonic() - started < 2
        assert str(caught.value).startswith(f"shard 0 at {address}: failed to connect")


@pytest.mark.slow
class TestLife:
    @pytest.mark.parametrize("transport", ["stream", "unary"])
    def test_a_client_waits_for_servers_that_start_later(
        self, connect: Any, name: str, transport: str
    ) -> None:
        cluster = Cluster(2)
        client = connect(cluster, transport=transport, timeout=60.0)
        cluster.launch()
        try:
            table = summing(client, name)
            table.push([1], np.ones((1, DIM), np.float32))
            assert_array_equal(table.pull([1]), -np.ones((1, DIM), np.float32))
        finally:
            assert cluster.stop() == 0

    def test_a_server_that_stalls_or_dies_is_named_in_time(
        self, start_cluster: Any, connect: Any, name: str
    ) -> None:
        cluster = start_cluster(1)
        clients = [connect(cluster, transport=kind, timeout=1.0) for kind in ("stream", "unary")]
        tables = [summing(client, name) for client in clients]
        expected = np.zeros((1, DIM), np.float32)
        for table in tables:
            assert_array_equal(table.pull([1]), expected)
        (pid,) = cluster.pids(0)
        os.kill(pid, signal.SIGSTOP)
        try:
            for table in tables:
                started = time.monotonic()
                with pytest.raises(DeadlineExceeded, match=f"shard 0 at {cluster.addresses[0]}: "):
                    table.pull([1])
                assert 0.9 < time.monotonic() - started < 3
        finally:
            os.kill(pid, signal.SIGCONT)
        for table in tables:
            assert_array_equal(table.pull([1]), expected)
        assert cluster.stop() == 0
        for table in tables:
            with pytest.raises(Unavailable, match=f"shard 0 at {cluster.addresses[0]}: "):
                table.pull([1])
