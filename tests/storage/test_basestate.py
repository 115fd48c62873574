"""The state of the base: its bytes, and what damages them."""

from __future__ import annotations

import dataclasses

import pytest
from bases import (
    FIRST_GOLDEN,
    OLDER_GOLDEN,
    SECOND_GOLDEN,
    STATE,
    STATE_GOLDEN,
)

from storage.basestate import BaseState
from storage.errors import Corrupt
from storage.history import History


def test_the_format_of_the_state_is_what_it_always_was() -> None:
    assert STATE.pack().hex(" ", 8) == bytes.fromhex(STATE_GOLDEN).hex(" ", 8)
    assert BaseState.unpack(bytes.fromhex(STATE_GOLDEN), "golden") == STATE
    second = dataclasses.replace(STATE, directory=0, distinct=False)
    assert BaseState.unpack(bytes.fromhex(SECOND_GOLDEN), "golden") == second
    older = dataclasses.replace(second, history=History((3,)))
    assert BaseState.unpack(bytes.fromhex(OLDER_GOLDEN), "golden") == older
    first = dataclasses.replace(older, logged=False)
    assert BaseState.unpack(bytes.fromhex(FIRST_GOLDEN), "golden") == first


def test_an_empty_state_comes_back() -> None:
    empty = BaseState(lineage=bytes(16), history=History((0,)), version=0, next_table=1)
    assert BaseState.unpack(empty.pack(), "here") == empty


def test_every_flipped_bit_and_every_other_length_of_a_state_is_found() -> None:
    data = bytearray(STATE.pack())
    for place in range(len(data)):
        for bit in range(8):
            data[place] ^= 1 << bit
            with pytest.raises(Corrupt):
                BaseState.unpack(bytes(data), "here")
            data[place] ^= 1 << bit
        with pytest.raises(Corrupt):
            BaseState.unpack(bytes(data[:place]), "here")
