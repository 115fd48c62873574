"""The seeds of the fuzzed decoders, and mutations of them; every decoder is a target."""

from __future__ import annotations

import random
import zlib
from typing import Any

import pytest

from psproto import codec
from psserver.service import Service
from tests.fuzz import methods, targets
from tests.psproto.wire_examples import KINDS

MUTATIONS = 300


def mutated(data: bytes, dice: random.Random) -> bytes:
    """Return ``data`` after a few random changes: bytes set, removed, repeated or cut off."""
    changed = bytearray(data)
    for _ in range(dice.randint(1, 4)):
        at, size = dice.randint(0, len(changed)), dice.randint(0, 9)
        match dice.randrange(4):
            case 0:
                changed[at : at + 1] = dice.randbytes(1)
            case 1:
                del changed[at : at + size]
            case 2:
                changed[at:at] = changed[at : at + size]
            case 3:
                del changed[at + size * size :]
    return bytes(changed)


@pytest.mark.parametrize("name", targets.NAMES)
def test_seeds_and_mutations_are_decoded_or_refused(name: str) -> None:
    known, dice = targets.inputs(name), random.Random(zlib.crc32(name.encode()))
    with targets.opened(name) as run:
        for data in known:
            run(data)
        for _ in range(MUTATIONS):
            run(mutated(dice.choice(known), dice))


def test_every_decoder_of_messages_with_arrays_is_a_target() -> None:
    """Each decode_* function of the codec is called by a target."""
    others = {codec.decode_delete, codec.decode_rows, codec.decode_stream_header}
    called = {kind.decode for kind in KINDS.values()} | others
    decoders = {getattr(codec, name) for name in codec.__all__ if name.startswith("decode_")}
    assert decoders <= called
    assert set(KINDS) < set(targets.TARGETS)


def test_every_method_has_a_first_input() -> None:
    assert {data[0] for data in methods.examples()} == set(range(len(methods.METHODS)))


def test_a_decoder_that_raises_another_error_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(data: bytes) -> None:
        raise IndexError

    monkeypatch.setattr(codec, "decode_rows", broken)
    with targets.opened("WriteRowsRequest") as run, pytest.raises(IndexError):
        run(b"")


def test_a_method_that_fails_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise IndexError

    describe = next(i for i, each in enumerate(methods.METHODS) if each.name == "DescribeTable")
    with targets.opened("methods") as run:
        monkeypatch.setattr(Service, "_describe", broken)
        with pytest.raises(AssertionError, match="IndexError"):
            run(bytes([describe]))
