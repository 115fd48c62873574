"""Attacks with bytes that gRPC's own clients do not send: tokens and paths, by raw HTTP/2."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from secured import METHOD, Recording, Secured, bearer, call, section

from psserver import acceptor
from psserver.security.audit import BURST

STATUS = METHOD["GetStatus"].path.encode()
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RESET, SETTINGS, GOAWAY = 0, 1, 3, 4, 7
TOKEN = "s3cret-t0ken"  # noqa: S105
Fields = list[tuple[bytes, bytes]]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    made = Secured(tmp_path_factory.mktemp("raw"), section(TOKEN, (["*"], ["*"]))).start()
    yield made
    made.stop()


def frame(kind: int, flags: int, stream: int, data: bytes = b"") -> bytes:
    return (
        struct.pack(">I", len(data))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + data
    )


def text(value: bytes) -> bytes:
    """A string of HPACK, without Huffman's code."""
    rest = len(value) - 127
    if rest < 0:
        return bytes([len(value)]) + value
    length = b"\x7f"
    while rest >= 128:
        length += bytes([rest % 128 + 128])
        rest //= 128
    return length + bytes([rest]) + value


def answered(server: Secured, fields: Fields, path: bytes = STATUS) -> bool:
    """Make a call with these metadata. Returns whether it had a reply, and not only an error."""
    head = [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", path),
        (b":authority", b"x"),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
    ]
    block = b"".join(b"\0" + text(name) + text(value) for name, value in [*head, *fields])
    with socket.create_connection(("127.0.0.1", server.port), 60) as connection:
        connection.sendall(PREFACE + frame(SETTINGS, 0, 0))
        # END_HEADERS; END_STREAM after an empty message
        connection.sendall(frame(HEADERS, 4, 1, block) + frame(DATA, 1, 1, bytes(5)))
        replied = False
        for kind, flags, data in frames(connection):
            replied |= kind == DATA and len(data) > 5
            if (kind in (DATA, HEADERS) and flags & 1) or kind in (RESET, GOAWAY):
                return replied
        return replied


def frames(connection: socket.socket) -> Iterator[tuple[int, int, bytes]]:
    """Yield (kind, flags, data) of the frames that arrive, until the connection is closed."""
    received = b""
    while True:
        while len(received) < 9 or len(received) < 9 + int.from_bytes(received[:3], "big"):
            try:
                piece = connection.recv(1 << 16)
            except ConnectionError:
                return
            if not piece:
                return
            received += piece
        end = 9 + int.from_bytes(received[:3], "big")
        yield received[3], received[4], received[9:end]
        received = received[end:]


GOOD = f"Bearer {TOKEN}".encode()
TOKENS: dict[str, tuple[Fields, bool]] = {
    "as it must be": ([(b"authorization", GOOD)], True),
    "scheme in another case": ([(b"authorization", GOOD.replace(b"Bearer", b"bEARER"))], True),
    "spaces around it": ([(b"authorization", b"Bearer   " + GOOD[7:] + b"  ")], True),
    "none": ([], False),
    "twice": ([(b"authorization", GOOD)] * 2, False),
    "a wrong one first": ([(b"authorization", b"Bearer x"), (b"authorization", GOOD)], False),
    "a wrong one last": ([(b"authorization", GOOD), (b"authorization", b"Bearer x")], False),
    "a list": ([(b"authorization", GOOD + b", " + GOOD)], False),
    "another case": ([(b"authorization", GOOD.upper())], False),
    "no scheme": ([(b"authorization", GOOD[7:])], False),
    "another scheme": ([(b"authorization", b"Basic " + GOOD[7:])], False),
    "no space": ([(b"authorization", b"Bearer" + GOOD[7:])], False),
    "a tab for the space": ([(b"authorization", b"Bearer\t" + GOOD[7:])], False),
    "no token": ([(b"authorization", b"Bearer ")], False),
    "a NUL after it": ([(b"authorization", GOOD + b"\0")], False),
    "a NUL and more after it": ([(b"authorization", GOOD + b"\0x")], False),
    "a line feed after it": ([(b"authorization", GOOD + b"\n")], False),
    "no UTF-8": ([(b"authorization", GOOD + b"\xff")], False),
    "a space of no width": ([(b"authorization", GOOD + "\u200b".encode())], False),
    "wide letters": ([(b"authorization", GOOD.replace(b"s", "\uff53".encode()))], False),
    "its digest": ([(b"authorization", b"Bearer " + b"0" * 64)], False),
    "too long": ([(b"authorization", b"Bearer " + b"x" * 8000)], False),
    "far too long": ([(b"authorization", GOOD + b" " * 100_000)], False),
    "binary metadata": ([(b"authorization-bin", b"QmVhcmVy")], False),
    "a field for proxies": ([(b"proxy-authorization", GOOD)], False),
    "a cookie": ([(b"cookie", b"authorization=" + GOOD)], False),
    "a name in upper case": ([(b"Authorization", GOOD)], False),
    "with huge metadata": ([(b"x-other", b"y" * 60_000), (b"authorization", GOOD)], False),
}


