"""Find the log versions that are older than a TTL (time to live, in seconds or steps)."""

from __future__ import annotations

import struct
from array import array
from bisect import bisect_left
from itertools import chain

PARTS = 256  # samples per TTL


class Timeline:
    """Maps versions to times, to find the versions that are older than a TTL.

    A row records the version of its last push, not its time. The timeline keeps samples: pairs of a
    version and the time of its push. Pushes within 1/256 of a TTL (1/PARTS) share one sample, that
    of the last push. A row therefore counts as idle up to 1/256 of a TTL too late, and never too
    early. Of the samples that are older than a TTL only the newest is kept, so there are at most
    259 samples, 4 KiB.

    The clock may go back.

    * By less than 1/256 of a TTL: time stands still until the clock has caught up.
    * By more: either the clock was ahead and is right again, or it is wrong now and will be
      corrected. No row may seem more idle than it is in either case. Therefore pushes at times that
      are now in the future count as pushed now. Later the clock reaches the time again that it
      showed before it went back. At the next push after that, all rows count as pushed just then.
    """

    def __init__(self, ttl: float) -> None:
        """Create a timeline without samples.

        ttl  time to live, in the unit of the times that ``add`` gets: seconds or steps
        """
        self.ttl = ttl
        self._versions = array("Q")  # of the samples, ascending
        self._times = array("d")  # of the samples, ascending
        self._start = 0.0  # time of the first push that shares the last sample
        self._latest = 0.0  # latest time that the clock has shown

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._times)

    def add(self, version: int, time: float) -> None:
        """Record a push. Does nothing if ``version`` is not newer than the newest recorded version.

        version  log version of the push
        time     time of the push, by a clock that continues while the process is down
        """
        part = self.ttl / PARTS
        if self._versions:
            newest, last = self._versions[-1], self._times[-1]
            if version <= newest:
                return
            if self._caught_up(time):
                self._drop(0, len(self))
                self._append(newest, time)
            elif time < last - part:
                self._drop(self._count_before(time - part), len(self))
                self._append(newest, time)
            else:
                time = max(time, last)
        self._latest = max(self._latest, time)
        if self._versions and time - self._start <= part:
            self._versions[-1], self._times[-1] = version, time
            return
        self._drop(0, self._count_before(time - self.ttl) - 1)
        self._append(version, time)

    def version_before(self, time: float) -> int:
        """Return the newest version that is more than a TTL old at ``time``; 0 if there is none."""
        idle = 0 if self._caught_up(time) else self._count_before(time - self.ttl)
        return self._versions[idle - 1] if idle else 0

    def _append(self, version: int, time: float) -> None:
        self._versions.append(version)
        self._times.append(time)
        self._start = time

    def _drop(self, start: int, stop: int) -> None:
        if stop > start:
            del self._versions[start:stop], self._times[start:stop]

    def _caught_up(self, time: float) -> bool:
        """Return whether the clock went back earlier and has now reached its old time again."""
        return bool(self._times) and self._times[-1] < self._latest <= time

    def _count_before(self, time: float) -> int:
        """Return how many samples are older than ``time``."""
        return bisect_left(self._times, time)

    def pack(self) -> bytes:
        """Return the timeline as bytes for ``load``.

        Format: start f64 | latest f64 | { version u64 | time f64 }*, little-endian.
        """
        numbers = chain.from_iterable(zip(self._versions, self._times, strict=True))
        return struct.pack("<dd" + "Qd" * len(self), self._start, self._latest, *numbers)

    def load(self, data: bytes) -> None:
        """Replace all samples by those in ``data``, which ``pack`` returned.

        Raises ValueError if ``data`` is empty or not a multiple of 16 bytes.
        """
        if not data or len(data) % 16:
            raise ValueError(
                f"the length of a timeline must be a positive multiple of 16 bytes, got {len(data)}"
                " bytes"
            )
        self._start, self._latest = struct.unpack_from("<dd", data)
        numbers = struct.unpack_from("<" + "Qd" * (len(data) // 16 - 1), data, 16)
        self._versions, self._times = array("Q", numbers[::2]), array("d", numbers[1::2])

    def copy(self) -> Timeline:
        """Return a copy."""
        return self.with_ttl(self.ttl)

    def with_ttl(self, ttl: float) -> Timeline:
        """Return a timeline with a different TTL and a copy of the samples.

        ttl  in the unit of the times that ``add`` gets

        If the new TTL is longer, samples that the old TTL dropped are missing. Rows that were
        pushed before the oldest sample then count as idle only when that sample exceeds the TTL.
        """
        other = Timeline(ttl)
        other._versions, other._times = self._versions[:], self._times[:]
        other._start, other._latest = self._start, self._latest
        return other
