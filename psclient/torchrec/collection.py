"""Base class of both collections: the keys of a KeyedJaggedTensor, per feature."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torchrec.modules.embedding_modules import get_embedding_names_by_table
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor
from torchrec.sparse.tensor_dict import maybe_td_to_kjt

from psclient.client import Client
from psclient.errors import InvalidArgument
from psclient.pending import Pending
from psclient.table import Table
from psclient.torch.feature import Remote
from psclient.torch.group import EmbeddingGroup
from psclient.torch.optimizer import Trained
from psclient.torchrec.pipeline import CollectionPipeline
from psclient.torchrec.tables import Initializer, tables_of


class Collection(Trained):
    """Base class of collections: modules of several tables, each with several features.

    client  client of all tables
    names   names of the outputs, per table and feature: that of the feature; "feature@table" if
            several tables have the feature
    group   module that pulls the rows of all outputs in one request

    The arguments are those of EmbeddingBagCollection.
    """

    def __init__(
        self,
        client: Client,
        configs: Sequence[Any],
        device: Any,
        initializers: Mapping[str, Initializer] | None,
        options: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.client = client
        for config in configs:
            config.feature_names = config.feature_names or [config.name]
        tables = tables_of(client, configs, initializers or {}, options)
        self.names: list[list[str]] = get_embedding_names_by_table(configs)
        self._features: list[str] = [each for config in configs for each in config.feature_names]
        modules = {
            name: self._module(config, tables[config.name])
            for config, names in zip(configs, self.names, strict=True)
            for name in names
        }
        self.group = EmbeddingGroup(client, modules)
        self._pipeline: CollectionPipeline | None = None
        self.to(device=device)

    def _module(self, config: Any, table: Table) -> Remote:
        """Return the module that computes one output of a table."""
        raise NotImplementedError

    def _arguments(self, values: JaggedTensor) -> Any:
        """Return the arguments for the module of a feature, keys first."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Device of the outputs."""
        for module in self.modules():
            if isinstance(module, Remote):
                return module.like.device
        return torch.device("cpu")

    def prefetch(self, features: KeyedJaggedTensor) -> Pending:
        """Ask the shards to read the rows of a later batch from disk into memory; return at once.

        features  the batch, as in ``forward``

        Client.prefetch explains the result, which need not be waited for.
        """
        return self.group.prefetch(self.inputs(features)[1])

    def inputs(self, features: Any) -> tuple[list[JaggedTensor], dict[str, Any]]:
        """Return the keys of each output: (as JaggedTensors, as {output: arguments of its module}).

        features  a KeyedJaggedTensor or a TensorDict

        Raises InvalidArgument if a feature is missing, or has weights that are not wanted, or none
        although they are.
        """
        jagged = maybe_td_to_kjt(features, None)
        if not isinstance(jagged, KeyedJaggedTensor):
            raise InvalidArgument(
                f"features must be a KeyedJaggedTensor, got {type(features).__name__}"
            )
        self._check_weights(jagged)
        given = jagged.to_dict()
        if missing := [name for name in self._features if name not in given]:
            raise InvalidArgument(
                f"features must contain {missing[0]!r}, got {sorted(jagged.keys())}"
            )
        values = [given[name] for name in self._features]
        names = [name for some in self.names for name in some]
        arguments = map(self._arguments, values)
        return values, dict(zip(names, arguments, strict=True))

    def _check_weights(self, features: KeyedJaggedTensor) -> None:
        """Raise InvalidArgument if the features have weights that the collection does not use."""

    def _outputs(self, features: KeyedJaggedTensor, inputs: Mapping[str, Any]) -> list[Tensor]:
        """Return the outputs as float32. Pull their rows in one request, unless a pipeline did.

        features, inputs  the batch, and the keys of each output
        """
        outputs = None if self._pipeline is None else self._pipeline.outputs_of(features)
        if outputs is None:
            outputs = self.group(inputs)
        return [outputs[name].float() for name in inputs]

    def pipeline(
        self,
        loader: Iterable[Any],
        features: Callable[[Any], KeyedJaggedTensor],
        **options: Any,
    ) -> CollectionPipeline:
        """Return an iterable of a loader's batches that pulls ahead, and pushes in the background.

        loader    a DataLoader, or any iterable of batches; each ``for`` begins anew
        features  function that returns the KeyedJaggedTensor of a batch
        options   further arguments of EmbeddingGroup.pipeline, such as staleness

            rows = ebc.optimizer()
            with ebc.pipeline(loader, lambda batch: batch.sparse_features, staleness=1) as batches:
                for batch in batches:
                    loss_fn(model(batch.dense_features, batch.sparse_features)).backward()
                    rows.step()

        Within the block, the collection uses the rows that were pulled ahead when the model calls
        it with the features of the batch at hand.
        """

        def enter(pipeline: CollectionPipeline | None) -> None:
            self._pipeline = pipeline

        return CollectionPipeline(
            self.group, lambda given: self.inputs(given)[1], enter, loader, features, options
        )

    def __getstate__(self) -> dict[str, Any]:
        """Leave out a pipeline: copies and pickles are not in its block."""
        return {**self.__dict__, "_pipeline": None}

    def _traced(self, features: Any) -> fx.Proxy | None:
        """Return a call of this module, as one node, if torch.fx is tracing it; else None.

        Rows are pulled when the traced model runs. So any tracer gets the module as a leaf.
        """
        if not isinstance(features, fx.Proxy):
            return None
        tracer: Any = features.tracer
        path = tracer.path_of_module(self)
        node: fx.Proxy = tracer.create_proxy("call_module", path, (features,), {})
        return node
