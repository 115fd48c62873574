"""Repeated pushes are noticed: every small case, with a clock of the test's own."""

from __future__ import annotations

import copy
import itertools
import struct
from dataclasses import asdict, replace
from typing import Any

import pytest

from psserver.errors import BadRequest, Refused, SessionExpired, TooLarge
from psserver.sessions import PACKED, WINDOW, Sessions

A, B, C, D, E = 0xA, 0xB, 0xC, 0xD, 0xE
TTL = 600.0
LAST = 2**64 - 1


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def sessions(clock: Clock) -> Sessions:
    return Sessions(2, TTL, clock)


def push(
    sessions: Sessions, client: int, sequence: int, acknowledged: int = 0, incarnation: int = 0
) -> int | None:
    """What a shard does: the known version, or the push is recorded under ``version(...)``."""
    numbers = (client, incarnation, sequence, acknowledged)
    known = sessions.applied(*numbers)
    if known is None:
        sessions.record(*numbers, version(client, sequence, incarnation))
    return known


def version(client: int, sequence: int, incarnation: int = 0) -> int:
    return (client << 40 | incarnation << 20 | sequence) % 2**64


def contents(sessions: Sessions) -> Any:
    return copy.deepcopy([(client, asdict(s)) for client, s in sessions._sessions.items()])


def test_a_new_push_is_not_known_and_a_repeated_one_is_known_under_its_version(
    sessions: Sessions,
) -> None:
    assert push(sessions, A, 1) is None
    assert push(sessions, A, 1) == version(A, 1)
    assert push(sessions, A, 2) is None
    assert push(sessions, A, 1) == version(A, 1)
    assert push(sessions, A, 2) == version(A, 2)
    assert len(sessions) == 1


def test_clients_do_not_share_their_numbers(sessions: Sessions) -> None:
    assert push(sessions, A, 1) is None
    assert push(sessions, B, 1) is None
    assert push(sessions, A, 1) == version(A, 1)
    assert push(sessions, B, 1) == version(B, 1)


@pytest.mark.parametrize("order", list(itertools.permutations(range(1, 5))))
def test_pushes_are_known_whatever_the_order_in_which_they_came(
    sessions: Sessions, order: tuple[int, ...]
) -> None:
    for sequence in order:
        assert push(sessions, A, sequence) is None
    for sequence in order:
        assert push(sessions, A, sequence) == version(A, sequence)


@pytest.mark.parametrize("sequence", range(1, 6))
@pytest.mark.parametrize("acknowledged", range(5))
def test_what_was_acknowledged_is_forgotten_and_refused_and_the_rest_is_known(
    sessions: Sessions, acknowledged: int, sequence: int
) -> None:
    for earlier in range(1, 5):
        push(sessions, A, earlier)
    assert push(sessions, A, 5, acknowledged) is None
    if sequence > acknowledged:
        assert push(sessions, A, sequence) == version(A, sequence)
    else:
        with pytest.raises(SessionExpired) as caught:
            push(sessions, A, sequence)
        assert str(caught.value) == (
            f"client 0xa: push {sequence} is too old to know whether it was applied: this shard has"
            f" records of pushes after {acknowledged} only (session_pushes); a trainer that"
            " computes its batches again must resume with policy 'rewind' instead of 'once'"
        )
    assert set(sessions._sessions[A].versions) == set(range(acknowledged + 1, 6))


def test_acknowledged_never_goes_back(sessions: Sessions) -> None:
    push(sessions, A, 1)
    push(sessions, A, 2, 1)
    assert push(sessions, A, 3, 0) is None
    with pytest.raises(SessionExpired):
        push(sessions, A, 1)


@pytest.mark.parametrize("newest", [WINDOW, WINDOW + 1, WINDOW + 7, 3 * WINDOW, LAST])
def test_pushes_further_back_than_the_window_are_refused(sessions: Sessions, newest: int) -> None:
    horizon = newest - WINDOW
    push(sessions, A, 1)
    push(sessions, A, newest)
    for sequence in {s for s in (1, horizon, horizon - 1) if 1 <= s <= horizon}:
        with pytest.raises(
            SessionExpired, match=rf"pushes after {horizon} only \(session_pushes\)"
        ):
            push(sessions, A, sequence)
    for sequence in (horizon + 1, horizon + 2, newest - 1, newest):
        known = version(A, sequence) if sequence in (1, newest) else None
        assert sessions.applied(A, 0, sequence, 0) == known


