"""Access: how a client opens connections: options of gRPC, TLS, a token, a proxy.

The token is a secret that tells a server who the client is. It is the content of a file, which is
read again when it changes. Every call carries it, as the metadata ``authorization: Bearer TOKEN``.
"""

from __future__ import annotations

import ipaddress
import os
import re
import time
from pathlib import Path
from typing import Any, Literal, TypedDict

import grpc

from psclient.addresses import proxy_variable
from psclient.errors import InvalidArgument, TlsError
from psclient.routes import Metadata
from psclient.tls import Tls, from_environment
from psproto import certfiles, keepalive

Options = tuple[tuple[str, int | str], ...]

TOKEN_FILE = "PSCLIENT_TOKEN_FILE"  # environment variable  # noqa: S105  # nosec B105
LOOK_SECONDS = 0.5  # shortest time between two looks at files that may have changed
PROXY = "grpc.enable_http_proxy"
NAME = "grpc.ssl_target_name_override"
OPTIONS: Options = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 1000),  # maximum time to connect, despite its name
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.dns_min_time_between_resolutions_ms", 1000),
    ("grpc.dns_ares_query_timeout", 5000),  # ms; then the look-up of a name fails, and is repeated
    *keepalive.client_options(),
    ("grpc.use_local_subchannel_pool", 1),  # else a forked child reuses its parent's connections
)
_TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]{1,4096}")


class Security(TypedDict, total=False):
    """Arguments of Client for TLS and the token, which other functions pass on to it."""

    tls: Tls | Literal[False] | None
    token_file: str | None
    token_in_plaintext: bool


