"""Versions of shards, and epochs, which tell whether two versions belong to the same history.

A shard draws a random number, its epoch, at each start. After the shard is restored, or its data
directory is replaced by an older copy, it gives out the same version numbers again for other
changes, but in a new epoch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


class Versions(tuple[int, ...]):
    """A tuple with one version per shard, and the epoch of each version.

    epochs  epoch of each version; 0: unknown, so only the version numbers can be compared
    """

    epochs: tuple[int, ...]

    def __new__(cls, versions: Iterable[int], epochs: Iterable[int] = ()) -> Versions:
        """Create from one version per shard, and one epoch per shard (random number of a server
        start).
        """
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
    ends    newest version of each epoch, except of the current one
    """

    epochs: tuple[int, ...]
    ends: tuple[int, ...]

    @property
    def epoch(self) -> int:
        """Return the current epoch."""
        return self.epochs[-1]

    def contains(self, epoch: int, version: int) -> bool | None:
        """Return whether a version that was given out in ``epoch`` belongs to this history.

        None: the epoch is not known here.
        """
        for known, end in zip(self.epochs, self.ends, strict=False):
            if known == epoch:
                return version <= end
        return True if epoch == self.epoch else None
