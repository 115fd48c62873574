"""Each batch of fit is pushed once, whatever the dataset, the optimizer and the backend do."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from servers import Cluster

from psclient import Client, Table
from psclient.errors import InvalidArgument, PushFailed
from psclient.keras import Embedding, Push, feed

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ impl:DeprecationWarning", "ignore:Your input ran out of data:UserWarning"
)

BACKEND = keras.backend.backend()
DIM, BATCH, KEYS, LR = 2, 16, 100, 0.5


@pytest.fixture
def ps(cluster2: Cluster, connect: Callable[..., Client]) -> Client:
    return connect(cluster2)


def zeros(ps: Client, name: str) -> Table:
    return ps.create_table(name, dim=DIM, optimizer="sgd", lr=LR, initializer="zeros")


def data(count: int, features: tuple[str, ...] = ("item",), seed: int = 0) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [
        (
            {name: rng.integers(0, KEYS, BATCH) for name in features},
            rng.integers(-8, 8, (BATCH, 1)).astype(np.float32),
        )
        for _ in range(count)
    ]


def linear(targets: Any, outputs: Any) -> Any:
    """A loss whose gradient does not depend on rows: the sum of each batch, for any backend."""
    return keras.ops.sum(targets * outputs, axis=-1)


class Sums(keras.Model):
    """Adds up all numbers of the embeddings of all features."""

    def __init__(self, *layers: Embedding, **options: Any) -> None:
        super().__init__(**options)
        self.embeddings = list(layers)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        found = [
            each(inputs[feature], training=training)
            for each in self.embeddings
            for feature in each.features
        ]
        return keras.ops.sum(sum(found[1:], start=found[0]), axis=-1, keepdims=True)


def model_of(*layers: Embedding, optimizer: Any = None, loss: Any = None, **options: Any) -> Sums:
    model = Sums(*layers)
    model.compile(optimizer or keras.optimizers.SGD(0.1), loss or linear, **options)
    return model


def expected(batches: list[Any], count: int = 1) -> Any:
    """The rows after SGD with the gradients of all features of the batches, ``count`` times."""
    rows = np.zeros((KEYS, DIM))
    for inputs, y in batches * count:
        for keys in inputs.values():
            np.add.at(rows, np.asarray(keys), -LR * y.astype(np.float64) / BATCH)
    return rows


def check(table: Table, batches: list[Any], count: int = 1) -> None:
    """Check sums and counts of the rows: they are exact, so that nothing is pushed twice."""
    found = table.pull_rows(np.arange(KEYS))
    assert np.abs(found.embeddings - expected(batches, count)).max() < 1e-5
    keys = np.concatenate([each for inputs, _ in batches for each in inputs.values()] * count)
    assert found.frequencies.tolist() == np.bincount(keys, minlength=KEYS).tolist()


@pytest.mark.parametrize("staleness", [0, 3])
def test_every_batch_is_pushed_once(ps: Client, name: str, staleness: int) -> None:
    """Two layers have one table, and one of them has two features."""
    table = zeros(ps, name)
    first = Embedding(table, features=["item", "before"])
    second = Embedding(table, features=["after"], name="second")
    model = model_of(first, second)
    batches = data(12, ("item", "before", "after"))
    fed = feed(batches, model, staleness=staleness, step=100)
    model.fit(fed, epochs=2, callbacks=[Push(model)], verbose=0)
    check(table, batches, 2)
    assert table.pull_rows(batches[-1][0]["item"]).steps.tolist() == [123] * BATCH
    model.fit(fed, steps_per_epoch=4, epochs=3, callbacks=[Push(model)], verbose=0)
    check(table, batches, 3)
    assert fed.pipe.stats.pushes == fed.pipe.stats.batches == 36

    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.model.stop_training = batch == 2

    model.fit(fed, callbacks=[Push(model), Stop()], verbose=0)
    model.compile(keras.optimizers.SGD(0.1), linear, metrics=["mse"])
    model.fit(fed, steps_per_epoch=5, callbacks=[Push(model)], verbose=0)
    more = [*batches[:3], *batches[:5]]
    found = np.abs(table.pull(np.arange(KEYS)) - expected(batches, 3) - expected(more)).max()
    assert found < 1e-5
    assert fed.pipe.step == 100 + 36 + 8


def test_batches_that_were_taken_and_not_trained(
    ps: Client, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on JAX with a GPU, if training ends before its batches do."""
    module = sys.modules["psclient.keras.feed"]  # the package has a function of this name
    monkeypatch.setattr(module, "_batches_at_hand", lambda staleness: 2)
    table = zeros(ps, name)
    model = model_of(Embedding(table, features=["item"]))
    fed = feed(data(5, ("item",)), model, staleness=1)
    for trained in range(2):
        fed.start()
        batches = fed.get_numpy_iterator()
        for _ in range(2):
            next(batches)
        _, ticket = fed.oldest()
        assert ticket.step == 2 * trained
        fed.push({name: np.ones((len(ticket.keys[name].keys), table.dim))}, None)
        fed.stop()
    assert (fed.pipe.stats.pushes, fed.pipe.stats.skipped) == (2, 2)