class Access:
    """How one client connects to servers.

    tls                 files for TLS; None: those of the environment variables PSCLIENT_TLS_CA,
                        PSCLIENT_TLS_CERTIFICATE, PSCLIENT_TLS_KEY and PSCLIENT_TLS_NAME, and no TLS
                        if they are not set; False: no TLS
    token_file          path of the file with the token; None: that of the environment variable
                        PSCLIENT_TOKEN_FILE, if it is set; "": no token
    token_in_plaintext  whether to send the token without TLS to other machines or through a proxy
    proxy               whether to use the HTTP proxy that the environment variables name

    Raises InvalidArgument if one is invalid, or if a file cannot be used.

    Its methods must not be called by two threads at once.
    """

    def __init__(
        self,
        *,
        tls: Tls | Literal[False] | None = None,
        token_file: str | os.PathLike[str] | None = None,
        token_in_plaintext: bool = False,
        proxy: bool = False,
    ) -> None:
        if tls is None:
            tls = from_environment(os.environ)
        if tls is not None and tls is not False and not isinstance(tls, Tls):
            raise InvalidArgument(f"tls must be psclient.Tls(ca=...), None or False, got {tls!r}")
        if token_file is None:
            token_file = os.environ.get(TOKEN_FILE, "")
        if not isinstance(token_file, str | os.PathLike):
            raise InvalidArgument(f"token_file must be the path of a file, got {token_file!r}")
        self.tls = tls or None
        self.proxy = bool(proxy)
        self._token_file = Path(token_file) if os.fspath(token_file) else None
        self._token_in_plaintext = bool(token_in_plaintext)
        self._token: tuple[Any, str] | None = None  # signature of the file, its content
        self._credentials: Any = None  # gRPC's object
        self._seen: certfiles.Signature = ()  # of the files of ``_credentials``
        self._process = 0  # id of the process that created it
        self._looked = 0.0  # when the files were last looked at, in monotonic seconds
        if self.tls is not None:
            self.tls.context()
        if self._token_file is not None:
            self.token()

    def options(self, address: str, name: str) -> Options:
        """Return the options of a gRPC channel.

        address  "host:port" to connect to
        name     name that the server's certificate must be for
        """
        override = ((NAME, name),) if self.tls is not None and name != host_of(address) else ()
        return (*OPTIONS, (PROXY, int(self.proxy)), *override)

    def expected(self, address: str, name: str) -> str:
        """Return the name that the certificate of the server at ``address`` must be for.

        name  DNS name through which the server was found; "": it was not found through one
        """
        chosen = self.tls.name if self.tls is not None else ""
        return chosen or name or host_of(address)

    def credentials(self) -> Any:
        """Return gRPC's credentials for TLS; None: no TLS.

        The result is a different object once the files have changed. If the new files cannot be
        used, the former result stays. Raises TlsError if there is none.
        """
        tls = self.tls
        if tls is None:
            return None
        now, known = time.monotonic(), self._process == os.getpid()
        if known and now - self._looked < LOOK_SECONDS:
            return self._credentials
        self._looked = now
        try:
            if not known or certfiles.signature(tls.paths) != self._seen:
                self._seen, contents = _read(tls)
                self._credentials = grpc.ssl_channel_credentials(*_arguments(contents))
                self._process = os.getpid()
        except (InvalidArgument, OSError) as error:
            if not known:
                failure = TlsError(str(error))
                failure.reason = "TLS_FILES"
                raise failure from error
        return self._credentials

    def require_secrecy(self, address: str) -> None:
        """Raise InvalidArgument if a token would be sent without TLS to another machine: to that of
        the server, or to a proxy.
        """
        if self._token_file is None or self.tls is not None or self._token_in_plaintext:
            return
        variable = proxy_variable() if self.proxy and not address.startswith("unix:") else ""
        if variable:
            raise InvalidArgument(
                f"token_file: the token would be sent to {address} without TLS through the proxy of"
                f" the environment variable {variable}, where others can read it: pass"
                " tls=psclient.Tls(ca=...), proxy=False for servers on this machine, or"
                " token_in_plaintext=True if you trust the proxy and the network"
            )
        if not is_local(address):
            raise InvalidArgument(
                f"token_file: the token would be sent to {address} without TLS, where others can"
                " read it: pass tls=psclient.Tls(ca=...), or token_in_plaintext=True if you trust"
                " the network"
            )

    def metadata(self) -> Metadata:
        """Return the metadata with the token; () if there is no token."""
        if self._token_file is None:
            return ()
        return (("authorization", f"Bearer {self.token()}"),)

    def token(self) -> str:
        """Return the token; read its file if it has changed.

        If the changed file cannot be used, the former token stays. Raises InvalidArgument if there
        is none.
        """
        path = self._token_file
        assert path is not None
        try:
            state = path.stat()
            seen = (state.st_ino, state.st_mtime_ns, state.st_size)
            if self._token is None or self._token[0] != seen:
                self._token = seen, _checked_token(path, path.read_bytes())
        except (OSError, InvalidArgument) as error:
            if self._token is None:
                if isinstance(error, InvalidArgument):
                    raise
                reason = error.strerror or error
                raise InvalidArgument(f"token_file: cannot read {path}: {reason}") from error
        return self._token[1]


PLAIN = Access(tls=False, token_file="")  # nosec B106


def host_of(address: str) -> str:
    """Return the host of "host:port", without the brackets of an IPv6 address."""
    return address.rpartition(":")[0].strip("[]")


def is_local(address: str) -> bool:
    """Return whether an address "host:port" certainly leads to this machine."""
    host = host_of(address)
    if address.startswith("unix:") or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _read(tls: Tls) -> tuple[certfiles.Signature, list[bytes]]:
    """Return the signature and the contents of files that fit together."""
    for _ in range(certfiles.TRIES):
        seen, contents = certfiles.read(tls.paths)
        tls.context()  # checks the files, as they are now
        if certfiles.signature(tls.paths) == seen:
            return seen, contents
    raise certfiles.Unsteady(f"{tls.ca}: the files change all the time")


def _arguments(contents: list[bytes]) -> tuple[bytes, bytes | None, bytes | None]:
    """Return the arguments of gRPC for files: CAs, key, certificate."""
    ca, *own = contents
    certificate, key = own or (None, None)
    return ca, key, certificate


def _checked_token(path: Path, data: bytes) -> str:
    """Return the token in the content of a file. Raises InvalidArgument if it is not one."""
    token = data.decode("latin-1").strip()
    if not _TOKEN.fullmatch(token):
        raise InvalidArgument(
            f"token_file: {path} must have one token of 1 to 4096 letters, digits or . _ ~ + / = -"
        )
    return token
