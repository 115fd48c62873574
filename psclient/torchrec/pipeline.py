"""CollectionPipeline: batches of a loader, whose rows a collection has pulled ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor

from psclient.errors import InvalidArgument
from psclient.pipeline import Pipeline
from psclient.torch.group import EmbeddingGroup


class CollectionPipeline:
    """Iterates over a loader, and pulls the rows of later batches in the meantime.

    Collection.pipeline creates it. Use it in a ``with`` block.

    group     module that computes the outputs of the collection
    inputs    returns the keys of each output, for features: inputs(features)
    enter     called with this object when the block begins, and with None when it ends
    loader    the batches
    features  function that returns the features of a batch
    options   further arguments of EmbeddingGroup.pipeline
    """

    def __init__(
        self,
        group: EmbeddingGroup,
        inputs: Callable[[Any], dict[str, Any]],
        enter: Callable[[CollectionPipeline | None], None],
        loader: Iterable[Any],
        features: Callable[[Any], Any],
        options: Mapping[str, Any],
    ) -> None:
        self._inputs, self._enter, self._features = inputs, enter, features
        self._planned: deque[Any] = deque()  # features of batches that were read ahead
        self._batches = group.pipeline(loader, self._keys_of, **options)
        self._ready: tuple[Any, dict[str, Tensor]] | None = None  # of the batch at hand

    @property
    def pipe(self) -> Pipeline:
        """Return the psclient Pipeline, with ``stats``, ``flush`` and ``state``."""
        return self._batches.pipe

    def __enter__(self) -> Self:
        self._batches.__enter__()
        self._enter(self)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Wait for all pushes. After this, the collection pulls by itself again."""
        self._enter(None)
        self._batches.__exit__(kind, error, trace)

    def __iter__(self) -> Iterator[Any]:
        """Begin an epoch: read the loader anew, and yield its batches."""
        self._planned.clear()
        try:
            for batch, outputs in self._batches:
                self._ready = self._planned.popleft(), outputs
                yield batch
        finally:
            self._ready = None

    def _keys_of(self, batch: Any) -> dict[str, Any]:
        """Return the keys of each output of a batch that is read ahead."""
        features = self._features(batch)
        inputs = self._inputs(features)
        self._planned.append(features)
        return inputs

    def outputs_of(self, features: Any) -> dict[str, Tensor] | None:
        """Return {output: tensor} if ``features`` are those of the batch at hand.

        Returns None for others if gradients are disabled, so that the model can be evaluated within
        the block; else raises InvalidArgument.
        """
        if self._ready is not None and _same(features, self._ready[0]):
            return self._ready[1]
        if not torch.is_grad_enabled():
            return None
        raise InvalidArgument(
            "while a pipeline runs, features must be those that its function returned for the batch"
            " at hand: pass the same KeyedJaggedTensor to the model, or evaluate others in"
            " torch.no_grad()"
        )


def _same(features: Any, others: Any) -> bool:
    """Return whether two batches of features are one, or share their keys."""
    return features is others or features.values() is others.values()
