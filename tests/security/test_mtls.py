"""Servers and clients with certificates: who reaches whom, and what the others are told."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from authority import HOUR, Authority, Mount, dates, expired, future
from servers import Cluster, Labels, eventually

from psclient import Client, Follower, Subscriber, Tls
from psclient.aio import AsyncClient
from psclient.errors import TlsError, Unavailable

ROOT = Path(__file__).parents[2]
CA, OTHER = Authority(), Authority()


@dataclass
class Site:
    """A server with TLS, and the certificates of a client that it accepts."""

    cluster: Cluster
    server: Mount
    client: Mount
    directory: Path

    def tls(self, ca: Authority, leaf: Any, **options: str) -> Tls:
        """Return the files of a client."""
        mount = Mount(self.directory / f"{time.monotonic_ns()}")
        mount.put(ca.pem, leaf)
        return mount.tls(**options)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp("certificates")
    server, client = Mount(directory / "server"), Mount(directory / "client")
    server.put(CA.pem, CA.server())
    client.put(CA.pem, CA.client())
    cluster = Cluster(1, *server.flags, metrics=True).start()
    try:
        yield Site(cluster, server, client, directory)
    finally:
        cluster.stop()


@pytest.fixture(autouse=True)
def renewed(site: Site) -> Iterator[None]:
    """Give the server its first certificates back after a test."""
    yield
    site.server.put(CA.pem, CA.server())


def summed(client: Client, name: str, pushes: int) -> None:
    """Push 1 to a row several times, and check the sum."""
    table = client.create_table(
        name, dim=2, optimizer="sgd", lr=1.0, initializer="zeros", durability="applied"
    )
    for _ in range(pushes):
        table.push([7], np.full((1, 2), -1.0))
    assert table.pull([7]).tolist() == [[pushes, pushes]]


# ---- who is accepted


@pytest.mark.parametrize("lane", ["never", "require"])
@pytest.mark.parametrize("where", ["list", "name"])
def test_a_client_with_a_certificate_is_served(
    site: Site, name: str, lane: Any, where: str
) -> None:
    """Over a list of addresses and a DNS name; over gRPC and the same-host lane."""
    addresses: Any = site.cluster.addresses
    if where == "name":
        addresses = f"localhost:{site.cluster.port}"
    with Client(addresses, tls=site.client.tls(), lane=lane, timeout=60) as client:
        summed(client, name, 3)


REFUSED: dict[str, tuple[Callable[[Site], Any], str]] = {
    "no TLS": (lambda site: False, "TLS_SERVER_TLS"),
    "no certificate": (
        lambda site: Tls(ca=str(site.client.path / "ca.crt")),
        "TLS_CLIENT_MISSING",
    ),
    "of another CA": (lambda site: site.tls(CA, OTHER.client()), "TLS_CLIENT_REFUSED"),
    "expired": (lambda site: site.tls(CA, CA.client(**expired())), "TLS_CLIENT_EXPIRED"),
    "not yet valid": (lambda site: site.tls(CA, CA.client(**future())), "TLS_CLIENT_EXPIRED"),
    "does not trust the server": (
        lambda site: site.tls(OTHER, CA.client()),
        "TLS_SERVER_UNTRUSTED",
    ),
    "expects another name": (lambda site: site.client.tls(name="a.test"), "TLS_SERVER_NAME"),
}


@pytest.mark.parametrize("transport", ["stream", "unary"])
@pytest.mark.parametrize("case", REFUSED)
def test_another_client_is_told_why_it_is_refused(site: Site, case: str, transport: Any) -> None:
    make, reason = REFUSED[case]
    with (
        Client(site.cluster.addresses, tls=make(site), transport=transport, timeout=600) as client,
        pytest.raises(TlsError) as caught,
    ):
        client.list_tables()
    assert caught.value.reason == reason
    assert str(caught.value).startswith(f"shard 0 at {site.cluster.addresses[0]}: ")


@pytest.mark.parametrize("case", REFUSED)
def test_the_search_behind_a_name_ends_with_the_reason(site: Site, case: str) -> None:
    make, reason = REFUSED[case]
    where = f"localhost:{site.cluster.port}"
    with (
        Client(where, tls=make(site), timeout=600) as client,
        pytest.raises(TlsError) as caught,
    ):
        client.list_tables()
    assert caught.value.reason == reason
    assert str(caught.value).startswith(f"{where}: 127.0.0.1:{site.cluster.port}: ")


def test_every_kind_of_client_tells_the_reason(site: Site) -> None:
    where, tls = site.cluster.addresses, site.tls(CA, OTHER.client())

    async def asynchronously() -> None:
        async with AsyncClient(where, tls=tls, timeout=600) as client:
            await client.list_tables()

    def subscribe() -> None:
        with Subscriber(where, tls=tls, timeout=600) as changes:
            next(changes)

    def follow() -> None:
        Follower(where, tls=tls).open()

    for act in (lambda: asyncio.run(asynchronously()), subscribe, follow):
        with pytest.raises(TlsError) as caught:
            act()
        assert caught.value.reason == "TLS_CLIENT_REFUSED"


SERVERS: dict[str, tuple[Callable[[Site], None], str]] = {
    "of another CA": (
        lambda site: site.server.put(CA.pem, OTHER.server()),
        "TLS_SERVER_UNTRUSTED",
    ),
    "of another name": (
        lambda site: site.server.put(CA.pem, CA.server("a.test")),
        "TLS_SERVER_NAME",
    ),
    "that trusts another CA": (
        lambda site: site.server.put(OTHER.pem, CA.server()),
        "TLS_CLIENT_REFUSED",
    ),
}


@pytest.mark.parametrize("case", SERVERS)
def test_a_client_refuses_a_server_with_other_certificates(site: Site, case: str) -> None:
    change, reason = SERVERS[case]
    change(site)
    with (
        Client(site.cluster.addresses, tls=site.client.tls(), timeout=600) as client,
        pytest.raises(TlsError) as caught,
    ):
        client.list_tables()
    assert caught.value.reason == reason


def test_a_client_with_tls_refuses_a_server_without(site: Site, cluster1: Cluster) -> None:
    with (
        Client(cluster1.addresses, tls=site.client.tls(), timeout=600) as client,
        pytest.raises(TlsError) as caught,
    ):
        client.list_tables()
    assert caught.value.reason == "TLS_SERVER_PLAINTEXT"


def test_a_server_that_is_down_is_retried_until_the_timeout(site: Site) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    with (
        Client([address], tls=site.client.tls(), timeout=2) as client,
        pytest.raises(Unavailable),
    ):
        client.list_tables()


def test_a_server_that_closes_connections_is_retried_until_the_timeout(site: Site) -> None:
    """It may be starting or stopping: TLS is not known to be the reason."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.05)
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        stop = time.monotonic() + 2.0
        client = Client([address], tls=site.client.tls(), timeout=2)
        try:
            pending = asyncio.run(_closing(client, listener, stop))
        finally:
            client.close()
    assert isinstance(pending, Unavailable)


