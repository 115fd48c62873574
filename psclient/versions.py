"""Versions of shards, and epochs, which tell whether two versions belong to the same history.

The version of a shard is a number that grows with every change. A shard draws a random number, its
epoch, at each start. After a shard was restored, or its data directory was replaced by an older
copy, it uses the same version numbers again for other changes, but in a new epoch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


class Versions(tuple[int, ...]):
    """A tuple with one version per shard, and the epoch of each version.

    epochs  epoch of each version: the random number that the server drew at the start after which
            it reached the version. 0: unknown, so that only the version numbers can be compared
    """

    epochs: tuple[int, ...]

    def __new__(cls, versions: Iterable[int], epochs: Iterable[int] = ()) -> Versions:
        """Create from one version per shard, and one epoch per shard (see the class)."""
        self = super().__new__(cls, versions)
        self.epochs = tuple(epochs)
        return self

    def __getnewargs__(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the arguments of ``__new__``, for pickle and copy."""
        return tuple(self), self.epochs


NO_VERSIONS = Versions((), ())


@dataclass(frozen=True, slots=True)
class History:
    """The newest epochs of one shard. An epoch is a random number that each server start draws.

    epochs  oldest first; the last one is the current epoch
    ends    last version that the shard reached in each epoch, except in the current one
    """

    epochs: tuple[int, ...]
    ends: tuple[int, ...]

    @property
    def epoch(self) -> int:
        """Return the current epoch: the number that the running server drew at its start."""
        return self.epochs[-1]

    def contains(self, epoch: int, version: int) -> bool | None:
        """Return whether a version belongs to this history, and was not undone by a restore.

        epoch    epoch in which the shard reached the version
        version  the version

        Returns None if this history does not contain the epoch.
        """
        for known, end in zip(self.epochs, self.ends, strict=False):
            if known == epoch:
                return version <= end
        return True if epoch == self.epoch else None
