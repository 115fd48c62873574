"""What psclient.keras refuses, by name, and before anything is trained."""

from __future__ import annotations

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
    "ignore:__array__ impl:DeprecationWarning",
    "ignore:The model does not have any trainable weights:UserWarning",
)

DATA = [({"item": np.arange(16)}, np.ones((16, 1), np.float32))] * 4


@pytest.fixture
def table(cluster2: Cluster, connect: Callable[..., Client], name: str) -> Table:
    return connect(cluster2).create_table(name, dim=2, optimizer="sgd", lr=0.5)


def model_of(
    layer: Embedding, optimizer: Any = None, shape: tuple[int, ...] = (), **options: Any
) -> keras.Model:
    shared = {"item": layer.input(shape, feature="item")}
    out = keras.layers.Dense(1, use_bias=False)(layer(shared["item"]))
    model = keras.Model(shared, out)
    model.compile(optimizer or keras.optimizers.SGD(0.0), "mse", **options)
    return model


def test_arguments_of_the_layer(table: Table) -> None:
    for options, said in (
        ({"combiner": "max"}, "combiner must be None or one of sum, mean, sqrtn, got 'max'"),
        ({"rows": 0}, "rows must be an integer in 1"),
        ({"padding": 1.5}, "padding must be an integer"),
        ({"features": "item"}, "features must be a list of names"),
    ):
        with pytest.raises(InvalidArgument, match=said):
            Embedding(table, **options)
    with pytest.raises(InvalidArgument, match="table must be a psclient Table, got 'item'"):
        Embedding("item")
    both = Embedding(table, features=["a", "b"])
    with pytest.raises(InvalidArgument, match="feature must be one of a, b, got None"):
        both.input()


def test_batches_that_do_not_fit_the_model(table: Table) -> None:
    model = model_of(Embedding(table, features=["item"]))
    for dataset, said in (
        ([], "the dataset has no batch"),
        ([np.arange(8)], "each batch must be a dict of inputs by name"),
        ([{"x": np.arange(8)}], r"inputs lack the features \['item'\].*they have \['x'\]"),
        ([{"item": np.ones(8)}], "keys must be integers"),
        ([{"item": np.int64(8)}], r"feature 'item': keys must have the shape \[batch"),
    ):
        with pytest.raises(InvalidArgument, match=said):
            feed(dataset, model)
    with pytest.raises(InvalidArgument, match=r"no layer psclient.keras.Embedding"):
        feed(DATA, keras.Sequential([keras.layers.Dense(1)]))
    pooled = Embedding(table, combiner="sum", features=["item"])
    with pytest.raises(InvalidArgument, match=r"\[batch, n\] to be combined, got \[16\]"):
        feed(DATA, model_of(pooled, shape=(3,)))


def test_two_layers_with_one_feature(table: Table) -> None:
    layers = [Embedding(table, features=["item"], name=each) for each in ("a", "b")]
    inputs = {"item": layers[0].input()}
    model = keras.Model(inputs, layers[0](inputs["item"]) + layers[1](inputs["item"]))
    with pytest.raises(InvalidArgument, match="two layers have the feature 'item'"):
        feed(DATA, model)


def test_more_distinct_keys_than_rows(table: Table) -> None:
    model = model_of(Embedding(table, rows=16, features=["item"]))
    wide = ({"item": np.arange(17)}, np.ones((17, 1), np.float32))
    said = "the batch of step 4 has 17 distinct keys, but the layer has room for 16: pass rows=17"
    with pytest.raises(InvalidArgument, match=said):
        model.fit(feed([*DATA, wide], model), callbacks=[Push(model)], verbose=0)
    assert table.pull_rows(np.arange(17)).frequencies.tolist() == [4] * 16 + [0]
    evaluated = feed([*DATA, wide], model, training=False)
    assert len(model.predict(evaluated, verbose=0)) == 4 * 16 + 17


