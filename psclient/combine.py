"""Combine rows of several parts into one embedding, and split its gradient among the parts.

To add a combination: write the class, add it to COMBINATIONS, and its counterpart for tensors to
COMBINE in psclient.torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Literal, Protocol

import numpy as np

from psclient.arrays import Rows
from psclient.errors import InvalidArgument

Combine = Literal["add", "multiply", "concatenate"]


class Combination(Protocol):
    """A way to combine parts float32[*shape, dim of the part] into embeddings float32[*shape,
    dim].
    """

    reads_parts: bool  # whether ``gradients`` needs the rows of the parts

    def dim(self, dims: Sequence[int]) -> int:
        """Return the dim of the embeddings from the dims of the parts.

        Raises InvalidArgument if these dims cannot be combined.
        """

    def combine(self, parts: Sequence[Rows]) -> Rows:
        """Return the embeddings float32[*shape, dim]."""

    def gradients(self, gradient: Rows, parts: Sequence[Rows], dims: Sequence[int]) -> list[Rows]:
        """Return the gradient of each part, float32[*shape, dim of the part].

        gradient  float32[*shape, dim], of the embeddings
        parts     rows of the parts; may be empty unless ``reads_parts``
        dims      dims of the parts
        """


class _Elementwise:
    def dim(self, dims: Sequence[int]) -> int:
        if len(set(dims)) > 1:
            raise InvalidArgument(
                f"tables must have equal dims to be added or multiplied, got {list(dims)}"
            )
        return dims[0]


class _Add(_Elementwise):
    reads_parts = False

    def combine(self, parts: Sequence[Rows]) -> Rows:
        return reduce(np.add, parts)

    def gradients(self, gradient: Rows, parts: Sequence[Rows], dims: Sequence[int]) -> list[Rows]:
        return [gradient] * len(dims)


class _Multiply(_Elementwise):
    reads_parts = True

    def combine(self, parts: Sequence[Rows]) -> Rows:
        return reduce(np.multiply, parts)

    def gradients(self, gradient: Rows, parts: Sequence[Rows], dims: Sequence[int]) -> list[Rows]:
        """Multiply the gradient by the rows of all other parts.

        Nothing is divided, so rows may be 0.
        """
        return [
            reduce(np.multiply, [*parts[:one], *parts[one + 1 :]], gradient)
            for one in range(len(parts))
        ]


class _Concatenate:
    reads_parts = False

    def dim(self, dims: Sequence[int]) -> int:
        return sum(dims)

    def combine(self, parts: Sequence[Rows]) -> Rows:
        return np.concatenate(parts, axis=-1)

    def gradients(self, gradient: Rows, parts: Sequence[Rows], dims: Sequence[int]) -> list[Rows]:
        return np.split(gradient, np.cumsum(dims)[:-1], axis=-1)


COMBINATIONS: dict[str, Combination] = {
    "add": _Add(),
    "multiply": _Multiply(),
    "concatenate": _Concatenate(),
}