def test_the_window_holds_4096_pushes_and_no_more(sessions: Sessions) -> None:
    assert WINDOW == 4096
    for sequence in range(1, 2 * WINDOW + 11):
        assert push(sessions, A, sequence) is None
        assert len(sessions._sessions[A].versions) <= WINDOW
    held = sessions._sessions[A].versions
    assert set(held) == set(range(WINDOW + 11, 2 * WINDOW + 11))
    assert all(held[sequence] == version(A, sequence) for sequence in held)


def test_the_window_can_be_chosen(clock: Clock) -> None:
    sessions = Sessions(1, TTL, clock, 3 * WINDOW)
    for sequence in range(1, 4 * WINDOW + 1):
        assert push(sessions, A, sequence) is None
    assert set(sessions._sessions[A].versions) == set(range(WINDOW + 1, 4 * WINDOW + 1))
    assert sessions.applied(A, 0, WINDOW + 1, 0) == version(A, WINDOW + 1)
    with pytest.raises(SessionExpired, match=r"with policy 'rewind' instead of 'once'$"):
        sessions.applied(A, 0, WINDOW, 0)


def test_a_jump_forgets_as_much_as_single_steps_do(sessions: Sessions) -> None:
    for sequence in (1, 2, 3, 10 * WINDOW, 10 * WINDOW + 1):
        push(sessions, A, sequence)
    assert set(sessions._sessions[A].versions) == {10 * WINDOW, 10 * WINDOW + 1}


# ---- incarnations


@pytest.mark.parametrize("held", range(3))
@pytest.mark.parametrize("asked", range(3))
@pytest.mark.parametrize("acknowledged", [0, 1])
def test_a_newer_incarnation_starts_anew_and_an_older_one_is_refused(
    sessions: Sessions, held: int, asked: int, acknowledged: int
) -> None:
    push(sessions, A, 2, 0, held)
    numbers = (A, asked, 2, acknowledged)
    if asked == held:
        assert sessions.applied(*numbers) == version(A, 2, held)
    elif asked < held:
        with pytest.raises(SessionExpired) as caught:
            sessions.applied(*numbers)
        said = f"client 0xa: incarnation {asked} was replaced by incarnation {held}"
        assert str(caught.value) == said
    elif acknowledged:
        with pytest.raises(SessionExpired, match=r"^no session of client 0xa, incarnation"):
            sessions.applied(*numbers)
    else:
        assert push(sessions, A, 2, 0, asked) is None
        assert push(sessions, A, 2, 0, asked) == version(A, 2, asked)
        assert sessions.applied(A, asked, 1, 0) is None
    assert len(sessions) == 1


def test_a_client_of_which_nothing_is_remembered_is_refused_once_it_had_answers(
    sessions: Sessions,
) -> None:
    with pytest.raises(SessionExpired) as caught:
        sessions.applied(A, 3, 8, 7)
    assert str(caught.value) == (
        "no session of client 0xa, incarnation 3, although the client acknowledged pushes up to 7:"
        " the session expired, or a restore removed it"
    )
    assert sessions.applied(A, 3, 8, 0) is None
    assert len(sessions) == 0


# ---- impossible numbers


@pytest.mark.parametrize(
    ("sequence", "acknowledged"),
    [(0, 0), (0, 1), (1, 1), (1, 2), (5, LAST), (LAST, LAST), (-1, 0), (1, -1)],
)
@pytest.mark.parametrize("known", [False, True])
def test_a_sequence_must_be_above_what_is_acknowledged(
    sessions: Sessions, sequence: int, acknowledged: int, known: bool
) -> None:
    if known:
        push(sessions, A, 1)
    with pytest.raises(BadRequest) as caught:
        sessions.applied(A, 0, sequence, acknowledged)
    assert caught.value.reason == "INVALID_ARGUMENT"
    assert str(caught.value) == (
        "field 'sequence' must be greater than field 'acknowledged', got"
        f" {sequence} and {acknowledged}"
    )


def test_the_largest_numbers_are_as_good_as_any(sessions: Sessions) -> None:
    assert push(sessions, LAST, LAST, 0, LAST) is None
    assert push(sessions, LAST, LAST, 0, LAST) == version(LAST, LAST, LAST)
    assert sessions.applied(LAST, LAST, LAST, LAST - 1) == version(LAST, LAST, LAST)


# ---- room and time


