"""Which gradients are pushed: those of backward passes since the last step or zero_grad, once."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from torch import Tensor, nn

from psclient import Client, Table
from psclient.errors import InvalidArgument, PsError
from psclient.mixed import MixedDimension
from psclient.multihash import KHash
from psclient.torch import (
    Embedding,
    EmbeddingBag,
    EmbeddingGroup,
    MixedDimensionEmbedding,
    MultiHashEmbedding,
    RowOptimizer,
    gradients,
)
from psclient.torch.gradients import FEW, FORGOTTEN

DIM = 4
BAD = 1e6  # gradient of a batch that must not be pushed


@pytest.fixture
def client(cluster3: Any, connect: Any) -> Client:
    return connect(cluster3)


@pytest.fixture
def table(client: Client, name: str) -> Table:
    return zeros(client, name)


def zeros(client: Client, name: str) -> Table:
    """A table whose rows begin with 0 and become minus the sum of their gradients."""
    return client.create_table(name, DIM, optimizer="sgd", lr=1.0, initializer="zeros")


class Model(nn.Module):
    """A user's model, with an Embedding somewhere in it."""

    def __init__(self, table: Table) -> None:
        super().__init__()
        self.tower = nn.Sequential(Embedding(table), nn.Linear(DIM, 1))

    def forward(self, keys: Tensor) -> Tensor:
        return self.tower(keys)


def backward(module: nn.Module, key: int, gradient: float) -> None:
    """Run a pass whose gradient for each number of the key's row is ``gradient``."""
    (module(torch.tensor([key])).sum() * gradient).backward()


MODULES: dict[str, Callable[[Client, str], Any]] = {
    "Embedding": lambda client, name: Embedding(zeros(client, name)),
    "MultiHash": lambda client, name: MultiHashEmbedding(KHash(zeros(client, name), (5, 7))),
    "Mixed": lambda client, name: MixedDimensionEmbedding(
        MixedDimension(zeros(client, f"{name}.a"), zeros(client, f"{name}.b"), threshold=1)
    ),
}


class TestDiscarded:
    @pytest.mark.parametrize("kind", MODULES)
    def test_zero_grad_of_a_module_discards(self, client: Client, name: str, kind: str) -> None:
        module = MODULES[kind](client, name)
        backward(module, 1, BAD)
        module.zero_grad()
        backward(module, 1, 1.0)
        module.step()
        assert set(module(torch.tensor([1])).flatten().tolist()) <= {-2.0, -1.0, 0.0}

    def test_zero_grad_of_a_group_discards(self, client: Client, table: Table) -> None:
        group = EmbeddingGroup(client, {"a": Embedding(table), "b": EmbeddingBag(table)})
        for gradient in (BAD, 1.0):
            group.zero_grad()
            out = group({"a": torch.tensor([1]), "b": torch.tensor([[1, 2]])})
            (out["a"].sum() * gradient + out["b"].sum() * gradient).backward()
        group.step()
        assert table.pull([1, 2])[:, 0].tolist() == [-2.0, -1.0]

    def test_zero_grad_of_a_model_discards(self, table: Table) -> None:
        model = Model(table)
        handle = model.tower[0].optimizer()
        for gradient in (BAD, 1.0):
            model.zero_grad()
            backward(model.tower[0], 1, gradient)
        handle.step()
        assert table.pull([1]).tolist() == [[-1.0] * DIM]

    def test_zero_grad_of_a_model_still_zeroes_its_parameters(self, table: Table) -> None:
        model = Model(table)
        model(torch.tensor([1])).sum().backward()
        model.zero_grad(set_to_none=False)
        linear = model.tower[1]
        assert linear.weight.grad is not None
        assert linear.weight.grad.abs().sum() == 0
        model.zero_grad()
        assert linear.weight.grad is None

    @pytest.mark.parametrize("to_none", [True, False])
    def test_zero_grad_of_a_handle_discards(self, table: Table, to_none: bool) -> None:
        module = Embedding(table)
        handle = module.optimizer()
        backward(module, 1, BAD)
        handle.zero_grad(set_to_none=to_none)
        assert handle.leaves() == []
        backward(module, 1, 1.0)
        handle.step()
        assert table.pull([1]).tolist() == [[-1.0] * DIM]

    def test_zero_grad_between_forward_and_backward_keeps_the_batch(self, table: Table) -> None:
        module = Embedding(table)
        loss = module(torch.tensor([1])).sum()
        module.zero_grad()
        loss.backward()
        module.step()
        assert table.pull([1]).tolist() == [[-1.0] * DIM]

    def test_a_graph_used_again_after_zero_grad_or_step_begins_anew(self, table: Table) -> None:
        module = Embedding(table)
        loss = module(torch.tensor([1])).sum()
        loss.backward(retain_graph=True)
        module.zero_grad()
        loss.backward(retain_graph=True)
        module.step()
        loss.backward()
        module.step()
        assert table.pull([1]).tolist() == [[-2.0] * DIM]


