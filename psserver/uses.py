"""Which checkpoints are in use on this shard, so that nobody deletes what another one reads."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from psserver.errors import CheckpointBusy


class Uses:
    """The checkpoints in use, by name. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users: dict[str, list[str]] = {}
        self._deleted: set[str] = set()

    @contextmanager
    def using(self, names: Iterable[str], what: str) -> Iterator[None]:
        """Keep checkpoints from being deleted. Raises CheckpointBusy if one is being deleted.

        what  describes the work, for a client that wants to delete one of them
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
        """Keep checkpoints from being used. Raises CheckpointBusy, which names the use of one."""
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
