"""Modules in torch's tools: copies, averages, saving, dtypes, torch.compile, any feature name."""

from __future__ import annotations

import copy
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from psclient import Client, Table
from psclient.errors import InvalidArgument
from psclient.torch import Embedding, EmbeddingBag, EmbeddingGroup, reach

DIM = 4
NAMES = ["type", "items", "user.id", "user%2Eid", "a/b c", "", "forward", "0", "naïve"]


@pytest.fixture
def client(cluster1: Any, connect: Any) -> Client:
    return connect(cluster1)


@pytest.fixture
def table(client: Client, name: str) -> Table:
    return client.create_table(name, DIM, optimizer="sgd", lr=1.0, initializer="normal")


class Model(nn.Module):
    """A group and a dense layer."""

    def __init__(self, client: Client, table: Table) -> None:
        super().__init__()
        self.group = EmbeddingGroup(client, {"user.id": Embedding(table), "b": EmbeddingBag(table)})
        self.head = nn.Linear(2 * DIM, 1)

    def forward(self, keys: Tensor) -> Tensor:
        out = self.group({"user.id": keys, "b": keys[:, None]})
        return self.head(torch.cat([out["user.id"], out["b"]], -1))


def trained(client: Client, table: Table) -> Model:
    """A model after a backward pass, whose gradients were not pushed."""
    model = Model(client, table)
    model(torch.arange(5)).sum().backward()
    return model


class TestNames:
    def test_any_string_names_a_feature(self, client: Client, table: Table) -> None:
        group = EmbeddingGroup(client, {name: Embedding(table) for name in NAMES})
        out = group({name: torch.tensor([number]) for number, name in enumerate(NAMES)})
        assert list(out) == list(group.features) == list(group.features.keys()) == NAMES
        for number, name in enumerate(NAMES):
            assert torch.equal(out[name], torch.from_numpy(table.pull([number])))
            assert name in group.features
        assert dict(group.features.items()) == dict(
            zip(NAMES, group.features.values(), strict=True)
        )
        assert len(group.features) == len(NAMES)

    def test_submodules_are_found_by_their_paths(self, client: Client, table: Table) -> None:
        group = EmbeddingGroup(client, {name: Embedding(table) for name in NAMES})
        found = [path for path, each in group.named_modules() if isinstance(each, Embedding)]
        assert len(set(found)) == len(NAMES)
        for path in found:
            assert isinstance(group.get_submodule(path), Embedding)

    def test_other_names_are_refused(self, client: Client, table: Table) -> None:
        with pytest.raises(InvalidArgument, match="must be a string, got 7"):
            EmbeddingGroup(client, {7: Embedding(table)})  # type: ignore[dict-item]


