"""The PyTorch modules against torch's own, with the same rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from torch import Tensor, nn

from psclient import Client, Table
from psclient.errors import InvalidArgument
from psclient.stream import StreamLink
from psclient.torch import Embedding, EmbeddingBag, EmbeddingGroup

DIM = 6
ROWS = 40


@pytest.fixture(params=[1, 3], ids=["1 shard", "3 shards"])
def client(request: pytest.FixtureRequest, connect: Any) -> Client:
    return connect(request.getfixturevalue(f"cluster{request.param}"))


@pytest.fixture
def table(client: Client, name: str) -> Table:
    return client.create_table(name, DIM, optimizer="sgd", lr=0.1, initializer="normal")


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every exchange that a client submits to a shard from now on."""
    sent: list[Any] = []
    inner = StreamLink.submit

    def submit(self: StreamLink, call: Any, **rest: Any) -> None:
        sent.append(call.exchange)
        inner(self, call, **rest)

    monkeypatch.setattr(StreamLink, "submit", submit)
    return sent


def weights(table: Table) -> Tensor:
    """Rows 0..ROWS - 1 as torch would hold them."""
    return torch.from_numpy(table.pull(np.arange(ROWS)))


def keys(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, ROWS, shape))


def close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    assert_allclose(ours.detach().numpy(), theirs.detach().numpy(), rtol=1e-5, atol=1e-5)


class TestForward:
    @pytest.mark.parametrize("shape", [(), (5,), (0,), (3, 4), (2, 3, 4)])
    def test_an_embedding_equals_torchs(self, table: Table, shape: tuple[int, ...]) -> None:
        wanted = keys(0, *shape)
        theirs = nn.Embedding.from_pretrained(weights(table))
        assert torch.equal(Embedding(table)(wanted), theirs(wanted))

    @pytest.mark.parametrize("mode", ["sum", "mean"])
    def test_bags_of_one_size_equal_torchs(self, table: Table, mode: Any) -> None:
        wanted = keys(1, 7, 5)
        theirs = nn.EmbeddingBag.from_pretrained(weights(table), mode=mode)
        close(EmbeddingBag(table, mode)(wanted), theirs(wanted))

    @pytest.mark.parametrize("mode", ["sum", "mean"])
    def test_bags_by_offsets_equal_torchs(self, table: Table, mode: Any) -> None:
        wanted, offsets = keys(2, 20), torch.tensor([0, 3, 3, 11, 20])
        theirs = nn.EmbeddingBag.from_pretrained(weights(table), mode=mode)
        close(EmbeddingBag(table, mode)(wanted, offsets), theirs(wanted, offsets))

    def test_weighted_bags_equal_torchs(self, table: Table) -> None:
        theirs = nn.EmbeddingBag.from_pretrained(weights(table), mode="sum")
        flat, by = keys(3, 20), torch.rand(20)
        offsets = torch.tensor([0, 4, 20])
        close(EmbeddingBag(table)(flat, offsets, by), theirs(flat, offsets, by))
        square, by = keys(4, 5, 4), torch.rand(5, 4)
        close(EmbeddingBag(table)(square, None, by), theirs(square, per_sample_weights=by))

    def test_gradients_reach_the_weights_of_the_samples(self, table: Table) -> None:
        flat, offsets = keys(5, 9), torch.tensor([0, 4])
        gradients = []
        for module in (
            EmbeddingBag(table),
            nn.EmbeddingBag.from_pretrained(weights(table), mode="sum", freeze=False),
        ):
            by = torch.linspace(0.1, 1, 9, requires_grad=True)
            module(flat, offsets, by).square().sum().backward()
            gradients.append(by.grad)
        close(*gradients)  # type: ignore[arg-type]

    def test_arguments_that_do_not_fit_are_refused(self, client: Client, table: Table) -> None:
        with pytest.raises(InvalidArgument, match="takes keys only"):
            Embedding(table)(keys(0, 3), torch.tensor([0]))
        with pytest.raises(InvalidArgument, match="mode must be 'sum', 'mean' or 'max', got 'avg'"):
            EmbeddingBag(table, "avg")  # type: ignore[arg-type]
        group = EmbeddingGroup(client, {"a": Embedding(table)})
        with pytest.raises(InvalidArgument, match=r"no feature 'b'; the features are \['a'\]"):
            group({"b": keys(0, 3)})
        with pytest.raises(InvalidArgument, match=r"^feature 'a': Embedding of .* takes keys only"):
            group({"a": (keys(0, 3), torch.tensor([0]))})


