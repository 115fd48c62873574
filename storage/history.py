"""Decide which versions belong to the history of a log, by the epochs that they were given out in.

An epoch is a random number that a shard draws at each start. The history of a log is the list of
its epochs. For each epoch except the current one it has the newest version of that epoch.

A version number alone does not identify a change. If a data directory is put back from an old copy,
the shard gives out the same version numbers again for different changes. So a version is compared
together with its epoch. A version that was given out after the copy was made does not belong
to the history of the restored directory: there its epoch is unknown, or ended at an older version.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

MAX_EPOCHS = 4096  # epochs kept; a version of an older epoch does not belong to the history


def draw_epoch() -> int:
    """Return a new epoch: a random 64-bit number, never 0."""
    return int.from_bytes(os.urandom(8), "little") or 1


@dataclass(frozen=True, slots=True)
class History:
    """The starts of the server that wrote one log. Each start draws a random number, its epoch.

    epochs  oldest first; the last one is the current epoch
    ends    newest version of each epoch except the current one, in the same order
    """

    epochs: tuple[int, ...]
    ends: tuple[int, ...] = ()

    @property
    def epoch(self) -> int:
        """Epoch of the current start of the server."""
        return self.epochs[-1]

    def contains(self, epoch: int, version: int) -> bool:
        """Return whether ``version``, given out in ``epoch``, belongs to this history.

        Every version of the current epoch does, including those not given out yet.
        """
        for known, end in zip(self.epochs, self.ends, strict=False):
            if known == epoch:
                return version <= end
        return epoch == self.epoch

    def begin(self, epoch: int, end: int) -> History:
        """Return this history extended by one start of the server.

        epoch  the new current epoch
        end    newest version of the epoch that was current so far
        """
        return History((*self.epochs, epoch)[-MAX_EPOCHS:], (*self.ends, end)[-MAX_EPOCHS + 1 :])
