"""The server's TLS certificates: read from files, and read again when the files change.

Before each handshake gRPC asks ``Certificates`` whether to use other certificates. So a client that
connects after the files were replaced gets the new certificate, and open connections stay as they
are. A new set of files is used only if it is complete, its key belongs to its certificate, and the
certificate has not expired. Otherwise the set in use stays in use, and one log line says why.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc
import structlog

from psproto import certfiles
from psserver.config import ServerConfig
from psserver.unusable import ConfigError

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class CertificateSet:
    """Contents of the files, checked.

    chain            the server's certificate and those that lead to its CA, in PEM
    key              private key of the server's certificate, in PEM
    roots            certificates of the CAs that sign certificates of clients, in PEM; None:
                     clients need none
    roots_not_after  when the first of ``roots`` expires, in seconds since 1970; None: no roots
    not_before       when the first of the chain's certificates becomes valid, in seconds since 1970
    not_after        when the first of the chain's certificates expires, in seconds since 1970
    names            names and addresses that the server's certificate is for
    """

    chain: bytes
    key: bytes
    roots: bytes | None
    roots_not_after: float | None
    not_before: float
    not_after: float
    names: tuple[str, ...]

    def configuration(self) -> grpc.ServerCertificateConfiguration:
        """Return this set as gRPC takes it."""
        return grpc.ssl_server_certificate_configuration([(self.key, self.chain)], self.roots)


class Certificates:
    """The certificates that a server uses, and the files that they come from. Thread-safe.

    config  has the paths of the files. Raises ConfigError if they cannot be used
    clock   returns seconds since 1970

    reloads  how often a new set of files came into use
    problem  why the newest files are not in use; "": they are
    """

    def __init__(self, config: ServerConfig, clock: Callable[[], float] = time.time) -> None:
        self.reloads = 0
        self.problem = ""
        self._paths = paths_of(config)
        self._clock = clock
        self._lock = threading.Lock()
        self._signature, self._set = load(self._paths)
        self._seen = self._signature  # newest files that were looked at, usable or not
        if problem := invalid_at(self._set, clock()):
            log.error("certificate", problem=f"tls_certificate: {problem}")

    @property
    def current(self) -> CertificateSet:
        """Return the set in use; first read the files if they have changed."""
        with self._lock:
            self._refresh()
            return self._set

    def expiries(self) -> dict[str, float]:
        """Return when certificates in use expire, in seconds since 1970: "server" or "ca" -> time.

        Of several certificates, the first to expire counts.
        """
        current = self.current
        found = {"server": current.not_after}
        if current.roots_not_after is not None:
            found["ca"] = current.roots_not_after
        return found

    def credentials(self) -> grpc.ServerCredentials:
        """Return what a gRPC server needs to use these certificates, whatever they are then."""
        given = self.current
        last = given

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            """Return other certificates, or None if those of the last call are still in use."""
            nonlocal last
            current = self.current
            if current is last:
                return None
            last = current
            return current.configuration()

        return grpc.dynamic_ssl_server_credentials(
            given.configuration(), fetch, require_client_authentication=given.roots is not None
        )

    def _refresh(self) -> None:
        """Read the files if they have changed, and use them if they can be used."""
        try:
            if certfiles.signature(list(self._paths.values())) == self._seen:
                return
            found, new = load(self._paths)
            self._seen = found
            if (problem := invalid_at(new, self._clock())) and not invalid_at(
                self._set, self._clock()
            ):
                raise ConfigError(f"tls_certificate: {problem}")
        except (ConfigError, OSError) as error:
            self._refuse(str(error))
            return
        self._signature, self._set = found, new
        self.reloads += 1
        self.problem = ""
        log.info("certificates replaced", names=new.names, expires=_date(new.not_after))

    def _refuse(self, problem: str) -> None:
        """Keep the set in use; log why, unless the reason is still the same."""
        if problem != self.problem:
            self.problem = problem
            log.error("certificates not replaced", problem=problem, in_use=self._set.names)


def paths_of(config: ServerConfig) -> dict[str, Path]:
    """Return the files of a server's certificates: setting -> path."""
    fields = ["tls_certificate", "tls_key"]
    if config.tls_client_auth == "required":
        fields.append("tls_ca")
    return {field: getattr(config, field) for field in fields}


def load(paths: dict[str, Path]) -> tuple[certfiles.Signature, CertificateSet]:
    """Read and check the files of a set; return their signature and the set.

    paths  setting -> path

    Raises ConfigError, which names the setting, if the files cannot be read or do not fit together.
    """
    try:
        signature, contents = certfiles.read(list(paths.values()))
    except OSError as error:
        raise _unreadable(paths, error) from error
    chain, key, *rest = contents
    roots = rest[0] if rest else None
    from psserver.security import pem  # imports a large package, only if TLS is used

    where = {field: f"{field}: {path}" for field, path in paths.items()}
    certificates = pem.certificates(where["tls_certificate"], chain)
    cas = [] if roots is None else pem.certificates(where["tls_ca"], roots)
    if not pem.is_key_of(where["tls_key"], key, certificates[0]):
        raise ConfigError(
            f"{where['tls_key']} is not the key of the first certificate in"
            f" {paths['tls_certificate']}"
        )
    return signature, CertificateSet(
        chain=chain,
        key=key,
        roots=roots,
        roots_not_after=min(map(pem.end, cas), default=None),
        not_before=max(map(pem.begin, certificates)),
        not_after=min(map(pem.end, certificates)),
        names=pem.names(certificates[0]),
    )


def _unreadable(paths: dict[str, Path], error: OSError) -> ConfigError:
    """Return the error for files that cannot be read; it names the first of them."""
    for field, path in paths.items():
        try:
            path.read_bytes()
        except OSError as reason:
            return ConfigError(f"{field}: cannot read {path}: {reason.strerror or reason}")
    return ConfigError(f"tls_certificate: cannot read the files: {error}")


def invalid_at(certificates: CertificateSet, now: float) -> str:
    """Return why clients refuse a set at a time, in seconds since 1970; "": they do not."""
    if now >= certificates.not_after:
        return f"the certificate expired at {_date(certificates.not_after)}; renew it"
    if now < certificates.not_before:
        begin = _date(certificates.not_before)
        return f"the certificate is valid only from {begin} on; check the clock"
    return ""


def _date(seconds: float) -> str:
    """Return a time in seconds since 1970 as text."""
    return time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(seconds))
