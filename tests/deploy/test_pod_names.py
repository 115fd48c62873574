"""The simulator's DNS server answers queries as the server of a cluster does."""

from __future__ import annotations

import struct

import pytest

from tests.deploy.simulator.names import answer, question


def query(name: str, kind: int = 1) -> bytes:
    labels = b"".join(bytes([len(one)]) + one.encode() for one in name.split("."))
    return struct.pack("!6H", 77, 0x0100, 1, 0, 0, 0) + labels + b"\0" + struct.pack("!HH", kind, 1)


def parts(reply: bytes) -> tuple[int, int, list[str]]:
    """Return (id, status, addresses) of a reply."""
    identity, flags, _, count, _, _ = struct.unpack_from("!6H", reply)
    found = [reply[len(reply) - 16 * (count - at) :][12:16] for at in range(count)]
    return identity, flags & 15, [".".join(map(str, one)) for one in found]


def test_a_name_has_all_its_addresses() -> None:
    names = {"ps.ps.svc.cluster.local": ["10.0.0.1", "10.0.0.2"]}
    assert parts(answer(query("PS.ps.svc.cluster.local"), names)) == (77, 0, names.popitem()[1])


@pytest.mark.parametrize(
    ("name", "kind", "status"), [("other", 1, 3), ("known", 28, 0), ("empty", 1, 0)]
)
def test_no_address_is_an_empty_answer_or_no_such_name(name: str, kind: int, status: int) -> None:
    names = {"known": ["10.0.0.1"], "empty": []}
    assert parts(answer(query(name, kind), names)) == (77, status, [])


def test_a_query_that_is_cut_off_is_refused() -> None:
    assert question(query("a.b"))[:2] == ("a.b", 1)
    for length in range(12, len(query("a.b")) - 1):
        with pytest.raises(ValueError, match="the query ends"):
            question(query("a.b")[:length])
