"""Tables: created, described, listed, dropped, changed by others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from servers import Cluster
from tables import DIM, create_on, summing

from psclient import Client
from psclient.errors import (
    InvalidArgument,
    SchemaMismatch,
    TableNotFound,
)
from storage.initializers import INITIALIZERS
from storage.optimizers import OPTIMIZERS


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

            def start(*args: Any, where: str = link.where, inner: Any = link.channel.start) -> Any:
                calls.append(where.split(" at ")[0])
                return inner(*args)

            link.channel.start = start
        client.drop_table(name)
        assert sorted(calls[:2]) == ["shard 1", "shard 2"]
        assert calls[2:] == ["shard 0"]

    def test_a_table_that_is_not_the_same_on_all_shards_is_refused_until_it_is_dropped(
        self, cluster3: Cluster, connect: Any, name: str
    ) -> None:
        client = connect(cluster3)
        for shard, dim in enumerate((4, 4, 5)):
            create_on(client, shard, name, dim)
        said = f"table '{name}': field 'dim' differs between shard 0 and shard 2; "
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
