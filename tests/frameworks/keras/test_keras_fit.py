"""psclient.keras with plain fit, on the backend that KERAS_BACKEND names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from servers import Cluster
from training import KEYS, LR, PADDING, Twin, batches, functional_model, table

from psclient import Client
from psclient.keras import Embedding, Push, feed

pytestmark = pytest.mark.filterwarnings("ignore:__array__ impl:DeprecationWarning")  # in Keras

TOLERANCE = {"torch": 1e-6, "jax": 1e-6, "tensorflow": 2e-6}[keras.backend.backend()]


@pytest.fixture
def ps(cluster2: Cluster, connect: Callable[..., Client]) -> Client:
    return connect(cluster2)


def compiled(model: keras.Model, **options: Any) -> keras.Model:
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(LR), loss, **options)
    return model


def test_rows_and_weights_are_those_of_a_twin(ps: Client, name: str) -> None:
    users, items = table(ps, f"{name}.user"), table(ps, f"{name}.item")
    twin = Twin(users, items)
    user = Embedding(users, features=["user"])
    basket = Embedding(items, combiner="mean", padding=PADDING, features=["basket"])
    model = compiled(functional_model(user, basket))
    data = batches(30)
    history = model.fit(feed(data, model), epochs=2, callbacks=[Push(model)], verbose=0)
    twin.train(data + data)
    keys = np.arange(KEYS)
    assert np.abs(users.pull(keys) - twin.rows["user"]).max() < TOLERANCE
    assert np.abs(items.pull(keys) - twin.rows["basket"]).max() < TOLERANCE
    for ours, theirs in zip(model.get_layer("out").get_weights(), twin.weights[2:], strict=True):
        assert np.abs(ours - theirs.detach().numpy()).max() < TOLERANCE
    assert history.history["loss"][1] < history.history["loss"][0]
