"""The last errors with which requests failed, for operators who look at a server.

Errors that differ only in numbers are one entry, so that a flood of one error does not displace
the others. The messages go to displays that more people may see than the rows: keys in them are
left out.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from psproto import ps_pb2 as pb

KEPT = 32  # maximum number of entries
MESSAGE_BYTES = 256  # maximum length of a message
_KEY = re.compile(r"\bkey -?\d+")
_NO_DIGITS = str.maketrans("", "", "0123456789")

# method, code, reason, and the message without digits
_Kind = tuple[str, str, str, str]


class RecentErrors:
    """Keeps the KEPT newest errors. One thread adds; any thread may read.

    now  returns seconds since 1970
    """

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self._now = now
        # kind -> (time of the newest, its message, number of them); the newest kind is last
        self._errors: dict[_Kind, tuple[float, str, int]] = {}

    def add(self, method: str, code: str, reason: str, message: str) -> None:
        """Add an error. If there are then more than KEPT entries, the oldest is removed.

        method   name of the gRPC method
        code     name of the gRPC status code
        reason   ErrorInfo reason, for example "TABLE_NOT_FOUND"
        message  message of the status
        """
        errors = self._errors
        kind = (method, code, reason, message.translate(_NO_DIGITS))
        before = errors.pop(kind, None)
        errors[kind] = (self._now(), message, 1 if before is None else before[2] + 1)
        if len(errors) > KEPT:
            del errors[next(iter(errors))]

    def newest(self) -> list[pb.RecentError]:
        """Return the errors, newest first."""
        return [
            pb.RecentError(
                time=time,
                method=method,
                code=code,
                reason=reason,
                message=_shown(message),
                count=count,
            )
            for (method, code, reason, _), (time, message, count) in [*self._errors.items()][::-1]
        ]


def _shown(message: str) -> str:
    """Return a message without keys and control characters, cut to MESSAGE_BYTES."""
    text = _KEY.sub("key (not shown)", message)
    text = "".join(each if each.isprintable() else " " for each in text)
    if len(data := text.encode(errors="replace")) > MESSAGE_BYTES:
        text = data[: MESSAGE_BYTES - 3].decode(errors="ignore") + "..."
    return text
