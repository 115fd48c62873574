"""Embedding: a Keras layer whose rows are inputs of the compiled step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from psclient import checked
from psclient.arrays import END, LOW
from psclient.errors import InvalidArgument
from psclient.keras.clients import table_of, table_settings
from psclient.table import Table

COMBINERS = ("sum", "mean", "sqrtn")
MOST = 1 << 31  # rows


@keras.saving.register_keras_serializable("psclient")
class Embedding(keras.layers.Layer):
    """Layer that returns the row of each key: [*shape, dim] for keys [*shape].

    table     the Table that has the rows
    combiner  how to combine the rows of the last axis, so that keys [batch, n] give
              [batch, dim]: "sum"; "mean"; "sqrtn", the sum divided by the square root of the number
              of keys. None: they are not combined
    rows      largest number of distinct keys in a training batch. None: the number of keys in the
              first batch, which is enough for all batches of the same shape
    padding   a key that fills up rows of keys; it has no row, its embedding is zeros, and combiners
              leave it out. None: no key
    features  names of the model's inputs that have keys of this layer. None: one, with the name of
              the table
    options   options of every Keras layer, such as ``name`` and ``trainable``

    ``psclient.keras.feed`` replaces the keys of each feature by a dict: the rows of the distinct
    keys ("rows"), the place of each key in them ("places"), and "marks". This dict is the input of
    the layer. ``input()`` returns symbolic inputs of this form, for a functional model.

    How gradients leave the compiled step: the layer owns a weight ``tap``, which adds nothing to
    the rows. Keras overwrites it by its gradient, because of its ``overwrite_with_gradient``. So
    after the step, the first rows of ``tap`` are the gradients of the rows. Its last rows are the
    gradients of ``marks``, which tell the number of the batch, and the factor by which the
    optimizer scaled the loss.
    """

    def __init__(
        self,
        table: Table,
        *,
        combiner: str | None = None,
        rows: int | None = None,
        padding: int | None = None,
        features: Sequence[str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(autocast=False, **options)  # marks and rows stay as they are
        if not isinstance(table, Table):
            raise InvalidArgument(f"table must be a psclient Table, got {table!r}")
        self.table = table
        if combiner is not None and combiner not in COMBINERS:
            known = ", ".join(COMBINERS)
            raise InvalidArgument(f"combiner must be None or one of {known}, got {combiner!r}")
        self.combiner = combiner
        self.limit = None if rows is None else checked.integer("rows", rows, 1, MOST)
        self.padding = None if padding is None else checked.integer("padding", padding, LOW, END)
        names = [table.name] if features is None else checked.names_of("features", features)
        self.features = tuple(names)
        self.room = self.limit or 0

    def input(self, shape: Sequence[int | None] = (), feature: str | None = None) -> dict[str, Any]:
        """Return the symbolic inputs of one feature, for a functional model.

        shape    shape of one sample's keys: () for one key, (n,) for n keys
        feature  name of the feature; None: the only one of this layer
        """
        name = self.features[0] if feature is None else feature
        if name not in self.features or (feature is None and len(self.features) > 1):
            raise InvalidArgument(
                f"feature must be one of {', '.join(self.features)}, got {feature!r}"
            )
        return {
            "marks": keras.Input((), dtype="int32", name=f"{name}_marks"),
            "places": keras.Input(shape, dtype="int32", name=f"{name}_places"),
            "rows": keras.Input((self.table.dim,), dtype="float32", name=f"{name}_rows"),
        }

    def build(self, shapes: Any) -> None:
        self._make_tap()

    def grow(self, rows: int) -> None:
        """Make room for batches with ``rows`` distinct keys, unless ``rows`` was given.

        Must be called before an optimizer knows the weight ``tap``.
        """
        if rows > self.room and self.limit is None:
            self.room = rows
            if self.built:
                self._tracker.unlock()  # as Keras' own layers do to replace a weight
                self._untrack_variable(self.tap)
                self._make_tap()
                self._tracker.lock()

    def call(self, inputs: dict[str, Any], training: bool | None = None) -> Any:
        """Return the embeddings of a batch. ``inputs`` has "rows", "places" and "marks"."""
        rows, places = ops.cast(inputs["rows"], "float32"), inputs["places"]
        if training:
            marks = ops.cast(inputs["marks"], "float32")
            nothing = self.tap - ops.stop_gradient(self.tap)  # zeros, with a gradient
            rows = rows + nothing[: ops.shape(rows)[0]]
            self.add_loss(ops.sum(nothing[self.room :, 0] * marks))
        rows = ops.cast(rows, self.compute_dtype)
        if self.padding is None:
            taken = ops.take(rows, places, axis=0)
            count: Any = ops.shape(places)[-1] if self.combiner else 1
        else:
            kept = ops.cast(places >= 0, self.compute_dtype)
            taken = ops.take(rows, ops.maximum(places, 0), axis=0) * kept[..., None]
            count = ops.maximum(ops.sum(kept, axis=-1), 1)[..., None] if self.combiner else 1
        if self.combiner is None:
            return taken
        total = ops.sum(taken, axis=-2)
        if self.combiner == "sum":
            return total
        count = ops.cast(count, self.compute_dtype)
        return total / (count if self.combiner == "mean" else ops.sqrt(count))

    def compute_output_spec(self, inputs: dict[str, Any], training: bool | None = None) -> Any:
        shape = tuple(inputs["places"].shape)
        kept = shape if self.combiner is None else shape[:-1]
        return keras.KerasTensor((*kept, self.table.dim), dtype=self.compute_dtype)

    def marks(self, feature: str, number: int) -> NDArray[np.int32]:
        """Return the input "marks" of a feature in the batch of this number, int32[2 * features].

        number  in 1..4095, so that float32 has it exactly
        """
        marks = np.zeros(2 * len(self.features), np.int32)
        at = self.features.index(feature)
        marks[at], marks[len(self.features) + at] = 1, number
        return marks

    def read(self, tap: Any) -> tuple[int, float]:
        """Return (number of the batch, factor of the loss) whose gradients a tap has.

        tap  the value of ``tap`` after a training step, as an array

        The number is 0 if no step has written the tap.
        """
        count = len(self.features)
        marks = np.asarray(tap[self.room :, 0], np.float64)
        scales = marks[:count]
        used = scales != 0
        if not used.any():
            return 0, 1.0
        numbers = np.rint(marks[count:][used] / scales[used])
        return int(numbers[0]) if (numbers == numbers[0]).all() else 0, float(scales[used][0])

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "table": table_settings(self.table),
            "combiner": self.combiner,
            "rows": self.limit,
            "room": self.room,
            "padding": self.padding,
            "features": list(self.features),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Embedding:
        options = {**config, "table": table_of(config["table"])}
        room = options.pop("room")
        made = cls(**options)
        made.room = room
        return made

    def save_own_variables(self, store: Any) -> None:
        """Save nothing: the servers have the rows."""

    def load_own_variables(self, store: Any) -> None:
        """Load nothing."""

    def _make_tap(self) -> None:
        self.tap = self.add_weight(
            name="tap",
            shape=(self.room + 2 * len(self.features), self.table.dim),
            initializer="zeros",
            dtype="float32",
            autocast=False,
            overwrite_with_gradient=True,
        )
