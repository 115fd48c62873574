"""Which pushes were applied, so that a repeated one is noticed.

A session is one incarnation of a client. It remembers the versions of the pushes that the client
may still repeat: those after ``acknowledged``, and no more than WINDOW behind the newest.

    packed   = session*                          least recently used first
    session  = client incarnation newest forgotten count_idle sequence[count] version[count]

All are u64, little-endian. The lower half of ``count_idle`` is a count, the upper half the seconds
for which the session was not used. Time does not pass for packed sessions.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from psserver.errors import BadRequest, SessionExpired, TooLarge

WINDOW = 4096  # pushes
LEAST_WINDOW = 64  # pushes: what one stream may have in flight
REMEMBERED = 1 << 20  # pushes of all sessions together, while their windows are above the least
HALF = (1 << 32) - 1


@dataclass(slots=True)
class _Session:
    incarnation: int
    used: float  # seconds on the clock
    newest: int = 0
    forgotten: int = 0  # every push up to here can no longer be told apart
    versions: dict[int, int] = field(default_factory=dict)


class Sessions:
    """The sessions of one shard.

    limit   sessions kept; a new one replaces the least recently used that is older than ttl, or
            is refused
    ttl     seconds; far longer than any client goes on repeating a push
    clock   monotonic seconds
    """

    def __init__(self, limit: int, ttl: float, clock: Callable[[], float]) -> None:
        self._limit = limit
        self._ttl = ttl
        self._clock = clock
        self._sessions: dict[int, _Session] = {}  # least recently used first

    def __len__(self) -> int:
        return len(self._sessions)

    def applied(
        self, client: int, incarnation: int, sequence: int, acknowledged: int
    ) -> int | None:
        """The version under which this push was applied, None if it was not; changes nothing.

        Raises SessionExpired if that cannot be known, TooLarge if there is no room for a new
        session, BadRequest for impossible numbers.
        """
        if not 0 <= acknowledged < sequence:
            raise BadRequest(
                "INVALID_ARGUMENT",
                f"sequence must be above acknowledged, got {sequence} and {acknowledged}",
            )
        session = self._sessions.get(client)
        if session is None or session.incarnation < incarnation:
            if acknowledged:
                raise SessionExpired(
                    f"no memory of client {client:#x} incarnation {incarnation}, which has had"
                    f" pushes up to {acknowledged} acknowledged"
                )
            if session is None and len(self._sessions) >= self._limit:
                oldest = next(iter(self._sessions.values()))
                if self._clock() - oldest.used < self._ttl:
                    raise TooLarge(
                        "TOO_MANY_SESSIONS", f"{self._limit} sessions are in use, the limit"
                    )
            return None
        if session.incarnation > incarnation:
            raise SessionExpired(
                f"client {client:#x} incarnation {incarnation} was replaced by incarnation"
                f" {session.incarnation}"
            )
        if sequence <= session.forgotten:
            raise SessionExpired(
                f"client {client:#x}: push {sequence} is further back than the window, which"
                f" starts after {session.forgotten}"
            )
        return session.versions.get(sequence)

    def record(
        self, client: int, incarnation: int, sequence: int, acknowledged: int, version: int
    ) -> None:
        """Remember a push that ``applied`` did not know and that is applied now."""
        session = self._sessions.pop(client, None)
        if session is None and len(self._sessions) >= self._limit:
            of_oldest, oldest = next(iter(self._sessions.items()))
            if self._clock() - oldest.used >= self._ttl:  # else one exchange opened several
                del self._sessions[of_oldest]
        if session is None or session.incarnation < incarnation:
            session = _Session(incarnation, self._clock())
        self._sessions[client] = session
        session.used = self._clock()
        session.versions[sequence] = version
        session.newest = max(session.newest, sequence)
        horizon = max(acknowledged, session.newest - self._window())
        if horizon > session.forgotten:
            if horizon - session.forgotten <= len(session.versions):
                for old in range(session.forgotten + 1, horizon + 1):
                    session.versions.pop(old, None)
            else:
                kept = {s: v for s, v in session.versions.items() if s > horizon}
                session.versions = kept
            session.forgotten = horizon

    def _window(self) -> int:
        """Return how many pushes a session remembers: fewer, the more sessions there are.

        A client that acknowledges nothing must not take memory without bound.
        """
        return max(LEAST_WINDOW, min(WINDOW, REMEMBERED // len(self._sessions)))

    def pack(self) -> bytes:
        """All sessions as numbers; see the module, and ``unpack``."""
        numbers: list[int] = []
        now = self._clock()
        for client, session in self._sessions.items():
            count, idle = len(session.versions), min(int(now - session.used), HALF)
            numbers += (client, session.incarnation, session.newest, session.forgotten)
            numbers += (count | idle << 32, *session.versions, *session.versions.values())
        return struct.pack(f"<{len(numbers)}Q", *numbers)

    def unpack(self, data: bytes) -> None:
        """Take over sessions that were packed."""
        numbers = struct.unpack(f"<{len(data) // 8}Q", data)
        now = self._clock()
        at = 0
        while at < len(numbers):
            client, incarnation, newest, forgotten, both = numbers[at : at + 5]
            count, idle = both & HALF, both >> 32
            at += 5
            sequences, versions = numbers[at : at + count], numbers[at + count : at + 2 * count]
            at += 2 * count
            self._sessions[client] = _Session(
                incarnation,
                now - idle,
                newest,
                forgotten,
                dict(zip(sequences, versions, strict=True)),
            )

    def replayed(self) -> None:
        """Forget those over the limit: others replaced them after they were packed, and the replay
        of what these others did could not tell that they had expired.

        One was idle for its ttl when it was replaced, so for half of that when it was packed: what
        is replayed takes in less. Who was not is kept: its pushes may still be repeated.
        """
        while len(self._sessions) > self._limit:
            client, oldest = next(iter(self._sessions.items()))
            if self._clock() - oldest.used < self._ttl / 2:
                break
            del self._sessions[client]
