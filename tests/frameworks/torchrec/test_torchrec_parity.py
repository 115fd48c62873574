"""Our collections and those of torchrec, case by case: the same outputs, gradients and refusals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torchrec
from numpy.testing import assert_allclose
from servers import Cluster
from torch import Tensor
from torchrec import EmbeddingBagConfig, EmbeddingConfig, JaggedTensor, KeyedJaggedTensor
from torchrec.modules.embedding_configs import PoolingType
from torchrec.sparse.tensor_dict import maybe_td_to_kjt

from psclient import Client
from psclient.errors import InvalidArgument
from psclient.rows import write_rows
from psclient.torchrec import EmbeddingBagCollection, EmbeddingCollection

ROWS, DIM = 20, 4
FAR = {3: -1, 4: 1 << 62, 5: -(1 << 63), 6: (1 << 63) - 1}  # ids that torchrec's tables cannot have


@pytest.fixture(scope="module")
def client(cluster2: Cluster) -> Iterator[Client]:
    with Client(cluster2.addresses, timeout=60.0) as client:
        yield client


def bags(name: str, *features: str, dim: int = DIM, mean: bool = False) -> EmbeddingBagConfig:
    pooling = PoolingType.MEAN if mean else PoolingType.SUM
    return EmbeddingBagConfig(ROWS, dim, name, feature_names=list(features), pooling=pooling)


def single(name: str, *features: str, dim: int = DIM) -> EmbeddingConfig:
    return EmbeddingConfig(ROWS, dim, name, feature_names=list(features))


def batch(keys: str, lengths: list[int], *, weighted: bool = False, **options: Any) -> Any:
    """A batch of features "a b ..."; ``lengths`` are those of all bags of a, then of b, ..."""
    seed = np.random.default_rng(len(lengths))
    ids = torch.from_numpy(seed.integers(0, ROWS, sum(lengths)))
    weights = torch.from_numpy(seed.normal(size=sum(lengths)).astype(np.float32))
    return KeyedJaggedTensor(
        keys=keys.split(),
        values=ids,
        lengths=torch.tensor(lengths, dtype=torch.int32),
        weights=weights.requires_grad_() if weighted else None,
        **options,
    )


def far(features: KeyedJaggedTensor) -> KeyedJaggedTensor:
    """The same batch with other ids in the place of some."""
    ids = [FAR.get(each, each) for each in features.values().tolist()]
    return KeyedJaggedTensor(features.keys(), torch.tensor(ids), lengths=features.lengths())


def same_rows(client: Client, theirs: Any, configs: list[Any]) -> None:
    """Write the weights of torchrec's tables to the servers; plain SGD with lr 1 trains them."""
    modules = getattr(theirs, "embedding_bags", None) or theirs.embeddings
    for config in configs:
        rows = modules[config.name].weight.detach().numpy()
        ids = np.array([FAR.get(each, each) for each in range(ROWS)])
        write_rows(client, config.name, np.arange(ROWS), rows)
        write_rows(client, config.name, ids, rows)


def moved(client: Client, table: str, before: Tensor, ids: Any = range(ROWS)) -> Any:
    """Minus what a push with lr 1 has added to the rows: their gradients."""
    return before.numpy() - client.table(table).pull(np.array(list(ids)))


