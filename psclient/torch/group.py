"""EmbeddingGroup: several features, pulled and pushed in one round trip each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, KeysView, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from psclient.choices import Durability, Wire
from psclient.errors import InvalidArgument
from psclient.pending import Pending
from psclient.rowclient import RowClient
from psclient.torch.feature import Feature, pull_features, start_prefetch
from psclient.torch.optimizer import Trained
from psclient.torch.pipeline import GroupPipeline


class Features(nn.Module):
    """Modules by name, as in nn.ModuleDict, but any string may be a name.

    nn.ModuleDict refuses names that contain a dot, and those of its own attributes, such as "type".
    """

    def __init__(self, modules: Mapping[str, Feature]) -> None:
        super().__init__()
        self._names: dict[str, str] = {}
        for name, module in modules.items():
            if not isinstance(name, str):
                raise InvalidArgument(f"the name of a feature must be a string, got {name!r}")
            inner = name.replace("%", "%25").replace(".", "%2E") or "%"  # a path joins names by "."
            if hasattr(self, inner):
                inner = f"%{inner}"
            self._names[name] = inner
            self._modules[inner] = module

    def __getitem__(self, name: str) -> Feature:
        module = self._modules[self._names[name]]
        assert isinstance(module, Feature)
        return module

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def keys(self) -> KeysView[str]:
        """Return the names of the features."""
        return self._names.keys()

    def values(self) -> list[Feature]:
        """Return the modules, in the order of ``keys()``."""
        return [self[name] for name in self]

    def items(self) -> list[tuple[str, Feature]]:
        """Return (name, module) of each feature."""
        return [(name, self[name]) for name in self]


class EmbeddingGroup(Trained):
    """Module of several features, whose rows are pulled and pushed in one round trip each.

    client   the client of all tables
    modules  {name of a feature, any string: Embedding, EmbeddingBag or MultiHashEmbedding of tables
             of ``client``}
    """

    def __init__(self, client: RowClient, modules: Mapping[str, Feature]) -> None:
        super().__init__()
        for name, module in modules.items():
            if not isinstance(module, Feature):
                raise InvalidArgument(
                    f"feature {name!r} must be an Embedding, EmbeddingBag or MultiHashEmbedding,"
                    f" got {module}"
                )
            if module.client is not client:
                raise InvalidArgument(
                    f"feature {name!r} must use tables of the client of the group: make a group for"
                    f" each client; got {module}"
                )
        self.client = client
        self.features = Features(modules)

    @torch.compiler.disable
    def forward(self, keys: Mapping[str, Any]) -> dict[str, Tensor]:
        """Pull the rows of all features in one round trip; return {feature: output}.

        keys  {feature: its keys, or a tuple of its arguments, keys first}; features may be omitted

        Raises InvalidArgument for an unknown feature.
        """
        return pull_features(self.client, self._features(keys), keys)

    def prefetch(self, keys: Mapping[str, Any]) -> Pending:
        """Ask the shards to read the rows of a later batch from disk into memory; return at once.

        keys  the argument of a later call of this module

        Client.prefetch explains the result, which need not be waited for. Raises InvalidArgument
        for an unknown feature.
        """
        return start_prefetch(self.client, self._features(keys), keys)

    def pipeline(
        self,
        loader: Iterable[Any],
        keys: Callable[[Any], Mapping[str, Any]],
        *,
        lookahead: int | None = None,
        staleness: int = 0,
        step: int = 0,
        accumulate: int = 1,
        device: Any = None,
        wire: Wire | None = None,
        durability: Durability | None = None,
    ) -> GroupPipeline:
        """Return an iterable of (batch, outputs) that pulls ahead, and pushes in the background.

        loader      a DataLoader, or any iterable of batches; each ``for`` begins anew
        keys        function that returns the argument of ``forward`` for a batch, with all features
        lookahead   number of batches whose rows are pulled while a batch is computed; None: as many
                    as ``staleness``, but at least 1
        staleness   number of pushes, those of the batches just before it, that the rows of a batch
                    may lack. 0: the results are those of a loop without pipeline
        step        number of the first batch, in errors and ``pipe.step``
        accumulate  number of batches whose gradients may be summed in one push
        device      GPU to which rows are copied ahead; None: they stay in host memory
        wire        dtype of rows and gradients on the wire; None: the client's
        durability  when a push counts as answered, see Client.push; None: each table's

            rows = group.optimizer(lr=0.05)
            with group.pipeline(loader, lambda batch: batch.keys, staleness=1) as batches:
                for batch, outputs in batches:
                    loss_fn(net(outputs), batch.labels).backward()
                    rows.step()

        Each batch must be pushed by ``step``, or discarded by ``zero_grad``, before the next turn,
        which raises InvalidArgument otherwise. A batch without a backward pass pushes nothing.
        Errors of a push are raised as PushFailed by a later turn, or at the end of the block.
        """
        return GroupPipeline(
            self.client,
            dict(self.features.items()),
            loader,
            keys,
            lookahead=lookahead,
            staleness=staleness,
            step=step,
            accumulate=accumulate,
            device=device,
            wire=wire,
            durability=durability,
        )

    def _features(self, keys: Mapping[str, Any]) -> dict[str, Feature]:
        """Return {feature: its module} for the features in ``keys``.

        Raises InvalidArgument for an unknown feature.
        """
        unknown = sorted(set(keys) - set(self.features))
        if unknown:
            raise InvalidArgument(
                f"no feature {unknown[0]!r}; the features are {sorted(self.features)}"
            )
        return {name: self.features[name] for name in keys}