async def _closing(client: Client, listener: socket.socket, until: float) -> Exception:
    """Use a client while a listener closes each connection at once; return the client's error."""
    call = asyncio.ensure_future(asyncio.to_thread(client.list_tables))
    while not call.done():
        try:
            (await asyncio.to_thread(listener.accept))[0].close()
        except TimeoutError:
            await asyncio.sleep(0)
    return call.exception()  # type: ignore[return-value]


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_versions_of_tls_before_1_2_are_refused(site: Site, version: ssl.TLSVersion) -> None:
    with pytest.raises(OSError):  # noqa: PT011  the connection ends
        handshake(site, version)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_tls_1_2_and_1_3_are_spoken(site: Site, version: ssl.TLSVersion) -> None:
    assert handshake(site, version) == version.name.replace("v1_", "v1.")


def handshake(site: Site, version: ssl.TLSVersion) -> str | None:
    """Connect with one version of TLS, and return the version that was agreed on."""
    tls = site.client.tls()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.set_alpn_protocols(["h2"])
    context.load_verify_locations(tls.ca)
    context.load_cert_chain(tls.certificate, tls.key)
    context.minimum_version = context.maximum_version = version
    address = ("127.0.0.1", site.cluster.port)
    with (
        socket.create_connection(address, 60) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as secured,
    ):
        assert secured.recv(1)
        return secured.version()


