"""Train the network of adult.py with Keras, on torch, JAX or TensorFlow.

    KERAS_BACKEND=jax python examples/adult_keras.py DIRECTORY [--reference]

adult.py explains DIRECTORY. --reference trains again with Keras' own layers, from the same rows.
"""

from typing import Any

import adult
import keras
import numpy as np
from auc import auc
from cluster import servers
from keras import layers, ops

from psclient import Client
from psclient.keras import Embedding, Push, feed


class Batches(keras.utils.PyDataset):
    """Batches in random order, or in order if ``seed`` is None. keys: inputs are places in it."""

    def __init__(self, samples: adult.Samples, seed: int | None, keys: Any = None) -> None:
        super().__init__()
        self.samples, self.keys, self.order = samples, keys, np.arange(len(samples))
        self.rng = None if seed is None else np.random.default_rng(seed)

    def on_epoch_begin(self) -> None:
        self.order = self.rng.permutation(self.order) if self.rng else self.order

    def __len__(self) -> int:
        return -(-len(self.order) // adult.BATCH)

    def __getitem__(self, index: int) -> Any:
        some = self.samples.take(self.order[index * adult.BATCH :][: adult.BATCH])
        keys = some.ids()
        if self.keys is not None:
            keys = {name: np.searchsorted(self.keys, each) for name, each in keys.items()}
        return {**keys, "numbers": some.numbers}, some.labels[:, None]


class Twin(keras.optimizers.AdamW):
    """AdamW for the dense layers, and the servers' Adagrad for rows in this process."""

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        if variable.shape[0] < 1000:  # a dense layer's
            super().update_step(gradient, variable, learning_rate)
        else:
            sums = self._velocities[self._get_variable_index(variable)]
            sums.assign_add((gradient := ops.zeros(variable.shape) + gradient) ** 2)
            lr = adult.WIDE_LR if variable.shape[1] == 1 else adult.DEEP_LR
            variable.assign_sub(lr * gradient / (ops.sqrt(sums.value) + 1e-10))


def network(inputs: Any, wide: Any, deep: Any, optimizer: Any) -> keras.Model:
    keras.utils.set_random_seed(0)
    inputs["numbers"] = keras.Input((7,), name="numbers")
    hidden = layers.Concatenate()([layers.Flatten()(deep), inputs["numbers"]])
    for width in adult.HIDDEN:
        hidden = layers.Dropout(adult.DROPOUT)(layers.Dense(width, activation="relu")(hidden))
    model = keras.Model(inputs, layers.Activation("sigmoid")(wide + layers.Dense(1)(hidden)))
    model.compile(optimizer(adult.DENSE_LR, weight_decay=0), "binary_crossentropy")
    return model


def main() -> None:
    given = adult.parse_arguments()
    samples, held = adult.load(given.directory, validate=given.validate)
    keys = np.unique(np.concatenate([samples.wide, held.wide]))
    shapes = {name: each.shape[1:] for name, each in samples.ids().items()}

    def train(name: str, model: Any, x: Any, scored: Any, callbacks: Any) -> float:
        model.fit(x, epochs=given.epochs, callbacks=callbacks, verbose=0)
        scores = model.predict(scored, verbose=0)[:, 0]
        print(f"{name}  AUC {(result := auc(held.labels, scores)):.4f}")
        return result

    with servers(given.servers, given.shards) as addresses, Client(addresses) as ps:
        wide, deep = adult.make_tables(ps, given.seed)
        first = wide.pull(keys), deep.pull(keys)
        bag = Embedding(wide, combiner="sum", features=["wide"])
        rows = Embedding(deep, features=["deep"])
        inputs = {"wide": bag.input(shapes["wide"]), "deep": rows.input(shapes["deep"])}
        model = network(inputs, bag(inputs["wide"]), rows(inputs["deep"]), keras.optimizers.AdamW)
        x = feed(Batches(samples, given.seed), model, staleness=1)
        scored = feed(Batches(held, None), model, training=False)
        served = train("server", model, x, scored, [Push(model)])
    if given.reference:
        own = [layers.Embedding(*each.shape, weights=[each]) for each in first]
        inputs = {name: keras.Input(shape, name=name) for name, shape in shapes.items()}
        sums = ops.sum(own[0](inputs["wide"]), axis=1)
        model = network(inputs, sums, own[1](inputs["deep"]), Twin)
        batches = Batches(samples, given.seed, keys), Batches(held, None, keys)
        adult.require_close(served, train(keras.backend.backend(), model, *batches, []))


if __name__ == "__main__":
    main()
