"""Tokens: what they say survives the way there and back, and nothing else is taken for one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from psserver.errors import BadRequest
from psserver.position import TOKEN_BYTES, Phase, Position, decode, digest

MOST = 2**64 - 1
PLAIN = Position(lineage=bytes(16), epoch=1, tables=0, phase=Phase.TAIL, version=0)
FULL = Position(
    lineage=bytes(range(16)),
    epoch=MOST,
    tables=MOST - 1,
    phase=Phase.CATCH_UP,
    version=MOST - 2,
    after=MOST - 3,
    until=MOST - 4,
    table=2**32 - 1,
    slot=MOST - 5,
    boot=MOST - 6,
)


@pytest.mark.parametrize("phase", Phase)
def test_a_token_says_where_its_subscriber_stood(phase: Phase) -> None:
    for position in (PLAIN, FULL):
        position = replace(position, phase=phase)
        token = position.encode()
        assert len(token) == TOKEN_BYTES == 88
        assert decode(token) == position


def test_a_token_is_these_bytes() -> None:
    """A change of them is a change of the format: old tokens must be refused by name."""
    assert FULL.encode().hex() == (
        "01030000ffffffff000102030405060708090a0b0c0d0e0fffffffffffffffff"
        "fdfffffffffffffffefffffffffffffffcfffffffffffffffbffffffffffffff"
        "fafffffffffffffff9ffffffffffffff" + FULL.encode()[-8:].hex()
    )


@pytest.mark.parametrize("position", [PLAIN, FULL], ids=["plain", "full"])
def test_every_flipped_bit_of_a_token_is_noticed(position: Position) -> None:
    token = position.encode()
    for at in range(len(token)):
        for bit in range(8):
            bad = token[:at] + bytes([token[at] ^ 1 << bit]) + token[at + 1 :]
            with pytest.raises(BadRequest, match=r"^token [0-9a-f]+\.\.\. is malformed: "):
                decode(bad)


@pytest.mark.parametrize("size", [*range(1, TOKEN_BYTES), TOKEN_BYTES + 1, 1000])
def test_a_token_of_another_length_is_refused(size: int) -> None:
    token = PLAIN.encode().ljust(size, b"\0")[:size]
    with pytest.raises(BadRequest, match=f"{size} bytes, not {TOKEN_BYTES}") as caught:
        decode(token)
    assert caught.value.reason == "INVALID_ARGUMENT"


def test_the_names_of_tables_count_not_their_order_or_number() -> None:
    assert digest([]) == 0
    assert digest(["a", "b"]) == digest(["b", "a", "b"])
    assert len({digest(names) for names in ([], ["a"], ["b"], ["a", "b"], ["ab"])}) == 5
