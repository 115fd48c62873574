"""Embedding: the row of each key."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional

from psclient.errors import InvalidArgument
from psclient.torch.feature import Remote


class Embedding(Remote):
    """Module that returns the row of each key: float32[*shape, dim] for integer keys[*shape].

    table  the table that has the rows; ``step`` pushes their gradients to it
    """

    def combine(self, leaf: Tensor, places: Tensor, arguments: tuple[Any, ...]) -> Tensor:
        if arguments:
            raise InvalidArgument(
                f"Embedding of table {self.table.name!r} takes keys only, got {len(arguments)} more"
                " arguments"
            )
        return functional.embedding(places, leaf)
