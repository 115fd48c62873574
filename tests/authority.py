"""Certificates for tests: authorities, and directories that change as mounted Secrets do."""

from __future__ import annotations

import datetime as dt
import itertools
from pathlib import Path
from typing import Any

import trustme

from psclient import Tls

NAMES = ("127.0.0.1", "localhost", "ps.test")  # of the certificates of servers
HOUR = dt.timedelta(hours=1)
FILES = ("ca.crt", "tls.key", "tls.crt")


class Authority(trustme.CA):  # type: ignore[misc]
    """A certificate authority."""

    @property
    def pem(self) -> bytes:
        """The certificate of the authority."""
        data: bytes = self.cert_pem.bytes()
        return data

    def server(self, *names: str, **options: Any) -> trustme.LeafCert:
        """A certificate for a server."""
        return self.issue_cert(*(names or NAMES), **options)

    def client(self, name: str = "trainer", **options: Any) -> trustme.LeafCert:
        """A certificate for a client."""
        return self.issue_cert(f"{name}.clients.test", common_name=name, **options)


def dates(begins: dt.timedelta, ends: dt.timedelta) -> dict[str, dt.datetime]:
    """Return the options of a certificate that is valid between two times, relative to now."""
    now = dt.datetime.now(dt.UTC)
    return {"not_before": now + begins, "not_after": now + ends}


def expired() -> dict[str, dt.datetime]:
    return dates(-48 * HOUR, -HOUR)


def future() -> dict[str, dt.datetime]:
    return dates(HOUR, 48 * HOUR)


def key(leaf: trustme.LeafCert) -> bytes:
    data: bytes = leaf.private_key_pem.bytes()
    return data


def chain(leaf: trustme.LeafCert) -> bytes:
    return b"".join(each.bytes() for each in leaf.cert_chain_pems)


class Mount:
    """A directory in which the files of a Secret are replaced all at once, as kubelet does it.

    The files are symbolic links through the link ``..data`` to a directory, which is replaced.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._numbers = itertools.count(1)
        path.mkdir(parents=True)

    def put(self, ca: bytes, leaf: trustme.LeafCert | tuple[bytes, bytes]) -> None:
        """Replace the files.

        leaf  a certificate with its key; or (key, certificate), which may be anything
        """
        pair = leaf if isinstance(leaf, tuple) else (key(leaf), chain(leaf))
        old = (self.path / "..data").resolve()
        new = self.path / f"..{next(self._numbers)}"
        new.mkdir()
        for name, data in zip(FILES, (ca, *pair), strict=True):
            (new / name).write_bytes(data)
        link = self.path / "..data_tmp"
        link.symlink_to(new.name)
        link.rename(self.path / "..data")
        for name in FILES:
            if not (self.path / name).is_symlink():
                (self.path / name).symlink_to(f"..data/{name}")
        if old.name.startswith("..") and old.exists() and old != self.path / "..data":
            for each in old.iterdir():
                each.unlink()
            old.rmdir()

    @property
    def flags(self) -> list[str]:
        """The flags of a server that uses these files."""
        pairs = zip(("--tls-ca", "--tls-key", "--tls-certificate"), FILES, strict=True)
        return [each for flag, name in pairs for each in (flag, str(self.path / name))]

    def tls(self, **options: str) -> Tls:
        """The Tls of a client that uses these files."""
        ca, key, certificate = (str(self.path / name) for name in FILES)
        return Tls(**{"ca": ca, "key": key, "certificate": certificate, **options})
