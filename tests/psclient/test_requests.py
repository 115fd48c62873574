"""Pooling, prefetches, round trips, arrays of frameworks, limits."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from servers import Cluster
from tables import DIM, integers, summing

from psclient import Client
from psclient.errors import (
    InvalidArgument,
    TableNotFound,
)


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
        with pytest.raises(InvalidArgument, match="must be an array in host memory"):
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
        with pytest.raises(
            InvalidArgument, match=f"'{name}': gradients must be an array in host memory"
        ):
            table.push([1], meta)


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
