"""EmbeddingBag: the sum or mean of the rows of each bag of keys."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor
from torch.nn import functional

from psclient.errors import InvalidArgument
from psclient.table import Table
from psclient.torch.feature import Remote

Mode = Literal["sum", "mean"]


class EmbeddingBag(Remote):
    """Module that returns the sum or mean of the rows of each bag of keys: float32[bags, dim].

    table  the table that has the rows; ``step`` pushes their gradients to it
    mode   "sum" or "mean"

    ``forward`` takes the arguments of torch.nn.EmbeddingBag: keys[bags, m]; or keys[n] and
    offsets[bags], the index of each bag's first key. With "sum", a third argument
    ``per_sample_weights``, float[*shape of the keys], multiplies the rows.
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
