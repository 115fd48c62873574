"""Write and read small JSON files with a checksum and a schema.

    file     = {"checksum": C, "content": CONTENT} as ``json.dumps(..., sort_keys=True, indent=1)``
               writes it, and a line feed
    C        = hexadecimal xxh3_128 of CONTENT alone, as the same call writes it
    CONTENT  = an object with the member "format": 1, and the fields of one dataclass

The schema is a dataclass. Types are not converted, and unknown or missing fields are errors. A
field may have bounds (``Annotated[int, Field(ge=0)]``).
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Hashable
from typing import Any, TypeVar, cast

from pydantic import ConfigDict, TypeAdapter, ValidationError
from xxhash import xxh3_128_hexdigest

from storage.errors import Corrupt, UnknownFormat

FORMAT = 1
STRICT = ConfigDict(extra="forbid", strict=True)  # the ``__pydantic_config__`` of each dataclass

_HEAD, _MIDDLE, _TAIL = b'{\n "checksum": "', b'",\n "content": ', b"\n}\n"
_DIGITS = 32  # of the checksum
T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class _Versioned:
    """The field ``format``, which every version of the file format has."""

    format: int


def seal(content: Any) -> bytes:
    """Return the bytes of a sealed file with the fields of ``content``, a dataclass instance."""
    return seal_fields(fields_of(content))


def fields_of(content: Any) -> dict[str, Any]:
    """Return the fields of ``content``, a dataclass instance, as a dict by their names in the file.

    The class attribute NAMES_IN_FILE, if any, maps names of fields to different names in the file.
    """
    names = getattr(content, "NAMES_IN_FILE", {})
    return {names.get(name, name): value for name, value in dataclasses.asdict(content).items()}


def seal_fields(fields: dict[str, Any]) -> bytes:
    """Return the bytes of a sealed file with ``fields``, any JSON object."""
    text = json.dumps(fields, sort_keys=True, indent=1)
    checksum = xxh3_128_hexdigest(text.encode())
    inner = text.replace("\n", "\n ").encode()  # strings have no line feeds: JSON escapes them
    return b"".join([_HEAD, checksum.encode(), _MIDDLE, inner, _TAIL])


def unseal(kind: type[T], data: bytes, where: str) -> T:
    """Read the bytes of a file that ``seal`` wrote.

    kind   dataclass to return an instance of
    where  file name, for errors

    Raises Corrupt if a byte differs from what was written or a field does not fit ``kind``, and
    UnknownFormat if the file has a different format number.
    """
    start = len(_HEAD) + _DIGITS + len(_MIDDLE)
    end = len(data) - len(_TAIL)
    checksum = data[len(_HEAD) : len(_HEAD) + _DIGITS]
    if end < start or data[:start] != _HEAD + checksum + _MIDDLE or data[end:] != _TAIL:
        raise Corrupt(where, "expected a JSON object with the members 'checksum' and 'content'")
    content = data[start:end].replace(b"\n ", b"\n")
    if xxh3_128_hexdigest(content).encode() != checksum:
        raise Corrupt(where, "the checksum does not match the content")
    try:
        found = _adapter(_Versioned).validate_json(content).format
        if found != FORMAT:
            raise UnknownFormat(where, found, FORMAT)
        read: T = _adapter(cast(Hashable, kind)).validate_json(content)
    except ValidationError as error:
        raise Corrupt(where, _first(error)) from error
    return read


@functools.cache
def _adapter(kind: Hashable) -> TypeAdapter[Any]:
    adapter: TypeAdapter[Any] = TypeAdapter(cast(Any, kind))
    return adapter


def _first(error: ValidationError) -> str:
    """Return the first validation error as text: field, expected value, found value."""
    item = error.errors(include_url=False)[0]
    field = ".".join(map(str, item["loc"])) or "content"
    return f"{field}: {item['msg']}, got {item['input']!r:.100}"
