"""Run analyses in slices, with a pause after each slice.

The pauses keep analyses from taking processor time from pulls and pushes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from psserver.engine import Engine

Slice = TypeVar("Slice")
Result = TypeVar("Result")

SPARED = 80  # default pause after a slice, as a multiple of its time: slices use 1/81 of a core
SPARED_STORED = 9  # the same for slices that read a checkpoint: they use 1/10 of a core
LONGEST = 1.0  # longest pause of ``beside``, in seconds; a server that stops waits for its end


class Pace:
    """Runs slices (short pieces) of work, and pauses after each one. If several threads call, they
    take turns: a slice and its pause end before the next slice begins.

    spared  length of a pause, as a multiple of the processor time that the slice took
    """

    def __init__(self, engine: Engine, spared: float = SPARED) -> None:
        self._engine = engine
        self._spared = spared
        self._turn = threading.Lock()

    def run(self, read: Callable[[], Slice], work: Callable[[Slice], Result]) -> Result:
        """Run one slice of an analysis, pause, and return the result of ``work``.

        read  called on the engine thread; returns the data of the slice
        work  called with these data, on the calling thread
        """

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
        """Run a slice that does not need the engine thread, pause, and return its result.

        work  called on the calling thread

        The pause lasts at most LONGEST (1 s).
        """
        with self._turn:
            start = time.thread_time()
            done = work()
            time.sleep(min(self._spared * (time.thread_time() - start), LONGEST))
        return done