# ---- certificates that change


def test_metrics_and_status_have_the_time_at_which_certificates_expire(site: Site) -> None:
    ends = dates(-HOUR, 5 * HOUR)
    site.server.put(CA.pem, CA.server(**ends))
    metrics = site.cluster.metrics(0)
    found = {
        use: metrics["ps_certificate_expiry_timestamp_seconds", Labels(certificate=use)]
        for use in ("server", "ca")
    }
    assert found["server"] == pytest.approx(ends["not_after"].timestamp(), abs=1)
    assert found["ca"] > found["server"]
    with urllib.request.urlopen(
        f"http://127.0.0.1:{site.cluster.metrics_port}/status.json"
    ) as page:
        status = json.loads(page.read())["shards"][0]["status"]
    assert status["certificate_expires"] == found["server"]


def test_garbage_in_the_secret_keeps_the_last_good_certificates(site: Site, name: str) -> None:
    with Client(site.cluster.addresses, tls=site.client.tls(), timeout=60) as client:
        client.list_tables()  # the server now has the good ones, whatever the last test has left
    site.server.put(b"garbage", (b"garbage", b"garbage"))
    with Client(site.cluster.addresses, tls=site.client.tls(), timeout=60) as client:
        summed(client, name, 2)
    lines = [
        line["problem"]
        for line in site.cluster.log(0)
        if line["event"] == "certificates not replaced"
    ]
    assert lines[-1].startswith(f"tls_certificate: {site.server.path}/tls.crt must have")


def test_an_open_stream_survives_new_certificates(site: Site, name: str) -> None:
    with Client(site.cluster.addresses, tls=site.client.tls(), lane="never", timeout=60) as client:
        table = client.create_table(name, dim=2, optimizer="sgd", lr=1.0, initializer="zeros")
        with Subscriber(client, tables=[name], start="latest", progress_ms=100) as changes:
            next(changes)  # the stream is open
            site.server.put(OTHER.pem, OTHER.server())
            with pytest.raises(TlsError):  # a new connection meets the new certificates
                Client(site.cluster.addresses, tls=site.client.tls()).list_tables()
            table.push([1], np.full((1, 2), -1.0))
            assert any(1 in change.keys for change in changes if change.keys is not None)
        assert table.pull([1]).tolist() == [[1.0, 1.0]]


@pytest.mark.slow
def test_a_hundred_handshakes_succeed_while_the_secret_is_replaced_every_20_ms(
    site: Site,
) -> None:
    leaves = [CA.server() for _ in range(8)]

    async def replace() -> None:
        number = 0
        while True:
            await asyncio.sleep(0.02)
            site.server.put(CA.pem, leaves[number % len(leaves)])
            number += 1

    def connect() -> None:
        with Client(site.cluster.addresses, tls=site.client.tls(), timeout=60) as client:
            client.list_tables()

    async def run() -> None:
        task = asyncio.ensure_future(replace())
        try:
            for _ in range(100):
                await asyncio.to_thread(connect)
        finally:
            task.cancel()

    before = replaced(site)
    asyncio.run(run())
    assert replaced(site) - before >= 10  # so that the handshakes met several certificates


def replaced(site: Site) -> int:
    """Return how often the server has replaced its certificates."""
    return sum(line["event"] == "certificates replaced" for line in site.cluster.log(0))


