"""Rules for the names of tables, barriers and checkpoints.

    part        = letter | digit | "_", then letters, digits and any of _ . -
    table       = part ("/" part)*      1..128 characters
    barrier     = part ("/" part)*      1..128 characters
    checkpoint  = part                  1..128 characters

A name is safe as a relative path: it has no empty part, no "." and no "..", and does not begin or
end with a slash. Servers check a name when a table, barrier or checkpoint is created. Tables that
older releases created keep their names even if they break these rules.
"""

from __future__ import annotations

import re
from typing import Literal

Kind = Literal["table", "barrier", "checkpoint"]

LONGEST = 128  # characters
SHOWN = 200  # maximum number of characters of an invalid name that an error message shows
_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
_PATH = (
    re.compile(rf"(?=.{{1,{LONGEST}}}\Z){_PART}(?:/{_PART})*\Z"),
    "letters, digits or any of _ . / -, and each part between slashes must start with a letter,"
    " a digit or _",
)
_SINGLE = (
    re.compile(rf"(?=.{{1,{LONGEST}}}\Z){_PART}\Z"),
    "letters, digits or any of _ . - and start with a letter, a digit or _",
)
RULES = {"table": _PATH, "barrier": _PATH, "checkpoint": _SINGLE}


def problem(kind: Kind, name: str) -> str | None:
    """Return an error message if a name breaks the rules for its kind; None if it is valid."""
    pattern, rule = RULES[kind]
    if pattern.match(name):
        return None
    return f"{kind} name must be 1..{LONGEST} {rule}, got {name[:SHOWN]!r}"
