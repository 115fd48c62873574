"""Find out by a plain TLS handshake why a server cannot be reached.

gRPC reports every failure to connect as UNAVAILABLE: a server that is down, and one whose
certificate is wrong. Only the latter is not worth a retry. So after such a failure the client
connects once more, with Python's ssl module, whose errors have reasons.

In TLS 1.3 the server checks the client's certificate after the client has finished its handshake.
So a refused certificate shows only when the client reads: a server that accepts the certificate
sends its HTTP/2 settings at once, and one that refuses it closes the connection.
"""

from __future__ import annotations

import socket
import ssl
import time
from contextlib import suppress
from typing import NamedTuple

from psclient.errors import InvalidArgument, TlsError
from psclient.lookup import look_up
from psclient.tls import Tls

SECONDS = 2.0  # maximum time of a handshake, and of waiting for the server's first bytes
# maximum time to connect: where nobody answers, TLS is not the reason, and the client must try the
# server again soon
CONNECT_SECONDS = 0.3
FRESH_SECONDS = 1.0  # time for which a result is used again
AGAIN_SECONDS = 0.1  # pause before a second look: the server may just have stopped
NAME_CODES = (62, 64)  # of OpenSSL's verification: certificate is not for this name, or IP address
DATE_CODES = (9, 10)  # the certificate is not valid yet, or has expired
PURPOSE_CODE = 26  # the certificate must not be used by clients
NOT_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST", "PACKET_LENGTH_TOO_LONG")


class Finding(NamedTuple):
    """Why a TLS connection to a server is impossible."""

    reason: str  # see TlsError
    text: str  # with advice

    def error(self, where: str) -> TlsError:
        """Return the error to raise. where: name of the server, which its message starts with."""
        error = TlsError(f"{where}: {self.text}")
        error.reason = self.reason
        return error


class Diagnosis:
    """The newest result of ``diagnose`` for one connection. Thread-safe, usable after a fork."""

    def __init__(self) -> None:
        self._last: tuple[float, tuple[object, ...], Finding | None] | None = None

    def of(self, address: str, tls: Tls | None, name: str) -> Finding | None:
        """Return what ``diagnose`` returns for these arguments; at most FRESH_SECONDS old."""
        about, last = (address, tls, name), self._last
        if last is not None and last[1] == about and time.monotonic() - last[0] < FRESH_SECONDS:
            return last[2]
        found = diagnose(address, tls, name)
        self._last = time.monotonic(), about, found
        return found


def diagnose(address: str, tls: Tls | None, name: str) -> Finding | None:
    """Return why a connection to a server fails, if TLS is the reason; else None.

    address  "host:port"
    tls      how the client connects; None: without TLS
    name     name or address that the server's certificate must be for

    Takes a few milliseconds, at most a few seconds. None means that the server is not reached, or
    that it accepts the connection now.
    """
    if address.startswith("unix:"):
        return None
    if tls is None:
        return _speaks_tls(address)
    try:
        context = tls.context()
    except InvalidArgument as error:
        return Finding("TLS_FILES", str(error))
    try:
        if _accepted(address, context, name):
            return None
        time.sleep(AGAIN_SECONDS)
        if _accepted(address, context, name):
            return None
    except ssl.SSLCertVerificationError as error:
        return _distrusted(tls, name, error)
    except ssl.SSLError as error:
        return _failed(tls, error)
    except OSError:
        return None
    return _refused(tls)


