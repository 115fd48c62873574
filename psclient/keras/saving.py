"""load_model and export: models with Embedding layers in files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np

from psclient.arrays import Rows
from psclient.client import Client
from psclient.errors import InvalidArgument
from psclient.keras.clients import client_for_loading
from psclient.keras.features import Features, Split
from psclient.keras.layer import Embedding
from psclient.rows import RowBatch, read_rows
from psclient.table import Table

SERVE = ("inputs", "frozen")


def load_model(path: str | Path, client: Client, **options: Any) -> Any:
    """Load a model that ``model.save`` has written, with its tables from the servers of ``client``.

    options  further arguments of keras.saving.load_model

    The file has no rows: save them with a checkpoint of the servers.
    """
    with client_for_loading(client):
        return keras.saving.load_model(path, **options)


def export(model: keras.Model, directory: str | Path, batch: Any, *, serve: str = "inputs") -> None:
    """Write a SavedModel, which TensorFlow Serving can load without psclient.

    batch  a batch of the dataset, from which the shapes of the inputs are taken; the first axis of
           each input may have any length
    serve  "inputs": the endpoint "serve" takes, for each feature, {feature}_rows, float32[n, dim],
           and {feature}_places, int32: the index in these rows of each key, -1 for padding. Who
           calls it pulls the rows.
           "frozen": it takes the keys, int64. The file contains all rows of the tables, as they are
           now; other keys have the table's serving_default. For tables that fit into memory
           several times

    Other inputs are taken under their names. Needs the backend TensorFlow: load a model that was
    trained on another one with ``load_model`` there.
    """
    if serve not in SERVE:
        raise InvalidArgument(f"serve must be one of {', '.join(SERVE)}, got {serve!r}")
    if keras.backend.backend() != "tensorflow":
        raise InvalidArgument(
            f"export needs the backend tensorflow, got {keras.backend.backend()}: save the model"
            " with model.save(path), and load it with load_model in a process with"
            " KERAS_BACKEND=tensorflow"
        )
    features = Features(model)
    split = features.split(batch)
    archive = keras.export.ExportArchive()
    archive.track(model)
    if serve == "inputs":
        endpoint, signature = _with_rows(model, features, split)
    else:
        frozen = {name: _Frozen(layer.table) for name, layer in features.layer.items()}
        for each in frozen.values():
            archive.track(each.places)
        endpoint, signature = _with_keys(model, features, split, frozen)
    archive.add_endpoint("serve", endpoint, [signature])
    archive.write_out(str(directory), verbose=False)


def _spec(name: str, array: Any, dtype: str | None = None) -> Any:
    """Return the TensorSpec of an input: the shape of ``array``, with any length of the batch."""
    import tensorflow as tf

    shape = (None, *np.shape(array)[1:])
    return tf.TensorSpec(shape, dtype or keras.backend.standardize_dtype(array.dtype), name)


def _with_rows(model: keras.Model, features: Features, split: Split) -> tuple[Any, Any]:
    """Return (function, signature) of the endpoint that takes rows and places."""
    signature = {name: _spec(name, each) for name, each in split.rest.items()}
    for feature, layer in features.layer.items():
        rows = np.zeros((1, layer.table.dim), np.float32)
        places = np.zeros(split.shape[feature], np.int32)
        signature[f"{feature}_rows"] = _spec(f"{feature}_rows", rows)
        signature[f"{feature}_places"] = _spec(f"{feature}_places", places)

    def endpoint(given: dict[str, Any]) -> Any:
        inputs = {name: given[name] for name in split.rest}
        for feature, layer in features.layer.items():
            inputs[feature] = _feature(layer, given[f"{feature}_rows"], given[f"{feature}_places"])
        return model(inputs, training=False)

    return endpoint, signature


def _with_keys(
    model: keras.Model, features: Features, split: Split, frozen: dict[str, _Frozen]
) -> tuple[Any, Any]:
    """Return (function, signature) of the endpoint that takes keys. frozen: by feature."""
    import tensorflow as tf

    signature = {name: _spec(name, each) for name, each in split.rest.items()}
    for feature, shape in split.shape.items():
        signature[feature] = _spec(feature, np.zeros(shape, np.int8), "int64")

    def endpoint(given: dict[str, Any]) -> Any:
        inputs = {name: given[name] for name in split.rest}
        for feature, layer in features.layer.items():
            keys, table = given[feature], frozen[feature]
            places = table.places.lookup(keys)
            if layer.padding is not None:
                padding = np.uint64(layer.padding % (1 << 64)).astype(np.int64)
                places = tf.where(keys == padding, -1, places)
            inputs[feature] = _feature(layer, tf.constant(table.rows), places)
        return model(inputs, training=False)

    return endpoint, signature


def _feature(layer: Embedding, rows: Any, places: Any) -> dict[str, Any]:
    """Return the input of a layer; its marks have no effect without training."""
    marks = keras.ops.zeros(2 * len(layer.features), "int32")
    return {"marks": marks, "places": places, "rows": rows}


class _Frozen:
    """All rows of a table as they are now, and where the row of each key is.

    rows    float32[rows + 1, dim]; the last is the row of all other keys
    places  a hash table of TensorFlow from int64 keys to their index in ``rows``
    """

    def __init__(self, table: Table) -> None:
        import tensorflow as tf

        client = table.client
        assert isinstance(client, Client)
        batches = [each for each in read_rows(client, table.name) if isinstance(each, RowBatch)]
        keys = np.concatenate([each.keys for each in batches]).view(np.int64)
        default = np.full((1, table.dim), table.describe().serving_default, np.float32)
        found: list[Rows] = [each.rows[:, : table.dim] for each in batches]
        self.rows = np.concatenate([*found, default])
        pairs = tf.lookup.KeyValueTensorInitializer(keys, np.arange(len(keys), dtype=np.int32))
        self.places = tf.lookup.StaticHashTable(pairs, len(keys))
