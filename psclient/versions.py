"""Versions of shards, and the epochs that tell whether two versions are of one history.

A shard draws a random epoch at each start. After a restore, or when a data directory was put back
from a copy, the same version numbers come again with other changes, in another epoch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


class Versions(tuple[int, ...]):
    """One version per shard: a tuple of integers, with the epoch of each version.

    epochs  by shard; 0: unknown, the version is compared as a number
    """

    epochs: tuple[int, ...]

    def __new__(cls, versions: Iterable[int], epochs: Iterable[int] = ()) -> Versions:
        """Create from versions and epochs by shard."""
        self = super().__new__(cls, versions)
        self.epochs = tuple(epochs)
        return self

    def __getnewargs__(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the arguments that a copy is created from."""
        return tuple(self), self.epochs


NO_VERSIONS = Versions((), ())


@dataclass(frozen=True, slots=True)
class History:
    """The newest epochs of one shard.

    epochs  oldest first; the last one is current
    ends    newest version of each epoch but the last
    """

    epochs: tuple[int, ...]
    ends: tuple[int, ...]

    @property
    def epoch(self) -> int:
        """The current epoch."""
        return self.epochs[-1]

    def contains(self, epoch: int, version: int) -> bool | None:
        """Return whether a version of an epoch belongs to this history; None: unknown epoch."""
        for known, end in zip(self.epochs, self.ends, strict=False):
            if known == epoch:
                return version <= end
        return True if epoch == self.epoch else None
