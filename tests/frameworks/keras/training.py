"""A small Keras model for the tests, its data, and the same training in plain torch."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import torch
from torch.nn import functional

from psclient import Client, Table

BATCH, DIM, LENGTH, KEYS = 32, 4, 3, 300
LR, ROWS_LR = 0.1, 0.5
PADDING = -1


def table(ps: Client, name: str) -> Table:
    return ps.create_table(
        name,
        dim=DIM,
        optimizer="sgd",
        lr=ROWS_LR,
        initializer="normal",
        seed=7,
        initializer_args={"std": 0.3},
    )


def batches(count: int, seed: int = 0, batch: int = BATCH) -> list[Any]:
    """Batches with two features: "user", one key, and "basket", up to three keys; and targets."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        user = rng.integers(0, KEYS, batch)
        basket = rng.integers(0, KEYS, (batch, LENGTH))
        basket[rng.random(basket.shape) < 0.3] = PADDING
        age = rng.normal(size=(batch, 1)).astype(np.float32)
        y = ((user + basket.sum(1)) % 2).astype(np.float32)[:, None]
        made.append(({"user": user, "basket": basket, "age": age}, y))
    return made


WEIGHTS = [
    np.random.default_rng(5).normal(size=shape).astype(np.float32) * 0.3
    for shape in ((2 * DIM + 1, 8), (8,), (8, 1), (1,))
]


class Twin:
    """The model in plain torch, with its rows in this process."""

    def __init__(self, users: Table, items: Table) -> None:
        keys = np.arange(KEYS)
        self.rows = {"user": users.pull(keys), "basket": items.pull(keys)}
        self.weights = [torch.tensor(each, requires_grad=True) for each in WEIGHTS]

    def outputs(self, inputs: Any, rows: Any) -> torch.Tensor:
        basket = torch.tensor(inputs["basket"])
        kept = (basket != PADDING).float()
        total = (functional.embedding(basket.clamp(min=0), rows["basket"]) * kept[..., None]).sum(1)
        mean = total / kept.sum(1, keepdim=True).clamp(min=1)
        user = functional.embedding(torch.tensor(inputs["user"]), rows["user"])
        whole = torch.cat([user, mean, torch.tensor(inputs["age"])], 1)
        hidden = torch.relu(whole @ self.weights[0] + self.weights[1])
        return hidden @ self.weights[2] + self.weights[3]

    def train(self, batches: list[Any]) -> None:
        optimizer = torch.optim.SGD(self.weights, lr=LR)
        for inputs, y in batches:
            rows = {
                name: torch.tensor(each, requires_grad=True) for name, each in self.rows.items()
            }
            loss = functional.binary_cross_entropy_with_logits(
                self.outputs(inputs, rows), torch.tensor(y)
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            for name, each in rows.items():
                assert each.grad is not None
                self.rows[name] -= ROWS_LR * each.grad.numpy()


def functional_model(user: Any, basket: Any) -> keras.Model:
    """The model, functional, with WEIGHTS."""
    inputs = {
        "user": user.input(),
        "basket": basket.input((LENGTH,)),
        "age": keras.Input((1,), name="age"),
    }
    whole = keras.layers.Concatenate()(
        [user(inputs["user"]), basket(inputs["basket"]), inputs["age"]]
    )
    hidden = keras.layers.Dense(8, activation="relu", name="hidden")(whole)
    out = keras.layers.Dense(1, name="out")(hidden)
    model = keras.Model(inputs, out)
    set_weights(model)
    return model


def set_weights(model: keras.Model) -> None:
    model.get_layer("hidden").set_weights(WEIGHTS[:2])
    model.get_layer("out").set_weights(WEIGHTS[2:])
