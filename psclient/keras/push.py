"""Push: a callback that pushes the gradients of each batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from psclient.arrays import Rows
from psclient.errors import InvalidArgument
from psclient.keras.feed import Feed, feed_of
from psclient.keras.layer import Embedding


class Push(keras.callbacks.Callback):
    """Callback of ``fit`` that pushes the gradients of the rows of each batch, once.

    model  the model with Embedding layers, whose ``feed`` is the argument x of ``fit``
    lr     learning rate of the rows: a number, or a function of the training step. None: each
           table's. The optimizer of the model does not reach the rows

    Batches that a LossScaleOptimizer skips, because gradients are infinite, are not pushed.
    ``fit`` ends when the servers have answered all pushes.
    """

    def __init__(
        self, model: keras.Model, lr: float | Callable[[int], float] | None = None
    ) -> None:
        super().__init__()
        self._of = model
        self._lr = lr
        self._feed: Feed | None = None

    def on_train_begin(self, logs: Any = None) -> None:
        if self.model is not self._of:
            raise InvalidArgument("Push(model) must get the model whose fit gets the callback")
        _refuse(self._of)
        self._feed = feed_of(self._of)
        for layer in self._feed.features.layers:
            layer.tap.assign(np.zeros(layer.tap.shape, np.float32))
        self._feed.start()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        feed = self._feed
        assert feed is not None
        if not feed.number:
            raise InvalidArgument(
                "fit trained a batch that is not of the feed: pass"
                " psclient.keras.feed(dataset, model) to fit as x"
            )
        step = feed.step - 1
        lr = self._lr(step) if callable(self._lr) else self._lr
        feed.push(self._gradients(feed, step), lr)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Wait for the pushes, so that validation and callbacks see them."""
        assert self._feed is not None
        self._feed.flush()

    def on_train_end(self, logs: Any = None) -> None:
        assert self._feed is not None
        self._feed.stop()

    def _gradients(self, feed: Feed, step: int) -> dict[str, Rows | None] | None:
        """Return the gradients of the open batch per table; None: the optimizer skipped it."""
        sums: dict[str, Rows | None] = {}
        for layer in feed.features.layers:
            table = layer.table.name
            sums.setdefault(table, None)
            if not layer.trainable:
                continue
            tap = _value(self._of, layer)
            number, scale = layer.read(tap)
            if number != feed.number:
                if isinstance(self._of.optimizer, keras.optimizers.LossScaleOptimizer):
                    return None
                raise InvalidArgument(
                    f"the gradients of layer {layer.name!r} in the batch of step {step} were lost:"
                    " the training step must call the layer with training=True, and the optimizer"
                    " must apply the gradients of all trainable weights"
                )
            gradients = tap[: feed.count(table)] / np.float32(scale)
            before = sums[table]
            sums[table] = gradients if before is None else before + gradients
        return sums


def _value(model: keras.Model, layer: Embedding) -> Rows:
    """Return the value of a layer's tap after a step, as an array."""
    state = getattr(model, "_jax_state", None)  # the weights, while fit runs on JAX
    if state is None:
        value = layer.tap.value  # of torch or TensorFlow
        found = value.detach().cpu() if hasattr(value, "detach") else value
        return np.asarray(found.numpy())
    for variable, value in zip(
        model.trainable_variables, state["trainable_variables"], strict=True
    ):
        if variable is layer.tap:
            return np.asarray(value)
    raise AssertionError("a trainable layer's weight is among those of its model")


def _refuse(model: keras.Model) -> None:
    """Raise InvalidArgument for settings of a model with which gradients would be lost."""
    if model.steps_per_execution > 1:
        raise InvalidArgument(
            f"steps_per_execution must be 1, got {model.steps_per_execution}: the gradients of all"
            " but the last step would be lost"
        )
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    steps = getattr(optimizer, "gradient_accumulation_steps", None)
    if steps:
        raise InvalidArgument(
            f"gradient_accumulation_steps must be None, got {steps}: Keras does not add up the"
            " gradients of rows. Use a larger batch"
        )
    strategy = getattr(model, "distribute_strategy", None)
    if getattr(strategy, "num_replicas_in_sync", 1) > 1 or keras.distribution.distribution():
        raise InvalidArgument(
            "a model with psclient.keras.Embedding runs on one device: train on several by several"
            " processes, each with a client of its own"
        )
