"""Which versions are older than a TTL."""

from __future__ import annotations

import struct
from bisect import bisect_left
from itertools import chain

PARTS = 256  # of a TTL: how closely time is known


class Timeline:
    """Which versions are older than a TTL; rows know the version of their last push, not its time.

    Pushes within 1/PARTS of a TTL share a sample, the last of them, so that a row is found idle by
    that much too late, and never too early. Samples older than a TTL tell nothing new: one is
    kept, and at most PARTS + 3 in all.

    A clock that goes back by less than such a part stands still until it has caught up. By more:
    it was ahead and is right again, or it is wrong now and will be set right. No row may seem more
    idle than it is in either case. So what was pushed in the future counts as pushed now; and when
    the clock reaches the future of then, all rows count as pushed at the next push.
    """

    def __init__(self, ttl: float) -> None:
        self.ttl = ttl
        self._samples: list[tuple[int, float]] = []  # version, seconds; both ascending
        self._start = 0.0  # seconds of the first push that shares the last sample
        self._most = 0.0  # the latest that the clock has shown: later than that if it went back

    def __len__(self) -> int:
        return len(self._samples)

    def add(self, version: int, seconds: float) -> None:
        """There was a push; ``seconds`` of any clock that goes on after a restart."""
        part = self.ttl / PARTS
        if self._samples:
            newest, last = self._samples[-1]
            if version <= newest:
                return  # known from the checkpoint, replayed from the log
            if self._caught_up(seconds):
                self._samples, self._start = [(newest, seconds)], seconds
            elif seconds < last - part:
                del self._samples[self._before(seconds - part) :]
                self._samples.append((newest, seconds))
                self._start = seconds
            else:
                seconds = max(seconds, last)
        self._most = max(self._most, seconds)
        if self._samples and seconds - self._start <= part:
            self._samples[-1] = version, seconds
            return
        del self._samples[: max(0, self._before(seconds - self.ttl) - 1)]
        self._samples.append((version, seconds))
        self._start = seconds

    def version_before(self, seconds: float) -> int:
        """All versions up to this one are older than a TTL; 0 if none is known to be."""
        idle = 0 if self._caught_up(seconds) else self._before(seconds - self.ttl)
        return self._samples[idle - 1][0] if idle else 0

    def _caught_up(self, seconds: float) -> bool:
        """Whether the clock went back and is again where it was."""
        return bool(self._samples) and self._samples[-1][1] < self._most <= seconds

    def _before(self, seconds: float) -> int:
        """Samples of earlier times: the first ones."""
        return bisect_left(self._samples, seconds, key=lambda sample: sample[1])

    def pack(self) -> bytes:
        """start f64 | most f64 | { version u64 | seconds f64 }*, little-endian."""
        numbers = chain.from_iterable(self._samples)
        layout = "<dd" + "Qd" * len(self._samples)
        return struct.pack(layout, self._start, self._most, *numbers)

    def copy(self) -> Timeline:
        """Return a timeline that goes on from the same samples."""
        return self.with_ttl(self.ttl)

    def with_ttl(self, ttl: float) -> Timeline:
        """Return a timeline of another TTL that goes on from the same samples.

        Samples that a shorter TTL dropped are unknown to a longer one: until it has passed, rows
        that were pushed before the oldest sample do not count as idle.
        """
        other = Timeline(ttl)
        other._samples = self._samples.copy()
        other._start, other._most = self._start, self._most
        return other

    def load(self, data: bytes) -> None:
        """Take over what ``pack`` returned; ValueError if it is not that."""
        if not data or len(data) % 16:
            raise ValueError(f"a timeline is 16 bytes and 16 for each sample, got {len(data)}")
        self._start, self._most = struct.unpack_from("<dd", data)
        self._samples = list(struct.iter_unpack("<Qd", data[16:]))
