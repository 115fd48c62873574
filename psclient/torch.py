"""PyTorch modules whose rows are stored on the servers.

    group = EmbeddingGroup(client, {"user": EmbeddingBag(users), "item": Embedding(items)})
    out = group({"user": user_keys, "item": item_keys})   # one round trip
    loss(out).backward()
    group.step(step)                                      # one round trip

A forward pass pulls one row for each distinct key into a leaf tensor. Autograd sums the gradients
of equal keys in this tensor, and ``step`` pushes them to the servers, whose optimizer applies them.
The modules have no parameters, and their ``state_dict`` contains no rows. Modules of a group may
share a table. MultiHashEmbedding and MixedDimensionEmbedding combine rows of several tables.

Under ``torch.no_grad()`` no gradients are collected. In ``eval()`` mode, keys without a row get the
table's serving_default. Pickling a module keeps its client's addresses and options; the unpickled
module opens its own connections. A deep copy shares the client. Neither includes gradients
collected so far.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from psclient.arrays import as_keys
from psclient.batch import Batch
from psclient.errors import InvalidArgument
from psclient.mixed import MixedDimension
from psclient.multihash import MultiHash
from psclient.pending import Pending
from psclient.rowclient import RowClient
from psclient.table import Table

Mode = Literal["sum", "mean"]
Part = tuple[str, int]  # (name of a feature, index in its ``remotes()``)

MODE: dict[bool, Literal["train", "serve"]] = {
    True: "train",
    False: "serve",
}  # mode of pulls, by nn.Module.training
COMBINE: dict[str, Callable[[list[Tensor]], Tensor]] = {  # as psclient.combine, for tensors
    "add": lambda parts: reduce(torch.add, parts),
    "multiply": lambda parts: reduce(torch.mul, parts),
    "concatenate": lambda parts: torch.cat(parts, -1),
}


class _Rows:
    """Rows that one forward pass pulled from one table, one per distinct key.

    batch       keys of the forward pass
    embeddings  float32[distinct, dim], the rows of ``batch.keys``
    collect     whether to collect gradients
    leaf        ``embeddings`` as a tensor; backward passes add the gradients to its ``grad``
    """

    def __init__(self, table: Table, batch: Batch, embeddings: Any, collect: bool) -> None:
        self.table = table
        self.batch = batch
        self.leaf = torch.from_numpy(embeddings).requires_grad_(collect)

    def places(self) -> Tensor:
        """Return the index in ``leaf`` of the row of each key of the batch, int64[n]."""
        return torch.from_numpy(self.batch.split.inverse.astype(np.int64))


class _Feature(nn.Module):
    """Base class of modules that an EmbeddingGroup may contain.

    Its output combines rows of one table or, for several parts, of several tables.
    """

    def __init__(self, client: RowClient) -> None:
        super().__init__()
        self.client = client

    def remotes(self) -> list[_Remote]:
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
        return _prefetch(self.client, {"": self}, {"": (keys, *arguments)})

    def step(self, step: int = 0, *, lr: float | None = None) -> None:
        """Push the gradients that backward passes collected since the last call of ``step``.

        step  training step
        lr    learning rate; None: that of each table

        Takes one round trip.
        """
        _push(self.client, self.remotes(), step, lr)

    def forward(self, keys: Any, *arguments: Any) -> Tensor:
        """Pull the rows of integer keys[*shape] in one round trip; return the output.

        The class explains the shape of the output, and ``arguments`` if there are any.
        """
        return _forward(self.client, {"": self}, {"": (keys, *arguments)})[""]


class _Remote(_Feature):
    """Base class of Embedding and EmbeddingBag: modules that use the rows of one table."""

    def __init__(self, table: Table) -> None:
        super().__init__(table.client)
        self.table = table
        self._collected: list[_Rows] = []

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to pickle or copy: without the gradients collected so far."""
        return {**self.__dict__, "_collected": []}

    def remotes(self) -> list[_Remote]:
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

    def collect(self, batch: Batch, embeddings: Any) -> _Rows:
        """Wrap pulled rows for a forward pass; keep them for ``step`` if gradients are enabled.

        batch       keys of the forward pass
        embeddings  float32[distinct, dim], the rows of ``batch.keys``
        """
        rows = _Rows(self.table, batch, embeddings, torch.is_grad_enabled())
        if torch.is_grad_enabled():
            self._collected.append(rows)
        return rows

    def extra_repr(self) -> str:
        return f"{self.table.name!r}, dim={self.table.dim}"


