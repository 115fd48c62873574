"""EmbeddingGroup: several features, pulled and pushed in one round trip each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from psclient.errors import InvalidArgument
from psclient.pending import Pending
from psclient.rowclient import RowClient
from psclient.torch.feature import Feature, pull_features, start_prefetch
from psclient.torch.gradients import push


class EmbeddingGroup(nn.Module):
    """Module of several features, whose rows are pulled and pushed in one round trip each.

    client   the client of all tables
    modules  {name of a feature: Embedding, EmbeddingBag or MultiHashEmbedding}
    """

    def __init__(self, client: RowClient, modules: Mapping[str, Feature]) -> None:
        super().__init__()
        self.client = client
        self.features = nn.ModuleDict(modules)

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

    def step(self, step: int = 0, *, lr: float | None = None) -> None:
        """Push the gradients of all features, collected since the last call, in one round trip.

        step  training step
        lr    learning rate; None: that of each table
        """
        remotes = [remote for name in self.features for remote in self._feature(name).remotes()]
        push(self.client, (remote.collected for remote in remotes), step, lr)

    def _features(self, keys: Mapping[str, Any]) -> dict[str, Feature]:
        """Return {feature: its module} for the features in ``keys``.

        Raises InvalidArgument for an unknown feature.
        """
        unknown = sorted(set(keys) - set(self.features))
        if unknown:
            raise InvalidArgument(
                f"no feature {unknown[0]!r}; the features are {sorted(self.features)}"
            )
        return {name: self._feature(name) for name in keys}

    def _feature(self, name: str) -> Feature:
        """Return the module of a feature. Raises InvalidArgument if a group cannot contain it."""
        module = self.features[name]
        if not isinstance(module, Feature):
            raise InvalidArgument(
                f"feature {name!r} must be an Embedding, EmbeddingBag or MultiHashEmbedding, got"
                f" {module}"
            )
        return module
