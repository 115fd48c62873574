"""Attacks with certificates: names that are almost right, and signatures of the wrong issuer."""

from __future__ import annotations

import datetime as dt
import ipaddress
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from authority import Authority, Mount
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from secured import METHOD, Secured, call, section

DNS, URI = x509.DNSName, x509.UniformResourceIdentifier
Pair = tuple[x509.Certificate, ec.EllipticCurvePrivateKey]
Extensions = Sequence[tuple[x509.ExtensionType, bool]]
IS_CA = (x509.BasicConstraints(ca=True, path_length=None), True)
IS_LEAF = (x509.BasicConstraints(ca=False, path_length=None), True)
FOR_SERVERS = (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False)
ONLY_B = (x509.NameConstraints(permitted_subtrees=[DNS("b.test")], excluded_subtrees=None), True)
ROOT = Authority()


def principal(name: str, *certificates: str) -> str:
    listed = ", ".join(f'"{each}"' for each in certificates)
    return (
        f"[principals.{name}]\ncertificates = [{listed}]\n"
        'grants = [{ verbs = ["status"], tables = [] }]\n'
    )


POLICY = (
    section("ops", (["*"], ["*"]))
    + principal("a", "dns:a.test", "cn:a")
    + principal("b", "uri:spiffe://b", "dns:b.test")
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    directory = tmp_path_factory.mktemp("attacked")
    mount = Mount(directory / "tls")
    mount.put(ROOT.pem, ROOT.server())
    made = Secured(directory, POLICY, *mount.flags).start()
    yield made
    made.stop()


def unchecked(kind: Any, value: str) -> Any:
    """A name that the class does not accept, but a careless authority signs."""
    return kind._init_without_validation(value)


def issue(
    signer: Pair | None,
    names: Sequence[x509.GeneralName] = (),
    common: Sequence[str] = ("nobody",),
    extensions: Extensions = (),
) -> Pair:
    """A certificate with its key. signer: certificate and key of its issuer; None: the root."""
    root: Any = ROOT
    issuer, key = signer or (root._certificate, root._private_key)
    own, now = ec.generate_private_key(ec.SECP256R1()), dt.datetime.now(dt.UTC)
    attributes = [x509.NameAttribute(NameOID.COMMON_NAME, each) for each in common]
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name(attributes))
        .issuer_name(issuer.subject)
        .public_key(own.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(hours=1))
    )
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical)
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(key, hashes.SHA256()), own


def outcome(server: Secured, *chain: x509.Certificate, key: Any) -> str:
    """Ask for the status with a certificate: "OK", or the name of the status code."""
    encoding = serialization.Encoding.PEM
    private = key.private_bytes(
        encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    certificates = b"".join(each.public_bytes(encoding) for each in chain)
    credentials = grpc.ssl_channel_credentials(ROOT.pem, private, certificates)
    options = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.secure_channel(server.address, credentials, options) as channel:
        try:
            call(channel, METHOD["GetStatus"], b"")
        except grpc.RpcError as error:
            code: grpc.StatusCode = error.code()  # type: ignore[attr-defined]
            return code.name
    return "OK"


@dataclass(frozen=True)
class Names:
    """The names in a certificate."""

    alternative: Sequence[x509.GeneralName] = ()
    common: Sequence[str] = ("nobody",)


ACCEPTED = {
    "one of its names": Names([DNS("x.test"), DNS("a.test")]),
    "two names of one principal": Names([URI("spiffe://b"), DNS("b.test")]),
    "the last of many": Names([*(DNS(f"n{at}.test") for at in range(300)), DNS("a.test")]),
    "a common name": Names(common=["a"]),
}
REFUSED = {
    "names of two principals": Names([DNS("a.test"), DNS("b.test")]),
    "names of two principals, of two kinds": Names([DNS("b.test")], ["a"]),
    "a DNS name cut off at NUL": Names([unchecked(DNS, "a.test\0.evil.test")]),
    "a URI cut off at NUL": Names([unchecked(URI, "spiffe://b\0.evil.test")]),
    "a common name cut off at NUL": Names(common=["a\0.evil.test"]),
    "another case": Names([DNS("A.TEST")], ["A"]),
    "another case of a URI": Names([URI("SPIFFE://B")]),
    "a dot at the end": Names([DNS("a.test.")]),
    "a slash at the end": Names([URI("spiffe://b/")]),
    "a wildcard": Names([DNS("*.test"), DNS("*")]),
    "a part of the domain": Names([DNS("x.a.test"), DNS("test")]),
    "a name of another kind": Names([URI("a.test"), unchecked(DNS, "spiffe://b")], ["a.test"]),
    "the prefix as a part of the name": Names([unchecked(DNS, "dns:a.test")], ["dns:a.test"]),
    "a line feed before the name": Names([unchecked(DNS, "x\na.test")], ["x\na"]),
    "two common names": Names(common=["a", "nobody"]),
    "the name as the second common name": Names(common=["nobody", "a"]),
    "the name as an e-mail address": Names([x509.RFC822Name("a@a.test")]),
    "only an IP address": Names([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))], []),
    "no name at all": Names(common=[]),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_a_certificate_with_the_name_is_accepted(server: Secured, case: str) -> None:
    certificate, key = issue(None, ACCEPTED[case].alternative, ACCEPTED[case].common)
    assert outcome(server, certificate, key=key) == "OK"


@pytest.mark.parametrize("case", REFUSED)
def test_a_certificate_with_almost_the_name_is_refused(server: Secured, case: str) -> None:
    certificate, key = issue(None, REFUSED[case].alternative, REFUSED[case].common)
    assert outcome(server, certificate, key=key) == "UNAUTHENTICATED"


def chained(*extensions: tuple[x509.ExtensionType, bool], of: Names) -> tuple[Any, ...]:
    """(Chain, key) of a certificate that another certificate has signed, which is no root."""
    between = issue(None, [DNS("between.test")], ["between"], extensions)
    leaf, key = issue(between, of.alternative, of.common)
    return (leaf, between[0]), key


A = Names([DNS("a.test")])
SIGNED: dict[str, tuple[Callable[[], tuple[Any, ...]], str]] = {
    "by an authority that the root has signed": (lambda: chained(IS_CA, of=A), "OK"),
    "by a certificate that is no authority": (lambda: chained(IS_LEAF, of=A), "UNAVAILABLE"),
    "by a certificate that says nothing": (lambda: chained(of=A), "UNAVAILABLE"),
    "by an authority for other names": (lambda: chained(IS_CA, ONLY_B, of=A), "UNAVAILABLE"),
    "by an authority for other names, as common name": (
        lambda: chained(IS_CA, ONLY_B, of=Names(common=["a"])),
        "UNAVAILABLE",
    ),
}


@pytest.mark.parametrize("case", SIGNED)
def test_who_may_sign_a_certificate(server: Secured, case: str) -> None:
    make, expected = SIGNED[case]
    chain, key = make()
    assert outcome(server, *chain, key=key) == expected


def test_a_certificate_for_servers_only_is_none_for_clients(server: Secured) -> None:
    certificate, key = issue(None, A.alternative, extensions=[FOR_SERVERS])
    assert outcome(server, certificate, key=key) == "UNAVAILABLE"
