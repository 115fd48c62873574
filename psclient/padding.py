"""Sizes of padded arrays, so that a compiler that specializes by shape sees few of them."""

from __future__ import annotations

SMALLEST = 16


def padded(count: int) -> int:
    """Return the smallest size that is at least ``count``: 16, 23, 32, 46, 64, 91, 128, ...

    Each size is about the square root of 2 times the one before, so at most 30 % of an array of
    this size is padding.
    """
    size = SMALLEST
    while size < count:
        size *= 2
    smaller = int(size / 2**0.5) + 1
    return smaller if size > SMALLEST and count <= smaller else size


class Room:
    """Size of an array that holds one batch's rows. It grows, and never shrinks.

    limit  the largest size; None: any
    size   the size now

    Sizes that only grow let a model with several tables compile once per new size of one table, not
    once per combination of sizes.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.size = 0

    def fit(self, count: int) -> int:
        """Return the size for ``count`` rows, which must not exceed the limit."""
        if count > self.size:
            self.size = padded(count) if self.limit is None else min(padded(count), self.limit)
        return self.size
