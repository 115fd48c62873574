"""The features of a model: which inputs of a batch are keys, and the inputs made of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from psclient.arrays import Rows, as_keys
from psclient.client import Client
from psclient.errors import InvalidArgument
from psclient.keras.layer import Embedding
from psclient.padding import Room
from psclient.table import Table


@dataclass(slots=True)
class Split:
    """One batch of the dataset, with its keys apart.

    rest   inputs that are not keys, by name
    more   what follows the inputs: () or (targets,) or (targets, sample weights)
    keys   {feature: its keys}; those that are padding are left out
    kept   {feature: which keys are not padding}, for features with padding
    shape  {feature: shape of its keys}
    """

    rest: dict[str, Any]
    more: tuple[Any, ...]
    keys: dict[str, NDArray[np.uint64]]
    kept: dict[str, NDArray[np.bool_]]
    shape: dict[str, tuple[int, ...]]


class Features:
    """All features of a model's Embedding layers.

    layers   the layers
    layer    {feature: its layer}
    tables   {feature: its table}
    client   the client of all tables
    """

    def __init__(self, model: keras.Model) -> None:
        self.layers = [each for each in model._flatten_layers() if isinstance(each, Embedding)]
        if not self.layers:
            raise InvalidArgument("the model has no layer psclient.keras.Embedding")
        self.layer: dict[str, Embedding] = {}
        for layer in self.layers:
            for feature in layer.features:
                if feature in self.layer:
                    raise InvalidArgument(
                        f"two layers have the feature {feature!r}: give one of them other"
                        " features=[...], or use one layer for both"
                    )
                self.layer[feature] = layer
        self.tables: dict[str, Table] = {name: each.table for name, each in self.layer.items()}
        clients = {id(table.client): table.client for table in self.tables.values()}
        if len(clients) > 1:
            raise InvalidArgument("all tables of a model must be of one client")
        (client,) = clients.values()
        assert isinstance(client, Client)
        self.client = client
        self._rooms: dict[str, Room] = {}

    def split(self, batch: Any) -> Split:
        """Split a batch of the dataset: {input: array}, or a tuple that begins with this dict."""
        inputs, more = (
            (batch[0], tuple(batch[1:])) if isinstance(batch, tuple | list) else (batch, ())
        )
        if not isinstance(inputs, Mapping):
            raise InvalidArgument(
                "each batch must be a dict of inputs by name, or a tuple that begins with one; got"
                f" {type(inputs).__name__}"
            )
        split = Split({}, more, {}, {}, {})
        for name, values in inputs.items():
            if name in self.layer:
                self._take(split, name, values)
            else:
                split.rest[name] = values
        if missing := sorted(set(self.layer) - set(split.keys)):
            raise InvalidArgument(
                f"inputs lack the features {missing} of the model's Embedding layers; they have"
                f" {sorted(map(str, inputs))}. An Embedding's features are named after its table,"
                " unless features=[...] names them"
            )
        return split

    def _take(self, split: Split, feature: str, values: Any) -> None:
        """Add the keys of a feature to ``split``."""
        layer = self.layer[feature]
        keys = as_keys(values)
        if keys.ndim < (1 if layer.combiner is None else 2):
            what = "[batch, ...]" if layer.combiner is None else "[batch, n] to be combined"
            raise InvalidArgument(
                f"feature {feature!r}: keys must have the shape {what}, got {list(keys.shape)}"
            )
        split.shape[feature] = keys.shape
        if layer.padding is not None:
            kept = keys != np.uint64(layer.padding % (1 << 64))
            split.kept[feature], keys = kept, keys[kept]
        split.keys[feature] = keys

    def make_room(self, split: Split, model: keras.Model) -> None:
        """Let the layers without a fixed room have room for batches like ``split``."""
        counts: dict[str, int] = {}
        for feature, shape in split.shape.items():
            table = self.tables[feature].name
            counts[table] = counts.get(table, 0) + int(np.prod(shape))
        for layer in self.layers:
            count = counts[layer.table.name]
            if layer.limit is None and layer.built and _is_built(model) and count > layer.room:
                raise InvalidArgument(
                    f"layer {layer.name!r} has room for batches with {layer.room} keys, like the"
                    f" first batch that its model was trained with, but this one has {count}. For"
                    f" larger batches, make the layer with rows={count}"
                )
            layer.grow(count)
        for table in counts:
            least = min(each.room for each in self.layers if each.table.name == table)
            self._rooms[table] = Room(least)

    def require_room(self, table: str, count: int, step: int) -> None:
        """Raise InvalidArgument if a training batch has more distinct keys than the layers allow.

        table  name of the table
        count  number of distinct keys in the batch
        step   training step of the batch
        """
        limit = self._rooms[table].limit
        assert limit is not None
        if count > limit:
            raise InvalidArgument(
                f"table {table!r}: the batch of step {step} has {count} distinct keys, but the"
                f" layer has room for {limit}: pass rows={count} or more to"
                " psclient.keras.Embedding"
            )

    def batch(
        self,
        split: Split,
        rows: Mapping[str, Rows],
        places: Mapping[str, NDArray[np.int32]],
        number: int,
        rooms: Mapping[str, Room] | None = None,
    ) -> tuple[Any, ...]:
        """Return a batch for Keras: (inputs, targets, ...).

        rows    {table: float32[distinct, dim]}
        places  {feature: int32, index in the rows of each of ``split.keys[feature]``}
        number  that of the batch, see Embedding.marks
        rooms   {table: Room for its rows}; None: those of training
        """
        rooms = self._rooms if rooms is None else rooms
        padded = {}
        for table, each in rows.items():
            padded[table] = np.zeros((rooms[table].fit(len(each)), each.shape[1]), np.float32)
            padded[table][: len(each)] = each
        inputs = dict(split.rest)
        for feature, layer in self.layer.items():
            at = places[feature]
            if feature in split.kept:
                at = np.full(split.shape[feature], -1, np.int32)
                at[split.kept[feature]] = places[feature]
            inputs[feature] = {
                "marks": layer.marks(feature, number),
                "places": at,
                "rows": padded[layer.table.name],
            }
        whole = (inputs, *split.more)
        convert = np.asarray if keras.backend.backend() == "jax" else keras.ops.convert_to_tensor
        made: tuple[Any, ...] = keras.tree.map_structure(
            lambda each: None if each is None else convert(each), whole
        )
        return made


def _is_built(model: keras.Model) -> bool:
    """Return whether the optimizer of a model knows the model's weights."""
    optimizer = getattr(model, "optimizer", None)
    return optimizer is not None and optimizer.built


def require_gradients(model: keras.Model) -> None:
    """Raise InvalidArgument for settings of a compiled model with which gradients would be lost."""
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
