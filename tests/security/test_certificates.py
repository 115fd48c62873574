"""The server's certificates: which files are used, which are refused, and what is said."""

from __future__ import annotations

import functools
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from authority import FILES, HOUR, Authority, Mount, chain, dates, expired, future, key

from psproto import certfiles
from psserver.config import ServerConfig, load
from psserver.security.certificates import Certificates
from psserver.unusable import ConfigError

CA, OTHER = Authority(), Authority()
ENCRYPTED = (
    b"-----BEGIN ENCRYPTED PRIVATE KEY-----\n"
    b"MIGbMFcGCSqGSIb3DQEFDTBKMCkGCSqGSIb3DQEFDDAcBAgLg4AZ5Y5YJQICCAAw\n"
    b"DAYIKoZIhvcNAgkFADAdBglghkgBZQMEASoEELVQb1w=\n"
    b"-----END ENCRYPTED PRIVATE KEY-----\n"
)


@pytest.fixture
def mount(tmp_path: Path) -> Mount:
    made = Mount(tmp_path / "server")
    made.put(CA.pem, CA.server())
    return made


def certificates(mount: Mount, *flags: str, **options: Any) -> Certificates:
    return Certificates(load([*mount.flags, *flags]), **options)


# ---- settings


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["tls_certificate"], "tls_key: must be set, because tls_certificate is set"),
        (["tls_certificate", "tls_key"], "tls_ca: must be set, because tls_certificate is set"),
        (["tls_key"], "tls_certificate: must be set, because tls_key is set"),
        (["tls_ca"], "tls_certificate: must be set, because tls_ca is set"),
    ],
)
def test_tls_needs_all_of_its_files(given: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load([f"--{field.replace('_', '-')}=/x" for field in given])
    assert str(caught.value) == (
        f"{said}; with tls_client_auth=required, TLS needs tls_certificate, tls_key, tls_ca"
    )


def test_without_certificates_of_clients_no_ca_is_needed() -> None:
    config = load(["--tls-certificate=/x", "--tls-key=/y", "--tls-client-auth=none"])
    assert config.tls


def test_a_setting_of_tls_without_tls_is_refused() -> None:
    with pytest.raises(ConfigError, match="tls_client_auth: none has no effect without TLS"):
        load(["--tls-client-auth=none"])


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "ps.test"])  # noqa: S104
def test_plaintext_beyond_this_machine_needs_permission(host: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(["--host", host])
    assert str(caught.value).startswith(f"plaintext: with host={host} other machines can reach")
    assert load(["--host", host, "--plaintext"]).host == host
    files = ["--tls-certificate=/x", "--tls-key=/y", "--tls-ca=/z"]
    assert load(["--host", host, *files]).tls


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_plaintext_on_loopback_needs_none(host: str) -> None:
    assert not load(["--host", host]).plaintext


# ---- files that cannot be used


def leaf(**options: Any) -> Any:
    return CA.server(**options)


@functools.cache
def unknown() -> tuple[bytes, bytes]:
    """(key, certificate) of the curve SM2, which the package cryptography does not know."""
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:SM2 -nodes -subj /CN=sm2"
    made = subprocess.run([*command.split(), "-keyout", "-"], capture_output=True, check=True)
    end = b"-----END PRIVATE KEY-----\n"
    pair, _, certificate = made.stdout.partition(end)
    return pair + end, certificate


BAD: dict[str, tuple[Callable[[Mount], None], str]] = {
    "no certificate": (
        lambda m: (m.path / "tls.crt").unlink(),
        "tls_certificate: cannot read {}/tls.crt: No such file or directory",
    ),
    "no key": (lambda m: (m.path / "tls.key").unlink(), "tls_key: cannot read {}/tls.key: No such"),
    "no CA": (lambda m: (m.path / "ca.crt").unlink(), "tls_ca: cannot read {}/ca.crt: No such"),
    "garbage certificate": (
        lambda m: m.put(CA.pem, (key(leaf()), b"garbage")),
        "tls_certificate: {}/tls.crt must have certificates in PEM: ",
    ),
    "garbage key": (
        lambda m: m.put(CA.pem, (b"garbage", chain(leaf()))),
        "tls_key: {}/tls.key must have one private key in PEM without a password: ",
    ),
    "key with a password": (
        lambda m: m.put(CA.pem, (ENCRYPTED, chain(leaf()))),
        "tls_key: {}/tls.key must have one private key in PEM without a password: ",
    ),
    "garbage CA": (
        lambda m: m.put(b"garbage", leaf()),
        "tls_ca: {}/ca.crt must have certificates in PEM: ",
    ),
    "empty": (
        lambda m: m.put(b"", (b"", b"")),
        "tls_certificate: {}/tls.crt must have certificates in PEM: ",
    ),
    "key of an unknown kind": (
        lambda m: m.put(CA.pem, (unknown()[0], chain(leaf()))),
        "tls_key: {}/tls.key must have one private key in PEM without a password: ",
    ),
    "certificate of an unknown kind": (
        lambda m: m.put(CA.pem, (key(leaf()), unknown()[1])),
        "tls_key: {}/tls.key is not the key of the first certificate in {}/tls.crt",
    ),
    "another key": (
        lambda m: m.put(CA.pem, (key(leaf()), chain(leaf()))),
        "tls_key: {}/tls.key is not the key of the first certificate in {}/tls.crt",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_at_the_start_by_the_name_of_their_setting(
    mount: Mount, case: str
) -> None:
    spoil, said = BAD[case]
    spoil(mount)
    with pytest.raises(ConfigError) as caught:
        certificates(mount)
    assert str(caught.value).startswith(said.replace("{}", str(mount.path)))


@pytest.mark.parametrize("case", BAD)
def test_bad_files_do_not_replace_good_ones(mount: Mount, case: str) -> None:
    used = certificates(mount)
    first = used.current
    spoil, said = BAD[case]
    spoil(mount)
    assert used.current is first
    assert used.problem.startswith(said.replace("{}", str(mount.path))) or "No such" in used.problem
    assert used.reloads == 0


def test_good_files_after_bad_ones_are_used(mount: Mount) -> None:
    used = certificates(mount)
    first = used.current
    mount.put(b"", (b"", b""))
    assert used.current is first
    mount.put(CA.pem, CA.server("other.test"))
    assert used.current.names == ("other.test",)
    assert (used.problem, used.reloads) == ("", 1)


def test_an_expired_certificate_does_not_replace_a_valid_one(mount: Mount) -> None:
    used = certificates(mount)
    first = used.current
    for options in (expired(), future()):
        mount.put(CA.pem, CA.server(**options))
        assert used.current is first
    assert used.problem.startswith("tls_certificate: the certificate is valid only from ")


def test_a_server_starts_with_an_expired_certificate_and_waits_for_another(mount: Mount) -> None:
    mount.put(CA.pem, CA.server(**expired()))
    used = certificates(mount)
    assert used.expiries()["server"] < time.time()
    mount.put(CA.pem, CA.server())
    assert used.expiries()["server"] > time.time()


# ---- what is read


def test_files_written_one_after_the_other_are_used_once_they_fit(tmp_path: Path) -> None:
    mount = Mount(tmp_path / "server")
    old, new = CA.server("old.test"), CA.server("new.test")
    for name, data in zip(FILES, (CA.pem, key(old), chain(old)), strict=True):
        (mount.path / name).write_bytes(data)
    used = certificates(mount)
    (mount.path / "tls.key").write_bytes(key(new))
    assert used.current.names == ("old.test",)
    assert "is not the key of the first certificate" in used.problem
    (mount.path / "tls.crt").write_bytes(chain(new))
    assert used.current.names == ("new.test",)


def test_files_that_are_replaced_all_the_time_are_read_as_one_set(tmp_path: Path) -> None:
    """Each set is one number: a mix of two sets would show."""
    mount = Mount(tmp_path / "numbers")
    paths = [mount.path / name for name in FILES]
    numbers = iter(range(1_000_000))
    stop = threading.Event()

    def put() -> None:
        data = str(next(numbers)).encode()
        mount.put(data, (data, data))

    def change() -> None:
        while not stop.wait(0.0005):
            put()

    put()
    thread = threading.Thread(target=change)
    thread.start()
    try:
        seen, tries = set(), 0
        while len(seen) < 50:
            tries += 1
            try:
                _, found = certfiles.read(paths)
            except OSError:
                continue
            assert len(set(found)) == 1, found
            seen.add(found[0])
    finally:
        stop.set()
        thread.join()
    assert tries < 100 * len(seen)


def test_the_times_of_expiry_are_those_of_the_first_to_expire(mount: Mount) -> None:
    soon = dates(-HOUR, 5 * HOUR)
    mount.put(CA.pem + OTHER.pem, CA.server(**soon))
    used = certificates(mount)
    found = used.expiries()
    assert found["server"] == pytest.approx(soon["not_after"].timestamp(), abs=1)
    assert found["ca"] > found["server"]
    alone = Certificates(
        ServerConfig(
            tls_certificate=mount.path / "tls.crt",
            tls_key=mount.path / "tls.key",
            tls_client_auth="none",
        )
    )
    assert alone.expiries() == {"server": found["server"]}
