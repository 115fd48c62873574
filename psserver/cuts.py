"""Capture a shard at the moment at which a named barrier is placed.

A checkpoint that is to end at a barrier expects it here before it copies rows. The engine thread,
which applies one change after the other, captures the shard right after it has applied the
barrier, so that no other change comes in between.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from psserver.capture import Capture
from psserver.errors import BarrierMissed
from psserver.work import Progress

LOOK_SECONDS = 0.05  # seconds between two checks whether the client is gone


class Cut:
    """One checkpoint's wait for a barrier.

    barrier   name of the barrier
    seconds   how long to wait for it
    captured  the shard as of the first barrier of this name; None: it has not been placed yet
    """

    def __init__(self, barrier: str, seconds: float) -> None:
        self.barrier = barrier
        self._seconds = seconds
        self.captured: Capture | None = None
        self._placed = threading.Event()

    def place(self, captured: Capture) -> None:
        """Record the shard as of the barrier, and let ``wait`` return."""
        self.captured = captured
        self._placed.set()

    def wait(self, progress: Progress) -> Capture:
        """Wait until the barrier is placed. Returns the shard as of the barrier.

        progress  of the operation that waits; it knows whether the client still wants the result

        Raises BarrierMissed after ``seconds``, and Draining if the client is gone or the server
        stops. Must run on a thread other than the engine's.
        """
        end = time.monotonic() + self._seconds
        while not self._placed.wait(LOOK_SECONDS):
            progress.require_wanted()
            if time.monotonic() > end:
                raise BarrierMissed(
                    f"barrier {self.barrier!r} was not placed within {self._seconds:g} s"
                    " (barrier_timeout_ms): the checkpoint was given up; take it again, and place"
                    " the barrier once all shards wait for it"
                )
        assert self.captured is not None
        return self.captured

    def require_after(self, version: int) -> None:
        """Raise BarrierMissed if the barrier was placed before ``version``, from which rows are
        copied: the copy then contains later changes.
        """
        captured = self.captured
        if captured is not None and captured.version < version:
            raise BarrierMissed(
                f"barrier {self.barrier!r} was placed at version {captured.version}, before the"
                f" shard began to copy its rows at version {version}: take the checkpoint again,"
                " and place the barrier once all shards wait for it"
            )


class Cuts:
    """The barriers that checkpoints of one shard wait for. Only the engine thread may use it."""

    def __init__(self) -> None:
        self._expected: list[Cut] = []

    def expect(self, cut: Cut) -> None:
        """Let ``cut`` capture the shard at the next barrier of its name."""
        self._expected.append(cut)

    def forget(self, cut: Cut) -> None:
        """Stop to wait for the barrier of ``cut``. Does nothing if it was placed."""
        if cut in self._expected:
            self._expected.remove(cut)

    def placed(self, barrier: str, capture: Callable[[], Capture]) -> None:
        """Capture the shard for every cut that waits for this barrier.

        barrier  name of the barrier, which was just applied
        capture  returns the shard as it is now; called only if a cut waits
        """
        reached = [cut for cut in self._expected if cut.barrier == barrier]
        for cut in reached:
            self._expected.remove(cut)
            cut.place(capture())
