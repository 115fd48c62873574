"""The token that protects the HTTP port."""

from __future__ import annotations

import base64
import socket
from pathlib import Path

import pytest
from servers import free_ports
from sites import Figures, document, get, site

from psserver.security.httptoken import HttpToken
from psserver.unusable import ConfigError

WORD = "t0ken-of-the-port"
PAGES = ("/", "/status.json", "/status.json?shard=self", "/metrics", "/unknown")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "http-token"
    path.write_text(f"{WORD}\n")
    return path


def basic(user: str, word: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{word}".encode()).decode()


@pytest.mark.parametrize("page", PAGES)
def test_a_page_needs_the_token(file: Path, page: str) -> None:
    with site(Figures(), token=HttpToken(file)) as port:
        for fields in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": WORD},
            {"Authorization": f"Bearer {WORD}x"},
            {"Authorization": "Bearer "},
            {"Authorization": basic("", "")},
            {"Authorization": basic(WORD, "wrong")},
            {"Authorization": "Basic ???"},
            {"Authorization": "Bearer \u00e4"},
        ):
            status, answer, body = get(port, page, **fields)
            assert (status, body) == (401, b"")
            assert answer["www-authenticate"].startswith("Basic realm=")
        expected = 404 if page == "/unknown" else 200
        for value in (f"Bearer {WORD}", f"bearer {WORD}", basic("", WORD), basic("me", WORD)):
            assert get(port, page, Authorization=value)[0] == expected


def test_probes_need_no_token(file: Path) -> None:
    with site(Figures(), token=HttpToken(file)) as port:
        assert get(port, "/livez")[0] == 200
        assert get(port, "/readyz")[0] in (200, 503)


def raw(port: int, request: bytes) -> bytes:
    """Send bytes, and return all that comes back."""
    with socket.create_connection(("127.0.0.1", port), 60) as connection:
        connection.sendall(request)
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))


PROBES = [  # a probe needs no token; these only look like one
    *("/livez/../metrics", "/livez/metrics", "//livez/../status.json", "/metrics/livez"),
    *("/metrics?/livez", "/metrics#/livez", "/metrics;/livez", "/metrics%3f/livez", "/livez%00"),
    *("/LIVEZ", "/livez/", "//livez", "/./livez", "http://x/livez", "http://x/metrics", "*", ""),
]


@pytest.mark.parametrize("target", PROBES)
def test_no_other_page_passes_for_a_probe(file: Path, target: str) -> None:
    with site(Figures(), token=HttpToken(file)) as port:
        answer = raw(port, f"GET {target} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        assert answer.startswith(b"HTTP/1.1 401 ")
        assert answer.endswith(b"\r\n\r\n")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "X"])
def test_no_method_passes_without_the_token(file: Path, method: str) -> None:
    with site(Figures(), token=HttpToken(file)) as port:
        for page in PAGES:
            head = f"{method} {page} HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Word: {WORD}\r\n"
            answer = raw(port, f"{head}\r\n".encode())
            assert answer.startswith(b"HTTP/1.1 401 ")
            assert WORD.encode() not in answer  # TRACE sends nothing back
            answer = raw(port, f"{head}Authorization: Bearer {WORD}\r\n\r\n".encode())
            assert answer.startswith((b"HTTP/1.1 405 ", b"HTTP/1.1 404 "))
            assert WORD.encode() not in answer


def test_the_token_does_not_open_the_port_to_foreign_sites(file: Path) -> None:
    """A browser that knows the password sends it only to the name for which it was asked."""
    with site(Figures(), token=HttpToken(file)) as port:
        head = f"GET /metrics HTTP/1.1\r\nHost: evil.com\r\nAuthorization: Bearer {WORD}\r\n"
        assert raw(port, f"{head}\r\n".encode()).startswith(b"HTTP/1.1 421 ")


@pytest.mark.parametrize(
    "fields",
    [
        "Authorization : Bearer",  # a space before the colon
        "Authorization: Bearer\r\n",  # the token on a line of its own
        "Proxy-Authorization: Bearer",
        "Cookie: authorization=Bearer",
        "X-Authorization: Bearer",
        "Authorization: Bearer wrong\r\nAuthorization: Bearer",
        "X-Other: a\r\n Authorization: Bearer",  # a field that goes on in the next line
        "Host: localhost\r\nAuthorization: Bearer",  # a second Host
    ],
)
def test_the_token_counts_in_its_own_field_alone(file: Path, fields: str) -> None:
    with site(Figures(), token=HttpToken(file)) as port:
        head = f"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\n{fields} {WORD}\r\n\r\n"
        answer = raw(port, head.encode())
        assert answer.startswith((b"HTTP/1.1 401 ", b"HTTP/1.1 400 "))


def test_shards_send_it_to_each_other(file: Path) -> None:
    ports = free_ports(2)
    addresses = [f"127.0.0.1:{ports}", f"127.0.0.1:{ports + 1}"]
    first, second = Figures(0), Figures(1)
    with (
        site(first, addresses, port=ports, token=HttpToken(file)) as port,
        site(second, addresses, port=ports + 1, token=HttpToken(file)),
    ):
        shards = document(port, authorization=f"Bearer {WORD}")["shards"]
        assert [each["problem"] for each in shards] == ["", ""]


@pytest.mark.parametrize("text", ["two words", "a\r\nX-Other: b", "\u00e4", "\x00", "x" * 4097])
def test_a_token_that_no_field_can_have_is_refused(file: Path, text: str) -> None:
    now = [0.0]
    token = HttpToken(file, lambda: now[0])
    file.write_bytes(text.encode())
    now[0] += 1.01
    assert token.header == f"Bearer {WORD}"
    with pytest.raises(ConfigError, match=r"http_token_file: .* must have one token of at most"):
        HttpToken(file)


def test_a_new_token_is_used_after_a_second(file: Path) -> None:
    now = [0.0]
    token = HttpToken(file, lambda: now[0])
    for text, expected in (("new", "new"), ("", "new"), ("newer\n", "newer")):
        file.write_text(text)
        now[0] += 1.01
        assert token.allows(f"Bearer {expected}")
    assert not token.allows(f"Bearer {WORD}")
    file.unlink()
    now[0] += 1.01
    assert token.allows("Bearer newer")
    assert token.header == "Bearer newer"


@pytest.mark.parametrize("contents", [None, "", " \n"])
def test_a_server_does_not_start_without_a_token(tmp_path: Path, contents: str | None) -> None:
    path = tmp_path / "http-token"
    if contents is not None:
        path.write_text(contents)
    with pytest.raises(ConfigError, match="http_token_file"):
        HttpToken(path)
