"""Checks of arguments. Each function returns the valid value, perhaps converted.

Each raises InvalidArgument with the field, the rule and the invalid value. ``field`` is the name of
the argument in that message.
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
    """Return ``value`` as an int, after checking that it is an integer in low..end - 1.

    field  name of the argument, for errors

    NumPy integers and other types with ``__index__`` are accepted. Raises InvalidArgument.
    """
    try:
        if low <= (number := operator.index(value)) < end:
            return number
    except TypeError:
        pass
    rule = f"{_power(low)}..{_power(end - 1)}"
    raise InvalidArgument(f"{field} must be an integer in {rule}, got {value!r}")


def number(field: str, value: Any) -> float:
    """Return ``value`` as a float. Raises InvalidArgument, naming ``field``, if it is not a number.

    Infinity and NaN are accepted, because the server decides whether they are valid.
    """
    if not isinstance(value, str | bytes):
        with suppress(TypeError, ValueError, OverflowError):
            return float(value)
    raise InvalidArgument(f"{field} must be a number, got {value!r}")


def seconds(field: str, value: Any) -> float:
    """Return ``value``, a duration in seconds, as a float.

    Raises InvalidArgument, naming ``field``, unless it is a positive number of at most
    threading.TIMEOUT_MAX.
    """
    if not 0 < (given := number(field, value)) <= threading.TIMEOUT_MAX:
        raise InvalidArgument(f"{field} must be a positive number of seconds, got {value}")
    return given


def text(field: str, value: Any) -> str:
    """Return ``value``, which must be a str that UTF-8 can encode.

    Raises InvalidArgument, naming ``field``, if it is not.
    """
    if isinstance(value, str):
        with suppress(UnicodeEncodeError):
            value.encode()
            return value
    raise InvalidArgument(f"{field} must be text in Unicode, got {value!r}")


def names_of(field: str, value: Any) -> list[str]:
    """Return ``value``, an iterable of str, as a list.

    Raises InvalidArgument, naming ``field``, for anything else, such as a single str.
    """
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        return [text(field, each) for each in value]
    raise InvalidArgument(f"{field} must be a list of names, got {value!r}")


def name(kind: names.Kind, value: Any) -> str:
    """Return ``value``, which must be a valid name for a new table, barrier or checkpoint.

    kind  which of these three the name is for

    Raises InvalidArgument if the name breaks the rules of psproto.names.
    """
    if problem := names.problem(kind, text(f"name of a {kind}", value)):
        raise InvalidArgument(problem)
    return str(value)


def one_of(field: str, value: Any, known: Mapping[str, int]) -> int:
    """Return ``known[value]``; ``value`` must be one of the strings that ``known`` maps to numbers.

    Raises InvalidArgument, naming ``field``, if it is not.
    """
    if not isinstance(value, str) or value not in known:
        raise InvalidArgument(f"{field} must be one of {', '.join(known)}, got {value!r}")
    return known[value]


def mapping(field: str, value: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Return ``value``, a mapping of parameters; {} if it is None.

    Raises InvalidArgument, naming ``field``, for other types.
    """
    if value is not None and not isinstance(value, Mapping):
        raise InvalidArgument(
            f"{field} must come with a mapping {{parameter: number}}, got {value!r}"
        )
    return value or {}


def _power(number: int) -> str:
    """Format an integer for an error. Powers of two from 2^32 on become text such as "2^64-1"."""
    for least, offset in ((1 << 32, ""), ((1 << 32) - 1, "-1")):
        size = abs(number) + bool(offset)
        if abs(number) >= least and size & (size - 1) == 0:
            return f"{'-' * (number < 0)}2^{size.bit_length() - 1}{offset}"
    return str(number)
