"""MultiHashEmbedding: embeddings combined from rows of several small tables."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from psclient.multihash import MultiHash
from psclient.torch.embedding import Embedding
from psclient.torch.feature import Feature, Remote
from psclient.torch.inputs import check_keys, padding_key

COMBINE: dict[str, Callable[[list[Tensor]], Tensor]] = {  # as psclient.combine, for tensors
    "add": lambda parts: reduce(torch.add, parts),
    "multiply": lambda parts: reduce(torch.mul, parts),
    "concatenate": lambda parts: torch.cat(parts, -1),
}


class MultiHashEmbedding(Feature):
    """Module that returns embeddings combined from parts: float32[*shape, dim] for keys[*shape].

    rows         a QuotientRemainder, ChineseRemainder or KHash of psclient.multihash, which defines
                 the rows of a key and how they are combined
    padding_idx  a key whose embeddings are zeros; its rows are neither pulled nor pushed.
                 None: no key

    Keys may also be a nested tensor with layout=torch.jagged; the embeddings are then one, too.
    """

    def __init__(self, rows: MultiHash, padding_idx: int | None = None) -> None:
        super().__init__()
        self.client = rows.client
        self.rows = rows
        self.padding_idx = padding_key("MultiHashEmbedding", padding_idx)
        self.parts = nn.ModuleList(Embedding(table) for table in rows.tables)

    def remotes(self) -> list[Remote]:
        return list(self.parts)  # type: ignore[arg-type]

    def requests(self, arguments: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        keys, padding, jagged = check_keys(repr(self.rows), self.padding_idx, arguments)
        return [(each, padding, jagged) for each in self.rows.row_keys(keys)]

    def merge(self, outputs: list[Tensor]) -> Tensor:
        return COMBINE[self.rows.combine](outputs)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.rows!r}{padding}"
