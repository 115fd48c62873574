"""Evictors: when they sweep, what they delete, and what they save."""

from __future__ import annotations

import pytest
from slots import (
    MASK,
    NAMES,
    Row,
    Rows,
    run,
)

from storage.eviction.contract import Now
from storage.eviction.evictor import Evictor
from storage.eviction.rules import (
    CapacityLru,
    StepTtl,
    TimeTtl,
    make_eviction,
)
from storage.records import Cause


def tick(evictor: Evictor, rows: Rows, seconds: float, **of: int) -> list[tuple[Cause, int]]:
    """One tick, and the deletes that it asks for."""
    found = evictor.tick(rows.contents, seconds, **of)
    slots = {int(rows.entries[slot, 0]): slot for slot in range(rows.used)}
    for keys in found.values():
        rows.release([slots[key] for key in keys.tolist()])
    return [(cause, key) for cause, keys in found.items() for key in keys.tolist()]


def test_an_evictor_without_rules_or_rows_has_nothing_to_do() -> None:
    assert Evictor([]).tick(Rows([Row(1, 1)]).contents, 5.0) == {}
    evictor = Evictor([make_eviction(name, {}) for name in NAMES[:4]])
    assert tick(evictor, Rows([]), 5.0) == []
    evictor.pushed(1, 10, 1.0)
    assert tick(evictor, Rows([None] * 5), 5.0) == []


@pytest.mark.parametrize("ttl", [1, 10, 640])
def test_idle_rows_leave_soon_after_their_ttl(ttl: int) -> None:
    rows, evictor, gone = Rows([Row(7, 1, 0), Row(8, 2, 0)]), Evictor([StepTtl(steps=ttl)]), {}
    evictor.pushed(1, 0, 0.0)
    for step in range(2 * ttl + 10):
        rows.put(1, Row(8, step + 2, step))
        evictor.pushed(step + 2, step, 0.0)
        for _, key in tick(evictor, rows, 0.0):
            gone[key] = step
    assert list(gone) == [7]
    assert ttl < gone[7] <= ttl + max(1, ttl // 64)


def test_idle_time_counts_while_nothing_is_pushed_and_over_a_restart() -> None:
    rules = [TimeTtl(seconds=60.0)]
    rows, evictor = Rows([Row(MASK, 1), Row(8, 2)]), Evictor(rules)
    evictor.pushed(1, 0, 1000.0)
    evictor.pushed(2, 0, 1030.0)
    assert tick(evictor, rows, 1060.0) == []
    assert tick(evictor, rows, 1061.0) == [(Cause.TIME_TTL, MASK)]
    after = Evictor(rules)
    after.load(evictor.pack())
    assert after.now(1061.0) == evictor.now(1061.0)
    assert tick(after, rows, 1090.0) == []
    assert tick(after, rows, 1090.1) == [(Cause.TIME_TTL, 8)]


def test_a_full_table_comes_back_to_its_size_in_bounded_ticks() -> None:
    rows = Rows([Row(i, 1 + i, i) for i in range(100)])
    evictor = Evictor([CapacityLru(max_rows=60)])
    evictor.pushed(100, 99, 0.0)
    gone: list[int] = []
    for _ in range(40):
        found = tick(evictor, rows, 0.0, limit=30, most=7)
        assert len(found) <= 7
        gone += [key for _, key in found]
    assert gone == list(range(40))
    rows.put(0, Row(500, 500))
    evictor.pushed(500, 100, 0.0)
    gone = [key for _ in range(10) for _, key in tick(evictor, rows, 0.0)]
    assert gone == [40]


def test_what_has_not_changed_is_not_swept_again() -> None:
    spied = StepTtl(steps=6400)
    evictor, rows = Evictor([spied]), Rows([Row(1, 1)])
    sweeps = 0
    for step in range(1000):
        evictor.pushed(step + 1, step, 0.0)
        before = evictor._last
        tick(evictor, rows, 0.0)
        sweeps += evictor._last is not before
    assert sweeps == 10


def test_a_sweep_on_demand_does_not_wait_until_it_is_worth_it() -> None:
    evictor, rows = Evictor([StepTtl(steps=6400)]), Rows([Row(1, 1, -10_000), Row(2, 2, 0)])
    evictor.pushed(2, 0, 0.0)
    sweep, dry = evictor.sweep(), evictor.sweep(dry=True)
    assert run(dry, rows, evictor.now(0.0)) == []
    assert run(sweep, rows, evictor.now(0.0)) == [(0, Cause.STEP_TTL)]
    assert dry.counts == sweep.counts == {Cause.STEP_TTL: 1}


def test_state_of_other_rules_is_refused() -> None:
    timed, plain = Evictor([TimeTtl()]), Evictor([StepTtl()])
    timed.pushed(1, 5, 0.0)
    plain.pushed(7, -3, 0.0)
    again = Evictor([StepTtl()])
    again.load(plain.pack())
    assert again.now(0.0) == Now(-3, 7)
    for evictor, data in ((plain, timed.pack()), (plain, b"123"), (timed, plain.pack())):
        with pytest.raises(ValueError, match="bytes"):
            evictor.load(data)
