"""PyTorch modules over several tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from features import KINDS, composed, dense, keys_of, summing
from numpy.testing import assert_allclose, assert_array_equal
from torch import nn

from psclient import Client
from psclient.combine import COMBINATIONS
from psclient.errors import InvalidArgument
from psclient.multihash import (
    KHash,
    MultiHash,
    QuotientRemainder,
)
from psclient.torch import Embedding, EmbeddingGroup
from psclient.torch import MultiHashEmbedding as HashModule


@pytest.fixture(params=[1, 2], ids=["1 shard", "2 shards"])
def client(request: pytest.FixtureRequest, connect: Any) -> Client:
    return connect(request.getfixturevalue(f"cluster{request.param}"))


@pytest.mark.parametrize("combine", COMBINATIONS)
class TestModule:
    @pytest.mark.quick(6)
    @pytest.mark.parametrize("kind", KINDS)
    def test_it_trains_as_torch_does(
        self, make: Callable[..., MultiHash], kind: Any, combine: str
    ) -> None:
        feature = make(kind, combine)
        module = HashModule(feature)
        rows = [nn.Parameter(torch.from_numpy(part)) for part in dense(feature)]
        local = torch.optim.SGD(rows, lr=0.01)
        for step, shape in enumerate([(), (30,), (4, 5)] * 3):
            keys = keys_of(10 + step, *shape)
            ours = module(torch.from_numpy(keys))
            theirs = composed(combine, rows, feature.codes(keys))
            assert_allclose(ours.detach().numpy(), theirs.detach().numpy(), rtol=1e-5, atol=1e-5)
            local.zero_grad()
            for output in (ours, theirs):
                torch.sin(output).sum().backward()
            module.step(step, lr=0.01)
            local.step()
            for part, their in zip(dense(feature), rows, strict=True):
                assert_allclose(part, their.detach().numpy(), rtol=1e-5, atol=1e-5)

    def test_two_passes_before_a_step_accumulate(
        self, make: Callable[..., MultiHash], combine: str
    ) -> None:
        feature = make(QuotientRemainder, combine)
        module = HashModule(feature)
        rows = [nn.Parameter(torch.from_numpy(part)) for part in dense(feature)]
        for keys in (keys_of(20, 30), keys_of(21, 6, 7)):
            module(keys).square().sum().backward()
            composed(combine, rows, feature.codes(keys)).square().sum().backward()
        module.step()
        for part, theirs in zip(dense(feature), rows, strict=True):
            assert theirs.grad is not None
            assert_array_equal(part, (theirs - theirs.grad).detach().numpy())

    def test_a_group_takes_it_in_one_round_trip(
        self, make: Callable[..., MultiHash], messages: list[Any], combine: str
    ) -> None:
        feature = make(QuotientRemainder, combine)
        client, first = feature.client, feature.tables[0]
        group = EmbeddingGroup(client, {"many": HashModule(feature), "one": Embedding(first)})
        tables = len({table.name for table in feature.tables})
        before = dense(feature)
        keys = torch.arange(200)
        del messages[:]
        out = group({"many": keys, "one": torch.tensor([0, 1])})
        assert [len(m.pulls) for m in messages] == [tables] * len(client._addresses)
        assert list(out) == ["many", "one"]
        rows = [torch.from_numpy(part) for part in before]
        alone = composed(combine, rows, feature.codes(keys.numpy()))
        assert torch.equal(out["many"].detach(), alone)
        (out["many"].sum() * 0 + out["one"].sum() * 2).backward()
        del messages[:]
        group.step()
        assert [len(m.pushes) for m in messages] == [tables] * len(client._addresses)
        before[0][:2] -= 2
        for ours, theirs in zip(dense(feature), before, strict=True):
            assert_array_equal(ours, theirs)


class TestModules:
    def test_there_is_nothing_to_save_and_no_grad_collects_nothing(
        self, client: Client, name: str
    ) -> None:
        module = HashModule(KHash(summing(client, name, 2), (5, 7)))
        assert (dict(module.state_dict()), list(module.parameters())) == ({}, [])
        with torch.no_grad():
            assert not module(torch.arange(3)).requires_grad
        assert [part.gradients.passes for part in module.remotes()] == [{}, {}]
        assert repr(module).startswith("MultiHashEmbedding(\n  KHash('")

    def test_evaluation_pulls_serve(self, client: Client, name: str) -> None:
        table = client.create_table(name, 2, serving_default=2.5)
        module = HashModule(KHash(table, (5, 7), "multiply")).eval()
        assert module(torch.arange(3)).tolist() == [[6.25, 6.25]] * 3

    @pytest.mark.parametrize("combine", COMBINATIONS)
    @pytest.mark.parametrize("shape", [(), (4,), (2, 2)])
    def test_a_padding_key_is_zeros_and_moves_no_row(
        self, make: Callable[..., MultiHash], messages: list[Any], combine: str, shape: Any
    ) -> None:
        feature = make(QuotientRemainder, combine)
        module, plain = HashModule(feature, padding_idx=-7), HashModule(feature)
        keys = torch.tensor([-7, 3, -7, 5])[: max(1, 4 * len(shape))].reshape(shape)
        expected = torch.where((keys == -7)[..., None], 0.0, plain(keys).detach())
        del messages[:]
        out = module(keys)
        assert torch.equal(out.detach(), expected)
        wanted = {key for rows in feature.row_keys(keys[keys != -7].numpy()) for key in rows}
        assert {key for m in messages for pull in m.pulls for key in pull.keys} == wanted
        del messages[:]
        out.sum().backward()
        module.step()
        assert {key for m in messages for push in m.pushes for key in push.keys} == wanted

    @pytest.mark.parametrize("combine", COMBINATIONS)
    def test_nested_keys_give_nested_embeddings(
        self, make: Callable[..., MultiHash], combine: str
    ) -> None:
        module = HashModule(make(QuotientRemainder, combine), padding_idx=3)
        keys, offsets = torch.tensor([1, 2, 3, 4, 1]), torch.tensor([0, 2, 2, 5])
        out = module(torch.nested.nested_tensor_from_jagged(keys, offsets))
        assert torch.equal(out.offsets(), offsets)
        assert torch.equal(out.values(), module(keys))

    def test_a_padding_key_that_is_none_is_refused(self, client: Client, name: str) -> None:
        with pytest.raises(InvalidArgument, match=r"padding_idx must be a key.*got 1\.5"):
            HashModule(KHash(summing(client, name, 2), (5, 7)), padding_idx=1.5)  # type: ignore[arg-type]

    def test_it_takes_keys_alone(self, client: Client, name: str) -> None:
        module = HashModule(KHash(summing(client, name, 2), (5, 7)))
        with pytest.raises(InvalidArgument, match=r"KHash\(.*takes keys only"):
            module(torch.arange(3), torch.tensor([0]))


# ---- dims that grow
