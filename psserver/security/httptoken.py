"""Protect the HTTP port with one token, read from a file.

Prometheus and other programs send it as "Authorization: Bearer TOKEN". Browsers ask their user for
a name and a password, and send them as "Authorization: Basic ...": the password must be the token,
the name may be anything.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import re
import time
from collections.abc import Callable
from pathlib import Path

from psserver.unusable import ConfigError

LOOK_SECONDS = 1.0  # maximum age of the token in use
MOST_BYTES = 4096  # maximum size of the token
_TOKEN = re.compile(rb"[!-~]+")  # what a field of HTTP can have without quotes
CHALLENGE = ("WWW-Authenticate", 'Basic realm="psserver", charset="UTF-8"')


class HttpToken:
    """The token of the HTTP port. Must be used on one thread.

    path   file with the token; spaces and newlines around it are ignored. It is read again when a
           request comes, at most every LOOK_SECONDS. If it cannot be read, or does not have one
           token of at most MOST_BYTES printable ASCII characters, the last token stays valid
    clock  returns monotonic seconds

    Raises ConfigError if the file has no valid token at the start.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._read_at = clock()
        try:
            self._token = self._read()
        except OSError as error:
            raise ConfigError(f"http_token_file: {path}: {error}") from error
        if not self._token:
            raise ConfigError(f"http_token_file: {path} is empty: write a random token to it")
        if not _valid(self._token):
            raise ConfigError(
                f"http_token_file: {path} must have one token of at most {MOST_BYTES} printable"
                " ASCII characters, without spaces or newlines inside"
            )

    @property
    def header(self) -> str:
        """Value of the field Authorization with which this shard asks the other shards."""
        self._refresh()
        return f"Bearer {self._token.decode('latin-1')}"

    def allows(self, authorization: str | None) -> bool:
        """Return whether a request with this field Authorization has the token.

        authorization  value of the field, decoded as Latin-1; None: the request has none
        """
        self._refresh()
        scheme, _, value = (authorization or "").partition(" ")
        given = value.strip().encode("latin-1", "replace")
        if scheme.lower() == "basic":
            try:
                given = base64.b64decode(given, validate=True).partition(b":")[2]
            except binascii.Error:
                return False
        elif scheme.lower() != "bearer":
            return False
        return hmac.compare_digest(given, self._token)

    def _refresh(self) -> None:
        """Read the file again, unless that was done a moment ago."""
        now = self._clock()
        if now - self._read_at >= LOOK_SECONDS:
            self._read_at = now
            try:
                token = self._read()
            except OSError:
                return
            if _valid(token):
                self._token = token

    def _read(self) -> bytes:
        with self._path.open("rb") as file:
            return file.read(2 * MOST_BYTES).strip()


def _valid(token: bytes) -> bool:
    """Return whether a token fits into one field of HTTP."""
    return len(token) <= MOST_BYTES and _TOKEN.fullmatch(token) is not None