def train(
    forward: Callable[[Tensor, Tensor], Tensor],
    step: Callable[[int], object],
    every_row: bool,
) -> list[float]:
    """Six steps of a small network over eight bags of keys; the losses.

    every_row  each step touches every row
    """
    torch.manual_seed(0)
    head = nn.Linear(DIM, 1)
    dense = torch.optim.SGD(head.parameters(), lr=0.05)
    losses = []
    for number in range(6):
        shuffled = np.random.default_rng(number).permutation(ROWS)
        wanted = torch.from_numpy(shuffled) if every_row else keys(100 + number, ROWS)
        offsets = torch.arange(0, ROWS, ROWS // 8)
        target = torch.sin(torch.arange(8.0) + number)
        loss = (head(forward(wanted, offsets))[:, 0] - target).square().mean()
        dense.zero_grad()
        loss.backward()
        step(number)
        dense.step()
        losses.append(loss.item())
    return losses


class TestNames:
    """Arguments and attributes have the names that they have in torch."""

    def test_keys_may_be_passed_by_name(self, table: Table) -> None:
        theirs = nn.EmbeddingBag.from_pretrained(weights(table), mode="sum")
        flat, offsets = keys(2, 20), torch.tensor([0, 3])
        close(EmbeddingBag(table)(input=flat, offsets=offsets), theirs(input=flat, offsets=offsets))
        assert torch.equal(Embedding(table)(input=flat), weights(table)[flat])

    def test_modules_have_the_length_of_their_rows(self, table: Table) -> None:
        assert Embedding(table).embedding_dim == EmbeddingBag(table).embedding_dim == DIM


class TestTraining:
    @pytest.mark.quick(4)
    @pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
    @pytest.mark.parametrize("mode", ["sum", "mean"])
    @pytest.mark.parametrize(
        ("optimizer", "arguments", "theirs", "sparse"),
        [
            ("sgd", {}, torch.optim.SGD, True),
            ("adagrad", {"initial_accumulator": 0.0}, torch.optim.Adagrad, True),
            # Bias correction counts the steps of a row here and of the table in torch.
            ("adam", {}, torch.optim.Adam, False),
        ],
    )
    def test_a_server_optimizer_trains_as_torchs_does(
        self,
        client: Client,
        name: str,
        optimizer: str,
        arguments: dict[str, float],
        theirs: Any,
        sparse: bool,
        mode: Any,
    ) -> None:
        table = client.create_table(
            name,
            DIM,
            optimizer=optimizer,
            lr=0.1,
            optimizer_args=arguments,
            initializer="normal",
        )
        reference = nn.EmbeddingBag.from_pretrained(
            weights(table), mode=mode, freeze=False, sparse=sparse
        )
        local = theirs(reference.parameters(), lr=0.1)

        def step(_: int) -> None:
            local.step()
            local.zero_grad()

        expected = train(reference, step, every_row=not sparse)
        bag = EmbeddingBag(table, mode)
        assert_allclose(train(bag, bag.step, every_row=not sparse), expected, rtol=1e-5, atol=1e-5)
        close(weights(table), reference.weight)

    def test_the_learning_rate_and_the_step_travel(self, table: Table) -> None:
        before = weights(table)
        module = Embedding(table)
        module(torch.tensor([3])).sum().backward()
        module.step(17, lr=0.5)
        close(weights(table)[3], before[3] - 0.5)
        rows = table.pull_rows([3])
        assert (rows.steps.tolist(), rows.frequencies.tolist()) == ([17], [1])

    def test_two_passes_before_a_step_accumulate_as_torch_does(self, table: Table) -> None:
        reference = nn.Embedding.from_pretrained(weights(table), freeze=False)
        optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
        module = Embedding(table)
        passes = [keys(6, 30), keys(7, 4, 5)]
        for wanted in passes:
            for embedding in (module, reference):
                embedding(wanted).square().sum().backward()
        module.step()
        optimizer.step()
        close(weights(table), reference.weight)
        occurrences = np.bincount(np.concatenate([p.numpy().ravel() for p in passes]))
        touched = np.flatnonzero(occurrences)
        rows = table.pull_rows(touched)
        assert_array_equal(rows.frequencies, occurrences[touched])
        assert len(set(rows.versions.tolist())) <= len(table.describe().versions)  # one push

    def test_rows_are_pulled_anew_after_a_step(self, table: Table) -> None:
        module = Embedding(table)
        first = module(torch.tensor([1]))
        first.sum().backward()
        module.step()
        close(module(torch.tensor([1])), first - 0.1)

    def test_a_step_without_a_backward_pass_pushes_nothing(
        self, table: Table, messages: list[Any]
    ) -> None:
        module = Embedding(table)
        module.step()
        module(keys(8, 10))
        del messages[:]
        module.step()
        assert messages == []
        assert table.describe().rows == 0

    def test_a_step_pushes_once(self, table: Table, messages: list[Any]) -> None:
        module = Embedding(table)
        module(keys(8, 10)).sum().backward()
        module.step()
        del messages[:]
        module.step()
        assert messages == []


class TestGroup:
    def test_features_of_any_tables_travel_in_one_round_trip(
        self, client: Client, name: str, messages: list[Any]
    ) -> None:
        users = client.create_table(f"{name}.u", DIM, optimizer="sgd", lr=0.1, initializer="normal")
        items = client.create_table(f"{name}.i", 2, optimizer="sgd", lr=0.1, initializer="normal")
        modules = {
            "user": Embedding(users),
            "friends": EmbeddingBag(users),
            "item": Embedding(items),
            "basket": EmbeddingBag(items, "mean"),
        }
        torch_users = nn.Parameter(weights(users))
        torch_items = nn.Parameter(weights(items))
        group = EmbeddingGroup(client, modules)
        inputs = {
            "user": keys(1, 300),
            "friends": (keys(2, 300), torch.arange(0, 300, 3)),
            "item": keys(3, 10, 30),
            "basket": keys(4, 60, 5),
        }
        functional = nn.functional
        expected = {
            "user": functional.embedding(inputs["user"], torch_users),
            "friends": functional.embedding_bag(
                *inputs["friends"][:1], torch_users, inputs["friends"][1], mode="sum"
            ),
            "item": functional.embedding(inputs["item"], torch_items),
            "basket": functional.embedding_bag(inputs["basket"], torch_items, mode="mean"),
        }
        shards = len(client._addresses)
        del messages[:]
        outputs = group(inputs)
        assert [len(message.pulls) for message in messages] == [2] * shards
        assert list(outputs) == list(expected)
        for feature, output in outputs.items():
            close(output, expected[feature])

        sum(output.square().sum() for output in outputs.values()).backward()
        sum(output.square().sum() for output in expected.values()).backward()
        del messages[:]
        group.step(3)
        assert [len(message.pushes) for message in messages] == [2] * shards
        close(weights(users), torch_users - 0.1 * torch_users.grad)
        close(weights(items), torch_items - 0.1 * torch_items.grad)

    def test_some_features_may_be_left_out(self, client: Client, table: Table) -> None:
        group = EmbeddingGroup(client, {"a": Embedding(table), "b": Embedding(table)})
        out = group({"b": keys(0, 3)})
        assert list(out) == ["b"]
        out["b"].sum().backward()
        group.step()
        assert table.describe().rows == len(keys(0, 3).unique())


class TestModules:
    def test_no_grad_collects_nothing(self, table: Table) -> None:
        module = Embedding(table)
        with torch.no_grad():
            out = module(keys(0, 5))
        assert not out.requires_grad
        assert module.gradients.passes == {}

    def test_evaluation_pulls_serve(self, client: Client, name: str) -> None:
        table = client.create_table(name, DIM, initializer="normal", serving_default=2.5)
        module = Embedding(table).eval()
        assert torch.equal(module(keys(0, 5)), torch.full((5, DIM), 2.5))
        assert torch.equal(module.train()(keys(0, 5)), weights(table)[keys(0, 5)])

    def test_a_group_in_evaluation_pulls_serve(self, client: Client, name: str) -> None:
        table = client.create_table(name, DIM, initializer="normal", serving_default=2.5)
        group = EmbeddingGroup(client, {"a": Embedding(table)}).eval()
        assert torch.equal(group({"a": keys(0, 5)})["a"], torch.full((5, DIM), 2.5))

    def test_there_is_nothing_to_save_or_to_optimize(self, client: Client, table: Table) -> None:
        group = EmbeddingGroup(client, {"a": Embedding(table), "b": EmbeddingBag(table)})
        assert dict(group.state_dict()) == {}
        assert list(group.parameters()) == []
        group.load_state_dict({})

    def test_modules_describe_themselves(self, table: Table) -> None:
        assert repr(Embedding(table)) == f"Embedding({table.name!r}, dim={DIM})"
        padded = Embedding(table, 0, scale_grad_by_freq=True)
        assert repr(padded).endswith(", padding_idx=0, scale_grad_by_freq=True)")
        assert repr(EmbeddingBag(table, "mean")) == (
            f"EmbeddingBag({table.name!r}, dim={DIM}, mode='mean')"
        )

    def test_keys_that_need_more_than_int32_keep_their_bits(self, table: Table) -> None:
        wanted = torch.tensor([-1, 2**40, -(2**63)])
        module = Embedding(table)
        module(wanted).sum().backward()
        module.step()
        assert table.pull_rows(wanted).found.tolist() == [True] * 3


def test_a_prefetch_is_one_message_for_all_features_and_moves_no_rows(
    client: Client, name: str, messages: list[Any]
) -> None:
    users, items = (
        client.create_table(f"{name}.{part}", DIM, optimizer="sgd", lr=0.1, initializer="normal")
        for part in ("user", "item")
    )
    group = EmbeddingGroup(client, {"user": EmbeddingBag(users), "item": Embedding(items)})
    batch = {"user": keys(1, 5, 3), "item": keys(2, 7)}
    expected = {part: out.detach() for part, out in group(batch).items()}
    messages.clear()
    assert group.prefetch(batch).result() is None
    assert group.features["item"].prefetch(batch["item"]).result() is None
    pulls = [pull for message in messages for pull in message.pulls]
    assert all(pull.header.prefetch for pull in pulls)
    shards = len(client._connect().links)
    assert len(messages) <= 2 * shards
    wanted = {users.name: batch["user"], items.name: batch["item"]}
    for table, some in wanted.items():
        sent = np.concatenate([p.keys for p in pulls[: 2 * shards] if p.header.table == table])
        assert set(sent.tolist()) == set(some.reshape(-1).tolist())
    for part, out in group(batch).items():
        assert_array_equal(out.detach().numpy(), expected[part].numpy())
    with pytest.raises(InvalidArgument, match="no feature 'no'"):
        group.prefetch({"no": batch["item"]})
