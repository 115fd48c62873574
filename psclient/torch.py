"""PyTorch modules whose rows are stored on the servers.

    group = EmbeddingGroup(client, {"user": EmbeddingBag(users), "item": Embedding(items)})
    out = group({"user": user_keys, "item": item_keys})   # one round trip
    loss(out).backward()
    group.step(step)                                      # one round trip

A forward pass pulls one row for each distinct key into a leaf tensor. Autograd sums the gradients
of equal keys in it, and ``step`` pushes them to the servers, whose optimizer applies them. The
modules have no parameters, and their ``state_dict`` contains no rows. Modules of a group may share
a table. MultiHashEmbedding and MixedDimensionEmbedding combine rows of several tables.

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
    """Rows of the distinct keys of one table in one forward pass, which collect gradients.

    embeddings  float32[distinct, dim]
    collect     whether to collect gradients
    leaf        ``embeddings`` as a tensor; its ``grad`` collects the gradients
    """

    def __init__(self, table: Table, batch: Batch, embeddings: Any, collect: bool) -> None:
        self.table = table
        self.batch = batch
        self.leaf = torch.from_numpy(embeddings).requires_grad_(collect)

    def places(self) -> Tensor:
        """Return the index in ``leaf`` of the row of each key of the batch, int64[n]."""
        return torch.from_numpy(self.batch.split.inverse.astype(np.int64))


class _Feature(nn.Module):
    """Module of an EmbeddingGroup, whose output combines rows of one or several tables."""

    def __init__(self, client: RowClient) -> None:
        super().__init__()
        self.client = client

    def remotes(self) -> list[_Remote]:
        """Return the modules that pull from a table each: one, or one per part."""
        raise NotImplementedError

    def requests(self, arguments: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        """Return for each module of ``remotes()`` its arguments (keys, ...).

        arguments  arguments of this feature: (keys, ...)
        """
        raise NotImplementedError

    def merge(self, outputs: list[Tensor]) -> Tensor:
        """Return the output of this feature from the outputs of the modules of ``remotes()``."""
        raise NotImplementedError

    def step(self, step: int = 0, *, lr: float | None = None) -> None:
        """Push the gradients collected since the last call, in one round trip.

        step  training step
        lr    learning rate; None: the tables'
        """
        _push(self.client, self.remotes(), step, lr)

    def forward(self, keys: Any, *arguments: Any) -> Tensor:
        """Pull the rows of integer keys[*shape] and return the output; see the class for
        ``arguments``.
        """
        return _forward(self.client, {"": self}, {"": (keys, *arguments)})[""]


class _Remote(_Feature):
    """Base class of Embedding and EmbeddingBag: a table, and its rows that collect gradients."""

    def __init__(self, table: Table) -> None:
        super().__init__(table.client)
        self.table = table
        self._collected: list[_Rows] = []

    def __getstate__(self) -> dict[str, Any]:
        """Omit collected gradients, which only ``step`` of the original pushes."""
        return {**self.__dict__, "_collected": []}

    def remotes(self) -> list[_Remote]:
        return [self]

    def requests(self, arguments: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        return [arguments]

    def merge(self, outputs: list[Tensor]) -> Tensor:
        return outputs[0]

    def combine(self, leaf: Tensor, places: Tensor, arguments: tuple[Any, ...]) -> Tensor:
        """Return the output for rows of the table.

        leaf       float32[distinct, dim]: the pulled rows
        places     int64[*shape]: the index in ``leaf`` of each key's row
        arguments  further arguments of ``forward``, after the keys
        """
        raise NotImplementedError

    def collect(self, batch: Batch, embeddings: Any) -> _Rows:
        """Wrap the rows of a forward pass; keep them for ``step`` if gradients are enabled.

        embeddings  float32[distinct, dim], rows of the batch's distinct keys
        """
        rows = _Rows(self.table, batch, embeddings, torch.is_grad_enabled())
        if torch.is_grad_enabled():
            self._collected.append(rows)
        return rows

    def extra_repr(self) -> str:
        return f"{self.table.name!r}, dim={self.table.dim}"


class Embedding(_Remote):
    """Returns one row for each key: float32[*shape, dim] for integer keys[*shape]."""

    def combine(self, leaf: Tensor, places: Tensor, arguments: tuple[Any, ...]) -> Tensor:
        if arguments:
            raise InvalidArgument(f"Embedding of {self.table.name!r} takes keys only")
        return functional.embedding(places, leaf)


class EmbeddingBag(_Remote):
    """Returns one combined row for each bag of keys: float32[bags, dim].

    mode  "sum" or "mean" of the rows of a bag

    ``forward`` takes the arguments of torch.nn.EmbeddingBag: keys[bags, m]; or keys[n] and
    offsets[bags], the index of each bag's first key. With "sum", a third argument
    ``per_sample_weights``, of the shape of the keys, multiplies the rows.
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
    """Returns embeddings that combine one row of each part: float32[*shape, dim] for keys[*shape].

    rows  a QuotientRemainder, ChineseRemainder or KHash of psclient.multihash
    """

    def __init__(self, rows: MultiHash) -> None:
        super().__init__(rows.client)
        self.rows = rows
        self.parts = nn.ModuleList(Embedding(table) for table in rows.tables)

    def remotes(self) -> list[_Remote]:
        return list(self.parts)  # type: ignore[arg-type]

    def requests(self, arguments: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        if len(arguments) > 1:
            raise InvalidArgument(f"{self.rows!r} takes keys only")
        return [(keys,) for keys in self.rows.row_keys(arguments[0])]

    def merge(self, outputs: list[Tensor]) -> Tensor:
        return COMBINE[self.rows.combine](outputs)

    def extra_repr(self) -> str:
        return repr(self.rows)


class MixedDimensionEmbedding(nn.Module):
    """Returns embeddings with more trained numbers for frequent keys: float32[*shape, dim].

    rows  a psclient.mixed.MixedDimension

    Its pull takes two round trips, so an EmbeddingGroup cannot contain it.
    """

    def __init__(self, rows: MixedDimension) -> None:
        super().__init__()
        self.rows = rows
        self.small = Embedding(rows.small)
        self.wide = Embedding(rows.wide)

    def forward(self, keys: Any) -> Tensor:
        """Pull the short rows of integer keys[*shape], then the long rows of frequent keys."""
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

    def step(self, step: int = 0, *, lr: float | None = None) -> None:
        """Push the gradients collected since the last call, in one round trip.

        step  training step
        lr    learning rate; None: the tables'
        """
        _push(self.rows.client, [self.small, self.wide], step, lr)

    def extra_repr(self) -> str:
        return repr(self.rows)


class EmbeddingGroup(nn.Module):
    """Several features over tables of one client, pulled and pushed in one round trip.

    modules  {feature: Embedding, EmbeddingBag or MultiHashEmbedding}
    """

    def __init__(self, client: RowClient, modules: Mapping[str, _Feature]) -> None:
        super().__init__()
        self.client = client
        self.features = nn.ModuleDict(modules)

    def forward(self, keys: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return {feature: output}.

        keys  {feature: its keys, or a tuple of its arguments, keys first}; features may be omitted
        """
        unknown = sorted(set(keys) - set(self.features))
        if unknown:
            raise InvalidArgument(
                f"no feature {unknown[0]!r}; the features are {sorted(self.features)}"
            )
        return _forward(self.client, {name: self._feature(name) for name in keys}, keys)

    def step(self, step: int = 0, *, lr: float | None = None) -> None:
        """Push the gradients collected since the last call, in one round trip.

        step  training step
        lr    learning rate; None: the tables'
        """
        remotes = [remote for name in self.features for remote in self._feature(name).remotes()]
        _push(self.client, remotes, step, lr)

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
    """Pull the rows of all features in one request; return {feature: output}.

    inputs  {feature: keys, or a tuple of its arguments}
    """
    modules, arguments = {}, {}
    for name, feature in features.items():
        value = inputs[name] if isinstance(inputs[name], tuple) else (inputs[name],)
        requests = feature.requests(value)
        for part, (remote, request) in enumerate(zip(feature.remotes(), requests, strict=True)):
            modules[name, part], arguments[name, part] = remote, request
    outputs = _pull(client, modules, arguments)
    return {
        name: feature.merge([outputs[name, part] for part in range(len(feature.remotes()))])
        for name, feature in features.items()
    }


def _pull(
    client: RowClient, modules: Mapping[Part, _Remote], arguments: Mapping[Part, tuple[Any, ...]]
) -> dict[Part, Tensor]:
    """Pull the rows of all modules in one request; modules of the same table share its rows.

    arguments  for each module (keys, ...)
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
    """Push the gradients that the modules collected, summed per table, in one request."""
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

    Returns (batch, gradients float32[distinct, dim]).
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
