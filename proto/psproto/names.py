"""The rule for names: of tables, of barriers, of checkpoints.

    part  = letter | digit | "_", then letters, digits and any of _ . -
    name  = part ("/" part)*       of a table or a barrier: 1..128 characters
          | part                   of a checkpoint: 1..128 characters

A name is safe as a relative path: it has no empty part, no "." and no "..", and neither begins nor
ends with a slash. Servers apply the rule when something is created. Tables of older releases keep
the names that they have.
"""

from __future__ import annotations

import re
from typing import Literal

Kind = Literal["table", "barrier", "checkpoint"]

LONGEST = 128  # characters
SHOWN = 200  # characters of a bad name in a message
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
    """Return what is wrong with a name, as a message for its sender; None if it may be used."""
    pattern, rule = RULES[kind]
    if pattern.match(name):
        return None
    return f"{kind} name must be 1..{LONGEST} {rule}, got {name[:SHOWN]!r}"
