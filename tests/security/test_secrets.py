"""Files with secrets that are given for the wrong setting: no message has the secret."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from authority import Authority, Mount, key

from psclient import Client, Tls
from psclient.access import Access
from psclient.errors import InvalidArgument
from psserver.config import load
from psserver.security.certificates import Certificates
from psserver.security.guard import guard_of
from psserver.security.httptoken import HttpToken
from psserver.unusable import ConfigError

CA = Authority()
WORD = "5ec4e7" * 10 + "70ce"  # as long as one of `openssl rand -hex 32`
SECRETS = {
    "a token": WORD,
    "two lines": f"{WORD}\n{WORD}\n",
    "a setting": f'token = "{WORD}"\n',
    "an unknown setting": f'[principals.a]\npassword = "{WORD}"\n',
    "another type": f'[principals.a]\ngrants = "{WORD}"\n',
    "another setting": f'[principals.a]\ncertificates = ["{WORD}"]\n',
    "a section": f'principals = "{WORD}"\n',
    "a role": f'[principals.a]\nroles = "{WORD}"\n',
    "a broken setting": f"token = {WORD}\n",
    "a broken key": f"-----BEGIN PRIVATE KEY-----\n{WORD}\n-----END PRIVATE KEY-----\n",
    "a broken certificate": f"-----BEGIN CERTIFICATE-----\n{WORD}\n-----END CERTIFICATE-----\n",
    "a key": key(CA.client()).decode(),
}


@pytest.fixture(params=SECRETS)
def secret(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text(SECRETS[request.param])
    return path


def said(*errors: BaseException) -> str:
    """All that the errors say, and those that a traceback shows with them."""
    found, todo = [], list(errors)
    while todo:
        error = todo.pop()
        found.append(f"{error} {error!r}")
        context = None if error.__suppress_context__ else error.__context__
        todo += [each for each in (error.__cause__, context) if each is not None]
    return " ".join(found)


def pieces(secret: Path) -> list[str]:
    """Words of a secret that no message may have, in text or in base64."""
    text = secret.read_text()
    lines = [line for line in text.splitlines() if "-----" not in line and WORD not in line]
    return [WORD, base64.b64encode(WORD.encode()).decode(), *lines]


def test_the_server_tells_nothing(secret: Path, tmp_path: Path) -> None:
    mount = Mount(tmp_path / "tls")
    mount.put(CA.pem, CA.server())
    errors: list[BaseException] = []
    for at in range(0, len(mount.flags), 2):
        flags = mount.flags
        flags[at + 1] = str(secret)
        if flags[at] == "--tls-key" and "-----BEGIN PRIVATE" in secret.read_text():
            continue
        with pytest.raises(ConfigError) as caught:
            Certificates(load(["--port", "1", *flags]))
        errors.append(caught.value)
    for make in (lambda: guard_of(secret, None, 0), lambda: HttpToken(secret)):
        try:
            make()
        except ConfigError as error:
            errors.append(error)
    text = said(*errors)
    assert [piece for piece in pieces(secret) if piece in text] == []


def test_the_client_tells_nothing(secret: Path, tmp_path: Path) -> None:
    mount = Mount(tmp_path / "tls")
    mount.put(CA.pem, CA.client())
    good, errors = mount.tls(), list[BaseException]()
    for fields in (
        {"ca": str(secret)},
        {"ca": good.ca, "certificate": str(secret), "key": good.key},
        {"ca": good.ca, "certificate": good.certificate, "key": str(secret)},
    ):
        with pytest.raises(InvalidArgument) as caught:
            Client(["127.0.0.1:1"], tls=Tls(**fields))
        errors.append(caught.value)
    access = None
    try:
        access = Access(tls=False, token_file=str(secret))
    except InvalidArgument as error:
        errors.append(error)
    text = f"{said(*errors)} {access!r}"
    assert [piece for piece in pieces(secret) if piece in text] == []
