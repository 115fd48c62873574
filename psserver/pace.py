"""Take turns with slices of slow work, and pause after each slice."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from psserver.engine import Engine

Slice = TypeVar("Slice")
Result = TypeVar("Result")

SPARED = 80  # length of a pause, as a multiple of the work before it: 1/81 of a core
SPARED_STORED = 9  # the same for pieces of checkpoints: another 1/10 of a core
LONGEST = 1.0  # seconds of a pause without the engine; a server that stops waits for its end


class Pace:
    """Runs slices of all such work one after the other, with a pause after each.

    spared  length of a pause, as a multiple of the processor time of the slice before it
    """

    def __init__(self, engine: Engine, spared: float = SPARED) -> None:
        self._engine = engine
        self._spared = spared
        self._turn = threading.Lock()

    def run(self, read: Callable[[], Slice], work: Callable[[Slice], Result]) -> Result:
        """Run ``read`` on the engine thread, then ``work`` on its result here, then pause."""

        def timed() -> tuple[Slice, float]:
            start = time.thread_time()
            return read(), time.thread_time() - start

        with self._turn:
            found, took = self._engine.run(timed)
            start = time.thread_time()
            done = work(found)
            time.sleep(self._spared * (took + time.thread_time() - start))
        return done

    def beside(self, work: Callable[[], Result]) -> Result:
        """Run ``work`` on this thread, without the engine, then pause for at most LONGEST."""
        with self._turn:
            start = time.thread_time()
            done = work()
            time.sleep(min(self._spared * (time.thread_time() - start), LONGEST))
        return done
