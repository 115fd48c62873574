"""De-duplication of pushes: which ones were applied, and under which versions.

A session belongs to one incarnation of a client. It records the versions of the pushes that the
client may still repeat: those after ``acknowledged``, and at most WINDOW of them.

    packed   = session*                          least recently used first
    session  = client incarnation newest horizon count_idle sequence[count] version[count]

All are u64, little-endian. The lower half of ``count_idle`` is a count, the upper half the seconds
since the session was last used. Time does not pass for packed sessions.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from psserver.errors import BadRequest, SessionExpired, TooLarge

WINDOW = 4096  # pushes
LEAST_WINDOW = 64  # pushes: what one stream may have in flight
RECORDED = 1 << 20  # pushes of all sessions together, while windows are above LEAST_WINDOW
HALF = (1 << 32) - 1
PACKED = 1 << 12  # numbers per call


@dataclass(slots=True)
class _Session:
    incarnation: int
    used: float  # seconds on the clock
    newest: int = 0  # sequence
    horizon: int = 0  # pushes up to this sequence are no longer recorded
    versions: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SessionsSnapshot:
    """The sessions of one shard at one moment, as the numbers that are packed."""

    numbers: list[int]

    def pack(self) -> bytes:
        """Return the sessions as bytes; the module describes the format.

        Packs in short calls, because each one keeps the interpreter lock.
        """
        parts = (self.numbers[at : at + PACKED] for at in range(0, len(self.numbers), PACKED))
        return b"".join(struct.pack(f"<{len(part)}Q", *part) for part in parts)


class Sessions:
    """The sessions of one shard.

    limit   most sessions; a new one replaces the least recently used if that is idle for ttl
            seconds, or else is refused
    ttl     seconds; far longer than any client repeats a push
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
        """Return the version under which a push was applied, or None if it was not.

        Changes nothing. Raises SessionExpired if the answer is no longer known, TooLarge if there
        is no room for a new session, and BadRequest for numbers that contradict each other.
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
                    f"no session of client {client:#x} incarnation {incarnation}, whose pushes up"
                    f" to {acknowledged} were acknowledged"
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
        if sequence <= session.horizon:
            raise SessionExpired(
                f"client {client:#x}: push {sequence} is older than the window, which starts after"
                f" {session.horizon}"
            )
        return session.versions.get(sequence)

    def record(
        self, client: int, incarnation: int, sequence: int, acknowledged: int, version: int
    ) -> None:
        """Record a push that was applied now, and for which ``applied`` returned None."""
        session = self._sessions.pop(client, None)
        if session is None and len(self._sessions) >= self._limit:
            of_oldest, oldest = next(iter(self._sessions.items()))
            if self._clock() - oldest.used >= self._ttl:  # else one exchange began several
                del self._sessions[of_oldest]
        if session is None or session.incarnation < incarnation:
            session = _Session(incarnation, self._clock())
        self._sessions[client] = session
        session.used = self._clock()
        session.versions[sequence] = version
        session.newest = max(session.newest, sequence)
        horizon = max(acknowledged, session.newest - self._window())
        if horizon > session.horizon:
            if horizon - session.horizon <= len(session.versions):
                for old in range(session.horizon + 1, horizon + 1):
                    session.versions.pop(old, None)
            else:
                kept = {s: v for s, v in session.versions.items() if s > horizon}
                session.versions = kept
            session.horizon = horizon

    def _window(self) -> int:
        """Return how many pushes a session records: fewer, the more sessions there are.

        A client that acknowledges nothing must not take memory without bound.
        """
        return max(LEAST_WINDOW, min(WINDOW, RECORDED // len(self._sessions)))

    def snapshot(self) -> SessionsSnapshot:
        """Return a copy of all sessions, which any thread can pack later."""
        numbers: list[int] = []
        now = self._clock()
        for client, session in self._sessions.items():
            count, idle = len(session.versions), min(int(now - session.used), HALF)
            numbers += (client, session.incarnation, session.newest, session.horizon)
            numbers.append(count | idle << 32)
            numbers += session.versions
            numbers += session.versions.values()
        return SessionsSnapshot(numbers)

    def pack(self) -> bytes:
        """Return all sessions as bytes; the module describes the format."""
        return self.snapshot().pack()

    def unpack(self, data: bytes) -> None:
        """Load sessions that were packed."""
        numbers = struct.unpack(f"<{len(data) // 8}Q", data)
        now = self._clock()
        at = 0
        while at < len(numbers):
            client, incarnation, newest, horizon, both = numbers[at : at + 5]
            count, idle = both & HALF, both >> 32
            at += 5
            sequences, versions = numbers[at : at + count], numbers[at + count : at + 2 * count]
            at += 2 * count
            self._sessions[client] = _Session(
                incarnation,
                now - idle,
                newest,
                horizon,
                dict(zip(sequences, versions, strict=True)),
            )

    def trim(self) -> None:
        """Drop sessions beyond the limit, after the log was replayed.

        Other sessions replaced them after they were packed, and the replay does not know that.
        A session was idle for ttl seconds when it was replaced. It was then idle for at least half
        of that when it was packed, because a replay covers less time. A session that was not is
        kept: its pushes may still be repeated.
        """
        while len(self._sessions) > self._limit:
            client, oldest = next(iter(self._sessions.items()))
            if self._clock() - oldest.used < self._ttl / 2:
                break
            del self._sessions[client]
