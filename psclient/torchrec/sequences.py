"""EmbeddingCollection: the row of each key, for all features of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollectionInterface
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from psclient.client import Client
from psclient.errors import InvalidArgument
from psclient.table import Table
from psclient.torch.embedding import Embedding
from psclient.torch.feature import Remote
from psclient.torchrec.collection import Collection
from psclient.torchrec.tables import Initializer


class EmbeddingCollection(EmbeddingCollectionInterface, Collection):  # type: ignore[misc]
    """torchrec's EmbeddingCollection, whose rows are on the servers.

    client        client of the servers
    tables        EmbeddingConfigs of torchrec, all with the same embedding_dim
    device        device of the outputs
    need_indices  whether the outputs also have the keys, as their ``weights()``

    ``forward`` takes a KeyedJaggedTensor and returns {output: JaggedTensor}. Weights of the batch
    are ignored, as in torchrec. EmbeddingBagCollection explains everything else.
    """

    def __init__(
        self,
        client: Client,
        tables: Sequence[EmbeddingConfig],
        device: Any = None,
        need_indices: bool = False,
        *,
        initializers: Mapping[str, Initializer] | None = None,
        **options: Any,
    ) -> None:
        dims = [config.embedding_dim for config in tables]
        for config in tables:
            if config.embedding_dim != dims[0]:
                raise InvalidArgument(
                    f"table {config.name!r}: embedding_dim must be that of the other tables of the"
                    f" collection, {dims[0]}; got {config.embedding_dim}"
                )
        Collection.__init__(self, client, tables, device, initializers, options)
        self._need_indices = bool(need_indices)
        self._configs = list(tables)
        self._dim = dims[0] if dims else -1

    def embedding_configs(self) -> list[EmbeddingConfig]:
        """Return the configs of the tables."""
        return self._configs

    def embedding_dim(self) -> int:
        """Return the length of the rows; -1: there are no tables."""
        return self._dim

    def embedding_names_by_table(self) -> list[list[str]]:
        """Return the names of the outputs, per table and feature."""
        return self.names

    def need_indices(self) -> bool:
        """Return whether the outputs also have the keys."""
        return self._need_indices

    @torch.compiler.disable
    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """Pull the rows of all features in one request; return them as {output: JaggedTensor}.

        features  keys of all features
        """
        if (traced := self._traced(features)) is not None:
            return traced  # type: ignore[return-value]
        values, inputs = self.inputs(features)
        rows = zip(inputs, values, self._outputs(features, inputs), strict=True)
        return {
            name: JaggedTensor(
                values=output,
                lengths=keys.lengths(),
                weights=keys.values() if self._need_indices else None,
            )
            for name, keys, output in rows
        }

    def _module(self, config: Any, table: Table) -> Remote:
        return Embedding(table)

    def _arguments(self, values: JaggedTensor) -> Any:
        return values.values()