def test_a_full_table_of_sessions_refuses_a_new_client_and_serves_the_others(
    sessions: Sessions, clock: Clock
) -> None:
    push(sessions, A, 1)
    push(sessions, B, 1)
    clock.now += TTL - 0.001
    with pytest.raises(
        TooLarge, match=r"^this shard already has 2 client sessions, its limit \(max_sessions\)$"
    ) as caught:
        push(sessions, C, 1)
    assert caught.value.reason == "TOO_MANY_SESSIONS"
    assert push(sessions, A, 2) is None
    assert push(sessions, B, 1) == version(B, 1)
    assert push(sessions, B, 1, 0, 1) is None  # another incarnation takes no more room
    assert len(sessions) == 2


def test_a_new_client_replaces_the_session_that_was_idle_longest_once_it_expired(
    sessions: Sessions, clock: Clock
) -> None:
    push(sessions, A, 1)
    clock.now += 1
    push(sessions, B, 1)
    clock.now += TTL - 2
    push(sessions, A, 2)  # now B is the one idle longest
    clock.now += 2
    assert push(sessions, C, 1) is None
    assert set(sessions._sessions) == {A, C}
    assert push(sessions, A, 1) == version(A, 1)
    with pytest.raises(SessionExpired, match=r"^no session of client 0xb"):
        push(sessions, B, 2, 1)


def test_an_expired_session_is_kept_while_there_is_room(sessions: Sessions, clock: Clock) -> None:
    push(sessions, A, 1)
    clock.now += 1000 * TTL
    assert push(sessions, A, 1) == version(A, 1)
    push(sessions, B, 1)
    assert set(sessions._sessions) == {A, B}


@pytest.mark.parametrize("known", [(), (A,), (B,), (A, B)])
@pytest.mark.parametrize("incarnation", [0, 1])
@pytest.mark.parametrize("sequence", [0, 1, 2])
@pytest.mark.parametrize("acknowledged", [0, 1])
@pytest.mark.parametrize("later", [0.0, 2 * TTL])
def test_asking_changes_nothing(
    clock: Clock,
    known: tuple[int, ...],
    incarnation: int,
    sequence: int,
    acknowledged: int,
    later: float,
) -> None:
    sessions = Sessions(1 if len(known) < 2 else 2, TTL, clock)
    for client in known:
        push(sessions, client, 1)
    clock.now += later
    before = contents(sessions)
    for _ in range(2):
        try:
            sessions.applied(A, incarnation, sequence, acknowledged)
        except Refused:
            continue
    assert contents(sessions) == before


def test_every_short_history_answers_as_an_unlimited_memory_would(clock: Clock) -> None:
    """All histories of three pushes over sequences 1..3, acknowledgements and incarnations."""
    steps = [
        (incarnation, sequence, acknowledged)
        for incarnation in (0, 1)
        for sequence in (1, 2, 3)
        for acknowledged in range(sequence)
    ]
    for history in itertools.product(steps, repeat=3):
        sessions = Sessions(1, TTL, clock)
        seen: dict[int, int] = {}
        at, low = -1, 0
        for number, (incarnation, sequence, acknowledged) in enumerate(history, 1):
            expired = (
                incarnation < at
                or (incarnation > at and acknowledged > 0)
                or (incarnation == at and sequence <= low)
            )
            try:
                known = sessions.applied(A, incarnation, sequence, acknowledged)
            except SessionExpired:
                assert expired, history
                continue
            assert not expired, history
            if incarnation > at:
                at, low, seen = incarnation, 0, {}
            assert known == seen.get(sequence), history
            if known is None:
                sessions.record(A, incarnation, sequence, acknowledged, number)
                seen[sequence] = number
                low = max(low, acknowledged)


def test_sessions_opened_at_once_push_out_no_live_one() -> None:
    sessions = Sessions(2, 600.0, lambda: 0.0)
    sessions.record(1, 1, 1, 0, 10)
    assert sessions.applied(2, 1, 1, 0) is None
    assert sessions.applied(3, 1, 1, 0) is None  # both were checked while there was a place
    sessions.record(2, 1, 1, 0, 11)
    sessions.record(3, 1, 1, 0, 12)
    assert [sessions.applied(client, 1, 1, 0) for client in (1, 2, 3)] == [10, 11, 12]


# ---- packed


def repacked(sessions: Sessions, clock: Clock, limit: int = 9) -> Sessions:
    other = Sessions(limit, TTL, clock)
    other.unpack(sessions.pack())
    return other


def test_no_sessions_are_packed_as_nothing(sessions: Sessions, clock: Clock) -> None:
    assert sessions.pack() == b""
    assert len(repacked(sessions, clock)) == 0


