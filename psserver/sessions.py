"""Recognize pushes that were applied before, so that a client may retry without applying one twice.

A client numbers its pushes 1, 2, 3, ...; this number is the push's sequence. Each time the client
begins again at 1, it draws a new, larger incarnation number. A session belongs to one incarnation
of a client. It records the versions of the pushes that the client may still retry: those after the
sequence that the client has acknowledged, but at most ``window`` pushes.

    packed   = session*                          least recently used first
    session  = client incarnation newest horizon count_idle sequence[count] version[count]

All numbers are u64, little-endian. newest: largest sequence recorded. horizon: the records of the
pushes up to this sequence were dropped. The lower 32 bits of count_idle are ``count``, the upper 32
bits are the seconds since the session was last used, at the time of packing.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from psserver.errors import BadRequest, SessionExpired, TooLarge

WINDOW = 4096  # default of the maximum number of pushes recorded per session
LEAST_WINDOW = 64  # the same when there are many sessions: pushes that a stream has in flight
RECORDED = 1 << 20  # pushes recorded for all sessions together, unless LEAST_WINDOW needs more
HALF = (1 << 32) - 1  # mask of the lower 32 bits of count_idle
PACKED = 1 << 12  # numbers that are packed per call of struct.pack


@dataclass(slots=True)
class _Session:
    """The applied pushes of one client that it may still retry, with their versions."""

    incarnation: int
    used: float  # time of the last use, in seconds on the clock
    newest: int = 0  # largest sequence recorded
    horizon: int = 0  # pushes up to this sequence are no longer recorded
    versions: dict[int, int] = field(default_factory=dict)  # sequence to version


@dataclass(frozen=True, slots=True)
class SessionsSnapshot:
    """Copy of all sessions of one shard, which any thread can pack.

    numbers  the packed format as Python integers
    """

    numbers: list[int]

    def pack(self) -> bytes:
        """Return the sessions as bytes, in the format that the module docstring describes.

        Packs 4096 numbers per call of struct.pack, because each call keeps other threads waiting
        for the interpreter lock.
        """
        parts = (self.numbers[at : at + PACKED] for at in range(0, len(self.numbers), PACKED))
        return b"".join(struct.pack(f"<{len(part)}Q", *part) for part in parts)


class Sessions:
    """The sessions of all clients of one shard: records of the pushes already applied.

    limit   maximum number of sessions; when it is reached, a new session replaces the least
            recently used one if that was unused for ``ttl`` seconds, and is refused otherwise
    ttl     seconds; much longer than any client retries a push
    clock   returns monotonic seconds
    window  maximum number of pushes recorded per session
    """

    def __init__(
        self, limit: int, ttl: float, clock: Callable[[], float], window: int = WINDOW
    ) -> None:
        self._limit = limit
        self._ttl = ttl
        self._clock = clock
        self._most = window
        self._sessions: dict[int, _Session] = {}  # least recently used first

    def __len__(self) -> int:
        return len(self._sessions)

    def applied(
        self, client: int, incarnation: int, sequence: int, acknowledged: int
    ) -> int | None:
        """Return the version of a push if it was applied before, else None. Changes nothing.

        client        id of the client, not 0
        incarnation   number of the client's session
        sequence      number of the push in the session
        acknowledged  the client has the replies up to this sequence, and will not retry them

        Raises SessionExpired if the push is so old that its record may have been dropped, TooLarge
        if it needs a new session but ``limit`` sessions are in use, BadRequest unless
        ``0 <= acknowledged < sequence``.
        """
        if not 0 <= acknowledged < sequence:
            raise BadRequest(
                "INVALID_ARGUMENT",
                "field 'sequence' must be greater than field 'acknowledged', got"
                f" {sequence} and {acknowledged}",
            )
        session = self._sessions.get(client)
        if session is None or session.incarnation < incarnation:
            if acknowledged:
                raise SessionExpired(
                    f"no session of client {client:#x}, incarnation {incarnation}, although the"
                    f" client acknowledged pushes up to {acknowledged}: the session expired, or a"
                    " restore removed it"
                )
            if session is None:
                self._require_room()
            return None
        if session.incarnation > incarnation:
            raise SessionExpired(
                f"client {client:#x}: incarnation {incarnation} was replaced by incarnation"
                f" {session.incarnation}"
            )
        if sequence <= session.horizon:
            raise SessionExpired(
                f"client {client:#x}: push {sequence} is too old to know whether it was applied:"
                f" this shard has records of pushes after {session.horizon} only"
                " (session_pushes); a trainer that computes its batches again must resume with"
                " policy 'rewind' instead of 'once'"
            )
        return session.versions.get(sequence)

    def _require_room(self) -> None:
        """Raise TooLarge if a new session would exceed the limit, and none can be replaced."""
        if len(self._sessions) < self._limit:
            return
        oldest = next(iter(self._sessions.values()))
        if self._clock() - oldest.used < self._ttl:
            raise TooLarge(
                "TOO_MANY_SESSIONS",
                f"this shard already has {self._limit} client sessions, its limit (max_sessions)",
            )

    def record(
        self, client: int, incarnation: int, sequence: int, acknowledged: int, version: int
    ) -> None:
        """Record that a push, for which ``applied`` returned None, was applied as ``version``.

        The other arguments are those of ``applied``. Drops the records of pushes that are
        acknowledged or too old.
        """
        session = self._sessions.pop(client, None)
        if session is None and len(self._sessions) >= self._limit:
            of_oldest, oldest = next(iter(self._sessions.items()))
            if self._clock() - oldest.used >= self._ttl:  # else one exchange created several
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
        """Return the maximum number of recorded pushes per session: 64 to ``window``, smaller the
        more sessions there are, so that clients that acknowledge nothing take limited memory.
        """
        return max(LEAST_WINDOW, min(self._most, RECORDED // len(self._sessions)))

    def snapshot(self) -> SessionsSnapshot:
        """Return a copy of all sessions. Any thread can pack it later."""
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
        """Return all sessions as bytes; the module docstring describes the format."""
        return self.snapshot().pack()

    def unpack(self, data: bytes) -> None:
        """Add the sessions in ``data``, which ``pack`` returned.

        Raises struct.error or ValueError if the bytes are malformed.
        """
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
        """Drop the least recently used sessions beyond the limit, after a recovery.

        The replay of the log adds sessions, but cannot tell which loaded sessions they had
        replaced. A replaced session was unused for ``ttl`` seconds, and the log covers less than
        half of that. So only sessions that were unused for ``ttl / 2`` seconds are dropped, and the
        number of sessions may still exceed the limit.
        """
        while len(self._sessions) > self._limit:
            client, oldest = next(iter(self._sessions.items()))
            if self._clock() - oldest.used < self._ttl / 2:
                break
            del self._sessions[client]
