"""Read certificates and private keys in the format PEM."""

from __future__ import annotations

from functools import lru_cache

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import NameOID

from psserver.unusable import ConfigError


def certificates(where: str, data: bytes) -> list[x509.Certificate]:
    """Return the certificates in the contents of a file, in their order.

    where  the setting and the path, which the error message starts with

    Raises ConfigError if there is none.
    """
    try:
        return x509.load_pem_x509_certificates(data)
    except ValueError as error:
        raise ConfigError(f"{where} must have certificates in PEM: {error}") from error


def is_key_of(where: str, data: bytes, certificate: x509.Certificate) -> bool:
    """Return whether the private key in the contents of a file belongs to a certificate.

    where  the setting and the path, which the error message starts with

    Raises ConfigError if ``data`` is not a private key, or if it needs a password.
    """
    try:
        private = load_pem_private_key(data, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:  # TypeError: it needs a password
        raise ConfigError(
            f"{where} must have one private key in PEM without a password: {error}"
        ) from error
    try:
        return private.public_key() == certificate.public_key()
    except (ValueError, UnsupportedAlgorithm):  # the certificate has a different kind of key
        return False


def begin(certificate: x509.Certificate) -> float:
    """Return when a certificate becomes valid, in seconds since 1970."""
    return certificate.not_valid_before_utc.timestamp()


def end(certificate: x509.Certificate) -> float:
    """Return when a certificate expires, in seconds since 1970."""
    return certificate.not_valid_after_utc.timestamp()


def names(certificate: x509.Certificate) -> tuple[str, ...]:
    """Return the DNS names and IP addresses that a certificate is for."""
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return ()
    dns = found.get_values_for_type(x509.DNSName)
    return (*dns, *map(str, found.get_values_for_type(x509.IPAddress)))


@lru_cache(4096)
def client_names(data: bytes) -> tuple[str, ...]:
    """Return the names in a client certificate, each such as "dns:a.example", "uri:spiffe://a" or
    "cn:a". A name may have any characters. Of several common names, none counts.

    data  the certificate in PEM, which gRPC has verified

    Raises ValueError if it cannot be read.
    """
    certificate = x509.load_pem_x509_certificate(data)
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        alternative = []
    else:
        alternative = [
            *(f"uri:{name}" for name in found.get_values_for_type(x509.UniformResourceIdentifier)),
            *(f"dns:{name}" for name in found.get_values_for_type(x509.DNSName)),
        ]
    common = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    text = [each.value for each in common] if len(common) == 1 else []
    return (*alternative, *(f"cn:{name}" for name in text if isinstance(name, str) and name))
