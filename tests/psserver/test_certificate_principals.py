"""Callers with certificates: who they are, and every method refuses those that it must refuse."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import grpc
import pytest
from authority import Authority, Mount, chain, expired, key
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from secured import (
    Method,
    Recording,
    Secured,
    bearer,
    create,
    enumerated,
    outcome,
    requests,
)

from psserver.security.verbs import LANE, METHODS, PATHS

CLOSED = [path for path, rule in METHODS.items() if rule.verbs and path != LANE]
OPEN = [path for path, rule in METHODS.items() if not rule.verbs]


def principal(name: str, certificate: str, verbs: str, tables: str) -> str:
    return (
        f'[principals.{name}]\ncertificates = ["{certificate}"]\n'
        f'grants = [{{ verbs = ["{verbs}"], tables = ["{tables}"] }}]\n'
    )


OPS = principal("ops", "cn:ops", "*", "*")
POLICY = (
    OPS
    + principal("reader", "dns:reader.clients.test", "pull", "other")
    + principal("robot", "uri:spiffe://prod/ns/ml/sa/robot", "status", "*")
)


def with_uri(authority: Authority, uri: str, name: str) -> tuple[bytes, bytes]:
    """(key, certificate) of a client whose only alternative name is a URI."""
    pair = ec.generate_private_key(ec.SECP256R1())
    now = dt.datetime.now(dt.UTC)
    signer: Any = authority
    made = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(signer._certificate.subject)
        .public_key(pair.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(hours=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)]), critical=False
        )
        .sign(signer._private_key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    return (
        pair.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
        made.public_bytes(pem),
    )


class Clients:
    """Channels to a server, with the certificates of several clients."""

    def __init__(self, server: Secured, ours: Authority) -> None:
        self._server, self._ours = server, ours
        self._open = ExitStack()
        other = Authority()
        leaves = {
            "ops": ours.client("ops"),
            "reader": ours.client("reader"),
            "stranger": ours.client("stranger"),
            "another CA": other.client("ops"),
            "expired": ours.client("ops", **expired()),
        }
        pairs = {name: (key(leaf), chain(leaf)) for name, leaf in leaves.items()}
        pairs["robot"] = with_uri(ours, "spiffe://prod/ns/ml/sa/robot", "ops-not")
        self.channels = {name: self._channel(*pair) for name, pair in pairs.items()}
        self.channels["no certificate"] = self._channel(None, None)
        self.channels["plaintext"] = self._open.enter_context(server.channel())

    def _channel(self, private: bytes | None, certificate: bytes | None) -> grpc.Channel:
        credentials = grpc.ssl_channel_credentials(self._ours.pem, private, certificate)
        options = [("grpc.use_local_subchannel_pool", 1)]
        channel = grpc.secure_channel(self._server.address, credentials, options)
        return self._open.enter_context(channel)

    def close(self) -> None:
        self._open.close()


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, authority: Authority) -> Iterator[Secured]:
    directory = tmp_path_factory.mktemp("certified")
    mount = Mount(directory / "tls")
    mount.put(authority.pem, authority.server())
    made = Secured(directory, POLICY, *mount.flags).start()
    yield made
    made.stop()


@pytest.fixture(scope="module")
def clients(server: Secured, authority: Authority) -> Iterator[dict[str, grpc.Channel]]:
    made = Clients(server, authority)
    for table in ("t", "other"):
        create(made.channels["ops"], table, ())
    server.checkpoint("first")
    yield made.channels
    made.close()


@pytest.fixture(scope="module")
def methods(clients: dict[str, grpc.Channel]) -> dict[str, Method]:
    return {method.path: method for method in enumerated(clients["ops"], ())}


OUTCOMES = {
    "another CA": "UNAVAILABLE",  # the handshake fails
    "expired": "UNAVAILABLE",
    "no certificate": "UNAVAILABLE",
    "plaintext": "UNAVAILABLE",
    "stranger": "UNAUTHENTICATED",
}


@pytest.mark.parametrize("path", CLOSED, ids=lambda path: path.rpartition("/")[2])
@pytest.mark.parametrize("who", OUTCOMES)
def test_a_caller_without_a_right_certificate_is_refused(
    server: Secured,
    clients: dict[str, grpc.Channel],
    methods: dict[str, Method],
    who: str,
    path: str,
) -> None:
    before, reached = server.state(), len(Recording.reached)
    data = requests("t")[path.rpartition("/")[2]]
    assert outcome(clients[who], methods[path], data) == OUTCOMES[who]
    assert Recording.reached[reached:] == []
    assert server.state() == before


@pytest.mark.parametrize("path", OPEN, ids=lambda path: path.rpartition("/")[2])
def test_health_checks_need_only_the_handshake(
    clients: dict[str, grpc.Channel], methods: dict[str, Method], path: str
) -> None:
    assert outcome(clients["stranger"], methods[path], b"") == "OK"
    assert outcome(clients["another CA"], methods[path], b"") == "UNAVAILABLE"


@pytest.mark.parametrize("path", CLOSED, ids=lambda path: path.rpartition("/")[2])
def test_a_certificate_without_the_right_is_refused(
    server: Secured, clients: dict[str, grpc.Channel], methods: dict[str, Method], path: str
) -> None:
    """The reader may only pull from another table, and learn what everybody may."""
    name = path.rpartition("/")[2]
    before = server.state()
    allowed = name in ("ListTables", "WaitDurable", "GetServerInfo")
    expected = "OK" if allowed else "PERMISSION_DENIED"
    assert outcome(clients["reader"], methods[path], requests("t")[name]) == expected
    assert server.state() == before


def test_the_principal_of_each_kind_of_name_is_found(
    clients: dict[str, grpc.Channel], methods: dict[str, Method]
) -> None:
    """ops by its common name, reader by its DNS name, robot by its URI."""
    status, pull = methods[PATHS["GetStatus"]], methods[PATHS["Pull"]]
    data = requests("other")["Pull"]
    found = {
        who: (outcome(clients[who], status, b""), outcome(clients[who], pull, data))
        for who in ("ops", "reader", "robot")
    }
    assert found == {
        "ops": ("OK", "OK"),
        "reader": ("PERMISSION_DENIED", "OK"),
        "robot": ("OK", "PERMISSION_DENIED"),
    }


def test_a_wrong_token_is_not_replaced_by_a_good_certificate(
    clients: dict[str, grpc.Channel], methods: dict[str, Method]
) -> None:
    method = methods[PATHS["ListTables"]]
    assert outcome(clients["ops"], method, b"", bearer("ops")) == "UNAUTHENTICATED"


def test_a_revoked_certificate_ends_a_stream(
    server: Secured, clients: dict[str, grpc.Channel], methods: dict[str, Method]
) -> None:
    opened = clients["reader"].unary_stream(PATHS["Subscribe"])
    server.change(OPS + principal("reader", "dns:reader.clients.test", "subscribe", "other"))
    replies = opened(requests("other")["Subscribe"], timeout=120)
    next(replies)
    server.change(OPS)
    with pytest.raises(grpc.RpcError) as caught:
        list(replies)
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED
    server.change(POLICY)
