"""Record which checkpoints this shard is reading, so that none is deleted meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from psserver.errors import CheckpointBusy


class Uses:
    """Registry that keeps a checkpoint from being deleted while it is read, and from being read
    while it is deleted. Thread-safe.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users: dict[str, list[str]] = {}
        self._deleted: set[str] = set()

    @contextmanager
    def using(self, names: Iterable[str], what: str) -> Iterator[None]:
        """Return a context manager that keeps checkpoints from being deleted during its block.

        names  names of the checkpoints
        what   description of the use, shown to a client that tries to delete one of them

        Raises CheckpointBusy if one of them is being deleted.
        """
        names = list(names)
        with self._lock:
            for name in names:
                if name in self._deleted:
                    raise CheckpointBusy(f"checkpoint {name!r} is being deleted")
            for name in names:
                self._users.setdefault(name, []).append(what)
        try:
            yield
        finally:
            with self._lock:
                for name in names:
                    self._users[name].remove(what)
                    if not self._users[name]:
                        del self._users[name]

    @contextmanager
    def deleting(self, names: Iterable[str]) -> Iterator[None]:
        """Return a context manager that keeps checkpoints from being used during its block.

        names  names of the checkpoints that the caller is going to delete

        Raises CheckpointBusy if one of them is in use, or is already being deleted.
        """
        names = set(names)
        with self._lock:
            for name in sorted(names):
                if name in self._users:
                    raise CheckpointBusy(f"checkpoint {name!r} is in use: {self._users[name][0]}")
                if name in self._deleted:
                    raise CheckpointBusy(f"checkpoint {name!r} is being deleted by another client")
            self._deleted |= names
        try:
            yield
        finally:
            with self._lock:
                self._deleted -= names