class TestSharedTable:
    """Features of one table, pulled together, have gradients of their own."""

    @pytest.fixture
    def group(self, client: Client, table: Table) -> EmbeddingGroup:
        return EmbeddingGroup(client, {"a": Embedding(table), "b": EmbeddingBag(table)})

    def test_zero_grad_of_one_feature_discards_its_gradients_only(
        self, table: Table, group: EmbeddingGroup
    ) -> None:
        out = group({"a": torch.tensor([1, 2, 2]), "b": torch.tensor([[2, 3]])})
        (out["a"].sum() + out["b"].sum() * BAD).backward()
        group.features["b"].zero_grad()
        group.step()
        pulled = table.pull_rows([1, 2, 3])
        assert pulled.embeddings[:, 0].tolist() == [-1.0, -2.0, 0.0]
        assert pulled.found.tolist() == [True, True, False]
        assert pulled.frequencies[:2].tolist() == [1, 2]

    def test_each_optimizer_pushes_its_own_feature(
        self, table: Table, group: EmbeddingGroup
    ) -> None:
        first, second = (
            RowOptimizer(group.features["a"], lr=1.0),
            RowOptimizer(group.features["b"], lr=0.5),
        )
        out = group({"a": torch.tensor([1, 2]), "b": torch.tensor([[2, 3]])})
        (out["a"].sum() + out["b"].sum()).backward()
        first.step()
        assert table.pull([1, 2, 3])[:, 0].tolist() == [-1.0, -1.0, 0.0]
        second.step()
        assert table.pull([1, 2, 3])[:, 0].tolist() == [-1.0, -1.5, -0.5]

    def test_one_step_of_the_group_counts_each_key_once(
        self, table: Table, group: EmbeddingGroup
    ) -> None:
        out = group({"a": torch.tensor([1, 2, 2]), "b": torch.tensor([[2, 3]])})
        (out["a"].sum() + out["b"].sum()).backward()
        group.step()
        pulled = table.pull_rows([1, 2, 3])
        assert pulled.embeddings[:, 0].tolist() == [-1.0, -3.0, -1.0]
        assert pulled.frequencies.tolist() == [1, 3, 1]

    def test_a_feature_in_eval_mode_is_served_beside_one_that_trains(
        self, client: Client, name: str
    ) -> None:
        table = client.create_table(name, DIM, initializer="zeros", serving_default=2.5)
        group = EmbeddingGroup(client, {"a": Embedding(table), "b": Embedding(table)})
        group.features["a"].eval()
        out = group({"a": torch.tensor([1]), "b": torch.tensor([1])})
        assert (out["a"][0, 0].item(), out["b"][0, 0].item()) == (2.5, 0.0)


class TestCopied:
    def test_a_shallow_copy_has_gradients_of_its_own(self, table: Table) -> None:
        module = Embedding(table).requires_grad_(False)
        other = copy.copy(module.requires_grad_())
        rows = RowOptimizer([module, other])
        backward(module, 1, 1.0)
        other.zero_grad()
        rows.step()
        assert table.pull([1]).tolist() == [[-1.0] * DIM]
        assert copy.copy(module.requires_grad_(False)).trainable is False
        assert other.trainable is True


