"""HTTP requests and responses as the HTTP port of a server reads and writes them.

One connection carries one request without a body.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

ONCE = ("host", "authorization")  # fields of which a request may have one
_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
NO_STORE = ("Cache-Control", "no-store")
# On every response: it is what its type says, may not be framed, loaded or run by other sites, and
# tells other sites nothing.
SECURITY = (
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
)
NOTHING = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


@dataclass(frozen=True, slots=True)
class Request:
    """A request: the method, the parts of its target, and its header fields by lower-case name."""

    method: str
    path: str
    query: str = ""
    fields: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Response:
    """A response. ``fields`` has its header fields as (name, value), without those that every
    response gets.

    status  code and reason, for example "404 Not Found"
    policy  Content-Security-Policy
    """

    status: str
    body: bytes = b""
    fields: tuple[tuple[str, str], ...] = (("Content-Type", "text/plain; charset=utf-8"), NO_STORE)
    policy: str = NOTHING

    def encode(self, *, head_only: bool = False) -> bytes:
        """Return the bytes to send.

        head_only  leave the body out, because the request is a HEAD
        """
        fields = [
            *self.fields,
            *SECURITY,
            ("Content-Security-Policy", self.policy),
            ("Content-Length", str(len(self.body))),
            ("Connection", "close"),
        ]
        head = "".join(f"{name}: {value}\r\n" for name, value in fields)
        data = f"HTTP/1.1 {self.status}\r\n{head}\r\n".encode("latin-1")
        return data if head_only else data + self.body


def parse(head: bytes) -> Request:
    """Parse the header of a request, up to the empty line. Raises ValueError if it is not HTTP: a
    proxy may understand it differently, and check other fields than this server.
    """
    first, *lines = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
    method, target, _ = first.split(" ")
    path, _, query = target.partition("?")
    fields = {}
    for line in lines:
        name, colon, value = line.partition(":")
        known = name.lower() in fields and name.lower() in ONCE
        if not colon or known or not _NAME.fullmatch(name):
            raise ValueError(f"not a header field: {name[:40]!r}")
        fields[name.lower()] = value.strip()
    return Request(method, path, query, fields)


def text(status: str, body: str) -> Response:
    """Return a response with a line of text."""
    return Response(status, f"{body}\n".encode())
