"""Tables of torchrec's configs: created, checked, refused; and models that contain collections."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from servers import Cluster
from torch import Tensor, nn
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.datasets.utils import Batch
from torchrec.distributed.train_pipeline import TrainPipelineBase, TrainPipelineSparseDist
from torchrec.fx import symbolic_trace
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.modules.embedding_configs import (
    CountBasedEvictionPolicy,
    DataType,
    NoEvictionPolicy,
    PoolingType,
)

from psclient import Client
from psclient.errors import InvalidArgument, SchemaMismatch
from psclient.rows import write_rows
from psclient.torch import RowOptimizer
from psclient.torchrec import EmbeddingBagCollection

init = nn.init


@pytest.fixture(scope="module")
def client(cluster2: Cluster) -> Iterator[Client]:
    with Client(cluster2.addresses, timeout=60.0) as client:
        yield client


def config(name: str, **others: Any) -> EmbeddingBagConfig:
    given = {"feature_names": [name[:1]], "num_embeddings": 16, "embedding_dim": 4, **others}
    return EmbeddingBagConfig(name=name, **given)


def batch(keys: str, count: int = 2, seed: int = 0) -> KeyedJaggedTensor:
    """A batch of ``count`` samples with two keys per feature of one letter."""
    ids = np.random.default_rng(seed).integers(0, 50, 2 * count * len(keys))
    lengths = torch.full((len(keys) * count,), 2)
    return KeyedJaggedTensor(list(keys), torch.from_numpy(ids), lengths=lengths)


INITIALIZERS: dict[str, tuple[dict[str, Any], str, dict[str, float]]] = {
    "default": ({}, "uniform", {"low": -0.25, "high": 0.25}),
    "bounds": (
        {"weight_init_min": -2.0, "weight_init_max": 3.0},
        *("uniform", {"low": -2.0, "high": 3.0}),
    ),
    "uniform": ({"init_fn": init.uniform_}, "uniform", {"low": 0.0, "high": 1.0}),
    "normal": (
        {"init_fn": partial(init.normal_, std=0.5)},
        *("normal", {"mean": 0.0, "std": 0.5}),
    ),
    "positions": (
        {"init_fn": partial(init.normal_, mean=1.0, std=0.5)},
        *("normal", {"mean": 1.0, "std": 0.5}),
    ),
    "truncated": (
        {"init_fn": init.trunc_normal_},
        *("truncated_normal", {"mean": 0.0, "std": 1.0}),
    ),
    "constant": ({"init_fn": partial(init.constant_, val=7)}, "constant", {"value": 7.0}),
    "zeros": ({"init_fn": init.zeros_}, "zeros", {}),
    "ones": ({"init_fn": init.ones_}, "constant", {"value": 1.0}),
}


@pytest.mark.parametrize("case", INITIALIZERS)
def test_initial_rows_have_the_distribution_of_init_fn(
    client: Client, name: str, case: str
) -> None:
    options, initializer, parameters = INITIALIZERS[case]
    EmbeddingBagCollection(client, [config(name, **options)])
    info = client.describe_table(name)
    assert (info.initializer, info.initializer_args) == (initializer, parameters)
    theirs = torch.empty(4000, 4)
    config(name, **options).init_fn(theirs)
    ours = client.table(name).pull(np.arange(4000))
    spread = theirs.std().item()
    assert math.isclose(ours.mean(), theirs.mean().item(), abs_tol=0.05 * spread + 1e-6)
    assert math.isclose(ours.std(), spread, rel_tol=0.05, abs_tol=1e-6)


def _mine(weight: Tensor) -> None: ...


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "own function": ({"init_fn": _mine}, {}, "init_fn _mine has no counterpart .*initializers="),
    "xavier": ({"init_fn": init.xavier_uniform_}, {}, "init_fn xavier_uniform_ has no counterpart"),
    "lambda": ({"init_fn": lambda w: w}, {}, "init_fn .*<lambda> has no counterpart"),
    "truncated elsewhere": (
        {"init_fn": partial(init.trunc_normal_, std=0.1)},
        {},
        "init_fn trunc_normal_: a must be -0.2, .* got -2",
    ),
    "half": ({"data_type": DataType.FP16}, {}, "data_type must be FP32.* got FP16"),
    "no pooling": ({"pooling": PoolingType.NONE}, {}, "pooling must be SUM or MEAN, got NONE"),
    "weighted mean": (
        {"pooling": PoolingType.MEAN},
        {"is_weighted": True},
        "pooling must be SUM with is_weighted=True",
    ),
    "eviction": (
        {"virtual_table_eviction_policy": CountBasedEvictionPolicy()},
        {},
        "virtual_table_eviction_policy must be None, got CountBasedEvictionPolicy: pass eviction",
    ),
    "a feature twice": ({"feature_names": ["a", "a"]}, {}, "feature_names must differ, got 'a'"),
    "unknown table": ({}, {"initializers": {"x": ("zeros", {})}}, "initializers: no table 'x'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(client: Client, name: str, case: str) -> None:
    """Nothing is created if one config is refused."""
    others, options, error = REFUSED[case]
    configs = [config(f"first_{name}"), config(name, **others)]
    with pytest.raises(InvalidArgument, match=error) as caught:
        EmbeddingBagCollection(client, configs, **options)
    assert repr(name) in str(caught.value) or case == "unknown table"
    assert f"first_{name}" not in {info.name for info in client.list_tables()}


def test_an_initializer_may_be_given(client: Client, name: str) -> None:
    given = config(name, init_fn=_mine, virtual_table_eviction_policy=NoEvictionPolicy())
    EmbeddingBagCollection(client, [given], initializers={name: ("constant", {"value": 2.0})})
    assert client.table(name).pull([5]).tolist() == [[2.0] * 4]


def test_existing_tables_are_used(client: Client, name: str) -> None:
    client.create_table(name, 4, optimizer="sgd", initializer="zeros")
    for options in ({}, {"optimizer": "sgd"}):
        EmbeddingBagCollection(client, [config(name)], **options)
    assert client.describe_table(name).initializer == "zeros"
    with pytest.raises(SchemaMismatch, match=f"'{name}' exists with dim 4, .* embedding_dim 8"):
        EmbeddingBagCollection(client, [config(name, embedding_dim=8)])
    with pytest.raises(SchemaMismatch, match=f"'{name}' exists with optimizer 'sgd', got 'adam'"):
        EmbeddingBagCollection(client, [config(name)], optimizer="adam")


def test_weighted_features_need_a_collection_of_their_own(client: Client, name: str) -> None:
    plain = EmbeddingBagCollection(client, [config(name, feature_names=["a"])])
    weighted = EmbeddingBagCollection(client, [config(name, feature_names=["a"])], is_weighted=True)
    features = batch("a")
    factors = torch.ones(len(features.values()))
    both = KeyedJaggedTensor(["a"], features.values(), factors, lengths=features.lengths())
    assert torch.equal(plain(features).values(), weighted(both).values())
    with pytest.raises(InvalidArgument, match=r"has weights, .* is_weighted=False"):
        plain(both)
    with pytest.raises(InvalidArgument, match=r"has no weights, .* is_weighted=True"):
        weighted(features)
    with pytest.raises(InvalidArgument, match="must be a KeyedJaggedTensor, got dict"):
        plain({"a": [1]})


# ---- models


def dlrm(client: Client, name: str, **options: Any) -> tuple[EmbeddingBagCollection, DLRM]:
    configs = [config(f"{each}_{name}", feature_names=[each]) for each in "ab"]
    collection = EmbeddingBagCollection(client, configs, **options)
    torch.manual_seed(0)
    model = DLRM(
        embedding_bag_collection=collection,
        dense_in_features=3,
        dense_arch_layer_sizes=[8, 4],
        over_arch_layer_sizes=[8, 1],
    )
    return collection, model


def test_dlrm_trains(client: Client, name: str) -> None:
    """It learns labels that depend on the keys of feature a alone."""
    _, model = dlrm(client, name, optimizer="adagrad", lr=0.1)
    rows, dense = RowOptimizer(model), torch.optim.Adagrad(model.parameters(), lr=0.05)
    losses = []
    for step in range(150):
        features = batch("ab", 64, seed=step)
        labels = (features["a"].values().reshape(64, 2) < 25).float().mean(1)
        logits = model(torch.ones(64, 3), features).squeeze(1)
        loss = (logits - labels).square().mean()
        model.zero_grad()
        loss.backward()
        dense.step()
        rows.step()
        losses.append(loss.item())
    assert np.mean(losses[-20:]) < 0.5 * np.mean(losses[:10])
    assert client.describe_table(f"a_{name}").rows == 50


class Both(torch.optim.Optimizer):
    """Several optimizers as one, which is what a train pipeline of torchrec takes."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers
        self.param_groups: list[Any] = []

    def step(self, closure: Any = None) -> None:
        for each in self.optimizers:
            each.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for each in self.optimizers:
            each.zero_grad()