def test_unpacked_sessions_are_those_that_were_packed(clock: Clock) -> None:
    sessions = Sessions(9, TTL, clock)
    push(sessions, A, 1)
    sessions.record(LAST, LAST, LAST, LAST - 1, 2**48 - 1)
    push(sessions, B, 3)
    push(sessions, B, 7, 2)
    push(sessions, C, 5, 0, 3)
    push(sessions, A, 2, 1)
    again = repacked(sessions, clock)
    assert contents(again) == contents(sessions)
    assert list(again._sessions) == list(sessions._sessions) == [LAST, B, C, A]
    assert again.pack() == sessions.pack()


def test_unpacked_sessions_are_as_old_as_they_were(sessions: Sessions, clock: Clock) -> None:
    push(sessions, A, 1)
    clock.now += 2
    push(sessions, B, 1)
    clock.now += TTL - 3
    packed = sessions.pack()
    clock.now = 0.5  # of another process, later
    again = Sessions(2, TTL, clock)
    again.unpack(packed)
    with pytest.raises(TooLarge):
        push(again, C, 1)
    clock.now += 1
    assert push(again, C, 1) is None
    assert set(again._sessions) == {B, C}  # the order of their use was kept


def test_a_snapshot_is_packed_as_the_sessions_were(clock: Clock) -> None:
    sessions = Sessions(9, TTL, clock)
    for sequence in range(1, PACKED):  # more numbers than one call packs
        push(sessions, A, sequence)
    snapshot, packed = sessions.snapshot(), sessions.pack()
    push(sessions, B, 1)
    push(sessions, A, PACKED, PACKED - 1)
    clock.now += 5
    assert snapshot.pack() == packed != sessions.pack()


def test_the_bytes_of_packed_sessions(sessions: Sessions, clock: Clock) -> None:
    """Also those that were packed when there were no idle seconds yet are read."""
    for sequence in (1, 3, 2):
        push(sessions, A, sequence, sequence > 1)
    clock.now += 300.9
    numbers = [A, 0, 3, 1, 2 | 300 << 32, 3, 2, version(A, 3), version(A, 2)]
    assert sessions.pack() == struct.pack("<9Q", *numbers)
    numbers[4] = 2
    again = Sessions(9, TTL, clock)
    again.unpack(struct.pack("<9Q", *numbers))
    assert again._sessions[A] == replace(sessions._sessions[A], used=clock.now)


def test_a_session_that_was_replaced_does_not_come_back_with_the_replay(clock: Clock) -> None:
    """Else a full table would refuse every new client for a ttl after a restart."""
    sessions = Sessions(2, TTL, clock)
    push(sessions, A, 1)
    push(sessions, B, 1)
    clock.now += TTL - 30
    packed = sessions.pack()
    clock.now += 30
    push(sessions, C, 1)
    push(sessions, D, 1)
    assert list(sessions._sessions) == [C, D]
    again = Sessions(2, TTL, clock)
    again.unpack(packed)
    for client in (C, D):
        again.record(client, 0, 1, 0, version(client, 1))
    again.trim()
    assert list(again._sessions) == [C, D]
    clock.now += TTL
    assert push(again, E, 1) is None


def test_a_live_session_over_the_limit_is_kept_by_a_replay(
    sessions: Sessions, clock: Clock
) -> None:
    push(sessions, A, 1)
    push(sessions, B, 1)
    clock.now += TTL / 4
    again = repacked(sessions, clock, 1)
    again.trim()
    assert list(again._sessions) == [A, B]


def test_a_full_window_comes_back(sessions: Sessions, clock: Clock) -> None:
    for sequence in range(1, WINDOW + 100):
        push(sessions, A, sequence)
    again = repacked(sessions, clock)
    assert contents(again) == contents(sessions)
    with pytest.raises(SessionExpired):
        push(again, A, 99)
    assert push(again, A, 100) == version(A, 100)
    assert push(again, A, WINDOW + 100) is None


def test_every_short_history_goes_on_after_packing_as_without(clock: Clock) -> None:
    steps = [
        (incarnation, sequence, acknowledged)
        for incarnation in (0, 1)
        for sequence in (1, 2, 3)
        for acknowledged in range(sequence)
    ]

    def answer(sessions: Sessions, step: tuple[int, int, int]) -> Any:
        try:
            return push(sessions, A, step[1], step[2], step[0])
        except SessionExpired as error:
            return str(error)

    for history in itertools.product(steps, repeat=3):
        plain = Sessions(1, TTL, clock)
        packed = Sessions(1, TTL, clock)
        for step in history:
            packed = repacked(packed, clock)
            assert answer(packed, step) == answer(plain, step), history
        assert contents(packed) == contents(plain)
