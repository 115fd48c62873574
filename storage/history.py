"""Epochs: which versions belong to the history of a log.

A shard draws a random epoch at each start. Its history is the list of its epochs, and for each but
the last the newest version that it reached. A version is only known together with its epoch: after
a data directory was put back from a copy, the shard reaches the same version numbers again with
other changes. A version of the abandoned future is not part of the history then: its epoch ended
earlier, or is unknown.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

MAX_EPOCHS = 4096  # starts; versions of an earlier epoch are no longer recognized


def draw_epoch() -> int:
    """Return a random epoch, never 0."""
    return int.from_bytes(os.urandom(8), "little") or 1


@dataclass(frozen=True, slots=True)
class History:
    """The epochs of one log.

    epochs  oldest first; the last one is current
    ends    newest version of each epoch but the last
    """

    epochs: tuple[int, ...]
    ends: tuple[int, ...] = ()

    @property
    def epoch(self) -> int:
        """The current epoch."""
        return self.epochs[-1]

    def contains(self, epoch: int, version: int) -> bool:
        """Return whether a version of an epoch is part of this history, or can become so."""
        for known, end in zip(self.epochs, self.ends, strict=False):
            if known == epoch:
                return version <= end
        return epoch == self.epoch

    def begin(self, epoch: int, end: int) -> History:
        """Return the history after a start: the current epoch ends at version ``end``."""
        return History((*self.epochs, epoch)[-MAX_EPOCHS:], (*self.ends, end)[-MAX_EPOCHS + 1 :])
