"""Ways to combine one row of each of several parts into an embedding: add, multiply, concatenate.

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
    """A way to combine rows of several parts into embeddings, and to split their gradients.

    The rows of a part are float32[*shape, dim of the part]; the embeddings float32[*shape, dim].
    """

    reads_parts: bool  # whether ``gradients`` needs the rows of the parts

    def dim(self, dims: Sequence[int]) -> int:
        """Return the dim of the embeddings that combine parts of these dims.

        Raises InvalidArgument if such parts cannot be combined.
        """

    def combine(self, parts: Sequence[Rows]) -> Rows:
        """Combine rows, float32[*shape, dim of the part] for each part, into embeddings.

        Returns float32[*shape, dim].
        """

    def gradients(self, gradient: Rows, parts: Sequence[Rows], dims: Sequence[int]) -> list[Rows]:
        """Compute the gradients of the rows of each part from those of the embeddings.

        gradient  float32[*shape, dim], gradients of the embeddings
        parts     rows that were combined, for each part; may be empty unless ``reads_parts``
        dims      dim of each part

        Returns float32[*shape, dim of the part] for each part.
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
        """Return for each part: ``gradient`` times the rows of all other parts."""
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
