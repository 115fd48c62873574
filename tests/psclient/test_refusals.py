"""Bad arguments are refused by name, and nothing is applied."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from servers import Cluster
from tables import DIM, summing

from psclient import Client, Follower, PsError, Subscriber, Table, admin
from psclient.errors import (
    InvalidArgument,
)
from psclient.tools.analysis import analyze


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


@pytest.mark.parametrize("bad", ["", "a b", "../c", "a" * 129])
@pytest.mark.parametrize(
    ("kind", "create"),
    [
        ("barrier", lambda client, name: client.barrier(name)),
        ("checkpoint", lambda client, name: admin.checkpoint(client, name)),
        ("table", lambda client, name: admin.warm_start(client, "full", "t", name)),
    ],
)
def test_bad_names_are_refused_before_anything_is_sent(kind: str, create: Any, bad: str) -> None:
    with (
        Client(["127.0.0.1:1"]) as client,
        pytest.raises(InvalidArgument, match=f"^{kind} name must be"),
    ):
        create(client, bad)


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

    def test_gradients_that_are_no_numbers(self, table: Table) -> None:
        with pytest.raises(InvalidArgument, match="gradients must be floats, got bool"):
            table.push([1, 2], np.ones((2, DIM), np.bool_))

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


@pytest.mark.parametrize(
    "call",
    [
        lambda client: admin.describe(client, ""),
        lambda client: admin.restore(client, ""),
        lambda client: admin.verify(client, 5),  # type: ignore[arg-type]
        lambda client: admin.delete(client, 5),  # type: ignore[arg-type]
        lambda client: admin.delete(client, "a", ""),
        lambda client: admin.checkpoint(client, "b", parent="../a"),
        lambda client: admin.warm_start(client, "", "t", "new"),
        lambda client: next(admin.read_rows(client, "t", checkpoint="")),
        lambda client: analyze(client, "t", checkpoint=""),
    ],
)
def test_an_empty_name_of_a_checkpoint_is_never_another_thing(call: Any) -> None:
    """Such as the live table, or the first of all checkpoints."""
    with Client(["127.0.0.1:1"]) as client, pytest.raises(InvalidArgument, match="checkpoint"):
        call(client)


def test_arguments_of_any_type_are_refused_by_name(client: Client, name: str) -> None:
    table: Any = summing(client, name)
    where = client._addresses
    one = np.ones((2, DIM), np.float32)
    calls: list[tuple[Any, str]] = [
        (lambda: admin.prune(client, "3"), "keep must be"),  # type: ignore[arg-type]
        (lambda: admin.prune(client, 1 << 40), "keep must be"),
        (lambda: admin.write_rows(client, 5, [1], one[:1]), "name of a table"),  # type: ignore
        (lambda: admin.write_rows(client, name, [1], [["a"]]), "rows must be"),  # type: ignore
        (lambda: admin.write_rows(client, name, [1, 2], [[1], [1, 2]]), "rows"),  # type: ignore
        (lambda: admin.write_rows(client, name, np.array([7, 7]), one), "keys must be distinct"),
        (lambda: next(admin.read_rows(client, name, shards=[9])), "shard must be"),
        (lambda: client.push([name]), "gradients must be a mapping"),  # type: ignore[arg-type]
        (lambda: client.push({name: [1]}), "a push must be a pair"),  # type: ignore[dict-item]
        (lambda: client.pull([name]), "keys must be a mapping"),  # type: ignore[arg-type]
        (lambda: Subscriber(5), "addresses must be"),  # type: ignore[arg-type]
        (lambda: Subscriber(where, tables=5), "tables must be"),  # type: ignore[arg-type]
        (lambda: Subscriber(where, tokens=5), "tokens must be"),  # type: ignore[arg-type]
        (lambda: Subscriber(where, tokens=[1] * len(where)), "tokens must be"),  # type: ignore
        (lambda: Subscriber(where, timeout="x"), "timeout must be"),  # type: ignore[arg-type]
        (lambda: Subscriber(where, timeout=float("nan")), "timeout must be"),
        (lambda: Follower(where, tables=5), "tables must be"),  # type: ignore[arg-type]
    ]
    for call, message in calls:
        with pytest.raises(InvalidArgument, match=message):
            call()
    with Follower(where, tables=[name]) as follower:
        for versions in (5, ["x"] * len(where)):
            with pytest.raises(InvalidArgument, match="version"):
                follower.wait_for(versions, 1)  # type: ignore[arg-type]
    assert table.describe().rows == 0