class Sequence(keras.utils.PyDataset):
    def __init__(self, batches: list[Any]) -> None:
        super().__init__()
        self.batches, self.ended = batches, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Any:
        return self.batches[index]

    def on_epoch_end(self) -> None:
        self.ended += 1


def dataset(kind: str, batches: list[Any]) -> Any:
    inputs = {"item": np.concatenate([each["item"] for each, _ in batches])}
    y = np.concatenate([y for _, y in batches])
    if kind == "tf.data":
        import tensorflow as tf

        return tf.data.Dataset.from_tensor_slices((inputs, y)).batch(BATCH)
    if kind == "DataLoader":
        import torch

        pairs = [({"item": key}, target) for key, target in zip(inputs["item"], y, strict=True)]
        return torch.utils.data.DataLoader(pairs, batch_size=BATCH)
    return Sequence(batches) if kind == "PyDataset" else iter(batches)


@pytest.mark.parametrize("kind", ["PyDataset", "tf.data", "DataLoader", "iterator"])
def test_datasets_of_all_frameworks(ps: Client, name: str, kind: str) -> None:
    table = zeros(ps, name)
    model = model_of(Embedding(table, features=["item"]))
    batches = data(5)
    model.fit(feed(dataset(kind, batches), model, staleness=1), callbacks=[Push(model)], verbose=0)
    check(table, batches)


def test_sample_weights(ps: Client, name: str) -> None:
    table = zeros(ps, name)
    model = model_of(Embedding(table, features=["item"]), weighted_metrics=[])
    (batch, other), weights = data(2), np.linspace(0, 1, BATCH, dtype=np.float32)
    given = [(*batch, weights), (*other, None)]
    for each in given:  # Keras wants one form in all batches of a fit
        model.fit(feed([each], model), callbacks=[Push(model)], verbose=0)
    weighted = (batch[0], batch[1] * weights[:, None])
    assert np.abs(table.pull(np.arange(KEYS)) - expected([weighted, other])).max() < 1e-5


def test_loss_scales_are_divided_out(ps: Client, name: str) -> None:
    """Keras does not unscale weights that it overwrites by their gradients."""
    batches = data(8)
    for at, optimizer in enumerate(
        (
            keras.optimizers.SGD(0.1, loss_scale_factor=1024.0),
            keras.optimizers.LossScaleOptimizer(
                keras.optimizers.SGD(0.1), initial_scale=64.0, dynamic_growth_steps=3
            ),
        )
    ):
        table = zeros(ps, f"{name}.{at}")
        model = model_of(Embedding(table, features=["item"]), optimizer=optimizer)
        model.fit(feed(batches, model, staleness=1), callbacks=[Push(model)], verbose=0)
        check(table, batches)


