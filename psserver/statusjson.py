"""Convert the message GetStatusResponse to JSON.

The names are those of ps.proto. All fields are present, except messages and optional fields that
are not set. 64-bit integers are JSON numbers, and values of enums are their names. protobuf's own
conversion takes several times as long, and makes texts of 64-bit integers.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message

# (name, whether it is repeated, whether it is a message, whether it may be absent, names of an
# enum's values by number)
_Field = tuple[str, bool, bool, bool, dict[int, str] | None]


def plain(message: Message) -> dict[str, Any]:
    """Return a message as dicts, lists, texts and numbers. No field may have the type bytes."""
    found: dict[str, Any] = {}
    for name, repeated, nested, absent, names in _fields(message.DESCRIPTOR):
        if repeated:
            values = getattr(message, name)
            found[name] = [plain(each) for each in values] if nested else list(values)
        elif absent and not message.HasField(name):
            continue
        elif nested:
            found[name] = plain(getattr(message, name))
        else:
            value = getattr(message, name)
            found[name] = value if names is None else names.get(value, value)
    return found


@cache
def _fields(kind: Descriptor) -> list[_Field]:
    """Return what ``plain`` must know about the fields of a message."""
    return [
        (
            each.name,
            each.is_repeated,
            each.message_type is not None,
            each.has_presence,
            None
            if each.enum_type is None
            else {value.number: value.name for value in each.enum_type.values},
        )
        for each in kind.fields
    ]