def _speaks_tls(address: str) -> Finding | None:
    """Return the Finding of a server that speaks TLS, for a client that does not."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # nothing is sent: the client only looks
    context.set_alpn_protocols(["h2"])
    try:
        with _connect(address) as plain, context.wrap_socket(plain):
            pass
    except ssl.SSLError as error:
        if "ALERT" not in (error.reason or ""):
            return None
    except OSError:
        return None
    return Finding(
        "TLS_SERVER_TLS",
        "the server accepts only TLS, and this client uses none: pass tls=psclient.Tls(ca=...), or"
        " set PSCLIENT_TLS_CA",
    )


def _connect(address: str) -> socket.socket:
    """Return a TCP connection to the first address behind "host:port" that accepts one.

    It waits at most SECONDS for each answer.
    """
    failure: OSError = ConnectionError(f"{address}: no address")
    for each in look_up(address):
        host, _, port = each.rpartition(":")
        try:
            connection = socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS)
        except OSError as error:
            failure = error
        else:
            connection.settimeout(SECONDS)
            return connection
    raise failure


def _accepted(address: str, context: ssl.SSLContext, name: str) -> bool:
    """Return whether the server sends its first bytes after a handshake.

    Returns False if it closes the connection instead. Raises OSError if it is not reached, or if
    the handshake fails.
    """
    with _connect(address) as plain, context.wrap_socket(plain, server_hostname=name) as secured:
        try:
            return bool(secured.recv(1))
        except ConnectionError:
            return False


def _distrusted(tls: Tls, name: str, error: ssl.SSLCertVerificationError) -> Finding:
    """Return the Finding for a server's certificate that the client does not accept."""
    why = error.verify_message
    if error.verify_code in NAME_CODES:
        return Finding(
            "TLS_SERVER_NAME",
            f"the server's certificate is not for {name!r}: {why}; issue it for that name, or pass"
            " Tls(name=...) with a name that it has",
        )
    if error.verify_code in DATE_CODES:
        return Finding(
            "TLS_SERVER_EXPIRED",
            f"the server's certificate is not valid now: {why}; renew it, and check the clocks",
        )
    return Finding(
        "TLS_SERVER_UNTRUSTED",
        f"the server's certificate is not signed by a CA in {tls.ca}: {why}; add the certificate of"
        " the CA that signed it",
    )


def _failed(tls: Tls, error: ssl.SSLError) -> Finding | None:
    """Return the Finding for a handshake that failed, except for the server's certificate."""
    reason = error.reason or ""
    if reason in NOT_TLS:
        return Finding(
            "TLS_SERVER_PLAINTEXT",
            "the server does not speak TLS: set tls_certificate and tls_key on the server, or"
            " connect without tls",
        )
    if "ALERT" not in reason:  # the connection was lost
        return None
    if "CERTIFICATE" in reason or "UNKNOWN_CA" in reason:
        return _refused(tls)
    return Finding("TLS_HANDSHAKE", f"the server refused the handshake: {reason}")


def _refused(tls: Tls) -> Finding:
    """Return the Finding for a server that refused the client's certificate, or the lack of one."""
    if not tls.certificate:
        return Finding(
            "TLS_CLIENT_MISSING",
            "the server requires a certificate of the client: pass Tls(certificate=..., key=...)",
        )
    code, why = _own_problem(tls)
    if code in DATE_CODES:
        return Finding(
            "TLS_CLIENT_EXPIRED",
            f"the server refused the certificate of this client, {tls.certificate}, which is not"
            f" valid now: {why}; renew it, and check the clocks",
        )
    if code == PURPOSE_CODE:
        why = "its extended key usage does not permit clientAuth"
    else:
        why = "no CA in the server's tls_ca signed it"
    return Finding(
        "TLS_CLIENT_REFUSED",
        f"the server refused the certificate of this client, {tls.certificate}: {why}",
    )


def _own_problem(tls: Tls) -> tuple[int, str]:
    """Return (code, text) of what is wrong with the client's own certificate; (0, ""): nothing.

    Does not check who signed it. The codes are those of OpenSSL's verification. It makes a
    handshake in memory, in which the certificate is also the only trusted one.
    """
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.verify_mode = ssl.CERT_REQUIRED
    server.verify_flags |= ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_mode = ssl.CERT_NONE  # both ends are this process
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    try:
        for context in (server, client):
            context.load_cert_chain(tls.certificate, tls.key)
        server.load_verify_locations(cafile=tls.certificate)
        ends = (
            client.wrap_bio(back, there),
            server.wrap_bio(there, back, server_side=True),
        )
        for _ in range(4):
            for end in ends:
                with suppress(ssl.SSLWantReadError):
                    end.do_handshake()
    except ssl.SSLCertVerificationError as error:
        return error.verify_code, error.verify_message
    except OSError:
        pass
    return 0, ""
