"""Coordinate long operations on checkpoints: one at a time, with progress, ended when the server
stops.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from psproto import ps_pb2 as pb
from psserver.errors import CheckpointBusy, Draining


class Progress:
    """Progress of a long operation. The thread that runs it writes; the event loop reads.

    principal  name of the principal that began the operation; "": there is no policy
    stopping   event that is set when the server stops
    """

    def __init__(self, stopping: threading.Event) -> None:
        self.bytes = 0  # read or written so far
        self.total = 0  # estimate of the bytes in the end; 0: unknown
        self.rows = 0  # read or written so far
        self.stage = pb.CheckpointProgress.STAGE_UNSPECIFIED  # shown to the client
        self.given_up = False  # True once the client is gone
        self.principal = ""
        self._stopping = stopping

    def add(self, size: int) -> None:
        """Add ``size`` to ``bytes``. Raises Draining if the server stops or the client is gone."""
        self.bytes += size
        self.require_wanted()

    @property
    def stopping(self) -> bool:
        """Whether the server is stopping."""
        return self._stopping.is_set()

    def require_wanted(self) -> None:
        """Raise Draining if the server is stopping or the client is gone."""
        if self.given_up or self.stopping:
            raise Draining("the server is stopping, or the client is gone")

    def message(self) -> pb.CheckpointProgress:
        """Return the progress so far as a message for the client."""
        stage = self.stage  # first: the rows are final once it is DONE
        return pb.CheckpointProgress(
            bytes=self.bytes, total=self.total, rows=self.rows, stage=stage
        )


class Work:
    """Lets one operation on checkpoints at a time run on a shard, and makes the running ones fail
    when the server stops. Thread-safe.

    on_stop  called by ``stop``
    """

    def __init__(self, on_stop: Callable[[], None] = lambda: None) -> None:
        self._lock = threading.Lock()
        self._owner = ""
        self._refusal = ""  # why no work can begin any more
        self._stopping = threading.Event()
        self._on_stop = on_stop

    @property
    def running(self) -> str:
        """Description of the operation that runs now; "" if none does. Any thread may read it."""
        return self._owner if self._lock.locked() else ""

    def progress(self) -> Progress:
        """Return a new Progress for an operation that begins."""
        return Progress(self._stopping)

    def stop(self) -> None:
        """Make all operations fail with Draining at their next progress check."""
        self._stopping.set()
        self._on_stop()

    def refuse(self, why: str) -> None:
        """Make every later call of ``alone`` raise CheckpointBusy, until the server restarts.

        why  reason, shown to clients
        """
        self._refusal = why

    @contextmanager
    def alone(self, what: str) -> Iterator[None]:
        """Return a context manager that lets no other operation run during its block.

        what  description of the operation, shown to clients that are refused meanwhile

        Raises CheckpointBusy, with the description of the running operation, if there is one.
        """
        if self._refusal:
            raise CheckpointBusy(f"{self._refusal}: restart the shard")
        if not self._lock.acquire(blocking=False):
            raise CheckpointBusy(f"the shard is busy: {self._owner}; try again later")
        self._owner = what
        try:
            yield
        finally:
            self._lock.release()