def test_settings_with_which_gradients_are_lost(table: Table) -> None:
    layer = Embedding(table, features=["item"])
    adding = keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)
    for settings, said in (
        (
            {"optimizer": keras.optimizers.SGD(0.1), "loss": "mse", "steps_per_execution": 2},
            "steps_per_execution must be 1, got 2",
        ),
        (
            {"optimizer": adding, "loss": "mse"},
            "gradient_accumulation_steps must be None, got 2",
        ),
    ):
        model = model_of(layer)
        model.compile(**settings)
        with pytest.raises(InvalidArgument, match=said):
            feed(DATA, model)
        model.compile(keras.optimizers.SGD(0.1), "mse")
        fed = feed(DATA, model)
        model.compile(**settings)
        if keras.backend.backend() != "torch":  # there, Keras itself takes two batches at once
            with pytest.raises(InvalidArgument, match=said):
                model.fit(fed, callbacks=[Push(model)], verbose=0)
    assert table.describe().rows == 0


def test_fit_without_the_callback_or_without_the_feed(table: Table) -> None:
    model, other = (model_of(Embedding(table, rows=16, features=["item"])) for _ in range(2))
    dense = model.layers[-1]
    (before,) = dense.get_weights()
    with pytest.raises(InvalidArgument, match=r"pass callbacks=\[psclient.keras.Push\(model\)\]"):
        model.fit(feed(DATA, model), verbose=0)
    assert dense.get_weights()[0].tolist() == before.tolist()
    with pytest.raises(InvalidArgument, match="must get the model whose fit gets the callback"):
        model.fit(feed(DATA, model), callbacks=[Push(other)], verbose=0)
    looked_up = feed(DATA, other, training=False)
    with pytest.raises(InvalidArgument, match="the model has no feed"):
        other.fit(looked_up, callbacks=[Push(other)], verbose=0)
    feed(DATA, other)
    with pytest.raises(InvalidArgument, match="a batch that is not of the feed"):
        other.fit(looked_up, callbacks=[Push(other)], verbose=0)
    assert table.describe().rows == 0


def test_a_step_that_takes_no_gradients(table: Table) -> None:
    """An optimizer that applies nothing: the gradients of the rows are not where they should be."""

    class Deaf(keras.optimizers.SGD):
        def apply(self, grads: Any, trainable_variables: Any = None) -> None:
            if not self.built:
                self.build(trainable_variables)

    model = model_of(Embedding(table, features=["item"], name="items"), Deaf(0.1))
    with pytest.raises((InvalidArgument, PushFailed), match=r"gradients of layer 'items'.*lost"):
        model.fit(feed(DATA, model), callbacks=[Push(model)], verbose=0)
    assert table.describe().rows == 0


@pytest.mark.filterwarnings("ignore:Gradients do not exist:UserWarning")
@pytest.mark.parametrize("scaled", [False, True])
def test_a_layer_that_takes_no_gradients(table: Table, scaled: bool) -> None:
    """A batch is skipped only if the optimizer has skipped all layers."""
    good, deaf = (Embedding(table, name=each, features=[each]) for each in ("good", "deaf"))

    class Model(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.good, self.deaf, self.head = good, deaf, keras.layers.Dense(1)

        def call(self, inputs: Any, training: bool = False) -> Any:
            taken = self.good(inputs["good"], training=training)
            return self.head(taken + self.deaf(inputs["deaf"], training=False))

    model = Model()
    optimizer = keras.optimizers.SGD(0.1)
    model.compile(keras.optimizers.LossScaleOptimizer(optimizer) if scaled else optimizer, "mse")
    data = [({"good": batch["item"], "deaf": batch["item"]}, y) for batch, y in DATA]
    with pytest.raises((InvalidArgument, PushFailed), match=r"gradients of layer 'deaf'.*lost"):
        model.fit(feed(data, model), callbacks=[Push(model)], verbose=0)