class TestFailed:
    @pytest.mark.parametrize("number", [float("nan"), float("inf")])
    def test_the_step_after_a_batch_of_nan_succeeds(self, table: Table, number: float) -> None:
        module = Embedding(table)
        backward(module, 1, number)
        with pytest.raises(InvalidArgument, match="must be finite") as raised:
            module.step()
        assert "gradients of this step were discarded" in raised.value.__notes__[0]
        backward(module, 2, 1.0)
        module.step()
        assert table.pull([1, 2])[:, 0].tolist() == [0.0, -1.0]

    @pytest.mark.parametrize("how", ["module", "handle"])
    def test_a_step_that_fails_on_one_shard_is_not_applied_again(
        self, client: Client, table: Table, how: str
    ) -> None:
        batch = client.batch(np.arange(100))
        first, last = batch.keys[0].item(), batch.keys[-1].item()  # on shards 0 and 2
        assert batch.bounds[1] > 0
        assert batch.bounds[2] < len(batch.keys)
        module = Embedding(table)
        step = module.step if how == "module" else module.optimizer().step
        out = module(torch.tensor([first, last]))
        (out[0].sum() * 3 + out[1].sum() * 3e38).backward()
        table.push([last], np.full((1, DIM), 3e38))  # the next push would overflow
        with pytest.raises(PsError, match=rf"overflow|infinit|row of key {last}"):
            step()
        backward(module, first, 1.0)
        step()
        assert table.pull([first]).tolist() == [[-4.0] * DIM]

    @pytest.mark.parametrize(
        "fail",
        [
            lambda module: module.step(1 << 60),
            lambda module: module.step(ranks="avg"),
            lambda module: module.optimizer().step(step=1 << 60),
            lambda module: module.optimizer().step(step="first"),
            lambda module: module.optimizer().step(lambda: 1 / 0),
        ],
        ids=["step", "ranks", "step of a handle", "no number", "closure"],
    )
    def test_whatever_fails_discards(self, table: Table, fail: Callable[[Any], Any]) -> None:
        module = Embedding(table)
        backward(module, 1, BAD)
        with pytest.raises((InvalidArgument, ZeroDivisionError)) as raised:
            fail(module)
        assert "gradients of this step were discarded" in raised.value.__notes__[0]
        backward(module, 2, 1.0)
        module.step()
        assert table.pull([1, 2])[:, 0].tolist() == [0.0, -1.0]

    def test_a_closed_client_says_that_gradients_are_gone(
        self, cluster3: Any, connect: Any, table: Table
    ) -> None:
        client = connect(cluster3)
        module = Embedding(client.table(table.name))
        for key in (1, 2):
            backward(module, key, 1.0)
        client.close()
        with pytest.raises(PsError) as raised:
            module.step()
        assert "gradients of this step were discarded" in raised.value.__notes__[0]
        assert module.gradients.passes == {}