@pytest.mark.slow
def test_a_ca_is_replaced_without_an_error_while_a_client_pushes(site: Site, name: str) -> None:
    """Bundle of both CAs first, then new certificates, then the new CA alone."""
    both = Authority()
    pem = CA.pem + both.pem
    steps: list[Callable[[], None]] = [
        lambda: site.server.put(pem, CA.server()),
        lambda: site.client.put(pem, CA.client()),
        lambda: site.server.put(pem, both.server()),
        lambda: site.client.put(pem, both.client()),
        lambda: site.server.put(both.pem, both.server()),
        lambda: site.client.put(both.pem, both.client()),
    ]
    pushes = 0
    try:
        with Client(
            site.cluster.addresses, tls=site.client.tls(), lane="never", timeout=60
        ) as client:
            table = client.create_table(name, dim=2, optimizer="sgd", lr=1.0, initializer="zeros")
            for step in [None, *steps]:
                if step is not None:
                    step()
                until = time.monotonic() + 1.0
                while time.monotonic() < until:
                    table.push([7], np.full((1, 2), -1.0))
                    pushes += 1
                client.list_tables()  # a new call, so a new connection if the files have changed
                with Client(
                    site.cluster.addresses, tls=site.client.tls(), lane="never", timeout=60
                ) as fresh:
                    fresh.list_tables()
            assert table.pull([7]).tolist() == [[pushes, pushes]]
        with pytest.raises(TlsError):  # the former CA is trusted no more
            Client(site.cluster.addresses, tls=site.tls(CA, CA.client())).list_tables()
    finally:
        site.client.put(CA.pem, CA.client())


def test_a_client_takes_its_renewed_certificate_when_it_connects_again(
    site: Site, name: str
) -> None:
    mount = Mount(site.directory / name)
    mount.put(CA.pem, CA.client())
    with Client(site.cluster.addresses, tls=mount.tls(), lane="never", timeout=60) as client:
        client.list_tables()
        new = Authority()
        site.server.put(new.pem, new.server())
        mount.put(new.pem, new.client())
        eventually(lambda: _served(client))
    site.server.put(CA.pem, CA.server())


def _served(client: Client) -> bool:
    channel = client._connect().links[0].channel
    before = channel._opened
    client.list_tables()
    return channel._opened is not before


@pytest.mark.parametrize(
    "name", ["ps", "ps.ps.svc", "ps-0.ps.ps.svc", "ps-12.ps.ps.svc.cluster.local"]
)
def test_the_names_of_the_manifests_certificate_are_accepted(site: Site, name: str) -> None:
    path = ROOT / "deploy" / "components" / "certificates" / "certificates.yaml"
    specs = [each["spec"] for each in yaml.safe_load_all(path.read_text())]
    (names,) = (each["dnsNames"] for each in specs if "dnsNames" in each)
    site.server.put(CA.pem, CA.server(*names))
    with Client(site.cluster.addresses, tls=site.client.tls(name=name), timeout=60) as client:
        client.list_tables()


# ---- psctl


def psctl(site: Site, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from psclient.tools.ctl import main; main()", *words],
        env={**os.environ, "PSCTL_SERVERS": site.cluster.addresses[0], **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def test_psctl_takes_the_files_from_options_and_variables(site: Site) -> None:
    tls = site.client.tls()
    flags = ["--tls-ca", tls.ca, "--tls-certificate", tls.certificate, "--tls-key", tls.key]
    done = psctl(site, "status", *flags)
    assert (done.returncode, done.stderr) == (0, "")
    assert "ready" in done.stdout
    variables = {
        "PSCLIENT_TLS_CA": tls.ca,
        "PSCLIENT_TLS_CERTIFICATE": tls.certificate,
        "PSCLIENT_TLS_KEY": tls.key,
        "PSCLIENT_TLS_NAME": "ps.test",
    }
    for command in ("doctor", "tables"):
        done = psctl(site, command, **variables)
        assert done.stderr == ""
        assert "unreachable" not in done.stdout
    done = psctl(site, "tables", "--tls-name", "a.test", "--output", "json", **variables)
    assert done.returncode == 5
    error = json.loads(done.stderr)["error"]
    assert (error["type"], error["reason"]) == ("TlsError", "TLS_SERVER_NAME")
    other = site.tls(OTHER, CA.client()).ca
    variables |= {"PSCLIENT_TLS_CA": other, "GRPC_VERBOSITY": "ERROR"}
    done = psctl(site, "tables", "--output", "json", **variables)
    error = json.loads(done.stderr)["error"]
    assert error["reason"] == "TLS_SERVER_UNTRUSTED"


def test_psctl_without_tls_is_told_so(site: Site) -> None:
    done = psctl(site, "tables")
    assert done.returncode == 5
    assert "the server accepts only TLS, and this client uses none" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    done = psctl(site, "tables", "--tls-key", "/k")
    assert done.returncode == 2
    assert "ca is missing" in done.stderr
