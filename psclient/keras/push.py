"""Push: a callback that pushes the gradients of each batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np

from psclient.arrays import Rows
from psclient.errors import InvalidArgument
from psclient.keras.features import require_gradients
from psclient.keras.feed import Feed, feed_of
from psclient.keras.layer import Embedding
from psclient.ticket import Ticket


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
        require_gradients(self._of)
        self._feed = feed_of(self._of)
        for layer in self._feed.features.layers:
            if layer.built:  # on TensorFlow, a layer may be built by the first step
                layer.tap.assign(np.zeros(layer.tap.shape, np.float32))
        self._feed.start()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        feed = self._feed
        assert feed is not None
        number, ticket = feed.oldest()
        taps = {each: _value(self._of, each) for each in feed.features.layers if each.trainable}
        if _may_skip(self._of.optimizer) and all(  # else a layer's gradients may be lost
            layer.read(np.asarray(tap))[0] != number for layer, tap in taps.items()
        ):
            gradients = None
        else:
            gradients = {table: _gradients(table, taps, number, ticket) for table in ticket.keys}
        lr = self._lr(ticket.step) if callable(self._lr) else self._lr
        feed.push(gradients, lr)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Wait for the pushes, so that validation and callbacks see them."""
        assert self._feed is not None
        self._feed.flush()

    def on_train_end(self, logs: Any = None) -> None:
        assert self._feed is not None
        self._feed.stop()


def _may_skip(optimizer: Any) -> bool:
    """Return whether an optimizer skips batches whose gradients are infinite."""
    return isinstance(optimizer, keras.optimizers.LossScaleOptimizer)


def _gradients(
    table: str, taps: Mapping[Embedding, Any], number: int, ticket: Ticket
) -> Callable[[], Rows] | Rows | None:
    """Return the gradients of the distinct keys of a table in one batch; None: it has none.

    taps    the taps of the layers that are not frozen, after the training step
    number  that of the batch, see Embedding.marks
    ticket  that of the batch

    On JAX, the step may still be running. The result is then a function that waits for it.
    """
    mine = {layer: tap for layer, tap in taps.items() if layer.table.name == table}
    if not mine:
        return None
    count = len(ticket.keys[table].keys)

    def total() -> Rows:
        parts = [
            _read(layer, np.asarray(tap), count, number, ticket.step) for layer, tap in mine.items()
        ]
        return sum(parts[1:], start=parts[0])

    return total if keras.backend.backend() == "jax" else total()


def _read(layer: Embedding, tap: Rows, count: int, number: int, step: int) -> Rows:
    """Return the first ``count`` gradients of a tap.

    Raises InvalidArgument if they are not of the batch with this number and training step.
    """
    found, scale = layer.read(tap)
    if found != number:
        raise InvalidArgument(
            f"the gradients of layer {layer.name!r} in the batch of step {step} were lost: the"
            " training step must call the layer with training=True, and the optimizer must apply"
            " the gradients of all trainable weights"
        )
    return tap[:count] / np.float32(scale)


def _value(model: keras.Model, layer: Embedding) -> Any:
    """Return the value of a layer's tap after a step, as an array of NumPy or JAX."""
    state = getattr(model, "_jax_state", None)  # the weights, while fit runs on JAX
    if state is None:
        value = layer.tap.value  # of torch or TensorFlow
        found = value.detach().cpu() if hasattr(value, "detach") else value
        return np.asarray(found.numpy())
    for variable, value in zip(
        model.trainable_variables, state["trainable_variables"], strict=True
    ):
        if variable is layer.tap:
            return value.copy()  # the next step overwrites the value
    raise AssertionError("a trainable layer's weight is among those of its model")
