"""Sweeps by several rules, their bounds, and a sweep over a real tier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from slots import (
    DIM,
    EXTREMES,
    Row,
    Rows,
    run,
)

from storage.arena import Budget
from storage.eviction.contract import Contents, Now, RowEviction, TableEviction, View
from storage.eviction.evictor import Evictor
from storage.eviction.rules import (
    EVICTIONS,
    CapacityLru,
    Norm,
    StepTtl,
    TimeTtl,
)
from storage.eviction.sweep import READ, Sweep
from storage.initializers import make_initializer
from storage.optimizers import OPTIMIZERS, make_optimizer
from storage.records import Cause
from storage.tiers.host import HostTier


def test_the_first_rule_that_holds_names_the_cause_and_capacity_takes_the_rest() -> None:
    small = (0.0,) * DIM
    rows = Rows(
        [
            Row(0, 1, 0, 1, small),  # idle by steps and by time, and small
            Row(1, 1, 90, 1, small),  # idle by time, and small
            Row(2, 9, 80, 1, small),  # small
            *(Row(i, 10 + i, 100) for i in range(3, 10)),
        ]
    )
    rules = [StepTtl(steps=50), TimeTtl(), Norm(grace=5), CapacityLru(max_rows=5)]
    dry, sweep, now = Sweep(rules, dry=True), Sweep(rules), Now(100, 30, 5)
    run(dry, rows, now)
    assert run(sweep, rows, now, 4, 1) == [
        (0, Cause.STEP_TTL),
        (1, Cause.TIME_TTL),
        (2, Cause.NORM),
        (3, Cause.CAPACITY),
        (4, Cause.CAPACITY),
    ]
    assert dry.counts == sweep.counts
    assert sweep.counts == {
        Cause.STEP_TTL: 1,
        Cause.TIME_TTL: 1,
        Cause.NORM: 1,
        Cause.CAPACITY: 2,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Spy(RowEviction):
    """Remembers which slots it was shown; nobody leaves."""

    name = "spy"
    cause = Cause.REQUEST
    seen: Any = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "seen", [])

    def _check(self) -> None: ...

    def due(self, rows: int, last: Now, now: Now) -> bool:
        return True

    def mark(self, view: View, start: int, stop: int, now: Now, causes: Any) -> None:
        assert len(causes) == stop - start
        self.seen.append((start, stop))


def test_a_slice_is_bounded_and_a_sweep_ends_though_slots_are_added() -> None:
    rows, spy = Rows([None] * 1000), Spy()
    rows.used = 10
    sweep = Sweep([spy])
    while not sweep.done:
        sweep.slice(rows.contents, Now(0, 0), 4)
        rows.used += 4
    assert spy.seen == [(0, 4), (4, 8), (8, 10)]


def test_a_slice_that_reads_rows_is_bounded_in_bytes() -> None:
    dim, spy = 8192, Spy()
    rows = Rows([Row(i, 1, 0, 1, (0.0,) * dim) for i in range(600)], dim, dim)
    run(Sweep([spy, Norm(threshold=1.0, grace=1)]), rows, Now(0, 1))
    assert max(stop - start for start, stop in spy.seen) == READ // (4 * dim) < 600
    assert spy.seen[-1][1] == 600


# ---- a real tier


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_the_metadata_is_that_of_a_tier(optimizer: str) -> None:
    made = make_optimizer(optimizer, None, {})
    tier = HostTier(4, made.initial_state(4), Budget(1 << 30))
    keys = np.array(EXTREMES, np.uint64)
    places = tier.allocate(len(keys))
    tier.create(keys, places, make_initializer("zeros", {}), 0)
    tier.slots.create(keys, places)
    evictor = Evictor([StepTtl(steps=5), Norm(threshold=1e-9, grace=2)])
    for version in range(1, 9):  # the first key at every step, another one with it
        slots = places[[0, version - 1]] if version > 1 else places[:1]
        grads = np.full((len(slots), 4), version != 5, np.float32)
        counts = np.ones(len(slots), np.uint32)
        tier.slots.touch(slots, counts, version - 20, version)
        tier.step(slots, grads, made, 0.1, version - 20)
        evictor.pushed(version, version - 20, 0.0)
    contents = Contents(tier.rows, tier.view())
    found = {cause: each.tolist() for cause, each in evictor.tick(contents, 0.0).items()}
    assert found == {Cause.STEP_TTL: [EXTREMES[1]], Cause.NORM: [EXTREMES[4]]}
    tier.release(places[[1, 4]])
    contents = Contents(tier.rows, tier.view())
    assert len(evictor.sweep().slice(contents, evictor.now(0.0))) == 0
    tier.close()


def test_kinds_of_rules_are_all_there_is() -> None:
    assert all(issubclass(rule, RowEviction | TableEviction) for rule in EVICTIONS.values())
