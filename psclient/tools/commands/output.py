"""Results and errors of psctl, as text for people or as JSON for programs.

--output   stdout                                       stderr
text       text                                         progress bars; lines "psctl: ..."
json       one JSON value; commands that go on until    progress bars, if it is a terminal; lines
           they are stopped: one JSON value per line    {"error": {...}} and {"note": "..."}

An error has the fields "type" (class of the error), "reason" (code from the server, such as
"TABLE_NOT_FOUND", or ""), "message", "status" (exit status of psctl) and "retry_after" (seconds
after which the server asks to try again, or null).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum, StrEnum
from itertools import pairwise
from typing import Any

import numpy as np
import typer
from google.protobuf.message import Message

from psclient.tools.commands.exits import Exit


class Output(StrEnum):
    """Formats in which a command can print its results."""

    TEXT = "text"
    JSON = "json"


def plain(value: Any) -> Any:
    """Convert a value to what JSON has: dicts, lists, strings, numbers, booleans and None.

    value  may contain dataclasses, enumerations, arrays and numbers of NumPy, paths, and messages
           of protobuf

    NaN and infinity, which JSON does not have, become None.
    """
    if value is None or (isinstance(value, (bool, str, int)) and not isinstance(value, Enum)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (np.ndarray, np.generic)):
        return plain(value.tolist())
    if is_dataclass(value):
        return {each.name: plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, Message):
        return _message(value)
    if isinstance(value, Mapping):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, Sequence):
        return [plain(each) for each in value]
    return str(value)


def _message(message: Message) -> dict[str, Any]:
    """Return the fields of a protobuf message by name. What is not set and may be is None."""
    found: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.has_presence and not message.HasField(field.name):
            found[field.name] = None
        elif field.enum_type is not None:
            found[field.name] = field.enum_type.values_by_number[value].name
        elif field.is_repeated:
            found[field.name] = [plain(each) for each in value]
        else:
            found[field.name] = plain(value)
    return found


def print_json(value: Any) -> None:
    """Print a value to stdout as JSON that is indented."""
    typer.echo(json.dumps(plain(value), indent=1, allow_nan=False))


def print_line(value: Any) -> None:
    """Print a value to stdout as one line of JSON, at once."""
    print(json.dumps(plain(value), allow_nan=False), flush=True)


def print_error(error: BaseException, message: str, status: Exit, output: Output) -> None:
    """Print an error to stderr, as one line.

    message  text for people; it may have several lines, which are joined
    status   exit status of psctl
    """
    text = " ".join(message.split())
    if output is Output.TEXT:
        typer.echo(f"psctl: {text}", err=True)
        return
    facts = {
        "type": type(error).__name__,
        "reason": getattr(error, "reason", ""),
        "message": text,
        "status": status,
        "retry_after": getattr(error, "retry_after", None),
    }
    typer.echo(json.dumps({"error": plain(facts)}), err=True)


def print_note(text: str, output: Output) -> None:
    """Print a remark to stderr, as one line."""
    if output is Output.TEXT:
        typer.echo(text, err=True)
    else:
        typer.echo(json.dumps({"note": text}), err=True)


def asked(words: Sequence[str]) -> Output:
    """Return the format that the words of a command line ask for.

    It is used for errors in these words. A format that is not valid counts as text.
    """
    pairs = pairwise(["", *words])
    found = any(pair == ("--output", "json") or pair[1] == "--output=json" for pair in pairs)
    return Output.JSON if found else Output.TEXT
