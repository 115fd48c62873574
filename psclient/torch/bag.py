"""EmbeddingBag: the sum, mean or maximum of the rows of each bag of keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from psclient.errors import InvalidArgument
from psclient.table import Table
from psclient.torch.feature import Remote, pull_features
from psclient.torch.inputs import (
    POOLINGS,
    Bagging,
    Pooling,
    check_bool,
    check_options,
    moved,
    padding_key,
)


class EmbeddingBag(Remote):
    """Module that combines the rows of each bag of keys into one: float32[bags, dim].

    table                the table that has the rows; ``step`` pushes their gradients to it
    mode                 "sum", "mean" or "max": how to combine them. An empty bag gives zeros
    padding_idx          a key that is left out of its bags; its row is neither pulled nor pushed.
                         None: no key
    include_last_offset  whether ``offsets`` has one more number, the end of the last bag
    sparse               has no effect: gradients are always those of the batch's distinct keys.
                         Not with "max"
    device, dtype        those of the outputs, as after ``to(device, dtype)``

    ``forward`` takes the arguments of torch.nn.EmbeddingBag: keys[bags, m]; or keys[n] and
    offsets[bags], the index of each bag's first key; or a nested tensor of keys with
    layout=torch.jagged. With "sum", a third argument ``per_sample_weights``, float[*shape of the
    keys] of the module's dtype, multiplies the rows. Other arguments of the constructor of
    torch.nn.EmbeddingBag, such as max_norm, are refused unless they have their default values.
    """

    shown = ("mode", "padding_idx", "include_last_offset")

    def __init__(
        self,
        table: Table,
        mode: Pooling = "sum",
        *,
        padding_idx: int | None = None,
        include_last_offset: bool = False,
        sparse: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **others: Any,
    ) -> None:
        super().__init__(table)
        name = "EmbeddingBag"
        check_options(name, others)
        if mode not in POOLINGS:
            raise InvalidArgument(f"{name}: mode must be 'sum', 'mean' or 'max', got {mode!r}")
        self.to(device=device, dtype=dtype)
        self.mode = mode
        self.padding_idx = padding_key(name, padding_idx)
        self.include_last_offset = check_bool(name, "include_last_offset", include_last_offset)
        self.sparse = check_bool(name, "sparse", sparse)
        if sparse and mode == "max":
            raise InvalidArgument(f"{name}: sparse must be False with mode 'max', got True")

    def requests(self, arguments: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        if len(arguments) > 3:
            raise InvalidArgument(
                f"EmbeddingBag of table {self.table.name!r} takes (keys, offsets,"
                f" per_sample_weights), got {len(arguments)} arguments"
            )
        keys, offsets, weights = (*arguments, None, None)[:3]
        bagging = Bagging(
            self.table.name, self.mode, self.padding_idx, self.include_last_offset, self.like
        )
        return [bagging.bags(keys, offsets, weights)]

    @torch.compiler.disable
    def forward(self, input: Any, offsets: Any = None, per_sample_weights: Any = None) -> Tensor:
        """Pull the rows of the keys ``input`` in one round trip; return float32[bags, dim].

        The class explains the arguments.
        """
        inputs = {"": (input, offsets, per_sample_weights)}
        return pull_features(self.client, {"": self}, inputs)[""]

    def combine(self, leaf: Tensor, places: Tensor, arguments: tuple[Any, ...]) -> Tensor:
        offsets, weights = arguments  # see Bags
        if len(offsets) == 1:
            none = leaf[:0]  # without bags; torch fails in the backward pass
            return none if weights is None else none * weights[:0, None]
        return functional.embedding_bag(
            places,
            leaf,
            moved(offsets, places.device),
            mode=self.mode,
            per_sample_weights=weights,
            include_last_offset=True,
        )
