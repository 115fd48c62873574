"""Checks of arguments. Each raises InvalidArgument with the field, the rule and the invalid value.

``field`` is the argument's name in the message.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from psclient.errors import InvalidArgument
from psproto import names


def integer(field: str, value: Any, low: int, end: int) -> int:
    """Return ``value`` as an int. Raises InvalidArgument unless it is an integer in low..end - 1.

    NumPy integers and other types with ``__index__`` are accepted.
    """
    try:
        if low <= (number := operator.index(value)) < end:
            return number
    except TypeError:
        pass
    rule = f"{_power(low)}..{_power(end - 1)}"
    raise InvalidArgument(f"{field} must be an integer in {rule}, got {value!r}")


def number(field: str, value: Any) -> float:
    """Return ``value`` as a float. Raises InvalidArgument if it is not a number.

    Infinity and NaN are accepted: the server decides whether they are valid.
    """
    if not isinstance(value, str | bytes):
        with suppress(TypeError, ValueError, OverflowError):
            return float(value)
    raise InvalidArgument(f"{field} must be a number, got {value!r}")


def seconds(field: str, value: Any) -> float:
    """Return ``value`` as float seconds.

    Raises InvalidArgument unless it is positive and at most threading.TIMEOUT_MAX.
    """
    if not 0 < (given := number(field, value)) <= threading.TIMEOUT_MAX:
        raise InvalidArgument(f"{field} must be a positive number of seconds, got {value}")
    return given


def text(field: str, value: Any) -> str:
    """Return ``value``. Raises InvalidArgument unless it is a str that UTF-8 can encode."""
    if isinstance(value, str):
        with suppress(UnicodeEncodeError):
            value.encode()
            return value
    raise InvalidArgument(f"{field} must be text in Unicode, got {value!r}")


def names_of(field: str, value: Any) -> list[str]:
    """Return ``value`` as a list if it is an iterable of names, and not one name."""
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        return [text(field, each) for each in value]
    raise InvalidArgument(f"{field} must be a list of names, got {value!r}")


def name(kind: names.Kind, value: Any) -> str:
    """Return ``value`` if something new of this kind may have it as a name."""
    if problem := names.problem(kind, text(f"name of a {kind}", value)):
        raise InvalidArgument(problem)
    return str(value)


def one_of(field: str, value: Any, known: Mapping[str, int]) -> int:
    """Return ``known[value]``. Raises InvalidArgument unless ``value`` is a key of ``known``."""
    if not isinstance(value, str) or value not in known:
        raise InvalidArgument(f"{field} must be one of {', '.join(known)}, got {value!r}")
    return known[value]


def mapping(field: str, value: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Return ``value``, or an empty mapping for None. Raises InvalidArgument for other types."""
    if value is not None and not isinstance(value, Mapping):
        raise InvalidArgument(f"{field} must come with a mapping of its parameters, got {value!r}")
    return value or {}


def _power(number: int) -> str:
    """Format a number; near a power of two above 2^32 as that power: "2^64-1"."""
    for least, offset in ((1 << 32, ""), ((1 << 32) - 1, "-1")):
        size = abs(number) + bool(offset)
        if abs(number) >= least and size & (size - 1) == 0:
            return f"{'-' * (number < 0)}2^{size.bit_length() - 1}{offset}"
    return str(number)
