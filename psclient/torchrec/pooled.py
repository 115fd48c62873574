"""EmbeddingBagCollection: the sum or mean of the rows of each bag, for all features of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollectionInterface,
    process_pooled_embeddings,
    reorder_inverse_indices,
)
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from psclient.client import Client
from psclient.errors import InvalidArgument
from psclient.table import Table
from psclient.torch.bag import EmbeddingBag
from psclient.torch.feature import Remote
from psclient.torch.inputs import Pooling
from psclient.torchrec.collection import Collection
from psclient.torchrec.tables import Initializer

MODES: dict[Any, Pooling] = {PoolingType.SUM: "sum", PoolingType.MEAN: "mean"}


class EmbeddingBagCollection(EmbeddingBagCollectionInterface, Collection):  # type: ignore[misc]
    """torchrec's EmbeddingBagCollection, whose rows are on the servers.

    client        client of the servers
    tables        EmbeddingBagConfigs of torchrec. A table of the name of each is used; it is
                  created if it does not exist
    is_weighted   whether batches have weights, which multiply the rows
    device        device of the outputs
    initializers  {name of a table: (initializer, its parameters)}, for tables to be created; those
                  left out get the one that has the distribution of the config's init_fn
    options       further arguments of Client.create_table, such as optimizer and lr, for tables to
                  be created

    ``forward`` takes a KeyedJaggedTensor, whose keys are any integers of 64 bits, and returns a
    KeyedTensor. ``num_embeddings`` of a config only sets the range of initial embeddings: tables
    have no end. Gradients flow as in psclient.torch: ``optimizer(lr)`` returns a torch optimizer of
    the rows, ``step`` pushes them, ``zero_grad`` discards them.

    Raises InvalidArgument for a config that has no counterpart, SchemaMismatch if a table exists
    with another dim, or with an optimizer other than that in ``options``.
    """

    def __init__(
        self,
        client: Client,
        tables: Sequence[EmbeddingBagConfig],
        is_weighted: bool = False,
        device: Any = None,
        *,
        initializers: Mapping[str, Initializer] | None = None,
        **options: Any,
    ) -> None:
        for config in tables:
            if config.pooling not in MODES:
                raise InvalidArgument(
                    f"table {config.name!r}: pooling must be SUM or MEAN, got {config.pooling.name}"
                )
            if is_weighted and config.pooling != PoolingType.SUM:
                raise InvalidArgument(
                    f"table {config.name!r}: pooling must be SUM with is_weighted=True, as in"
                    f" torch; got {config.pooling.name}"
                )
        Collection.__init__(self, client, tables, device, initializers, options)
        self._is_weighted = bool(is_weighted)
        self._configs = list(tables)
        dims = zip(self._configs, self.names, strict=True)
        self._dims = [config.embedding_dim for config, names in dims for _ in names]

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """Return the configs of the tables."""
        return self._configs

    def is_weighted(self) -> bool:
        """Return whether batches have weights."""
        return self._is_weighted

    @torch.compiler.disable
    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Pull the rows of all features in one request; return the sum or mean of each bag.

        features  keys of all features, weighted if the collection is. Its strides may differ
                  between features; with ``inverse_indices``, these choose the rows of each output

        Returns a KeyedTensor, float32[batch, sum of the dims of the outputs].
        """
        if (traced := self._traced(features)) is not None:
            return traced
        _, inputs = self.inputs(features)
        inverse = getattr(features, "inverse_indices_or_none", lambda: None)()
        return KeyedTensor(
            keys=list(inputs),
            values=process_pooled_embeddings(
                pooled_embeddings=self._outputs(features, inputs),
                inverse_indices=reorder_inverse_indices(inverse, self._features),
            ),
            length_per_key=self._dims,
        )

    def _module(self, config: Any, table: Table) -> Remote:
        return EmbeddingBag(table, MODES[config.pooling], include_last_offset=True)

    def _arguments(self, values: JaggedTensor) -> Any:
        weights = values.weights() if self._is_weighted else None
        return values.values(), values.offsets(), weights

    def _check_weights(self, features: KeyedJaggedTensor) -> None:
        weighted = features.weights_or_none() is not None
        if weighted != self._is_weighted:
            has, is_ = "has" if weighted else "has no", self._is_weighted
            raise InvalidArgument(
                f"features: the KeyedJaggedTensor {has} weights, but the collection was made with"
                f" is_weighted={is_}: make a collection for weighted features and one for others"
            )
