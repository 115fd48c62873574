"""Where the numbers of the rows of an HbmTier are: in host memory or in GPU memory."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.kernels import ABSENT, AHEAD, Slots, jit, prefetch


@jit
def _split(where: Any, slots: Any, far: Any, near: Any) -> Any:
    """Look up where the numbers of some slots are.

    where  int64[capacity]  number of the row in the slab of the host; or -2 - (its number in that
           of the GPU); or ABSENT for a slot without a row
    slots  int64[n]  may be ABSENT
    far    int64[n]  written: number in the slab of the host, or ABSENT
    near   int64[n]  written: number in the slab of the GPU, or ABSENT

    Returns how many are in the slab of the GPU.
    """
    n, count = slots.shape[0], 0
    for i in range(n):
        if i + AHEAD < n and slots[i + AHEAD] >= 0:
            prefetch(where, slots[i + AHEAD], 0)
        at = where[slots[i]] if slots[i] >= 0 else ABSENT
        far[i] = max(at, ABSENT)
        near[i] = max(-2 - at, ABSENT)
        count += at < ABSENT
    return count


@jit
def find_near(where: Any, slots: Any, near: Any) -> Any:
    """Do what ``_split`` does for the slab of the GPU alone."""
    n, count = slots.shape[0], 0
    for i in range(n):
        if i + AHEAD < n and slots[i + AHEAD] >= 0:
            prefetch(where, slots[i + AHEAD], 0)
        at = where[slots[i]] if slots[i] >= 0 else ABSENT
        near[i] = max(-2 - at, ABSENT)
        count += at < ABSENT
    return count


class Places:
    """Where the numbers of some slots are; see ``_split``."""

    __slots__ = ("far", "here", "near", "there")

    def __init__(self, where: NDArray[np.int64], slots: Slots) -> None:
        n = len(slots)
        self.far, self.near = np.empty(n, np.int64), np.empty(n, np.int64)
        count = _split(where, np.ascontiguousarray(slots), self.far, self.near)
        # indices of the slots in GPU memory, and in host memory; None: all others
        self.here = np.flatnonzero(self.near >= 0) if count else None
        self.there = None if count == 0 else np.flatnonzero(self.far >= 0)