BAGS: dict[str, tuple[list[Any], Any, dict[str, Any]]] = {
    "sum": ([bags("t", "a")], batch("a", [2, 0, 1]), {}),
    "mean": ([bags("t", "a", mean=True)], batch("a", [2, 0, 1]), {}),
    "several tables and dims": (
        [bags("t", "b", dim=3), bags("u", "a", dim=5, mean=True)],
        batch("a b", [1, 2, 3, 0, 1, 4]),
        {},
    ),
    "several features of a table": ([bags("t", "a", "b")], batch("a b", [1, 2, 2, 1]), {}),
    "shared features": (
        [bags("t", "a", "b"), bags("u", "b", "c", dim=3)],
        batch("a b c", [1, 2, 2, 1, 3, 0]),
        {},
    ),
    "no feature names": ([bags("t")], batch("t", [1, 2]), {}),
    "more features than tables": ([bags("t", "b")], batch("a b c", [1, 1, 2, 1, 1, 1]), {}),
    "weighted": (
        [bags("t", "a"), bags("u", "b", "a")],
        batch("a b", [1, 2, 2, 0], weighted=True),
        {"is_weighted": True},
    ),
    "a feature without keys": ([bags("t", "a", "b")], batch("a b", [0, 0, 2, 1]), {}),
    "no keys": ([bags("t", "a")], batch("a", [0, 0]), {}),
    "int32 ids": (
        [bags("t", "a")],
        KeyedJaggedTensor(["a"], torch.tensor([1, 2, 1]).int(), lengths=torch.tensor([1, 2])),
        {},
    ),
    "offsets": (
        [bags("t", "a", "b")],
        KeyedJaggedTensor.from_offsets_sync(
            ["a", "b"], torch.tensor([1, 2, 1, 5]), offsets=torch.tensor([0, 1, 1, 3, 4])
        ),
        {},
    ),
    "variable stride": (
        [bags("t", "a", mean=True), bags("u", "b", dim=3)],
        batch(
            "a b",
            [1, 2, 3, 1, 0],
            stride_per_key_per_rank=[[2], [3]],
            inverse_indices=(["b", "a"], torch.tensor([[0, 1, 2, 1], [1, 1, 0, 0]])),
        ),
        {},
    ),
    "inverse indices of a shared feature": (
        [bags("t", "a", "b"), bags("u", "b", dim=3)],
        batch(
            "a b",
            [1, 2, 3, 1, 0],
            stride_per_key_per_rank=[[2], [3]],
            inverse_indices=(["a", "b"], torch.tensor([[1, 1, 0, 0], [0, 1, 2, 1]])),
        ),
        {},
    ),
}  # fmt: skip


def renamed(configs: list[Any], prefix: str) -> list[Any]:
    """Copies of configs whose tables no other test uses; features keep their names."""
    return [
        type(config)(
            **{
                **vars(config),
                "name": f"{prefix}.{config.name}".replace(".", "_"),
                "feature_names": config.feature_names or [config.name],
            }
        )
        for config in configs
    ]


def both_bags(client: Client, prefix: str, configs: list[Any], **options: Any) -> tuple[Any, Any]:
    """(torchrec's collection, ours), with the same rows."""
    theirs = torchrec.EmbeddingBagCollection(tables=configs, **options)
    ours = EmbeddingBagCollection(client, configs, **options, optimizer="sgd", lr=1.0)
    same_rows(client, theirs, configs)
    return theirs, ours


@pytest.mark.parametrize("case", BAGS)
def test_bags(client: Client, name: str, case: str) -> None:
    given, features, options = BAGS[case]
    configs = renamed(given, name)
    theirs, ours = both_bags(client, name, configs, **options)
    weights = features.weights_or_none()
    outputs, slopes = [], []
    for module in (theirs, ours):
        out = module(features)
        coefficients = torch.linspace(-1, 1, out.values().numel()).reshape(out.values().shape)
        weights is not None and setattr(weights, "grad", None)
        (out.values() * coefficients).sum().backward()
        outputs.append(out)
        slopes.append(None if weights is None else weights.grad.clone())
    ours.step()
    first, second = outputs
    assert first.keys() == second.keys()
    assert first.length_per_key() == second.length_per_key()
    assert first.values().dtype == second.values().dtype
    assert_allclose(second.values().detach(), first.values().detach(), atol=1e-6)
    for key in first.keys():  # noqa: SIM118
        assert_allclose(second[key].detach(), first[key].detach(), atol=1e-6)
    if weights is not None:
        assert_allclose(slopes[1], slopes[0], atol=1e-6)
    for config in configs:
        weight = theirs.embedding_bags[config.name].weight
        expected = torch.zeros_like(weight) if weight.grad is None else weight.grad
        assert_allclose(moved(client, config.name, weight.detach()), expected, atol=1e-6)
    assert theirs.is_weighted() == ours.is_weighted()
    assert ours.embedding_bag_configs() == theirs.embedding_bag_configs()
    assert theirs.device == ours.device


def test_ids_need_not_be_below_num_embeddings(client: Client, name: str) -> None:
    configs = renamed([bags("t", "a", mean=True), bags("u", "b")], name)
    theirs, ours = both_bags(client, name, configs)
    near = batch("a b", [3, 0, 4, 9, 5, 8])
    expected, got = theirs(near).values(), ours(far(near)).values()
    assert_allclose(got.detach(), expected.detach(), atol=1e-6)
    expected.square().sum().backward()
    got.square().sum().backward()
    ours.step()
    for config in configs:
        weight = theirs.embedding_bags[config.name].weight
        ids = [FAR.get(each, each) for each in range(ROWS)]
        got_moved = moved(client, config.name, weight.detach(), ids)
        assert_allclose(got_moved, weight.grad, atol=1e-5)


