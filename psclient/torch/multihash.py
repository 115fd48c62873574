"""MultiHashEmbedding: embeddings combined from rows of several small tables."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from psclient.errors import InvalidArgument
from psclient.multihash import MultiHash
from psclient.torch.embedding import Embedding
from psclient.torch.feature import Feature, Remote
from psclient.torch.inputs import host

COMBINE: dict[str, Callable[[list[Tensor]], Tensor]] = {  # as psclient.combine, for tensors
    "add": lambda parts: reduce(torch.add, parts),
    "multiply": lambda parts: reduce(torch.mul, parts),
    "concatenate": lambda parts: torch.cat(parts, -1),
}


class MultiHashEmbedding(Feature):
    """Module that returns embeddings combined from parts: float32[*shape, dim] for keys[*shape].

    rows  a QuotientRemainder, ChineseRemainder or KHash of psclient.multihash, which defines the
          rows of a key and how they are combined
    """

    def __init__(self, rows: MultiHash) -> None:
        super().__init__()
        self.client = rows.client
        self.rows = rows
        self.parts = nn.ModuleList(Embedding(table) for table in rows.tables)

    def remotes(self) -> list[Remote]:
        return list(self.parts)  # type: ignore[arg-type]

    def requests(self, arguments: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        if len(arguments) != 1:
            raise InvalidArgument(
                f"{self.rows!r} takes keys only, got {len(arguments) - 1} more arguments"
            )
        return [(keys,) for keys in self.rows.row_keys(host(arguments[0]))]

    def merge(self, outputs: list[Tensor]) -> Tensor:
        return COMBINE[self.rows.combine](outputs)

    def extra_repr(self) -> str:
        return repr(self.rows)
