"""Tiers and tables with rows in GPU memory, on any device, where tests move rows."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np

from storage.arena import Budget
from storage.gpu.device import Device
from storage.gpu.gpu import Gpu
from storage.initializers import Initializer
from storage.kernels import Keys, Rows, Slots
from storage.tiers.hbm import HbmTier

PIECE = 1 << 16  # bytes
PART = 1 << 16  # bytes of page-locked memory at first, so that a Gpu is made quickly
NONE = np.empty(0, np.int64)


def make_gpu(device: Device, limit: int = 1 << 30, part: int = PART, **more: Any) -> Gpu:
    """A Gpu with little page-locked memory; it grows if a test needs more."""
    with mock.patch.multiple("storage.gpu.gpu", PART=part, SCAN_PART=part):
        return Gpu(device, limit, **more)


class LiftedTier(HbmTier):
    """A tier that moves new rows to the GPU at once.

    share  part of the new rows that move, drawn at random
    """

    share = 1.0
    _rng = np.random.default_rng(0)

    def create(self, keys: Keys, slots: Slots, initializer: Initializer, seed: int) -> None:
        super().create(keys, slots, initializer, seed)
        self.lift(slots)

    def scatter(self, slots: Slots, rows: Rows) -> None:
        super().scatter(slots, rows)
        self.lift(slots[slots >= 0])

    def lift(self, slots: Slots) -> None:
        """Move rows to the GPU that are not there."""
        chosen = slots[self._rng.random(len(slots)) < self.share]
        self.move(chosen[~self.in_hbm(chosen)], NONE)

    def stir(self, rng: np.random.Generator) -> None:
        """Move some rows up, and others down, or down alone; give free memory back now and then."""
        slots = np.flatnonzero(self.where[: self.slots.used] != -1)
        slots = slots[rng.random(len(slots)) < 0.2]
        near = self.in_hbm(slots)
        up, down = slots[~near], slots[near]
        self.move(up if rng.random() < 0.7 else NONE, down)
        if rng.random() < 0.3:
            self.compact(int(rng.integers(0, 1 << 20)))
            self.shrink_hbm()


def tier_on(
    device: Device, budget: Budget, dim: int, state: Any, share: float = 1.0, **more: Any
) -> LiftedTier:
    tier = LiftedTier(dim, state, budget, make_gpu(device, **more), None, PIECE)
    tier.share = share
    return tier