def test_a_tensor_dict(client: Client, name: str) -> None:
    tensordict = pytest.importorskip("tensordict")
    configs = renamed([bags("t", "a"), bags("u", "b")], name)
    theirs, ours = both_bags(client, name, configs)
    values = {
        each: torch.nested.nested_tensor_from_jagged(
            torch.tensor([1, 2, 3]), lengths=torch.tensor(lengths)
        )
        for each, lengths in (("a", [1, 2]), ("b", [3, 0]))
    }
    features = tensordict.TensorDict(values)
    assert isinstance(maybe_td_to_kjt(features, None), KeyedJaggedTensor)
    assert_allclose(ours(features).values().detach(), theirs(features).values().detach())


SEQUENCES: dict[str, tuple[list[Any], Any, dict[str, Any]]] = {
    "one": ([single("t", "a")], batch("a", [2, 0, 1]), {}),
    "shared features": (
        [single("t", "a", "b"), single("u", "b")],
        batch("a b", [1, 2, 2, 1]),
        {},
    ),
    "indices": (
        [single("t", "a"), single("u", "b")],
        batch("a b", [1, 2, 2, 1]),
        {"need_indices": True},
    ),
    "weights are ignored": ([single("t", "a")], batch("a", [1, 2], weighted=True), {}),
    "no keys": ([single("t", "a")], batch("a", [0, 0]), {}),
    "variable stride": (
        [single("t", "a"), single("u", "b")],
        batch("a b", [1, 2, 3, 1, 0], stride_per_key_per_rank=[[2], [3]]),
        {},
    ),
}


@pytest.mark.parametrize("case", SEQUENCES)
def test_sequences(client: Client, name: str, case: str) -> None:
    given, features, options = SEQUENCES[case]
    configs = renamed(given, name)
    theirs = torchrec.EmbeddingCollection(tables=configs, **options)
    ours = EmbeddingCollection(client, configs, **options, optimizer="sgd", lr=1.0)
    same_rows(client, theirs, configs)
    first, second = theirs(features), ours(features)
    assert list(first) == list(second)
    for key in first:
        assert isinstance(second[key], JaggedTensor)
        assert_allclose(second[key].values().detach(), first[key].values().detach(), atol=1e-6)
        assert torch.equal(second[key].lengths(), first[key].lengths())
        expected, got = (each[key].weights_or_none() for each in (first, second))
        assert (expected is None) == (got is None)
        assert expected is None or torch.equal(expected, got)
    for outputs in (first, second):
        torch.cat([each.values() for each in outputs.values()]).square().sum().backward()
    ours.step()
    for config in configs:
        weight = theirs.embeddings[config.name].weight
        assert_allclose(moved(client, config.name, weight.detach()), weight.grad, atol=1e-5)
    assert ours.embedding_configs() == theirs.embedding_configs()
    assert ours.embedding_dim() == theirs.embedding_dim()
    assert ours.need_indices() == theirs.need_indices()
    assert ours.embedding_names_by_table() == theirs.embedding_names_by_table()


def _missing(collection: Any) -> Any:
    return collection(batch("b", [1, 2]))


def _unweighted(collection: Any) -> Any:
    return collection(batch("a", [1, 2]))


REFUSED: dict[str, tuple[Callable[..., Any], dict[str, Any], Callable[[Any], Any] | None, str]] = {
    "two tables of a name": (
        lambda: [bags("t", "a"), bags("t", "b")],
        {},
        None,
        "each name must be used once, got '.*' twice",
    ),
    "a missing feature": (lambda: [bags("t", "a")], {}, _missing, "must contain 'a', got .'b'.$"),
    "no weights": (
        lambda: [bags("t", "a")],
        {"is_weighted": True},
        _unweighted,
        "has no weights, but the collection was made with is_weighted=True",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_both(client: Client, name: str, case: str) -> None:
    configs, options, call, error = REFUSED[case]

    def make(kind: Any, *first: Any) -> Any:
        made = kind(*first, tables=renamed(configs(), name), **options)
        return made if call is None else call(made)

    with pytest.raises((ValueError, KeyError, AssertionError)):
        make(torchrec.EmbeddingBagCollection)
    with pytest.raises(InvalidArgument, match=error):
        make(EmbeddingBagCollection, client)


def test_different_dims_of_sequences(client: Client) -> None:
    configs = [single("t", "a"), single("u", "b", dim=3)]
    with pytest.raises(ValueError, match="same embedding dim"):
        torchrec.EmbeddingCollection(tables=configs)
    with pytest.raises(InvalidArgument, match=r"'u': embedding_dim must be .* 4; got 3"):
        EmbeddingCollection(client, configs)
