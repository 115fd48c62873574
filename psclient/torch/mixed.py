"""MixedDimensionEmbedding: embeddings that have more trained numbers for frequent keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from psclient.arrays import as_keys
from psclient.mixed import MixedDimension
from psclient.pending import Pending
from psclient.torch.embedding import Embedding
from psclient.torch.feature import MODE, places_of
from psclient.torch.inputs import host
from psclient.torch.optimizer import Trained


class MixedDimensionEmbedding(Trained):
    """Module that returns float32[*shape, dim] for integer keys[*shape].

    Frequent keys have more trained numbers than rare keys; the other numbers of rare keys are 0.

    rows  a psclient.mixed.MixedDimension, which defines the tables and the frequent keys

    A pull takes two round trips, so an EmbeddingGroup cannot contain this module.
    """

    def __init__(self, rows: MixedDimension) -> None:
        super().__init__()
        self.client = rows.client
        self.rows = rows
        self.small = Embedding(rows.small)
        self.wide = Embedding(rows.wide)

    @torch.compiler.disable
    def forward(self, keys: Any) -> Tensor:
        """Pull the embeddings of integer keys[*shape]: float32[*shape, dim], in two round trips.

        The first pulls the short rows of all keys, the second the wide rows of frequent keys.
        """
        array = as_keys(host(keys))
        flat = array.reshape(-1)
        batch = self.rows.client.batch(flat)
        pulled = self.rows.small.pull_rows(batch.keys, mode=MODE[self.training])
        small = self.small.seen(self.small.collect(batch, pulled.embeddings))
        earned = batch.spread(pulled.frequencies >= self.rows.threshold)
        rest = small.new_zeros(len(flat), self.rows.wide.dim)
        if earned.any():
            where = torch.from_numpy(earned).to(small.device)
            rest = rest.index_put((where,), self.wide(flat[earned]))
        out = torch.cat([functional.embedding(places_of(batch).to(small.device), small), rest], -1)
        return out.reshape(*array.shape, self.rows.dim)

    def prefetch(self, keys: Any) -> Pending:
        """Ask the shards to read the rows of a later batch from disk into memory; return at once.

        keys  the keys of a later call of this module

        Client.prefetch explains the result, which need not be waited for.
        """
        return self.rows.prefetch(as_keys(host(keys)))

    def extra_repr(self) -> str:
        return repr(self.rows)
