"""Load rows into host memory after a start, in the background.

A restart finds all rows on disk and serves at once; rows are read from there, in place. A push
brings its rows into host memory. If a table fits into host memory as a whole, this thread loads the
rest of it, so that pulls of rows that are never pushed become as fast as before the restart.
"""

from __future__ import annotations

import threading
import time
from functools import partial

import structlog

from psserver.engine import Engine
from psserver.preloads import Preloads
from storage.errors import Corrupt, OutOfMemory
from storage.threads import Background

SHARE = 0.2  # share of the engine's time
ALL = (1 << 48) - 1  # the largest version

log = structlog.get_logger()


class Preloader:
    """The thread that loads rows."""

    def __init__(self, preloads: Preloads, engine: Engine) -> None:
        self._preloads = preloads
        self._engine = engine
        self._stop = threading.Event()
        self._thread = Background("preloader", self._run)

    def open(self) -> None:
        """Start the thread. It ends when all tables are loaded."""
        self._thread.start()

    def close(self) -> None:
        """Stop the thread. Call it before the engine is closed."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        for number in self._engine.run(self._preloads.numbers):
            began = time.monotonic()
            try:
                rows = self._load(number)
            except OutOfMemory:  # clients need the memory
                return
            except (Corrupt, OSError) as error:  # the pull that needs the row names it again
                log.warning("preloading failed", table=number, error=str(error))
                continue
            except Exception:
                log.exception("preloading failed", table=number)
                continue
            if rows:
                seconds = round(time.monotonic() - began, 2)
                log.info("preloaded", table=number, rows=rows, seconds=seconds)

    def _load(self, number: int) -> int:
        """Load the rows of one table; return how many were loaded."""
        run, preloads = self._engine.run, self._preloads
        begun = run(partial(preloads.begin, number))
        if begun is None:
            return 0
        scan, most = begun
        start: int | None = 0
        rows = 0
        while start is not None and not self._stop.is_set():
            places, start = scan.find(start, 0, ALL, most)
            pages = run(partial(preloads.pages, number, places)) if len(places) else None
            if pages is None:
                continue
            pages.warm()
            began = time.monotonic()
            rows += run(partial(preloads.load, number, pages, places))
            self._stop.wait((time.monotonic() - began) * (1 / SHARE - 1))
        return rows
