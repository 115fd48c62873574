"""Models of torchrec that are imported into tables, and tables that models of torchrec load."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from servers import Cluster
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.optim.keyed import KeyedOptimizerWrapper

from psclient import Client
from psclient.admin import RowBatch, read_rows
from psclient.tools import export
from psclient.tools.importer import import_rows


@pytest.fixture(scope="module")
def client(cluster2: Cluster) -> Iterator[Client]:
    with Client(cluster2.addresses) as client:
        yield client


def rows_of(client: Client, table: str) -> np.ndarray:
    """All rows of a table with their optimizer state, by key."""
    batches = [each for each in read_rows(client, table) if isinstance(each, RowBatch)]
    keys = np.concatenate([each.keys for each in batches])
    return np.concatenate([each.rows for each in batches])[np.argsort(keys)]


def collection() -> EmbeddingBagCollection:
    features = {"user": ["u"], "item": ["i"]}
    configs = [
        EmbeddingBagConfig(name=name, num_embeddings=16, embedding_dim=4, feature_names=features)
        for name, features in features.items()
    ]
    return EmbeddingBagCollection(tables=configs)


def batch() -> KeyedJaggedTensor:
    keys = torch.arange(16).repeat(2)
    return KeyedJaggedTensor(["u", "i"], keys, lengths=torch.full((16,), 2))


def test_a_trained_model_goes_in_with_its_state_and_out_again(
    client: Client, name: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"ebc": collection()})
    optimizer = KeyedOptimizerWrapper(
        dict(model.named_parameters()), lambda given: torch.optim.Adagrad(given, lr=0.1)
    )
    model["ebc"](batch()).values().square().sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({k: dict(v) for k, v in state.items()}, tmp_path / "model.pt")
    weight = model["ebc"].embedding_bags["user"].weight
    sums = optimizer.state_dict()["state"]["ebc.embedding_bags.user.weight"]["sum"]

    client.create_table(name, 4, optimizer="adagrad")
    count = import_rows(
        client,
        name,
        tmp_path / "model.pt",
        kind="torchrec",
        map={"table": "user"},
        journal=tmp_path,
    )
    assert count == 16
    found = rows_of(client, name)
    assert np.array_equal(found, torch.cat([weight, sums], 1).detach().numpy())

    options = {"rows": 16, "name": "ebc.embedding_bags.user.weight"}
    export.export(client, name, tmp_path / "out.pt", format="state_dict", options=options)
    other = torch.nn.ModuleDict({"ebc": collection()})
    loaded = other.load_state_dict(torch.load(tmp_path / "out.pt", weights_only=True), strict=False)
    assert loaded.missing_keys == ["ebc.embedding_bags.item.weight"]
    assert not loaded.unexpected_keys
    assert torch.equal(other["ebc"](batch())["u"], model["ebc"](batch())["u"])
    client.drop_table(name)