class Embedding(_Remote):
    """Module that returns the row of each key: float32[*shape, dim] for integer keys[*shape].

    table  the table that has the rows; ``step`` pushes their gradients to it
    """

    def combine(self, leaf: Tensor, places: Tensor, arguments: tuple[Any, ...]) -> Tensor:
        if arguments:
            raise InvalidArgument(
                f"Embedding of table {self.table.name!r} takes keys only, got {len(arguments)} more"
                " arguments"
            )
        return functional.embedding(places, leaf)


class EmbeddingBag(_Remote):
    """Module that returns the sum or mean of the rows of each bag of keys: float32[bags, dim].

    table  the table that has the rows; ``step`` pushes their gradients to it
    mode   "sum" or "mean"

    ``forward`` takes the arguments of torch.nn.EmbeddingBag: keys[bags, m]; or keys[n] and
    offsets[bags], the index of each bag's first key. With "sum", a third argument
    ``per_sample_weights``, float[*shape of the keys], multiplies the rows.
    """

    def __init__(self, table: Table, mode: Mode = "sum") -> None:
        super().__init__(table)
        if mode not in ("sum", "mean"):
            raise InvalidArgument(f"mode must be 'sum' or 'mean', got {mode!r}")
        self.mode = mode

    def combine(self, leaf: Tensor, places: Tensor, arguments: tuple[Any, ...]) -> Tensor:
        offsets, weights = (*arguments, None, None)[:2]
        return functional.embedding_bag(
            places, leaf, offsets, mode=self.mode, per_sample_weights=weights
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mode={self.mode!r}"


class MultiHashEmbedding(_Feature):
    """Module that returns embeddings combined from parts: float32[*shape, dim] for keys[*shape].

    rows  a QuotientRemainder, ChineseRemainder or KHash of psclient.multihash, which defines the
          rows of a key and how they are combined
    """

    def __init__(self, rows: MultiHash) -> None:
        super().__init__(rows.client)
        self.rows = rows
        self.parts = nn.ModuleList(Embedding(table) for table in rows.tables)

    def remotes(self) -> list[_Remote]:
        return list(self.parts)  # type: ignore[arg-type]

    def requests(self, arguments: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        if len(arguments) > 1:
            raise InvalidArgument(
                f"{self.rows!r} takes keys only, got {len(arguments) - 1} more arguments"
            )
        return [(keys,) for keys in self.rows.row_keys(arguments[0])]

    def merge(self, outputs: list[Tensor]) -> Tensor:
        return COMBINE[self.rows.combine](outputs)

    def extra_repr(self) -> str:
        return repr(self.rows)


class MixedDimensionEmbedding(nn.Module):
    """Module that returns float32[*shape, dim] for integer keys[*shape].

    Frequent keys have more trained numbers than rare keys; the other numbers of rare keys are 0.

    rows  a psclient.mixed.MixedDimension, which defines the tables and the frequent keys

    A pull takes two round trips, so an EmbeddingGroup cannot contain this module.
    """

    def __init__(self, rows: MixedDimension) -> None:
        super().__init__()
        self.rows = rows
        self.small = Embedding(rows.small)
        self.wide = Embedding(rows.wide)

    def forward(self, keys: Any) -> Tensor:
        """Pull the embeddings of integer keys[*shape]: float32[*shape, dim], in two round trips.

        The first pulls the short rows of all keys, the second the wide rows of frequent keys.
        """
        array = as_keys(keys)
        flat = array.reshape(-1)
        batch = self.rows.client.batch(flat)
        pulled = self.rows.small.pull_rows(batch.keys, mode=MODE[self.training])
        small = self.small.collect(batch, pulled.embeddings)
        earned = batch.spread(pulled.frequencies >= self.rows.threshold)
        rest = torch.zeros(len(flat), self.rows.wide.dim)
        if earned.any():
            rest = rest.index_put((torch.from_numpy(earned),), self.wide(flat[earned]))
        out = torch.cat([functional.embedding(small.places(), small.leaf), rest], -1)
        return out.reshape(*array.shape, self.rows.dim)

    def prefetch(self, keys: Any) -> Pending:
        """Ask the shards to read the rows of a later batch from disk into memory; return at once.

        keys  the keys of a later call of this module

        Client.prefetch explains the result, which need not be waited for.
        """
        return self.rows.prefetch(as_keys(keys))

    def step(self, step: int = 0, *, lr: float | None = None) -> None:
        """Push the gradients that backward passes collected since the last call of ``step``.

        step  training step
        lr    learning rate; None: that of each table

        Takes one round trip.
        """
        _push(self.rows.client, [self.small, self.wide], step, lr)

    def extra_repr(self) -> str:
        return repr(self.rows)


class EmbeddingGroup(nn.Module):
    """Module of several features, whose rows are pulled and pushed in one round trip each.

    client   the client of all tables
    modules  {name of a feature: Embedding, EmbeddingBag or MultiHashEmbedding}
    """

    def __init__(self, client: RowClient, modules: Mapping[str, _Feature]) -> None:
        super().__init__()
        self.client = client
        self.features = nn.ModuleDict(modules)

    def forward(self, keys: Mapping[str, Any]) -> dict[str, Tensor]:
        """Pull the rows of all features in one round trip; return {feature: output}.

        keys  {feature: its keys, or a tuple of its arguments, keys first}; features may be omitted

        Raises InvalidArgument for an unknown feature.
        """
        return _forward(self.client, self._features(keys), keys)

    def prefetch(self, keys: Mapping[str, Any]) -> Pending:
        """Ask the shards to read the rows of a later batch from disk into memory; return at once.

        keys  the argument of a later call of this module

        Client.prefetch explains the result, which need not be waited for. Raises InvalidArgument
        for an unknown feature.
        """
        return _prefetch(self.client, self._features(keys), keys)

    def step(self, step: int = 0, *, lr: float | None = None) -> None:
        """Push the gradients of all features, collected since the last call, in one round trip.

        step  training step
        lr    learning rate; None: that of each table
        """
        remotes = [remote for name in self.features for remote in self._feature(name).remotes()]
        _push(self.client, remotes, step, lr)

    def _features(self, keys: Mapping[str, Any]) -> dict[str, _Feature]:
        """Return {feature: its module} for the features in ``keys``.

        Raises InvalidArgument for an unknown feature.
        """
        unknown = sorted(set(keys) - set(self.features))
        if unknown:
            raise InvalidArgument(
                f"no feature {unknown[0]!r}; the features are {sorted(self.features)}"
            )
        return {name: self._feature(name) for name in keys}

    def _feature(self, name: str) -> _Feature:
        """Return the module of a feature. Raises InvalidArgument if a group cannot contain it."""
        module = self.features[name]
        if not isinstance(module, _Feature):
            raise InvalidArgument(
                f"feature {name!r} must be an Embedding, EmbeddingBag or MultiHashEmbedding, got"
                f" {module}"
            )
        return module


def _forward(
    client: RowClient, features: Mapping[str, _Feature], inputs: Mapping[str, Any]
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
    features: Mapping[str, _Feature], inputs: Mapping[str, Any]
) -> tuple[dict[Part, _Remote], dict[Part, tuple[Any, ...]]]:
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


def _prefetch(
    client: RowClient, features: Mapping[str, _Feature], inputs: Mapping[str, Any]
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
    client: RowClient, modules: Mapping[Part, _Remote], arguments: Mapping[Part, tuple[Any, ...]]
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


def _push(client: RowClient, modules: Sequence[_Remote], step: int, lr: float | None) -> None:
    """Push the gradients that the modules collected, summed per table, in one request.

    step  training step
    lr    learning rate; None: that of each table
    """
    by_table: dict[str, list[_Rows]] = {}
    for module in modules:
        for rows in module._collected:
            if rows.leaf.grad is not None:  # None: no backward pass reached these rows
                by_table.setdefault(rows.table.name, []).append(rows)
    client.push_distinct(
        {name: _merge(client, rows) for name, rows in by_table.items()}, step=step, lr=lr
    )
    for module in modules:
        module._collected.clear()


def _merge(client: RowClient, passes: list[_Rows]) -> tuple[Batch, Any]:
    """Sum the gradients of several forward passes over one table.

    passes  rows of each forward pass, with their gradients

    Returns (batch of all keys, gradients float32[distinct, dim] of its distinct keys).
    """
    gradients = [rows.leaf.grad.numpy() for rows in passes if rows.leaf.grad is not None]
    if len(passes) == 1:
        return passes[0].batch, gradients[0]
    table = passes[0].table
    batch = client.batch(np.concatenate([rows.batch.keys for rows in passes]))
    sums = batch.sum(np.concatenate(gradients), table.name, table.dim)
    counts = np.concatenate([rows.batch.split.counts for rows in passes])
    total = np.bincount(batch.split.inverse, weights=counts).astype(np.uint32)
    batch.split = replace(batch.split, counts=total)
    return batch, sums