@pytest.mark.parametrize("kind", [TrainPipelineBase, TrainPipelineSparseDist])
def test_train_pipelines_of_torchrec_run_the_collection(
    client: Client, name: str, kind: Any
) -> None:
    collection, model = dlrm(client, name, optimizer="sgd", lr=0.1)
    dense = torch.optim.SGD(model.parameters(), lr=0.1)
    pipeline = kind(DLRMTrain(model), Both(dense, collection.optimizer()), torch.device("cpu"))
    batches = iter(
        [Batch(torch.ones(8, 3), batch("ab", 8, seed), torch.ones(8).int()) for seed in range(6)]
    )
    losses = []
    while True:
        try:
            losses.append(float(pipeline.progress(batches)[0]))
        except StopIteration:
            break
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    assert client.describe_table(f"a_{name}").rows > 20


def test_optimizer_handle(client: Client, name: str) -> None:
    """A GradScaler, clipping, zero_grad and freezing reach the rows."""
    collection, model = dlrm(client, name, optimizer="sgd", lr=1.0)
    rows = RowOptimizer(model)
    table = collection.group.features["a"].table  # type: ignore[attr-defined]
    before = table.pull(np.arange(50))

    def backward(scale: float = 1.0) -> None:
        (model(torch.ones(2, 3), batch("ab")).sum() * scale).backward()

    backward(1e6)
    model.zero_grad()
    rows.step()
    model.requires_grad_(False)
    assert not collection(batch("ab")).values().requires_grad
    model.requires_grad_(True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    backward(math.inf)
    scaler.scale(torch.ones(()))
    scaler.step(rows)
    scaler.update()
    rows.zero_grad()
    assert np.array_equal(before, table.pull(np.arange(50)))
    scaler.scale(model(torch.ones(2, 3), batch("ab")).sum()).backward()
    scaler.unscale_(rows)
    norm = nn.utils.clip_grad_norm_(rows.leaves(), 1e-3)
    scaler.step(rows)
    change = np.abs(before - table.pull(np.arange(50)))
    assert norm > 1e-3 > change.max() > 0


def test_a_pipeline_trains_as_the_loop_does(client: Client, name: str) -> None:
    """Bit for bit; and only the features of the batch at hand may be trained."""
    batches = [batch("ab", 16, seed=step) for step in range(12)]
    first = client.create_table(f"first_{name}", 4, optimizer="adam", lr=0.1)
    rows = first.pull(np.arange(50))
    weights = []
    for prefix in ("loop", "pipe"):
        collection, model = dlrm(client, f"{prefix}_{name}", optimizer="adam", lr=0.1)
        tables = [client.table(f"{each}_{prefix}_{name}") for each in "ab"]
        for table in tables:
            write_rows(client, table.name, np.arange(50), rows)
        optimizer, dense = RowOptimizer(model), torch.optim.SGD(model.parameters(), lr=0.1)

        def step(
            features: Any, model: Any = model, optimizer: Any = optimizer, dense: Any = dense
        ) -> None:
            dense.zero_grad()
            model(torch.ones(16, 3), features).square().mean().backward()
            dense.step()
            optimizer.step()

        if prefix == "loop":
            for features in batches:
                step(features)
        else:
            with collection.pipeline(batches, lambda each: each, lookahead=2) as ahead:
                for features in ahead:
                    with pytest.raises(InvalidArgument, match="must be those that its function"):
                        collection(batches[0] if features is batches[1] else batches[1])
                    with torch.no_grad():
                        assert len(collection(batch("ab")).keys()) == 2
                    step(features)
                assert ahead.pipe.stats.pushes == 12
            step(batches[0])
        weights.append([table.pull(np.arange(50)) for table in tables])
        weights[-1].append(model.over_arch.model[1].weight.detach().clone())
        if prefix == "loop":
            step(batches[0])
            weights[-1] = [table.pull(np.arange(50)) for table in tables] + [
                model.over_arch.model[1].weight.detach().clone()
            ]
    for one, other in zip(*weights, strict=True):
        assert np.array_equal(one, other)


def test_fx_sees_a_leaf(client: Client, name: str) -> None:
    collection, model = dlrm(client, name)
    dense, features = torch.ones(2, 3), batch("ab")
    for traced in (symbolic_trace(model), torch.fx.symbolic_trace(model)):
        calls = [node.target for node in traced.graph.nodes if node.op == "call_module"]
        assert "sparse_arch.embedding_bag_collection" in calls
        assert torch.equal(traced(dense, features), model(dense, features))
    assert collection(features).keys() == ["a", "b"]


def test_copies_and_pickles(client: Client, name: str) -> None:
    collection, _ = dlrm(client, name, initializers=None)
    features = batch("ab")
    expected = collection(features).values()
    assert torch.equal(copy.deepcopy(collection)(features).values(), expected)
    loaded = pickle.loads(pickle.dumps(collection))  # noqa: S301
    assert torch.equal(loaded(features).values(), expected)
    loaded.client.close()
    assert collection.state_dict() == {}
    assert collection.half()(features).values().dtype == torch.float32
    assert collection.prefetch(features).result() is None
