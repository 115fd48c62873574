"""Why a request is refused. Together with storage's tree, all that a client is ever told.

* Refused
  - BadRequest        the request breaks a rule; the reason says which
  - WrongShard        a key belongs to another shard
  - SessionExpired    a push whose repetition could no longer be noticed
  - VersionInFuture   a min_version that this shard has not reached
  - TooLarge          over a limit of this server
  - Overloaded        too much is in flight; later is fine
  - Draining          the server is stopping; another one will answer
  - DeadlinePassed    the caller no longer waits; nothing was applied
"""

from __future__ import annotations


class Refused(Exception):
    """Root of the refusals. ``retry_after`` in seconds, where trying again makes sense."""

    reason = ""
    retry_after: float | None = None

    @property
    def metadata(self) -> dict[str, str]:
        """Facts for ErrorInfo."""
        return {}


class BadRequest(Refused):
    """The request breaks a rule."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class WrongShard(Refused):
    """A key belongs to another shard."""

    reason = "WRONG_SHARD"

    def __init__(self, table: str, key: int, belongs: int, shard: int, epoch: int) -> None:
        super().__init__(
            f"table {table!r}: key {key} belongs to shard {belongs}, this is shard {shard}"
            f" (shard map of epoch {epoch})"
        )
        self.epoch = epoch

    @property
    def metadata(self) -> dict[str, str]:
        return {"epoch": str(self.epoch)}


class SessionExpired(Refused):
    """A push whose repetition could no longer be noticed."""

    reason = "SESSION_EXPIRED"


class VersionInFuture(Refused):
    """A min_version that this shard has not reached."""

    reason = "VERSION_IN_FUTURE"


class TooLarge(Refused):
    """Over a limit of this server."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Overloaded(Refused):
    """Too much is in flight."""

    reason = "OVERLOADED"
    retry_after = 0.1


class Draining(Refused):
    """The server is stopping."""

    reason = "DRAINING"
    retry_after = 1.0


class DeadlinePassed(Refused):
    """The caller no longer waits; nothing was applied."""

    reason = "DEADLINE_EXCEEDED"