class TestMemory:
    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    def test_passes_without_a_backward_pass_are_not_kept(
        self, table: Table, training: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        batches: list[weakref.ref[Any]] = []
        inner = Client.pull_distinct

        def pull(self: Client, keys: Any, **rest: Any) -> Any:
            batches.extend(weakref.ref(batch) for batch in keys.values())
            return inner(self, keys, **rest)

        monkeypatch.setattr(Client, "pull_distinct", pull)
        module = Embedding(table).train(training)
        for _ in range(3):
            module(torch.arange(50))
        gc.collect()
        assert len(batches) == 3
        assert [batch() for batch in batches] == [None] * 3
        assert module.gradients.passes == {}

    def test_a_pushed_batch_is_freed(self, table: Table) -> None:
        module = Embedding(table)
        backward(module, 1, 1.0)
        leaf = weakref.ref(module.optimizer().leaves()[0])
        module.step()
        gc.collect()
        assert leaf() is None

    def test_many_passes_hold_the_memory_of_few(self, table: Table) -> None:
        module = Embedding(table)
        for _ in range(10 * FEW):
            module(torch.arange(50)).sum().backward()
            assert len(module.gradients.passes) <= FEW
        module.step()
        pulled = table.pull_rows(np.arange(50))
        assert_array_equal(pulled.embeddings, np.full((50, DIM), -10.0 * FEW))
        assert_array_equal(pulled.frequencies, np.full(50, 10 * FEW))

    def test_many_passes_of_which_some_were_set_to_none_are_summed(self, table: Table) -> None:
        module = Embedding(table)
        for number in range(2 * FEW):
            backward(module, number, 1.0)
            if number == 2:
                for each in module.gradients.passes.values():
                    each.leaf.grad = None
        module.step()
        assert table.pull_rows(np.arange(2 * FEW)).found.tolist() == [False] * 3 + [True] * 13

    def test_sums_are_rare_if_passes_have_new_keys(
        self, table: Table, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sums = []
        inner = gradients._merge
        monkeypatch.setattr(
            gradients, "_merge", lambda passes: sums.append(len(passes)) or inner(passes)
        )
        module = Embedding(table)
        for number in range(128):
            backward(module, number, 1.0)
        assert 1 <= len(sums) <= 5
        module.step()
        assert_array_equal(table.pull(np.arange(128)), -np.ones((128, DIM)))

    def test_a_loop_without_step_is_warned_once(
        self, table: Table, recwarn: pytest.WarningsRecorder
    ) -> None:
        module = Embedding(table)
        rows = module.optimizer()
        loss = module(torch.tensor([1])).sum()
        for _ in range(FORGOTTEN - 1):
            loss.backward(retain_graph=True)
        assert len(rows.leaves()) == 1
        with pytest.warns(UserWarning, match="1000 backward passes without a step or zero_grad"):
            loss.backward(retain_graph=True)
        recwarn.clear()
        loss.backward(retain_graph=True)
        assert len(recwarn) == 0

    def test_a_gradient_that_arrives_during_a_sum_is_kept(
        self, table: Table, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Another thread ends its backward pass while ``leaves`` sums those of this one."""
        module = Embedding(table)
        rows = module.optimizer()
        inner = gradients._merge

        def merge(passes: Any) -> Any:
            other = threading.Thread(target=backward, args=(module, 3, 1.0))
            other.start()
            other.join()
            return inner(passes)

        backward(module, 1, 1.0)
        backward(module, 2, 1.0)
        monkeypatch.setattr(gradients, "_merge", merge)
        rows.leaves()
        monkeypatch.undo()
        rows.step()
        assert table.pull([1, 2, 3])[:, 0].tolist() == [-1.0] * 3

    def test_a_gradient_that_arrives_while_others_are_discarded_is_kept(
        self, client: Client, table: Table
    ) -> None:
        module = Embedding(table)

        class Leaf:
            def __setattr__(self, name: str, value: Any) -> None:
                backward(module, 3, 1.0)  # the backward pass of another thread ends now

            def __len__(self) -> int:
                return 1

        leaf: Any = Leaf()
        module.gradients.keep(gradients.Pass(table, client.batch([1]), leaf))
        module.zero_grad()
        module.step()
        assert table.pull([1, 3])[:, 0].tolist() == [0.0, -1.0]


class TestFrozen:
    def test_a_frozen_module_pushes_nothing(self, table: Table) -> None:
        module = Embedding(table)
        assert module.requires_grad_(False) is module
        assert not module(torch.tensor([1])).requires_grad
        module.requires_grad_()
        backward(module, 1, 1.0)
        module.step()
        assert table.pull([1]).tolist() == [[-1.0] * DIM]

    def test_freezing_a_model_freezes_its_rows_and_parameters(self, table: Table) -> None:
        model = Model(table).requires_grad_(False)
        assert not model(torch.tensor([1])).requires_grad
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert model.requires_grad_()(torch.tensor([1])).requires_grad

    def test_a_group_pushes_no_keys_of_its_frozen_features(
        self, client: Client, table: Table
    ) -> None:
        group = EmbeddingGroup(client, {"a": Embedding(table), "b": Embedding(table)})
        group.features["b"].requires_grad_(False)
        out = group({"a": torch.tensor([1, 2]), "b": torch.tensor([2, 3])})
        assert (out["a"].requires_grad, out["b"].requires_grad) == (True, False)
        (out["a"].sum() + out["b"].sum()).backward()
        group.step()
        assert table.pull_rows([1, 2, 3]).found.tolist() == [True, True, False]
        assert_array_equal(table.pull([1, 2]), -np.ones((2, DIM)))

    def test_freezing_between_forward_and_backward_pass_pushes_nothing(self, table: Table) -> None:
        module = Embedding(table)
        loss = module(torch.tensor([1])).sum()
        module.requires_grad_(False)
        loss.backward()
        module.step()
        assert table.describe().rows == 0

    def test_frozen_and_trained_features_are_one_request(
        self, client: Client, table: Table, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        group = EmbeddingGroup(client, {"a": Embedding(table), "b": Embedding(table)})
        group.features["b"].requires_grad_(False)
        calls = []
        inner = Client.pull_distinct
        monkeypatch.setattr(
            Client, "pull_distinct", lambda *args, **rest: calls.append(1) or inner(*args, **rest)
        )
        group({"a": torch.tensor([1]), "b": torch.tensor([1])})
        assert calls == [1]


def test_evaluation_with_gradients_equals_torchs(table: Table) -> None:
    """As with torch, ``eval()`` alone does not disable gradients."""
    table.push([1], np.ones((1, DIM)))
    module = Embedding(table).eval()
    out = module(torch.tensor([1]))
    assert out.requires_grad
    out.sum().backward()
    module.step()
    assert_allclose(table.pull([1]), -2 * np.ones((1, DIM)))
