"""The phase of a server: what it is doing now, from the start of its process to its stop.

    KERNELS -> GPU -> RECOVERY -> READY -> DRAINING
                                    `-> RESTORING -> READY

A server whose number is not below the number of shards stays in NOT_A_SHARD.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from psproto import ps_pb2 as pb

SERVING = (pb.PHASE_READY, pb.PHASE_RESTORING)  # phases in which health checks report SERVING


class Phases:
    """Records the phase of a server and the time since which it lasts.

    Any thread may read; only one thread may call ``enter``.

    clock    returns monotonic seconds
    blocked  whether a restore blocks the shard, which is then RESTORING instead of READY
    """

    def __init__(
        self, first: pb.Phase = pb.PHASE_KERNELS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._entered = (first, clock())  # phase, time at which it began
        self._shown = self._entered  # the same, with RESTORING in place of READY
        self.blocked: Callable[[], bool] = lambda: False

    def enter(self, phase: pb.Phase) -> None:
        """Begin ``phase`` now."""
        self._entered = (phase, self._clock())

    def now(self) -> tuple[pb.Phase, float]:
        """Return (current phase, seconds since it began).

        RESTORING, and the READY after it, count from the first call that found them.
        """
        shown, entered = self._shown, self._entered
        phase, since = entered
        if phase == pb.PHASE_READY and self.blocked():
            phase = pb.PHASE_RESTORING
        if phase != shown[0]:
            ours = pb.PHASE_READY, pb.PHASE_RESTORING
            restored = phase in ours and shown[0] in ours
            shown = (phase, self._clock() if restored or phase == ours[1] else since)
            self._shown = shown
        return phase, self._clock() - shown[1]

    @property
    def name(self) -> str:
        """Name of the current phase in lower case, for example "ready"."""
        return name_of(self.now()[0])

    @property
    def serving(self) -> bool:
        """Whether health checks report that the shard is ready. A shard that restores is."""
        return self._entered[0] in SERVING


def name_of(phase: pb.Phase) -> str:
    """Return the name of a phase in lower case, for example "recovery"."""
    return str(pb.Phase.Name(phase)).removeprefix("PHASE_").lower()
