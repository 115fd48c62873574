"""Features whose embeddings grow with their frequency."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from features import integers, offline, summing
from numpy.testing import assert_array_equal
from torch import nn

from psclient import Client
from psclient.errors import InvalidArgument
from psclient.mixed import MixedDimension
from psclient.torch import EmbeddingGroup
from psclient.torch import MixedDimensionEmbedding as MixedModule


@pytest.fixture(params=[1, 2], ids=["1 shard", "2 shards"])
def client(request: pytest.FixtureRequest, connect: Any) -> Client:
    return connect(request.getfixturevalue(f"cluster{request.param}"))


@pytest.fixture
def mixed(client: Client, name: str) -> MixedDimension:
    """2 numbers for every key, 3 more from the third occurrence on, initially 10."""
    wide = client.create_table(
        f"{name}.wide", 3, optimizer="sgd", lr=1.0, initializer="constant",
        initializer_args={"value": 10.0},
    )  # fmt: skip
    return MixedDimension(summing(client, f"{name}.small", 2), wide, 3)


def ones(*shape: int) -> np.ndarray:
    return np.ones((*shape, 5), np.float32)


class TestMixedDimension:
    def test_a_key_earns_its_wide_part(self, mixed: MixedDimension) -> None:
        seen = []
        for _ in range(5):
            seen.append(mixed.pull([-1])[0].tolist())
            mixed.push([-1], ones(1))
        assert seen == [
            [0, 0, 0, 0, 0],
            [-1, -1, 0, 0, 0],
            [-2, -2, 0, 0, 0],
            [-3, -3, 10, 10, 10],
            [-4, -4, 9, 9, 9],
        ]

    def test_rare_keys_have_no_wide_row(self, mixed: MixedDimension) -> None:
        frequent = np.repeat(np.arange(10), 3)
        for _ in range(2):
            mixed.push(np.append(frequent, np.arange(100, 150)), ones(80))
        assert (mixed.small.describe().rows, mixed.wide.describe().rows) == (60, 10)
        assert mixed.wide.pull_rows(np.arange(10)).frequencies.tolist() == [3] * 10
        pulled = mixed.pull_mixed(np.arange(200))
        assert_array_equal(np.flatnonzero(pulled.wide), np.arange(10))
        assert_array_equal(pulled.embeddings[:10], [[-6, -6, 7, 7, 7]] * 10)
        assert_array_equal(pulled.embeddings[100:150], [[-2, -2, 0, 0, 0]] * 50)

    def test_a_prefetch_changes_nothing(self, mixed: MixedDimension) -> None:
        before = mixed.pull(np.arange(20))
        assert mixed.prefetch(np.arange(20).reshape(4, 5)).result() is None
        assert_array_equal(mixed.pull(np.arange(20)), before)

    @pytest.mark.parametrize("shape", [(), (0,), (40,), (3, 4, 5)])
    def test_integers_are_exact(self, mixed: MixedDimension, shape: tuple[int, ...]) -> None:
        mixed.push(np.repeat(np.arange(0, 20, 2), 3), ones(30))
        keys = np.random.default_rng(1).integers(0, 20, shape)
        gradients = integers(2, *shape, 5)
        rows = np.zeros((20, 5), np.float32)
        rows[::2] = [-3, -3, 10, 10, 10]
        assert_array_equal(mixed.pull(keys), rows[keys])
        mixed.push(mixed.pull_mixed(keys), gradients)
        np.subtract.at(rows, keys.reshape(-1), gradients.reshape(-1, 5))
        frequency = 3 * (np.arange(20) % 2 == 0) + np.bincount(keys.reshape(-1), minlength=20)
        rows[1::2, 2:] = 10 * (frequency[1::2] >= 3)[:, None]
        assert_array_equal(mixed.pull(np.arange(20)), rows)

    def test_a_push_earns_what_its_pull_saw(self, mixed: MixedDimension) -> None:
        pulled = mixed.pull_mixed([4])
        mixed.push([4, 4, 4], ones(3))
        mixed.push(pulled, ones(1))
        assert mixed.pull([4]).tolist() == [[-4, -4, 10, 10, 10]]
        mixed.push([4], ones(1))
        assert mixed.pull([4]).tolist() == [[-5, -5, 9, 9, 9]]

    def test_a_pull_takes_two_messages_and_a_push_one(
        self, mixed: MixedDimension, messages: list[Any]
    ) -> None:
        keys = np.arange(200)
        shards = len(mixed.client._addresses)
        mixed.push(keys, ones(200))
        del messages[:]
        pulled = mixed.pull_mixed(keys)
        assert len(messages) == shards  # nothing is earned
        mixed.push(np.tile(keys, 2), ones(400))
        del messages[:]
        pulled = mixed.pull_mixed(keys)
        assert len(messages) == 2 * shards
        del messages[:]
        mixed.push(pulled, ones(200))
        assert [len(message.pushes) for message in messages] == [2] * shards

    def test_serving_sees_what_training_does(self, mixed: MixedDimension) -> None:
        mixed.push([1, 1, 1, 2], ones(4))
        mixed.push([1], ones(1))
        expected = [[-4, -4, 9, 9, 9], [-1, -1, 0, 0, 0], [0, 0, 0, 0, 0]]
        assert mixed.pull([1, 2, 3]).tolist() == expected
        assert mixed.pull([1, 2, 3], mode="serve").tolist() == expected
        mixed.push([2, 2], ones(2))  # earned, and the wide row is yet to be pushed
        assert mixed.pull([2]).tolist() == [[-3, -3, 10, 10, 10]]
        assert mixed.pull([2], mode="serve").tolist() == [[-3, -3, 0, 0, 0]]

    def test_options_reach_the_client(self, mixed: MixedDimension) -> None:
        mixed.push([1, 1, 1], ones(3))
        mixed.push([1], ones(1) * 1.001953125, step=9, lr=2.0, wire="bfloat16")
        assert mixed.pull([1]).tolist() == [[-5, -5, 8, 8, 8]]
        assert [table.pull_rows([1]).steps[0] for table in (mixed.small, mixed.wide)] == [9, 9]

    def test_bad_gradients_are_applied_nowhere(self, mixed: MixedDimension) -> None:
        mixed.push([1, 1, 1], ones(3))
        before = mixed.pull([1]).tolist()
        bad = ones(1)
        bad[0, 4] = np.inf
        for gradients, message in ((bad, r"got inf at \[0, 4\]"), (ones(2), "shape")):
            with pytest.raises(InvalidArgument, match=message):
                mixed.push([1], gradients)
        assert mixed.pull([1]).tolist() == before

    @pytest.mark.parametrize("threshold", [-1, 0, 2**32])
    def test_a_threshold_that_no_count_reaches_is_refused(self, threshold: int) -> None:
        with pytest.raises(InvalidArgument, match=rf"in 1\.\.2\^32-1, got {threshold}"):
            MixedDimension(*offline(2), threshold)

    def test_tables_that_do_not_fit_are_refused(self) -> None:
        (table,) = offline()
        with pytest.raises(InvalidArgument, match="must be different tables, got 't0' twice"):
            MixedDimension(table, table, 3)
        with pytest.raises(InvalidArgument, match="must belong to one client"):
            MixedDimension(table, *offline(), 3)


class TestMixedModule:
    @pytest.mark.parametrize("shape", [(), (0,), (40,), (3, 4)])
    def test_it_trains_as_torch_does(self, mixed: MixedDimension, shape: tuple[int, ...]) -> None:
        mixed.push(np.repeat(np.arange(0, 20, 2), 3), ones(30))
        keys = np.random.default_rng(3).integers(0, 20, shape)
        rows = nn.Parameter(torch.from_numpy(mixed.pull(np.arange(20))))
        module = MixedModule(mixed)
        ours, theirs = module(torch.from_numpy(keys)), rows[torch.from_numpy(keys)]
        assert_array_equal(ours.detach().numpy(), theirs.detach().numpy())
        for output in (ours, theirs):
            output.square().sum().backward()
        module.step(4)
        assert rows.grad is not None
        expected = (rows - rows.grad).detach().numpy()
        frequency = np.bincount(keys.reshape(-1), minlength=20)
        expected[1::2, 2:] = 10 * (frequency[1::2] >= 3)[:, None]
        assert_array_equal(mixed.pull(np.arange(20)), expected)
        even = np.arange(0, 20, 2)
        assert_array_equal(mixed.small.pull_rows(even).frequencies, 3 + frequency[::2])
        assert_array_equal(mixed.wide.pull_rows(even).frequencies, frequency[::2])

    def test_evaluation_collects_nothing_without_gradients(self, mixed: MixedDimension) -> None:
        mixed.push([1, 1, 1], ones(3))
        module = MixedModule(mixed).eval()
        with torch.no_grad():
            assert module(torch.tensor([1, 2])).tolist() == [[-3, -3, 0, 0, 0], [0] * 5]
        assert module.small.gradients.passes == module.wide.gradients.passes == {}
        assert (dict(module.state_dict()), list(module.parameters())) == ({}, [])

    def test_a_group_refuses_it(self, mixed: MixedDimension) -> None:
        with pytest.raises(InvalidArgument, match="feature 'a' must be an Embedding"):
            EmbeddingGroup(mixed.client, {"a": MixedModule(mixed)})  # type: ignore[dict-item]
