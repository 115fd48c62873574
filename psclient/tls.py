"""Tls: the files with which a client checks servers and shows who it is.

    ps = Client(["ps-0.ps:7000"], tls=Tls(ca="ca.crt", certificate="tls.crt", key="tls.key"))

The files are read again when they change, so that certificates can be replaced while the client
runs.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from psclient.errors import InvalidArgument

PREFIX = "PSCLIENT_TLS_"  # of the environment variables with the fields of Tls


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """Files for TLS, all in PEM. The names of the fields are those of Client's environment
    variables: PSCLIENT_TLS_CA is ``ca``.

    ca           path of a file with the certificates of the CAs that sign servers' certificates
    certificate  path of the client's certificate, followed by those that lead to its CA; "": none
    key          path of the private key of ``certificate``, without a password
    name         name that servers' certificates must have, for all addresses; "": the host in the
                 address. For shards found behind one DNS name, the host is that of the DNS name

    Raises InvalidArgument if a path is missing. Reads no file.
    """

    ca: str
    certificate: str = ""
    key: str = ""
    name: str = ""

    def __post_init__(self) -> None:
        for field in ("ca", "certificate", "key"):
            value = getattr(self, field)
            if not isinstance(value, str | os.PathLike):
                raise InvalidArgument(f"tls: {field} must be the path of a file, got {value!r}")
            object.__setattr__(self, field, os.fspath(value))
        if not isinstance(self.name, str):
            raise InvalidArgument(f"tls: name must be a string, got {self.name!r}")
        if not self.ca:
            raise InvalidArgument(
                "tls: ca is missing: give the file with the certificate of the CA that signed those"
                " of the servers"
            )
        if bool(self.certificate) != bool(self.key):
            there, lacking = ("certificate", "key") if self.certificate else ("key", "certificate")
            raise InvalidArgument(f"tls: {there} is given, but {lacking} is missing: give both")

    @property
    def paths(self) -> list[Path]:
        """Return the files: that of the CAs and, if there is one, certificate and key."""
        return [Path(each) for each in (self.ca, self.certificate, self.key) if each]

    def context(self) -> ssl.SSLContext:
        """Return an SSLContext of the files as they are now, for a connection by HTTP/2.

        Raises InvalidArgument if a file cannot be used.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["h2"])
        try:
            context.load_verify_locations(cafile=self.ca)
        except OSError as error:  # ssl.SSLError too
            raise InvalidArgument(f"tls: ca: {_reason(self.ca, error)}") from error
        if self.certificate:
            try:
                context.load_cert_chain(self.certificate, self.key, _no_password)
            except (OSError, ValueError) as error:
                for path in (self.certificate, self.key):
                    if not os.access(path, os.R_OK):
                        raise InvalidArgument(f"tls: {_reason(path, error)}") from error
                both = f"{self.certificate} and {self.key}"
                raise InvalidArgument(
                    f"tls: certificate and key: {_reason(both, error)}; expected a certificate and"
                    " its key without a password, in PEM"
                ) from error
        return context


def from_environment(environment: Mapping[str, str]) -> Tls | None:
    """Return the Tls of the environment variables PSCLIENT_TLS_*; None if there are none.

    environment  variable -> value

    Raises InvalidArgument if PSCLIENT_TLS_CA is not among them.
    """
    fields = {
        field: environment.get(PREFIX + field.upper(), "")
        for field in ("ca", "certificate", "key", "name")
    }
    if not any(fields.values()):
        return None
    try:
        return Tls(**fields)
    except InvalidArgument as error:
        raise InvalidArgument(f"environment variables {PREFIX}...: {error}") from None


def _no_password() -> str:
    raise ValueError("the key has a password")


def _reason(path: str, error: Exception) -> str:
    """Return the text of the error of a file that cannot be used."""
    if isinstance(error, ssl.SSLError):
        return f"cannot use {path}: {error.reason or error}"
    if isinstance(error, OSError):
        return f"cannot read {path}: {error.strerror or error}"
    return f"cannot use {path}: {error}"
