"""RowOptimizer with GradScaler, clipping, schedulers, accumulation and several ranks."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from psclient import Client, Table
from psclient.errors import InvalidArgument
from psclient.torch import Embedding, EmbeddingBag, EmbeddingGroup, RowOptimizer

DIM = 4


@pytest.fixture
def client(cluster2: Any, connect: Any) -> Client:
    return connect(cluster2)


@pytest.fixture
def table(client: Client, name: str) -> Table:
    return client.create_table(name, DIM, optimizer="sgd", lr=1.0, initializer="zeros")


@pytest.fixture
def other(client: Client, name: str) -> Table:
    return client.create_table(f"{name}.b", DIM, optimizer="sgd", lr=1.0, initializer="zeros")


def number(table: Table, key: int = 1) -> float:
    """The first number of a row."""
    return float(table.pull([key])[0, 0])


class TestScaler:
    def test_gradients_are_unscaled_and_infinite_ones_are_skipped(self, table: Table) -> None:
        module = Embedding(table)
        rows = module.optimizer()
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        seen = []
        for factor in (1.0, float("inf"), 1.0):
            rows.zero_grad()
            scaler.scale(module(torch.tensor([1])).sum() * factor).backward()
            scaler.step(rows)
            scaler.update()
            seen.append((number(table), scaler.get_scale()))
        assert seen == [(-1.0, 1024.0), (-1.0, 512.0), (-2.0, 512.0)]

    def test_the_training_step_travels(self, table: Table) -> None:
        module = Embedding(table)
        rows = module.optimizer()
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(module(torch.tensor([1])).sum()).backward()
        scaler.unscale_(rows)
        scaler.step(rows, step=17)
        assert table.pull_rows([1]).steps.tolist() == [17]

    def test_mixed_precision_trains_as_torch_does(self, table: Table) -> None:
        keys = torch.arange(10)
        table.push(keys, np.random.default_rng(0).normal(size=(10, DIM)))
        reference = nn.Embedding.from_pretrained(torch.from_numpy(table.pull(keys)), freeze=False)
        ours = Embedding(table)
        results = []
        for module, optimizer in (
            (ours, ours.optimizer(lr=0.1)),
            (reference, torch.optim.SGD(reference.parameters(), lr=0.1)),
        ):
            torch.manual_seed(0)
            head, scaler = nn.Linear(DIM, 1), torch.amp.GradScaler("cpu", init_scale=64.0)
            for seed in range(4):
                wanted = torch.from_numpy(np.random.default_rng(seed).integers(0, 10, 16))
                with torch.autocast("cpu", torch.bfloat16):
                    loss = head(module(wanted)).float().square().mean()
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
            results.append(module(keys).detach())
        assert_allclose(results[0], results[1], rtol=1e-5, atol=1e-6)


class TestClipping:
    @pytest.mark.parametrize("passes", [1, 3])
    def test_the_norm_is_that_of_torch(
        self, client: Client, table: Table, other: Table, passes: int
    ) -> None:
        """Passes over the same keys count as their sum, not as separate gradients."""
        group = EmbeddingGroup(
            client, {"a": Embedding(table), "b": EmbeddingBag(table), "c": Embedding(other)}
        )
        weights = [nn.Parameter(torch.zeros(20, DIM)) for _ in range(2)]
        rows = group.optimizer()
        for seed in range(passes):
            a, b, c = np.random.default_rng(seed).integers(0, 20, (3, 12))
            keys = {"a": torch.from_numpy(a), "b": torch.from_numpy(b).reshape(4, 3)}
            out = group({**keys, "c": torch.from_numpy(c)})
            torch.cat([out["a"], out["b"], out["c"]]).sum().backward()
            theirs = (weights[0][a], weights[0][b.reshape(4, 3)].sum(1), weights[1][c])
            torch.cat(theirs).sum().backward()
        assert len(rows.leaves()) == 2
        expected = clip_grad_norm_(weights, 1.0)
        assert_allclose(clip_grad_norm_(rows.leaves(), 1.0), expected, rtol=1e-5)
        rows.step()
        for mine, weight in zip((table, other), weights, strict=True):
            assert weight.grad is not None
            assert_allclose(mine.pull(np.arange(20)), -weight.grad, rtol=1e-5, atol=1e-7)

    def test_the_param_group_has_the_leaves(self, table: Table) -> None:
        module = Embedding(table)
        rows = module.optimizer()
        (module(torch.tensor([1])).sum() * 5).backward()
        clip_grad_value_([leaf for group in rows.param_groups for leaf in group["params"]], 2.0)
        rows.step()
        assert number(table) == -2.0
        assert rows.param_groups[0]["params"] == []

    def test_separate_modules_of_one_table_count_as_one(self, table: Table) -> None:
        modules = nn.ModuleList([Embedding(table), Embedding(table)])
        rows = RowOptimizer(modules)
        for module in modules:
            module(torch.tensor([1])).sum().backward()
        assert clip_grad_norm_(rows.leaves(), 1.0) == 2 * DIM**0.5
        rows.step()
        assert_allclose(table.pull([1]), np.full((1, DIM), -(DIM**-0.5)), rtol=1e-5)


class TestSchedule:
    def test_the_learning_rate_of_a_scheduler_travels(self, table: Table) -> None:
        module = Embedding(table)
        rows = module.optimizer(lr=0.5)
        schedule = torch.optim.lr_scheduler.StepLR(rows, step_size=1, gamma=0.5)
        seen = []
        for _ in range(3):
            module(torch.tensor([1])).sum().backward()
            rows.step()
            schedule.step()
            seen.append(number(table))
        assert seen == [-0.5, -0.75, -0.875]

    def test_without_a_learning_rate_the_tables_is_used(self, table: Table) -> None:
        module = Embedding(table)
        rows = module.optimizer()
        module(torch.tensor([1])).sum().backward()
        rows.step()
        assert number(table) == -1.0

    def test_a_scheduler_needs_a_learning_rate(self, table: Table) -> None:
        with pytest.raises(InvalidArgument, match="pass lr to the optimizer"):
            torch.optim.lr_scheduler.StepLR(Embedding(table).optimizer(), step_size=1)

    def test_its_state_is_saved(self, table: Table) -> None:
        module = Embedding(table)
        rows = module.optimizer(lr=0.5, step=10)
        schedule = torch.optim.lr_scheduler.StepLR(rows, step_size=1, gamma=0.5)
        rows.step()
        schedule.step()
        module(torch.tensor([1])).sum().backward()
        state = rows.state_dict()  # between a backward pass and the step
        rows.zero_grad()
        again = module.optimizer(lr=0.1)
        again.load_state_dict(state)
        module(torch.tensor([1])).sum().backward()
        again.step()
        assert number(table) == -0.25
        assert table.pull_rows([1]).steps.tolist() == [11]
        assert again.state_dict()["step"] == 12
        schedule = torch.optim.lr_scheduler.StepLR(again, step_size=1, gamma=0.5, last_epoch=1)
        assert schedule.base_lrs == [0.5]

    def test_a_state_of_another_optimizer_is_refused(self, table: Table) -> None:
        state = torch.optim.SGD([torch.zeros(1)], lr=0.1).state_dict()
        with pytest.raises(InvalidArgument, match="state_dict must be that of a RowOptimizer"):
            Embedding(table).optimizer().load_state_dict(state)


class TestAccumulation:
    def test_several_passes_are_one_push(self, table: Table) -> None:
        module = Embedding(table)
        rows = module.optimizer()
        for keys in ([1, 2], [2, 3], [2]):
            (module(torch.tensor(keys)).sum() / 2).backward()
        rows.step()
        pulled = table.pull_rows([1, 2, 3])
        assert pulled.embeddings[:, 0].tolist() == [-0.5, -1.5, -0.5]
        assert pulled.frequencies.tolist() == [1, 3, 1]
        rows.step()
        assert_array_equal(table.pull_rows([1, 2, 3]).versions, pulled.versions)

    def test_infinite_gradients_of_one_pass_reach_the_scaler(self, table: Table) -> None:
        module = Embedding(table)
        rows = module.optimizer()
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for factor in (1.0, float("inf")):
            scaler.scale(module(torch.tensor([1])).sum() * factor).backward()
        scaler.step(rows)
        scaler.update()
        assert (scaler.get_scale(), table.describe().rows) == (2.0, 0)

    def test_a_closure_is_called(self, table: Table) -> None:
        module = Embedding(table)
        rows = module.optimizer()

        def closure() -> Any:
            rows.zero_grad()
            loss = module(torch.tensor([1])).sum() + 7
            loss.backward()
            return loss

        assert rows.step(closure).item() == 7
        assert number(table) == -1.0


class FourRanks:
    """A Job whose other ranks neither answer nor need an answer."""

    size, sums, sync = 4, False, False

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def reduce(self, turn: Any, sums: Any, error: Any) -> Any:
        assert error is None
        return turn, sums

    def settle(self, turn: Any, error: Any) -> None:
        assert error is None


class TestRanks:
    @pytest.fixture(autouse=True)
    def _four_ranks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 4)
        monkeypatch.setattr("psclient.torch.optimizer.Job", FourRanks)

    def test_gradients_are_divided_by_the_number_of_ranks(self, table: Table) -> None:
        module = Embedding(table)
        for push in (module.step, module.optimizer().step):
            module(torch.tensor([1])).sum().backward()
            push()
        assert number(table) == -0.5

    def test_they_are_summed_if_asked(self, table: Table) -> None:
        module = Embedding(table)
        module(torch.tensor([1])).sum().backward()
        module.step(ranks="sum")
        rows = module.optimizer(ranks="sum")
        module(torch.tensor([1])).sum().backward()
        rows.step()
        assert number(table) == -2.0

    def test_other_values_are_refused(self, table: Table) -> None:
        with pytest.raises(InvalidArgument, match="ranks must be one of mean, sum, got 'max'"):
            Embedding(table).optimizer(ranks="max")  # type: ignore[arg-type]


class TestRefused:
    @pytest.mark.parametrize("options", [{"reduce": "sum"}, {"sync": True}])
    def test_an_optimizer_made_before_its_ranks(
        self, table: Table, monkeypatch: pytest.MonkeyPatch, options: Any
    ) -> None:
        module = Embedding(table)
        rows = module.optimizer(**options)
        module(torch.tensor([1])).sum().backward()
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 4)
        with pytest.raises(InvalidArgument, match=r"after torch\.distributed was initialized"):
            rows.step()
        assert (rows.leaves(), number(table)) == ([], 0.0)

    def test_ranks_that_are_not_in_the_group(
        self, table: Table, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: -1)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda *_: 3)
        with pytest.raises(InvalidArgument, match=r"process_group must contain .* rank 3"):
            Embedding(table).optimizer(process_group="others")

    @pytest.mark.parametrize(
        ("options", "error"),
        [
            ({"reduce": "mean"}, "reduce must be one of none, sum, got 'mean'"),
            ({"timeout": 0}, "timeout must be a positive number of seconds, got 0"),
        ],
    )
    def test_invalid_options_of_ranks(self, table: Table, options: Any, error: str) -> None:
        with pytest.raises(InvalidArgument, match=error):
            Embedding(table).optimizer(**options)

    def test_modules_without_rows(self) -> None:
        with pytest.raises(InvalidArgument, match="must contain an Embedding"):
            RowOptimizer(nn.Linear(2, 2))

    def test_modules_of_several_clients(self, cluster2: Any, connect: Any, table: Table) -> None:
        far = connect(cluster2).table(table.name)
        with pytest.raises(InvalidArgument, match="one client"):
            RowOptimizer([Embedding(table), Embedding(far)])

    def test_a_second_param_group(self, table: Table) -> None:
        rows = Embedding(table).optimizer()
        with pytest.raises(InvalidArgument, match="has one param group"):
            rows.add_param_group({"params": [torch.zeros(1)]})

    @pytest.mark.parametrize("how", [pickle.dumps, copy.deepcopy])
    def test_a_copy(self, table: Table, how: Any) -> None:
        with pytest.raises(TypeError, match="save its state_dict"):
            how(Embedding(table).optimizer())
