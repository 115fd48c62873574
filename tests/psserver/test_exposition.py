"""The HTTP server: one thread, whatever connects."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from alone import alone
from servers import free_ports

from psserver import exposition as module
from psserver.exposition import MOST_CONNECTIONS, Exposition
from psserver.webmessages import Request, Response, text

HOST = "127.0.0.1"


class Echo:
    """Pages that tell what was asked."""

    async def answer(self, request: Request) -> Response:
        if request.path == "/fails":
            raise RuntimeError("no")
        return text("200 OK", f"{request.method} {request.path} {request.query}")


@contextmanager
def opened() -> Iterator[int]:
    server, port = Exposition(Echo()), free_ports(1)
    server.open(HOST, port)
    yield port
    server.close()


@pytest.fixture
def port() -> Iterator[int]:
    with opened() as port:
        yield port


def connect(port: int) -> socket.socket:
    return socket.create_connection((HOST, port), timeout=10)


def ask(port: int, request: str = "GET /a?b=c HTTP/1.1\r\nHost: x\r\n\r\n") -> tuple[str, str]:
    """Return status line and body of the answer to a request."""
    with connect(port) as connection:
        connection.sendall(request.encode())
        with connection.makefile("rb") as file:
            head, _, body = file.read().decode().partition("\r\n\r\n")
    return head.splitlines()[0] if head else "", body


def test_a_request_gets_its_answer(port: int) -> None:
    assert ask(port) == ("HTTP/1.1 200 OK", "GET /a b=c\n")


def test_the_answer_to_head_has_no_body(port: int) -> None:
    assert ask(port, "HEAD / HTTP/1.1\r\n\r\n") == ("HTTP/1.1 200 OK", "")


def test_what_is_not_http_is_a_bad_request(port: int) -> None:
    assert ask(port, "what\r\n\r\n") == ("HTTP/1.1 400 Bad Request", "")


def test_an_error_is_the_answer_to_one_request(port: int) -> None:
    assert ask(port, "GET /fails HTTP/1.1\r\n\r\n") == ("HTTP/1.1 500 Internal Server Error", "")
    assert ask(port)[0] == "HTTP/1.1 200 OK"


@alone
def test_half_open_connections_take_no_threads_and_keep_no_scrape_out() -> None:
    with opened() as port, ExitStack() as stack:
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


def test_a_port_in_use_is_an_error() -> None:
    with socket.create_server((HOST, 0)) as other, pytest.raises(OSError, match="in use"):
        Exposition(Echo()).open(HOST, other.getsockname()[1])


def gone(connection: socket.socket) -> bool:
    """Whether the other side has closed a connection."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True