class TestMethods:
    """How ``zero_grad`` of any model reaches the modules in it."""

    def run(self, program: str, *arguments: str) -> str:
        """Run a program in a process of its own; what it has printed."""
        command = [sys.executable, "-c", program, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    @pytest.mark.slow
    def test_an_import_changes_no_method(self) -> None:
        program = (
            "from torch import nn; before = nn.Module.zero_grad; import psclient.torch;"
            " print(nn.Module.zero_grad is before)"
        )
        assert self.run(program) == "True\n"

    @pytest.mark.slow
    def test_a_loaded_module_is_reached(self, table: Table, tmp_path: Path) -> None:
        torch.save(nn.Sequential(Embedding(table)), tmp_path / "model.pt")
        program = (
            "import sys, torch; model = torch.load(sys.argv[1], weights_only=False);"
            " model(torch.tensor([1])).sum().backward(); kept = len(model[0].gradients.passes);"
            " model.zero_grad(); print(kept, len(model[0].gradients.passes))"
        )
        assert self.run(program, str(tmp_path / "model.pt")) == "1 0\n"

    def test_a_file_that_is_loaded_again_changes_nothing(self, table: Table) -> None:
        model = nn.Sequential(Embedding(table))
        before = nn.Module.zero_grad
        old = sys.modules.pop(reach.__name__)
        try:
            again = importlib.import_module(reach.__name__)
            model(torch.arange(5)).sum().backward()
            assert again.holders(model) == reach.holders(model) == [model[0]]
            again.Holder(table)
            assert nn.Module.zero_grad is before
        finally:
            sys.modules[reach.__name__] = old
        model.zero_grad()
        assert model[0].gradients.passes == {}


class TestMembers:
    def test_a_module_of_another_client_is_refused(
        self, cluster1: Any, connect: Any, client: Client, table: Table
    ) -> None:
        far = connect(cluster1).table(table.name)
        with pytest.raises(InvalidArgument, match="feature 'b' must use tables of the client of"):
            EmbeddingGroup(client, {"a": Embedding(table), "b": Embedding(far)})

    def test_other_modules_are_refused(self, client: Client) -> None:
        with pytest.raises(InvalidArgument, match="feature 'a' must be an Embedding, EmbeddingBag"):
            EmbeddingGroup(client, {"a": nn.Linear(1, 1)})  # type: ignore[dict-item]


class TestCopies:
    def test_a_deep_copy_shares_the_rows_but_no_gradients(
        self, client: Client, table: Table
    ) -> None:
        model = trained(client, table)
        before = table.pull(np.arange(5))
        other = copy.deepcopy(model)
        other.group.step()
        assert np.array_equal(table.pull(np.arange(5)), before)
        assert torch.equal(other(torch.arange(5)), model(torch.arange(5)))
        model.group.step()
        assert not np.array_equal(table.pull(np.arange(5)), before)

    def test_an_average_is_taken_of_the_dense_part(self, client: Client, table: Table) -> None:
        model = trained(client, table)
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        average.update_parameters(model)
        before = model.head.weight.detach().clone()
        optimizer.step()
        average.update_parameters(model)
        expected = (before + model.head.weight.detach()) / 2
        assert torch.allclose(average.module.head.weight, expected)
        assert average(torch.arange(5)).shape == (5, 1)

    def test_a_model_is_saved_and_loaded(
        self, client: Client, table: Table, tmp_path: Path
    ) -> None:
        model = trained(client, table)
        torch.save(model, tmp_path / "model.pt")
        loaded = torch.load(tmp_path / "model.pt", weights_only=False)
        assert torch.equal(loaded(torch.arange(5)), model(torch.arange(5)))
        assert loaded.group.optimizer().leaves() == []
        loaded.group.client.close()

    def test_a_state_dict_has_the_dense_part(
        self, client: Client, table: Table, tmp_path: Path
    ) -> None:
        model = trained(client, table)
        torch.save(model.state_dict(), tmp_path / "state.pt")
        other = Model(client, table)
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert torch.equal(other(torch.arange(5)), model(torch.arange(5)))
        assert list(model.state_dict()) == ["head.weight", "head.bias"]


class TestDtypes:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_outputs_have_the_dtype_of_the_model(
        self, client: Client, table: Table, dtype: torch.dtype
    ) -> None:
        model = Model(client, table).to(dtype)
        out = model(torch.arange(5))
        assert out.dtype == dtype
        before = table.pull([0])
        out.sum().backward()
        (leaf,) = model.group.optimizer().leaves()
        assert leaf.dtype == torch.float32
        model.group.step()
        weight = model.head.weight.detach().float()[0]
        expected = before[0] - (weight[:DIM] + weight[DIM:]).numpy()
        assert np.allclose(table.pull([0])[0], expected, rtol=1e-2, atol=1e-2)

    def test_half_reaches_every_module(self, client: Client, table: Table) -> None:
        model = Model(client, table).half()
        outputs = model.group({"user.id": torch.arange(3), "b": torch.arange(3)[:, None]})
        assert {out.dtype for out in outputs.values()} == {torch.float16}
        assert model.float()(torch.arange(3)).dtype == torch.float32


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # by torch
class TestCompile:
    @pytest.mark.slow
    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    def test_a_compiled_model_trains(self, client: Client, table: Table, backend: str) -> None:
        model = Model(client, table)
        compiled = torch.compile(model, backend=backend)
        for count in (5, 5, 7):
            expected = model(torch.arange(count))
            out = compiled(torch.arange(count))
            assert torch.allclose(out, expected)
            before = table.pull(np.arange(count))
            out.sum().backward()
            model.group.step()
            weight = model.head.weight.detach()[0]
            moved = before - (weight[:DIM] + weight[DIM:]).numpy()
            assert np.allclose(table.pull(np.arange(count)), moved, atol=1e-5)

    def test_a_compiled_embedding_trains(self, table: Table) -> None:
        module = Embedding(table)
        before = table.pull([1])
        compiled = torch.compile(module, backend="eager")
        compiled(torch.tensor([1])).sum().backward()
        compiled.zero_grad()
        compiled(torch.tensor([1])).sum().backward()
        module.step()
        assert np.allclose(table.pull([1]), before - 1)
