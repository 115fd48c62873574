"""How a client connects: arguments and environment variables for TLS and the token."""

from __future__ import annotations

import os
import pickle
import socket
from pathlib import Path
from typing import Any

import pytest
from authority import Authority, Mount
from fakes import fake_server
from servers import eventually, free_ports

from psclient import Client, Subscriber, Tls
from psclient.access import Access, is_local
from psclient.addresses import PROXIES
from psclient.errors import InvalidArgument, PsError, TlsError
from psproto import ps_pb2 as pb

CA = Authority()
FAR = "192.0.2.1:7000"  # an address that no machine has


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("PSCLIENT_"):
            monkeypatch.delenv(name)


@pytest.fixture
def mount(tmp_path: Path) -> Mount:
    made = Mount(tmp_path / "client")
    made.put(CA.pem, CA.client())
    return made


@pytest.fixture
def token(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text("s3cret\n")
    return path


# ---- arguments


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"ca": ""}, "tls: ca is missing"),
        ({"ca": 1}, "tls: ca must be the path of a file, got 1"),
        ({"ca": "a", "certificate": "c"}, "tls: certificate is given, but key is missing"),
        ({"ca": "a", "key": "k"}, "tls: key is given, but certificate is missing"),
        ({"ca": "a", "name": 1}, "tls: name must be a string, got 1"),
    ],
)
def test_the_files_of_tls_must_be_complete(fields: Any, said: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        Tls(**fields)
    assert str(caught.value).startswith(said)


def test_files_that_cannot_be_used_are_named_at_once(mount: Mount, tmp_path: Path) -> None:
    garbage = tmp_path / "garbage"
    garbage.write_text("garbage")
    good = mount.tls()
    for tls, said in [
        (Tls(ca=str(tmp_path / "none")), f"tls: ca: cannot read {tmp_path}/none: No such file"),
        (Tls(ca=str(garbage)), f"tls: ca: cannot use {garbage}: "),
        (
            Tls(ca=good.ca, certificate=str(tmp_path / "none"), key=good.key),
            f"tls: cannot read {tmp_path}/none: No such file",
        ),
        (
            Tls(ca=good.ca, certificate=good.certificate, key=str(garbage)),
            f"tls: certificate and key: cannot use {good.certificate} and {garbage}: ",
        ),
    ]:
        with pytest.raises(InvalidArgument) as caught:
            Client([FAR], tls=tls)
        assert str(caught.value).startswith(said)


@pytest.mark.parametrize("wrong", ["ca.crt", True, {"ca": "x"}])
def test_tls_must_be_an_object_of_its_class(wrong: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"tls must be psclient.Tls\(ca=...\), None or False"):
        Client([FAR], tls=wrong)


@pytest.mark.parametrize("content", ["", "two words", "a\nb", "ä", "x" * 4097])
def test_a_file_must_have_one_token(tmp_path: Path, content: str) -> None:
    path = tmp_path / "token"
    path.write_text(content)
    with pytest.raises(InvalidArgument, match=r"must have one token of 1 to 4096 letters, digits"):
        Client([FAR], token_file=path)
    with pytest.raises(InvalidArgument, match=r"token_file: cannot read .*none: No such file"):
        Client([FAR], token_file=tmp_path / "none")


def test_arguments_of_security_belong_to_the_client(mount: Mount) -> None:
    with (
        Client([FAR]) as client,
        pytest.raises(InvalidArgument, match="tls: pass this to the Client instead"),
    ):
        Subscriber(client, tls=mount.tls())


# ---- the environment


def test_the_environment_gives_what_no_argument_gives(
    mount: Mount, token: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = mount.tls(name="ps.test")
    for field in ("ca", "certificate", "key", "name"):
        monkeypatch.setenv(f"PSCLIENT_TLS_{field.upper()}", getattr(files, field))
    monkeypatch.setenv("PSCLIENT_TOKEN_FILE", str(token))
    assert Access().tls == files
    assert Access().metadata() == (("authorization", "Bearer s3cret"),)
    assert Access(tls=mount.tls()).tls == mount.tls()
    none = Access(tls=False, token_file="")
    assert (none.tls, none.metadata()) == (None, ())


def test_an_incomplete_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PSCLIENT_TLS_NAME", "ps.test")
    with pytest.raises(InvalidArgument, match=r"environment variables PSCLIENT_TLS_.*ca is missin"):
        Client([FAR])


def test_a_pickled_client_keeps_paths_and_no_secrets(mount: Mount, token: Path) -> None:
    with Client([FAR], tls=mount.tls(), token_file=str(token)) as client:
        data = pickle.dumps(client)
    assert b"s3cret" not in data
    assert b"PRIVATE KEY" not in data
    with pickle.loads(data) as copy:  # noqa: S301  made here
        assert copy._access.tls == mount.tls()
        assert copy._access.metadata() == (("authorization", "Bearer s3cret"),)


# ---- the token


def test_the_token_is_sent_and_read_again_when_it_changes(token: Path) -> None:
    told: list[str] = []

    def tables(_: bytes, context: Any) -> bytes:
        told.append(dict(context.invocation_metadata())["authorization"])
        return pb.ListTablesResponse().SerializeToString()

    with (
        fake_server({"TableService/ListTables": tables}) as address,
        Client([address], token_file=str(token)) as client,
    ):
        client.list_tables()
        token.write_text("another-one")
        client.list_tables()
        token.write_text("")  # cannot be used: the last one stays
        client.list_tables()
        token.unlink()
        client.list_tables()
    assert told == ["Bearer s3cret", *3 * ["Bearer another-one"]]


@pytest.mark.parametrize("transport", ["stream", "unary"])
def test_a_token_is_not_sent_in_plaintext_to_another_machine(token: Path, transport: Any) -> None:
    with (
        Client([FAR], token_file=token, timeout=600, transport=transport) as client,
        pytest.raises(InvalidArgument, match=f"the token would be sent to {FAR} without TLS"),
    ):
        client.list_tables()


def test_a_name_is_looked_up_but_its_servers_get_no_token_in_plaintext(
    token: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psclient.discovery.look_up", lambda _: [FAR])
    with (
        Client("ps.test:7000", token_file=token, timeout=600) as client,
        pytest.raises(InvalidArgument, match=f"the token would be sent to {FAR} without TLS"),
    ):
        client.list_tables()


@pytest.mark.parametrize("variable", PROXIES)
def test_a_token_is_not_sent_in_plaintext_through_a_proxy(
    token: Path, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although the server is on this machine: the proxy may be on another."""
    local = f"127.0.0.1:{free_ports(1)}"
    for each in PROXIES:
        monkeypatch.delenv(each, raising=False)
    with Client([local], token_file=token, timeout=0.2, proxy=True) as client:
        with pytest.raises(PsError) as caught:
            client.list_tables()
        assert not isinstance(caught.value, InvalidArgument)  # there is no proxy
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        monkeypatch.setenv(variable, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        with (
            Client([local], token_file=token, timeout=600, proxy=True) as client,
            pytest.raises(InvalidArgument, match=f"{local} without TLS through .* {variable}, "),
        ):
            client.list_tables()
        for more in ({"proxy": False}, {"token_in_plaintext": True}):
            Access(token_file=token, **{"proxy": True, **more}).require_secrecy(local)
        Access(token_file=token, proxy=True).require_secrecy("unix:/run/x")  # gRPC's rule
        proxy.settimeout(0.0)
        with pytest.raises(BlockingIOError):
            proxy.accept()


def test_a_token_in_plaintext_may_be_permitted(token: Path) -> None:
    with Client([FAR], token_file=token, timeout=0.2, token_in_plaintext=True) as client:
        with pytest.raises(PsError) as caught:
            client.list_tables()
        assert not isinstance(caught.value, InvalidArgument)


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("127.0.0.1:1", True),
        ("127.1.2.3:1", True),
        ("[::1]:1", True),
        ("localhost:1", True),
        ("unix:/run/x", True),
        ("10.0.0.1:1", False),
        ("[fd00::1]:1", False),
        ("127.0.0.1.example.com:1", False),
        ("localhost.example.com:1", False),
    ],
)
def test_which_addresses_lead_to_this_machine(address: str, local: bool) -> None:
    assert is_local(address) is local


# ---- files that change


def test_credentials_are_others_once_the_files_have_changed(mount: Mount) -> None:
    access = Access(tls=mount.tls())
    first = access.credentials()
    assert access.credentials() is first
    mount.put(b"garbage", (b"garbage", b"garbage"))
    access._looked = 0.0
    assert access.credentials() is first
    mount.put(CA.pem, CA.client())
    eventually(lambda: access.credentials() is not first)


def test_files_that_are_gone_before_the_first_connection_are_an_error(mount: Mount) -> None:
    with Client([FAR], tls=mount.tls(), timeout=600) as client:
        (mount.path / "tls.key").unlink()
        with pytest.raises(TlsError) as caught:
            client.list_tables()
    assert caught.value.reason == "TLS_FILES"
