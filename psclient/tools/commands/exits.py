"""The exit statuses of psctl, and the status for each error."""

from __future__ import annotations

from enum import IntEnum

from psclient.errors import (
    DeadlineExceeded,
    PermissionDenied,
    TlsError,
    Unauthenticated,
    Unavailable,
)
from psclient.tools.importer import ImportIncomplete


class Exit(IntEnum):
    """Exit statuses of psctl. ``meaning`` is the text of each in ``psctl --help``."""

    meaning: str

    def __new__(cls, number: int, meaning: str) -> Exit:
        one = int.__new__(cls, number)
        one._value_, one.meaning = number, meaning
        return one

    OK = 0, "success"
    FAILED = 1, "refused or failed, or something is wrong (status, doctor, verify)"
    USAGE = 2, "invalid arguments"
    UNREACHABLE = 3, "a server is unreachable, or did not answer in time"
    INCOMPLETE = 4, "part of the work was done and stays; repeat the command"
    NOT_PERMITTED = 5, "credentials are missing, not valid, or lack the right"
    INTERRUPTED = 130, "interrupted by Ctrl-C"


STATUSES: dict[type[BaseException], Exit] = {  # any other error: FAILED
    ImportIncomplete: Exit.INCOMPLETE,
    Unavailable: Exit.UNREACHABLE,
    DeadlineExceeded: Exit.UNREACHABLE,
    TlsError: Exit.NOT_PERMITTED,
    Unauthenticated: Exit.NOT_PERMITTED,
    PermissionDenied: Exit.NOT_PERMITTED,
    KeyboardInterrupt: Exit.INTERRUPTED,
}


def exit_of(error: BaseException) -> Exit:
    """Return the exit status for an error: that of the first class in STATUSES that fits."""
    fitting = (status for kind, status in STATUSES.items() if isinstance(error, kind))
    return next(fitting, Exit.FAILED)


def listed() -> str:
    """Return one line of text per exit status, for ``psctl --help``."""
    return "\n".join(f"  {each.value:<5}{each.meaning}" for each in Exit)
