"""Read the processor time of a server's threads, and of the trainer, by what they do."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

# Name of a thread of the server, as the system shows it -> what its time counts as. All other
# threads count as LOOP: the event loop, gRPC, and the work that the loop gives away.
PARTS = {
    "engine": "engine",
    "flusher": "flusher",
    "cold reads": "disk reads",
    "version log": "log",
    "log sync": "log",
}
LOOP = "event loop, gRPC"
NAMES = (LOOP, "engine", "flusher", "disk reads", "log")


def spent(pid: int) -> dict[str, float]:
    """Return the processor time of a server in seconds, by NAMES."""
    seconds = dict.fromkeys(NAMES, 0.0)
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError):  # it has ended meanwhile
            part = PARTS.get((thread / "comm").read_text().rstrip("\n"), LOOP)
            seconds[part] += int((thread / "schedstat").read_text().split()[0]) / 1e9
    return seconds


class Clock:
    """Adds up the wall time and the processor time of this process while it runs."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    def __enter__(self) -> None:
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.wall += time.perf_counter() - self._wall
        self.cpu += time.process_time() - self._cpu

    def add(self, other: Clock) -> None:
        """Add the times of another clock."""
        self.wall += other.wall
        self.cpu += other.cpu


class Use:
    """What a trainer and its server used during the turns of the trainer.

    seconds  processor time of the server, by NAMES
    clock    times of the trainer
    steps    number of its steps
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(NAMES, 0.0)
        self.clock = Clock()
        self.steps = 0

    def add(self, before: dict[str, float], after: dict[str, float]) -> None:
        """Add what the server used between two calls of ``spent``."""
        for name, seconds in after.items():
            self.seconds[name] += seconds - before[name]

    def per_step(self) -> dict[str, float]:
        """Return all times per step, in milliseconds, as columns of a report."""
        every = {"client": self.clock.cpu, **self.seconds}
        every |= {"sum": sum(every.values()), "wall time": self.clock.wall}
        return {name: 1e3 * seconds / self.steps for name, seconds in every.items()}


def spread(uses: Sequence[Use], first: dict[str, float], last: dict[str, float]) -> None:
    """Add what a server used outside of all turns of its trainers to ``uses``, by steps.

    uses         one per trainer of the server
    first, last  what ``spent`` returned before the first turn and after the last
    """
    steps = sum(use.steps for use in uses)
    for name in NAMES:
        away = last[name] - first[name] - sum(use.seconds[name] for use in uses)
        for use in uses:
            use.seconds[name] += away * use.steps / steps


def cores() -> int:
    """Return the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0))
