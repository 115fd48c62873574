"""CollectionPipeline: batches of a loader, whose rows a collection has pulled ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from psclient.errors import InvalidArgument
from psclient.pipeline import Pipeline

if TYPE_CHECKING:
    from psclient.torchrec.collection import Collection


class CollectionPipeline:
    """Iterates over a loader, and pulls the rows of later batches in the meantime.

    Collection.pipeline creates it, and explains the arguments. Use it in a ``with`` block.
    """

    def __init__(
        self,
        collection: Collection,
        loader: Iterable[Any],
        features: Callable[[Any], Any],
        options: Mapping[str, Any],
    ) -> None:
        self._collection, self._features = collection, features
        self._planned: deque[Any] = deque()  # features of batches that were read ahead
        self._batches = collection.group.pipeline(loader, self._keys_of, **options)
        self._ready: tuple[Any, dict[str, Tensor]] | None = None  # of the batch at hand

    @property
    def pipe(self) -> Pipeline:
        """Return the psclient Pipeline, with ``stats``, ``flush`` and ``state``."""
        return self._batches.pipe

    def __enter__(self) -> Self:
        self._batches.__enter__()
        self._collection._pipeline = self
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Wait for all pushes. After this, the collection pulls by itself again."""
        self._collection._pipeline = None
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
        inputs: dict[str, Any] = self._collection.inputs(features)[1]
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