@pytest.mark.parametrize("case", TOKENS)
def test_a_token_is_sent(server: Secured, case: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Only the exact token is accepted, the server goes on, and no log has what was sent."""
    fields, accepted = TOKENS[case]
    reached = len(Recording.reached)
    assert answered(server, fields) is accepted
    assert len(Recording.reached) == reached + accepted
    with server.channel() as channel:
        call(channel, METHOD["GetStatus"], b"", bearer(TOKEN))
    said = "".join(capfd.readouterr())
    assert "cret" not in said


PATHS = [
    *(b"lane", b"/lane", b"", b"/", b"*", STATUS + b"/", b"/" + STATUS, STATUS.upper()),
    *(STATUS + b"?", STATUS.replace(b"/Get", b"//Get"), STATUS.replace(b"/Get", b"/../Get")),
    *(STATUS + b"\xff", STATUS.replace(b"S", b"%53"), b"http://x" + STATUS),
    *(b"/grpc.channelz.v1.Channelz/GetServers", b"/grpc.health.v1.Health/../GetStatus"),
    *(b"/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", b"/ps.v1.InfoService/*"),
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("who", ["somebody", "nobody"])
def test_a_path_that_is_no_method_reaches_none(server: Secured, path: bytes, who: str) -> None:
    reached = len(Recording.reached)
    assert not answered(server, [(b"authorization", GOOD)] if who == "somebody" else [], path)
    assert len(Recording.reached) == reached


def test_a_call_after_any_path_is_served(server: Secured) -> None:
    """A path that is not UTF-8 once ended gRPC's task that accepts calls, and so the server."""
    for path in (b"\xff", STATUS + b"\xff", STATUS[:-3] + b"\xc3\x28", b"/\x80/\x80"):
        assert not answered(server, [], path)
        assert answered(server, [(b"authorization", GOOD)])
    assert acceptor.supported()


def test_another_release_of_grpc_is_used_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acceptor, "HANDLE", ("other", "arguments"))
    made = Secured(tmp_path, section(TOKEN, (["*"], ["*"]))).start()
    try:
        assert answered(made, [(b"authorization", GOOD)])
        assert not answered(made, [])
        assert not answered(made, [], b"/\xff")  # it ends, and the process starts again
        assert made.restarted.wait(60)
    finally:
        made.stop()


def test_many_refused_calls_write_little(
    server: Secured, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whoever reaches the port cannot fill the disk with lines of a log."""
    before = len(server.records())
    for at in range(100):
        answered(server, [(b"authorization", b"Bearer %d" % at)])
        answered(server, [(b"authorization", b"Bearer \xff%d" % at)])
    assert len("".join(capfd.readouterr())) < 2000
    assert len(server.records()) - before < BURST + 50
