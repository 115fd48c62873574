"""A table as a plain PyTorch module, to serve or evaluate a model without servers.

    bag = frozen.load("user.pt", mode="mean")        # written by: psctl export user --format torch
    bag(keys, offsets)                               # as nn.EmbeddingBag, but with keys
    torch.jit.script(bag).save("user.ts")            # runs without this package

Rows do not change: there is nothing to train. This file needs only PyTorch, so a server of models
can contain a copy of it, without the rest of the package. torch.jit.script and torch.export accept
the modules.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

MODES = ("sum", "mean", "max")


class EmbeddingBag(nn.Module):
    """Combines the rows of keys, as torch.nn.EmbeddingBag combines the rows of indices.

    keys                 int64[n], sorted and distinct. Keys are the integers that were pushed
    weight               float[n + 1, dim]: row i belongs to keys[i], the last row to all other keys
    mode                 "sum", "mean" or "max"
    include_last_offset  as in torch.nn.EmbeddingBag: offsets end with the number of keys
    """

    keys: Tensor
    weight: Tensor

    def __init__(
        self, keys: Tensor, weight: Tensor, *, mode: str = "sum", include_last_offset: bool = False
    ) -> None:
        """Check and keep the tensors, without copying them. Raises ValueError."""
        super().__init__()
        _check(keys, weight)
        if mode not in MODES:
            raise ValueError(f"'mode' must be one of {', '.join(MODES)}, got {mode!r}")
        self.register_buffer("keys", keys)
        self.register_buffer("weight", weight)
        self.mode = mode
        self.include_last_offset = include_last_offset

    def forward(
        self,
        input: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        """Return one combined row per bag, float[bags, dim].

        input               int64[bags, size], or int64[n] with ``offsets``
        offsets             index in ``input`` at which each bag begins
        per_sample_weights  factor of each key, in the shape of ``input``; only with mode "sum"
        """
        return functional.embedding_bag(
            self.rows(input),
            self.weight,
            offsets,
            mode=self.mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset,
        )

    @torch.jit.export
    def rows(self, input: Tensor) -> Tensor:
        """Return the number of the row of each key, int64 in the shape of ``input``."""
        return rows_of(self.keys, input)

    @torch.jit.export
    def lookup(self, input: Tensor) -> Tensor:
        """Return the row of each key, float[*shape, dim], without combining."""
        return functional.embedding(rows_of(self.keys, input), self.weight)


class QuantizedEmbeddingBag(nn.Module):
    """Combines rows of 8-bit numbers: a quarter of the memory of EmbeddingBag. CPU only.

    Each row has its own scale and offset. Made by ``quantized``. The only mode is "sum".
    """

    keys: Tensor
    packed: Tensor

    def __init__(self, keys: Tensor, packed: Tensor, *, include_last_offset: bool = False) -> None:
        """Keep the keys, and the rows in the format of torch.ops.quantized."""
        super().__init__()
        self.register_buffer("keys", keys)
        self.register_buffer("packed", packed)
        self.include_last_offset = include_last_offset

    def forward(
        self,
        input: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        """Return the sum of the rows of each bag; the arguments are those of EmbeddingBag."""
        if input.dim() == 2:
            offsets = torch.arange(0, input.numel(), input.size(1), device=input.device)
            if self.include_last_offset:
                offsets = torch.arange(0, input.numel() + 1, input.size(1), device=input.device)
        combined: Tensor = torch.ops.quantized.embedding_bag_byte_rowwise_offsets(
            self.packed,
            rows_of(self.keys, input).reshape(-1),
            offsets,
            False,
            0,
            False,
            None if per_sample_weights is None else per_sample_weights.reshape(-1),
            None,
            self.include_last_offset,
        )
        return combined


def rows_of(keys: Tensor, input: Tensor) -> Tensor:
    """Return the index of each element of ``input`` in ``keys``, or n if it is not there.

    keys  int64[n], sorted
    """
    n = keys.size(0)
    if n == 0:
        return torch.zeros_like(input, dtype=torch.int64)
    wanted = input.to(torch.int64)
    at = torch.searchsorted(keys, wanted).clamp(max=n - 1)
    return torch.where(keys[at] == wanted, at, n)


def load(path: str, *, mode: str = "sum", include_last_offset: bool = False) -> EmbeddingBag:
    """Load a file that ``psctl export --format torch`` wrote. It is mapped into memory.

    The file is loaded with weights_only, so no code in it can run. Raises ValueError if it is not
    such a file.
    """
    loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(loaded, dict) or not {"keys", "weight"} <= loaded.keys():
        raise ValueError(f"{path}: must contain the tensors 'keys' and 'weight'")
    return EmbeddingBag(
        loaded["keys"], loaded["weight"], mode=mode, include_last_offset=include_last_offset
    )


def quantized(bag: EmbeddingBag) -> QuantizedEmbeddingBag:
    """Return a copy with 8-bit numbers. Raises ValueError unless the mode is "sum"."""
    if bag.mode != "sum":
        raise ValueError(f"'mode' must be 'sum' to quantize, got {bag.mode!r}")
    packed = torch.ops.quantized.embedding_bag_byte_prepack(bag.weight)
    return QuantizedEmbeddingBag(bag.keys, packed, include_last_offset=bag.include_last_offset)


def _check(keys: Tensor, weight: Tensor) -> None:
    """Raise ValueError unless the tensors are those of an EmbeddingBag."""
    if keys.dim() != 1 or keys.dtype != torch.int64:
        raise ValueError(f"'keys' must be int64[n], got {keys.dtype} of shape {tuple(keys.shape)}")
    if weight.dim() != 2 or not weight.is_floating_point() or weight.size(0) != len(keys) + 1:
        raise ValueError(
            f"'weight' must be floats of shape ({len(keys) + 1}, dim): one row per key and one for"
            f" all other keys; got {weight.dtype} of shape {tuple(weight.shape)}"
        )
    if len(keys) > 1 and not bool((keys[1:] > keys[:-1]).all()):
        raise ValueError("'keys' must be sorted and distinct")
