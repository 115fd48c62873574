"""PyTorch modules whose rows live on the servers.

    group = EmbeddingGroup(client, {"user": EmbeddingBag(users), "item": Embedding(items)})
    out = group({"user": user_keys, "item": item_keys})   # one round trip
    loss(out).backward()
    group.step(step)                                      # one round trip

A forward pass pulls one row for each distinct key as a leaf tensor; autograd sums the gradients of
equal keys into it, and ``step`` pushes them. The server's optimizer does the rest: the modules have
no parameters, and a ``state_dict`` holds no rows. Modules of a group may share a table.

Under ``torch.no_grad()`` nothing is collected; in ``eval()`` mode pulls are serving pulls, so keys
without a row give the table's serving default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from psclient.batch import Batch, as_keys
from psclient.client import Client, Table
from psclient.errors import InvalidArgument

Mode = Literal["sum", "mean"]


class _Rows:
    """Rows of the distinct keys of one table in one forward pass, waiting for their gradients."""

    def __init__(self, table: Table, batch: Batch, embeddings: Any, collect: bool) -> None:
        self.table = table
        self.batch = batch
        self.leaf = torch.from_numpy(embeddings).requires_grad_(collect)


class _Remote(nn.Module):
    """What Embedding and EmbeddingBag share: a table, and rows that wait for their gradients."""

    def __init__(self, table: Table) -> None:
        super().__init__()
        self.table = table
        self._collected: list[_Rows] = []

    def combine(self, leaf: Tensor, places: Tensor, arguments: tuple[Any, ...]) -> Tensor:
        """The output, from distinct rows [u, dim] and the place int64[*shape] of each key."""
        raise NotImplementedError

    def step(self, step: int = 0, *, lr: float | None = None) -> None:
        """Push the gradients collected since the last step, in one round trip."""
        _push(self.table.client, [self], step, lr)

    def forward(self, keys: Tensor, *arguments: Any) -> Tensor:
        """Pull and combine the rows of integer keys[*shape]."""
        return _forward(self.table.client, {"": self}, {"": (keys, *arguments)})[""]

    def extra_repr(self) -> str:
        return f"{self.table.name!r}, dim={self.table.dim}"


class Embedding(_Remote):
    """A row for each key: float32[*shape, dim] of integer keys[*shape]."""

    def combine(self, leaf: Tensor, places: Tensor, arguments: tuple[Any, ...]) -> Tensor:
        if arguments:
            raise InvalidArgument(f"Embedding of {self.table.name!r} takes keys alone")
        return functional.embedding(places, leaf)


class EmbeddingBag(_Remote):
    """One combined row for each bag of keys: float32[bags, dim].

    mode  "sum" or "mean"

    Called as torch.nn.EmbeddingBag is: with keys[bags, m]; or with keys[n] and offsets[bags], where
    each bag starts; then ``per_sample_weights`` of the shape of the keys ("sum" alone).
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


class EmbeddingGroup(nn.Module):
    """Several features, over any tables of one client, in one round trip.

    modules  by feature: Embedding or EmbeddingBag
    """

    def __init__(self, client: Client, modules: Mapping[str, _Remote]) -> None:
        super().__init__()
        self.client = client
        self.features = nn.ModuleDict(modules)

    def forward(self, keys: Mapping[str, Any]) -> dict[str, Tensor]:
        """Outputs by feature; ``keys`` by feature: a tensor, or a tuple of arguments."""
        unknown = sorted(set(keys) - set(self.features))
        if unknown:
            raise InvalidArgument(f"no feature {unknown[0]!r}; there are {sorted(self.features)}")
        return _forward(self.client, {name: self._feature(name) for name in keys}, keys)

    def step(self, step: int = 0, *, lr: float | None = None) -> None:
        """Push the gradients collected since the last step, in one round trip."""
        _push(self.client, [self._feature(name) for name in self.features], step, lr)

    def _feature(self, name: str) -> _Remote:
        module = self.features[name]
        assert isinstance(module, _Remote)
        return module


def _forward(
    client: Client, modules: Mapping[str, _Remote], inputs: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Pull the rows of every feature together; features that share a table share its rows."""
    arguments = {
        name: value if isinstance(value, tuple) else (value,) for name, value in inputs.items()
    }
    keys = {name: as_keys(values[0]) for name, values in arguments.items()}
    by_table: dict[str, list[str]] = {}
    for name, module in modules.items():
        by_table.setdefault(module.table.name, []).append(name)
    batches = {
        table: client.batch(np.concatenate([keys[name].reshape(-1) for name in names]))
        for table, names in by_table.items()
    }
    training = any(module.training for module in modules.values())
    pulled = client.pull_distinct(batches, mode="train" if training else "serve")
    outputs = {}
    for table, names in by_table.items():
        first = modules[names[0]]
        rows = _Rows(first.table, batches[table], pulled[table], torch.is_grad_enabled())
        if torch.is_grad_enabled():
            first._collected.append(rows)
        places = torch.from_numpy(batches[table].split.inverse.astype(np.int64))
        at = 0
        for name in names:
            size = keys[name].size
            place = places[at : at + size].reshape(keys[name].shape)
            outputs[name] = modules[name].combine(rows.leaf, place, arguments[name][1:])
            at += size
    return outputs


def _push(client: Client, modules: Sequence[_Remote], step: int, lr: float | None) -> None:
    """Push what the modules collected; several passes over a table count as one batch."""
    by_table: dict[str, list[_Rows]] = {}
    for module in modules:
        for rows in module._collected:
            if rows.leaf.grad is not None:  # else no backward pass came this way
                by_table.setdefault(rows.table.name, []).append(rows)
    client.push_distinct(
        {name: _merge(client, rows) for name, rows in by_table.items()}, step=step, lr=lr
    )
    for module in modules:
        module._collected.clear()


def _merge(client: Client, passes: list[_Rows]) -> tuple[Batch, Any]:
    """One batch and its gradients float32[distinct, dim] from those of several passes."""
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
