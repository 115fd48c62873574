"""Base classes of the modules, and the pull of the rows of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from psclient.arrays import as_keys
from psclient.batch import Batch
from psclient.pending import Pending
from psclient.rowclient import RowClient
from psclient.table import Table
from psclient.torch.gradients import Rows, push

Part = tuple[str, int]  # (name of a feature, index in its ``remotes()``)

MODE: dict[bool, Literal["train", "serve"]] = {
    True: "train",
    False: "serve",
}  # mode of pulls, by nn.Module.training


class Feature(nn.Module):
    """Base class of modules that an EmbeddingGroup may contain.

    Its output combines rows of one table or, for several parts, of several tables.
    """

    def __init__(self, client: RowClient) -> None:
        super().__init__()
        self.client = client

    def remotes(self) -> list[Remote]:
        """Return the modules that pull the rows of this module's parts, one per part.

        Each uses one table. A module that has no parts returns only itself.
        """
        raise NotImplementedError

    def requests(self, arguments: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        """Return for each module of ``remotes()`` the arguments (keys, ...) to call it with.

        arguments  arguments (keys, ...) of the ``forward`` of this module
        """
        raise NotImplementedError

    def merge(self, outputs: list[Tensor]) -> Tensor:
        """Combine the outputs of the modules of ``remotes()`` into the output of this module."""
        raise NotImplementedError

    def prefetch(self, keys: Any, *arguments: Any) -> Pending:
        """Ask the shards to read the rows of a later batch from disk into memory; return at once.

        keys, arguments  the arguments of a later call of this module

        Client.prefetch explains the result, which need not be waited for.
        """
        return start_prefetch(self.client, {"": self}, {"": (keys, *arguments)})

    def step(self, step: int = 0, *, lr: float | None = None) -> None:
        """Push the gradients that backward passes collected since the last call of ``step``.

        step  training step
        lr    learning rate; None: that of each table

        Takes one round trip.
        """
        push(self.client, (remote.collected for remote in self.remotes()), step, lr)

    def forward(self, keys: Any, *arguments: Any) -> Tensor:
        """Pull the rows of integer keys[*shape] in one round trip; return the output.

        The class explains the shape of the output, and ``arguments`` if there are any.
        """
        return pull_features(self.client, {"": self}, {"": (keys, *arguments)})[""]


class Remote(Feature):
    """Base class of Embedding and EmbeddingBag: modules that use the rows of one table."""

    def __init__(self, table: Table) -> None:
        super().__init__(table.client)
        self.table = table
        self.collected: list[Rows] = []

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to pickle or copy: without the gradients collected so far."""
        return {**self.__dict__, "collected": []}

    def remotes(self) -> list[Remote]:
        return [self]

    def requests(self, arguments: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        return [arguments]

    def merge(self, outputs: list[Tensor]) -> Tensor:
        return outputs[0]

    def combine(self, leaf: Tensor, places: Tensor, arguments: tuple[Any, ...]) -> Tensor:
        """Compute the output of ``forward`` from the pulled rows.

        leaf       float32[distinct, dim]  rows of the distinct keys
        places     int64[*shape]           index in ``leaf`` of each key's row
        arguments  arguments of ``forward`` after the keys
        """
        raise NotImplementedError

    def collect(self, batch: Batch, embeddings: Any) -> Rows:
        """Wrap pulled rows for a forward pass; keep them for ``step`` if gradients are enabled.

        batch       keys of the forward pass
        embeddings  float32[distinct, dim], the rows of ``batch.keys``
        """
        rows = Rows(self.table, batch, embeddings, torch.is_grad_enabled())
        if torch.is_grad_enabled():
            self.collected.append(rows)
        return rows

    def extra_repr(self) -> str:
        return f"{self.table.name!r}, dim={self.table.dim}"


def pull_features(
    client: RowClient, features: Mapping[str, Feature], inputs: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Pull the rows of several features in one request; return {feature: output}.

    client    client of all tables
    features  {name: module}
    inputs    {name: keys, or a tuple of the module's arguments, keys first}
    """
    modules, arguments = _requests(features, inputs)
    outputs = _pull(client, modules, arguments)
    return {
        name: feature.merge([outputs[name, part] for part in range(len(feature.remotes()))])
        for name, feature in features.items()
    }


def _requests(
    features: Mapping[str, Feature], inputs: Mapping[str, Any]
) -> tuple[dict[Part, Remote], dict[Part, tuple[Any, ...]]]:
    """Split features into their parts, each of which is a module that uses one table.

    features  {name: module}
    inputs    {name: keys, or a tuple of the module's arguments, keys first}

    Returns ({part: its module}, {part: arguments to call that module with}).
    """
    modules, arguments = {}, {}
    for name, feature in features.items():
        value = inputs[name] if isinstance(inputs[name], tuple) else (inputs[name],)
        requests = feature.requests(value)
        for part, (remote, request) in enumerate(zip(feature.remotes(), requests, strict=True)):
            modules[name, part], arguments[name, part] = remote, request
    return modules, arguments


def start_prefetch(
    client: RowClient, features: Mapping[str, Feature], inputs: Mapping[str, Any]
) -> Pending:
    """Ask the shards to read the rows of several features from disk, in one request.

    client    client of all tables
    features  {name: module}
    inputs    {name: keys, or a tuple of the module's arguments, keys first}
    """
    modules, arguments = _requests(features, inputs)
    keys: dict[str, list[Any]] = {}
    for part, module in modules.items():
        keys.setdefault(module.table.name, []).append(as_keys(arguments[part][0]).reshape(-1))
    return client.prefetch({table: np.concatenate(each) for table, each in keys.items()})


def _pull(
    client: RowClient, modules: Mapping[Part, Remote], arguments: Mapping[Part, tuple[Any, ...]]
) -> dict[Part, Tensor]:
    """Pull the rows of several modules in one request; return the output of each.

    client     client of all tables
    modules    modules that use the rows of one table each; modules of the same table share rows
    arguments  arguments (keys, ...) of each module's ``forward``
    """
    keys = {name: as_keys(values[0]) for name, values in arguments.items()}
    by_table: dict[str, list[Part]] = {}
    for name, module in modules.items():
        by_table.setdefault(module.table.name, []).append(name)
    batches = {
        table: client.batch(np.concatenate([keys[name].reshape(-1) for name in names]))
        for table, names in by_table.items()
    }
    training = any(module.training for module in modules.values())
    pulled = client.pull_distinct(batches, mode=MODE[training])
    outputs = {}
    for table, names in by_table.items():
        rows = modules[names[0]].collect(batches[table], pulled[table])
        places = rows.places()
        at = 0
        for name in names:
            size = keys[name].size
            place = places[at : at + size].reshape(keys[name].shape)
            outputs[name] = modules[name].combine(rows.leaf, place, arguments[name][1:])
            at += size
    return outputs
