"""Embedding: the row of each key."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from psclient.table import Table
from psclient.torch.feature import Remote, pull_features
from psclient.torch.inputs import check_bool, check_keys, check_options, moved, padding_key


class Embedding(Remote):
    """Module that returns the row of each key: float32[*shape, dim] for integer keys[*shape].

    table               the table that has the rows; ``step`` pushes their gradients to it
    padding_idx         a key whose embeddings are zeros; its row is neither pulled nor pushed.
                        None: no key
    scale_grad_by_freq  whether to divide the gradients of a key by the number of its occurrences
                        in the call
    sparse              has no effect: gradients are always those of the batch's distinct keys
    device, dtype       those of the outputs, as after ``to(device, dtype)``

    The arguments are those of torch.nn.Embedding. Its others, such as max_norm, are refused unless
    they have their default values. Keys may also be a nested tensor with layout=torch.jagged; the
    embeddings are then one, too.
    """

    shown = ("padding_idx", "scale_grad_by_freq")

    def __init__(
        self,
        table: Table,
        padding_idx: int | None = None,
        *,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **others: Any,
    ) -> None:
        super().__init__(table)
        check_options("Embedding", others)
        self.to(device=device, dtype=dtype)
        self.padding_idx = padding_key("Embedding", padding_idx)
        self.scale_grad_by_freq = check_bool("Embedding", "scale_grad_by_freq", scale_grad_by_freq)
        self.sparse = check_bool("Embedding", "sparse", sparse)

    def requests(self, arguments: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        return [check_keys(f"Embedding of table {self.table.name!r}", self.padding_idx, arguments)]

    @torch.compiler.disable
    def forward(self, input: Any, *others: Any) -> Tensor:
        """Pull the rows of integer keys ``input``[*shape] in one round trip; return their rows.

        others  must be empty
        """
        return pull_features(self.client, {"": self}, {"": (input, *others)})[""]

    def combine(self, leaf: Tensor, places: Tensor, arguments: tuple[Any, ...]) -> Tensor:
        padding, jagged = arguments  # see CheckedKeys
        rows = functional.embedding(places, leaf, scale_grad_by_freq=self.scale_grad_by_freq)
        if padding is not None:
            kept = moved(~padding.reshape(-1), leaf.device)
            zeros = leaf.new_zeros(len(kept), leaf.shape[1])
            rows = zeros.index_put((kept,), rows).reshape(*padding.shape, -1)
        if jagged is not None:
            return torch.nested.nested_tensor_from_jagged(rows, jagged.offsets())
        return rows
