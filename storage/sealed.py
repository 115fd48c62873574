"""Small JSON files with a checksum.

file  = JSON, to the byte what ``json.dumps(..., sort_keys=True, indent=1)`` and a line feed
        make of {"checksum": C, "content": {...}}, where C is the xxh3_128 in hexadecimal of
        what it makes of the content alone
"""

from __future__ import annotations

import json
from typing import Any

from xxhash import xxh3_128_hexdigest

from storage.errors import Corrupt, UnknownFormat

FORMAT = 1


def seal(content: dict[str, Any]) -> bytes:
    """A content as it is stored, with its checksum."""
    checksum = xxh3_128_hexdigest(_dumps(content).encode())
    return f"{_dumps({'checksum': checksum, 'content': content})}\n".encode()


def unseal(data: bytes, where: str) -> dict[str, Any]:
    """The content that ``seal`` made so; Corrupt if a single byte is another."""
    try:
        whole = json.loads(data)
        content = dict(whole["content"])
        intact = seal(content) == data
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise Corrupt(where, f"no manifest: {error}") from error
    if not intact:
        raise Corrupt(where, "the checksum of the manifest does not fit its content")
    held = content.pop("format", None)
    if held != FORMAT:
        raise UnknownFormat(where, held if isinstance(held, int) else 0, FORMAT)
    return content


def _dumps(value: Any) -> str:
    return json.dumps(value, sort_keys=True, indent=1)
