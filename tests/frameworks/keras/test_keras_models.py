"""Models with rows on the servers: evaluated, saved, loaded and copied."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from servers import Cluster
from training import BATCH, KEYS, LR, PADDING, Twin, batches, functional_model, table

from psclient import Client
from psclient.errors import InvalidArgument
from psclient.keras import Embedding, Push, export, feed, load_model

pytestmark = pytest.mark.filterwarnings("ignore:__array__ impl:DeprecationWarning")


@pytest.fixture
def ps(cluster2: Cluster, connect: Callable[..., Client]) -> Client:
    return connect(cluster2)


@pytest.fixture
def model(ps: Client, name: str) -> keras.Model:
    users, items = table(ps, f"{name}.user"), table(ps, f"{name}.item")
    user = Embedding(users, features=["user"], name="users")
    basket = Embedding(items, combiner="mean", padding=PADDING, features=["basket"], name="items")
    model = functional_model(user, basket)
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(LR), loss, metrics=["accuracy"])
    return model


def outputs(model: keras.Model, data: Any) -> Any:
    return model.predict(feed(data, model, training=False), verbose=0)


def test_evaluation_reads_rows_as_they_are(model: keras.Model) -> None:
    """Keys without a row have the embedding serving_default, 0, not their initial rows."""
    data = batches(4)
    never = batches(2, seed=1)
    never = [
        ({**x, "user": x["user"] + KEYS, "basket": x["basket"] * 0 + KEYS}, y) for x, y in never
    ]
    history = model.fit(
        feed(data, model, staleness=1),
        validation_data=feed(never, model, training=False),
        callbacks=[Push(model)],
        verbose=0,
    )
    assert history.history["val_accuracy"]
    layer = model.get_layer("users")
    twin = Twin(layer.table, model.get_layer("items").table)
    dense = [*model.get_layer("hidden").get_weights(), *model.get_layer("out").get_weights()]
    import torch

    twin.weights = [torch.tensor(each) for each in dense]
    rows = {name: torch.tensor(each) for name, each in twin.rows.items()}
    expected = np.concatenate([twin.outputs(inputs, rows).numpy() for inputs, _ in data])
    assert np.abs(outputs(model, data) - expected).max() < 1e-5
    blank = {name: torch.zeros(2 * KEYS, each.shape[1]) for name, each in rows.items()}
    unknown = np.concatenate([twin.outputs(inputs, blank).numpy() for inputs, _ in never])
    assert np.abs(outputs(model, never) - unknown).max() < 1e-5
    loss, _ = model.evaluate(feed(never, model, training=False), verbose=0)
    assert loss == pytest.approx(history.history["val_loss"][0], abs=1e-5)
    assert layer.table.pull_rows(np.arange(KEYS, 2 * KEYS)).found.sum() == 0


def test_a_saved_model_has_no_rows_and_trains_on(
    ps: Client, model: keras.Model, tmp_path: Path
) -> None:
    data = batches(4)
    model.fit(feed(data, model), callbacks=[Push(model)], verbose=0)
    path = tmp_path / "model.keras"
    model.save(path)
    loaded = load_model(path, ps)
    assert np.abs(outputs(loaded, data) - outputs(model, data)).max() < 1e-6
    layer = loaded.get_layer("items")
    assert (layer.combiner, layer.padding, layer.features) == ("mean", PADDING, ("basket",))
    pushed = layer.table.pull_rows(np.arange(KEYS)).frequencies.sum()
    loaded.fit(feed(data, loaded), callbacks=[Push(loaded)], verbose=0)
    keys = np.concatenate([inputs["basket"].reshape(-1) for inputs, _ in data])
    again = layer.table.pull_rows(np.arange(KEYS)).frequencies.sum()
    assert again - pushed == (keys != PADDING).sum()
    copy = keras.models.clone_model(loaded)
    assert copy.get_layer("items").table.name == layer.table.name
    with pytest.raises(InvalidArgument, match=r"larger batches, make the layer with rows=\d+"):
        feed(batches(1, batch=2 * BATCH), loaded)


def test_mixed_precision(ps: Client, name: str) -> None:
    users = table(ps, name)
    layer = Embedding(users, combiner="sqrtn", features=["basket"], dtype="mixed_bfloat16")
    inputs = {"basket": layer.input((3,))}
    out = layer(inputs["basket"])
    assert keras.backend.standardize_dtype(out.dtype) == "bfloat16"
    dense = keras.layers.Dense(1, kernel_initializer="ones", use_bias=False, dtype="float32")
    model = keras.Model(inputs, dense(out))
    model.compile(keras.optimizers.SGD(0.0), "mse")
    keys = np.array([[1, 2, 3], [1, 1, 4]])
    before = users.pull(keys)
    model.fit(
        feed([({"basket": keys}, np.zeros((2, 1), np.float32))], model),
        callbacks=[Push(model)],
        verbose=0,
    )
    gradient = before.sum((1, 2)) / 3**0.5 / 3**0.5  # d/dp p^2/2 of a batch of 2, by row
    moved = (before - users.pull(keys))[..., 0] / 0.5
    total = {1: gradient[0] + 2 * gradient[1], 2: gradient[0], 3: gradient[0], 4: gradient[1]}
    for key, sums in total.items():
        assert moved[keys == key] == pytest.approx(sums, rel=0.02, abs=0.01)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="SavedModels need TensorFlow")
def test_a_saved_model_of_tensorflow_serves_with_rows_or_frozen(
    model: keras.Model, tmp_path: Path
) -> None:
    import tensorflow as tf

    data = batches(3)
    model.fit(feed(data, model), callbacks=[Push(model)], verbose=0)
    expected = outputs(model, data)
    inputs = {name: np.concatenate([each[name] for each, _ in data]) for name in data[0][0]}
    export(model, tmp_path / "frozen", data[0], serve="frozen")
    export(model, tmp_path / "rows", data[0])
    frozen = tf.saved_model.load(tmp_path / "frozen")
    served = frozen.serve({name: tf.constant(each) for name, each in inputs.items()})
    assert np.abs(served.numpy() - expected).max() < 1e-5
    given = {"age": inputs["age"]}
    for layer in (model.get_layer("users"), model.get_layer("items")):
        (feature,) = layer.features
        keys, places = np.unique(inputs[feature], return_inverse=True)
        given[f"{feature}_rows"] = layer.table.pull(keys, mode="serve")
        places = places.reshape(inputs[feature].shape).astype(np.int32)
        given[f"{feature}_places"] = np.where(inputs[feature] == layer.padding, -1, places)
    rows = tf.saved_model.load(tmp_path / "rows")
    served = rows.serve({name: tf.constant(each) for name, each in given.items()})
    assert np.abs(served.numpy() - expected).max() < 1e-5


@pytest.mark.skipif(keras.backend.backend() == "tensorflow", reason="others cannot")
def test_other_backends_refuse_to_export(model: keras.Model, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="export needs the backend tensorflow, got"):
        export(model, tmp_path / "model", batches(1)[0])
    with pytest.raises(InvalidArgument, match="serve must be one of inputs, frozen, got 'rows'"):
        export(model, tmp_path / "model", batches(1)[0], serve="rows")
