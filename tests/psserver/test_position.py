"""Tokens: what they say survives the way there and back, and nothing else is taken for one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from psserver.errors import BadRequest
from psserver.position import MAX_SLOT, TOKEN_BYTES, Phase, Position, decode, digest

MOST = 2**64 - 1
UNUSED = ("after", "until", "table", "slot", "boot")  # fields of a token in phase TAIL
PLAIN = Position(lineage=bytes(16), epoch=1, tables=0, phase=Phase.TAIL, version=0)
FULL = Position(
    lineage=bytes(range(16)),
    epoch=MOST,
    tables=MOST - 1,
    phase=Phase.CATCH_UP,
    version=MOST - 2,
    after=MOST - 3,
    table=2**32 - 1,
    slot=1 << 40,
    boot=MOST - 6,
)
FULL_TAIL = replace(FULL, phase=Phase.CATCH_UP_TAIL, until=MOST - 1, table=0, slot=0)
POSITIONS = [
    PLAIN,
    FULL,
    replace(FULL, phase=Phase.SNAPSHOT),
    FULL_TAIL,
    replace(FULL_TAIL, phase=Phase.SNAPSHOT_TAIL),
]


@pytest.mark.parametrize("position", POSITIONS, ids=lambda each: each.phase.name)
def test_a_token_stands_for_its_position(position: Position) -> None:
    token = position.encode()
    assert len(token) == TOKEN_BYTES == 88
    assert decode(token) == position


@pytest.mark.parametrize(
    ("position", "changes", "why"),
    [
        (PLAIN, {"phase": 0}, "field 'phase' must be in 1..5, got 0"),
        (PLAIN, {"phase": 6}, "field 'phase' must be in 1..5, got 6"),
        *((PLAIN, {name: 7}, f"field '{name}' must be 0 in phase TAIL, got 7") for name in UNUSED),
        (FULL, {"until": 1}, "field 'until' must be 0 in phase CATCH_UP, got 1"),
        (
            FULL,
            {"after": MOST},
            f"field 'after' must be at most the version, {MOST - 2}, got {MOST}",
        ),
        (
            FULL,
            {"slot": MAX_SLOT + 1},
            f"field 'slot' must be in 0..{MAX_SLOT}, got {MAX_SLOT + 1}",
        ),
        (FULL_TAIL, {"until": 5}, f"field 'until' must be at least the version, {MOST - 2}, got 5"),
        (FULL_TAIL, {"slot": 5}, "field 'slot' must be 0 in phase CATCH_UP_TAIL, got 5"),
    ],
)
def test_every_field_of_a_token_has_bounds(
    position: Position, changes: dict[str, Any], why: str
) -> None:
    forged = replace(position, **changes).encode()
    with pytest.raises(BadRequest, match=r"^token [0-9a-f]+\.\.\. is malformed: ") as caught:
        decode(forged)
    assert str(caught.value).endswith(why)


def test_a_token_is_these_bytes() -> None:
    """A change of them is a change of the format: old tokens must be refused by name."""
    assert FULL.encode().hex() == (
        "01030000ffffffff000102030405060708090a0b0c0d0e0fffffffffffffffff"
        "fdfffffffffffffffefffffffffffffffcffffffffffffff0000000000000000"
        "0000000000010000f9ffffffffffffff" + FULL.encode()[-8:].hex()
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
    with pytest.raises(BadRequest, match=f"expected {TOKEN_BYTES} bytes, got {size}") as caught:
        decode(token)
    assert caught.value.reason == "INVALID_ARGUMENT"


def test_the_names_of_tables_count_not_their_order_or_number() -> None:
    assert digest([]) == 0
    assert digest(["a", "b"]) == digest(["b", "a", "b"])
    assert len({digest(names) for names in ([], ["a"], ["b"], ["a", "b"], ["ab"])}) == 5
