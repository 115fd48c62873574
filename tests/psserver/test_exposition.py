"""The page of metrics: one thread, whatever connects, and there before the shard is."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from alone import alone
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.registry import Collector
from servers import free_ports

from psserver import exposition as module
from psserver.exposition import MOST_CONNECTIONS, Exposition

HOST = "127.0.0.1"


@contextmanager
def opened(registry: CollectorRegistry) -> Iterator[int]:
    page, port = Exposition(registry), free_ports(1)
    page.open(HOST, port)
    yield port
    page.close()


@pytest.fixture
def registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    Gauge("ps_test", "Of the test.", registry=registry).set(7)
    return registry


@pytest.fixture
def port(registry: CollectorRegistry) -> Iterator[int]:
    with opened(registry) as port:
        yield port


def connect(port: int) -> socket.socket:
    return socket.create_connection((HOST, port), timeout=10)


def ask(port: int, request: str = "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n") -> tuple[str, str]:
    """Return status line and body of the answer to a request."""
    with connect(port) as connection:
        connection.sendall(request.encode())
        with connection.makefile("rb") as file:
            head, _, body = file.read().decode().partition("\r\n\r\n")
    return head.splitlines()[0] if head else "", body


def test_a_scrape_gets_the_page(port: int) -> None:
    status, body = ask(port)
    assert status == "HTTP/1.1 200 OK"
    assert "ps_test 7.0\n" in body


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        ("GET / HTTP/1.1\r\n\r\n", "200 OK"),
        ("GET /metrics?name[]=ps_test HTTP/1.0\r\nAccept: */*\r\n\r\n", "200 OK"),
        ("GET /other HTTP/1.1\r\n\r\n", "404 Not Found"),
        ("POST /metrics HTTP/1.1\r\n\r\n", "405 Method Not Allowed"),
        ("what\r\n\r\n", "400 Bad Request"),
    ],
)
def test_every_request_gets_a_status(port: int, request_: str, status: str) -> None:
    assert ask(port, request_)[0] == f"HTTP/1.1 {status}"


@alone
def test_half_open_connections_take_no_threads_and_keep_no_scrape_out() -> None:
    with opened(CollectorRegistry()) as port, ExitStack() as stack:
        before = threading.active_count()
        for at in range(400):
            connection = stack.enter_context(connect(port))
            if at % 2:
                connection.sendall(b"GET /metrics")
        assert ask(port)[0] == "HTTP/1.1 200 OK"
        assert threading.active_count() <= before


def test_beyond_the_limit_the_oldest_connection_is_closed(port: int) -> None:
    with ExitStack() as stack:
        first = stack.enter_context(connect(port))
        for _ in range(MOST_CONNECTIONS):
            stack.enter_context(connect(port))
        assert gone(first)


def test_a_connection_has_a_few_seconds(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REQUEST_SECONDS", 0.3)
    with connect(port) as slow:
        start = time.monotonic()
        with pytest.raises(OSError, match=r"reset|pipe"):  # noqa: PT012
            while time.monotonic() < start + 10:
                slow.sendall(b"x")  # a byte now and then does not help
                time.sleep(0.05)
        assert time.monotonic() < start + 5


def test_a_long_head_is_not_read_to_its_end(port: int) -> None:
    with connect(port) as connection:
        with pytest.raises(OSError, match=r"reset|pipe"):  # noqa: PT012
            for _ in range(1000):
                connection.sendall(b"x" * 65536)
        assert gone(connection)


def test_a_collector_that_fails_is_an_error_of_one_request(
    port: int, registry: CollectorRegistry
) -> None:
    class Failing(Collector):
        def collect(self) -> Any:
            raise RuntimeError("no")

    failing = Failing()
    registry.register(failing)
    assert ask(port)[0] == "HTTP/1.1 500 Internal Server Error"
    registry.unregister(failing)
    assert ask(port)[0] == "HTTP/1.1 200 OK"


def test_a_port_in_use_is_an_error(registry: CollectorRegistry) -> None:
    with socket.create_server((HOST, 0)) as other, pytest.raises(OSError, match="in use"):
        Exposition(registry).open(HOST, other.getsockname()[1])


def gone(connection: socket.socket) -> bool:
    """Whether the other side has closed a connection."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True