def test_a_batch_that_the_optimizer_skips_is_not_pushed(ps: Client, name: str) -> None:
    table = zeros(ps, name)
    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=64.0)
    model = model_of(Embedding(table, features=["item"]), optimizer=scaled)
    batches = data(6)
    bad = (batches[2][0], np.full((BATCH, 1), np.inf, np.float32))
    fed = feed([*batches[:2], bad, *batches[2:]], model)
    model.fit(fed, callbacks=[Push(model)], verbose=0)
    check(table, batches)
    assert (fed.pipe.stats.batches, fed.pipe.stats.skipped) == (7, 1)


def test_a_gradient_that_is_infinite_is_refused_and_fit_goes_on(ps: Client, name: str) -> None:
    table = zeros(ps, name)
    model = model_of(Embedding(table, features=["item"]))
    batches = data(6)
    bad = (batches[2][0], np.full((BATCH, 1), np.inf, np.float32))
    with pytest.raises((InvalidArgument, PushFailed), match="all numbers must be finite"):
        model.fit(feed([*batches[:2], bad], model), callbacks=[Push(model)], verbose=0)
    check(table, batches[:2])
    model.fit(feed(batches[2:], model), callbacks=[Push(model)], verbose=0)
    check(table, batches)


def test_frozen_layers_and_a_learning_rate(ps: Client, name: str) -> None:
    free, frozen = zeros(ps, f"{name}.free"), zeros(ps, f"{name}.frozen")
    layers = Embedding(free, features=["item"]), Embedding(frozen, features=["old"], name="old")
    layers[1].trainable = False
    model = model_of(*layers)
    batches = data(4, ("item", "old"))
    push = Push(model, lr=lambda step: 0.25 if step == 8 else 0.0)
    model.fit(feed(batches, model, step=7), callbacks=[push], verbose=0)
    alone = [({"item": inputs["item"]}, y / 2) for inputs, y in batches[1:2]]
    assert np.abs(free.pull(np.arange(KEYS)) - expected(alone)).max() < 1e-6
    assert ps.describe_table(frozen.name).rows == 0


@pytest.mark.skipif(BACKEND != "jax", reason="only Keras on JAX copies batches ahead")
def test_jax_with_a_device_takes_batches_ahead(
    ps: Client, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import jax

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    table = zeros(ps, name)
    model = model_of(Embedding(table, features=["item"]))
    batches = data(6)
    with pytest.raises(InvalidArgument, match="staleness must be at least 1 on JAX with a gpu"):
        feed(batches, model)
    fed = feed(batches, model, staleness=1)
    model.fit(fed, epochs=2, callbacks=[Push(model)], verbose=0)
    check(table, batches, 2)
    with pytest.raises(InvalidArgument, match="nothing pushes the gradients"):
        model.fit(fed, verbose=0)


@pytest.mark.skipif(BACKEND == "torch", reason="torch runs the layer in each step")
def test_few_steps_are_compiled(ps: Client, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches have 1 to 300 distinct keys: the sizes 16, 23, ..., 363, and one for the limit."""
    traced = []
    plain = Embedding.call

    def call(self: Embedding, inputs: Any, training: bool | None = None) -> Any:
        if training:
            traced.append(tuple(inputs["rows"].shape))
        return plain(self, inputs, training=training)

    monkeypatch.setattr(Embedding, "call", call)
    table = zeros(ps, name)
    model = model_of(Embedding(table, features=["item"]))
    rng, y = np.random.default_rng(0), np.ones((300, 1), np.float32)
    batches = [
        ({"item": np.where(np.arange(300) < distinct, np.arange(300), 0)}, y)
        for distinct in rng.permutation(np.repeat([1, 40, 300], 12))
    ]
    model.fit(feed(batches, model), callbacks=[Push(model)], verbose=0)
    assert 1 <= len(traced) <= 2 * len({16, 46, 300})
    found = table.pull_rows(np.arange(300))
    total = sum(np.bincount(inputs["item"], minlength=300) for inputs, _ in batches)
    assert found.frequencies.tolist() == total.tolist()
