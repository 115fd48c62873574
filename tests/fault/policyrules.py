"""What the random model does with admission and eviction: rules of every kind, and what they do.

Table "v" counts waiting keys exactly, table "w" in a sketch. Both evict by one rule, which
alterations replace by rules of other kinds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from hypothesis import event
from hypothesis import strategies as st
from hypothesis.stateful import rule
from stores import DIM, Home, contents
from tierrules import KEYS, NAMES

from storage.admission.rules import Counter, Sketch
from storage.errors import DiskFull
from storage.eviction.contract import FIRST_STEP, Eviction
from storage.eviction.rules import SCALE, Capacity, CapacityLru, Norm, StepTtl, TimeTtl
from storage.eviction.rules import CapacityLfu as Lfu
from storage.schema import TableSchema

RULED = ("v", "w")
LR, THRESHOLD, RULE = 1.0, 2, StepTtl(steps=3)  # of a new table; threshold and rule of RULED alone
EXPECTED = 20_000  # keys in the sketch: so many that no two are confused
RULES: st.SearchStrategy[Eviction] = st.one_of(
    st.builds(lambda steps: StepTtl(steps=steps), st.integers(1, 6)),
    st.builds(lambda seconds: TimeTtl(seconds=seconds), st.sampled_from([1.0, 5.0])),
    st.builds(
        lambda threshold, grace: Norm(threshold=threshold, grace=grace),
        st.sampled_from([1.0, 5.0]),
        st.integers(0, 3),
    ),
    st.builds(lambda rows: CapacityLru(max_rows=rows), st.integers(1, 8)),
    st.builds(
        lambda rows, life: Lfu(max_rows=rows, half_life=life), st.integers(1, 8), st.integers(1, 4)
    ),
)


@dataclass
class Model:
    """The expected rows of a table, by key."""

    # key -> (value, version, frequency, step)
    rows: dict[int, tuple[float, int, int, int]] = field(default_factory=dict)
    # key -> (occurrences, version of the last)
    waiting: dict[int, tuple[int, int]] = field(default_factory=dict)
    step: int = FIRST_STEP  # the largest that was pushed
    lr: float = LR
    threshold: int = THRESHOLD
    rule: Eviction = RULE

    def copy(self) -> Model:
        return replace(self, rows=dict(self.rows), waiting=dict(self.waiting))


def settings_of(name: str, threshold: int, rule: Eviction) -> dict[str, Any]:
    """Return the fields of a schema that decide about admission and eviction."""
    if name not in RULED:
        return {}
    gate: Any = Counter(threshold=threshold)
    if name == "w":
        gate = Sketch(threshold=threshold, expected_keys=EXPECTED)
    return {"admission": gate, "evictions": (rule,)}


def doomed(model: Model, idle: int) -> tuple[list[tuple[float, int]], int]:
    """Return ((score, key) of the rows that a sweep may evict, ascending; how many it evicts).

    idle  rows of this version or older have exceeded the time TTL
    """
    rule, step = model.rule, model.step

    def score(version: int, frequency: int, last: int) -> float:
        if not isinstance(rule, Lfu):
            return version
        return np.floor(SCALE * (np.log2(max(frequency, 1)) - max(step - last, 0) / rule.half_life))

    def dies(value: float, version: int, last: int) -> bool:
        match rule:
            case StepTtl():
                return step - last > rule.steps
            case TimeTtl():
                return version <= idle
            case Norm():
                return step - last >= rule.grace and abs(value) * DIM**0.5 < rule.threshold
        return True

    found = sorted(
        (score(version, frequency, last), key)
        for key, (value, version, frequency, last) in model.rows.items()
        if dies(value, version, last)
    )
    if isinstance(rule, Capacity):
        return found, max(0, len(found) - rule.max_rows)  # type: ignore[attr-defined]
    return found, len(found)


class PolicyRules:
    """Part of the state machine: rules about admission and eviction. The machine has the rest."""

    home: Home
    model: dict[str, Model]
    faults: Any
    clock: float
    pushed: dict[int, float]
    push: Callable[..., None]
    create: Callable[..., None]
    checkpoint: Callable[..., None]
    demote: Callable[..., None]
    change: Callable[..., bool]
    remember: Callable[..., None]

    @rule(seconds=st.sampled_from([0.5, 3.0]))
    def wait(self, seconds: float) -> None:
        """Let time pass."""
        self.clock += seconds

    @rule(name=st.sampled_from(RULED), dry=st.booleans())
    def evict(self, name: str, dry: bool) -> None:
        if name not in self.model:
            return
        shard, model = self.home.shard, self.model[name]
        idle = shard._tables.get(name).table.evictor.now(self.clock).idle
        found, count = doomed(model, idle)
        scores = {key: score for score, key in found}
        number, sweep = shard.sweeps.begin(name, dry)
        left, evicted = count, list[float]()
        while not sweep.done:
            before, version = contents(shard), shard.version
            if sweep.wanted is not None:
                sweep.wanted()
            try:
                shard.sweeps.take_slice(number, sweep)
            except DiskFull:  # there must be room for what it may find
                assert self.faults.full
                assert not dry
                assert contents(shard) == before
                return
            if shard.version == version:
                assert contents(shard) == before
                continue
            assert shard.version == version + 1
            kept = set(shard.dump()[name].keys.tolist())
            gone = [key for key in model.rows if key not in kept]
            assert gone
            assert not dry
            for key in gone:
                evicted.append(scores[key])
                self.check_age(model, key)
                del model.rows[key]
                left -= 1
            self.remember()
        assert dict(sweep.counts) == {model.rule.cause: count}
        if not dry:
            event(f"rows evicted by {model.rule.name}" if count else "no rows evicted")
            assert left == 0
            assert sorted(evicted) == [score for score, _ in found[:count]]

    @rule(name=st.sampled_from(RULED), policy=RULES, keys=KEYS, others=KEYS, cold=st.booleans())
    def evict_by(
        self, name: str, policy: Eviction, keys: list[int], others: list[int], cold: bool
    ) -> None:
        """Evict by a rule some rows that were just pushed, and perhaps left memory."""
        self.create(name)
        self.alter(name, 1.0, 1, policy)
        self.push(name, keys, 1, 0, 0)
        self.wait(3.0)
        if cold:
            self.checkpoint()
            self.demote(1.0)
        self.push(name, others, 4, 0, 9)
        self.evict(name, False)

    def check_age(self, model: Model, key: int) -> None:
        """A row that its time TTL evicts must be that old."""
        if isinstance(model.rule, TimeTtl):
            assert self.clock - self.pushed[model.rows[key][1]] >= model.rule.seconds

    @rule(
        name=NAMES,
        lr=st.sampled_from([0.5, 1.0, 2.0]),
        threshold=st.integers(1, 4),
        policy=RULES,
    )
    def alter(self, name: str, lr: float, threshold: int, policy: Eviction) -> None:
        if name not in self.model:
            return
        shard, model = self.home.shard, self.model[name]

        def altered(old: TableSchema) -> TableSchema:
            new = replace(old, optimizer=replace(old.optimizer, lr=lr))
            return replace(new, **settings_of(name, threshold, policy))

        before = model.copy()
        model.lr = lr
        if name in RULED:
            model.threshold, model.rule = threshold, policy
        if model == before:
            version = shard.version
            shard.alter_table(name, altered)
            assert shard.version == version
        elif self.change(lambda: shard.alter_table(name, altered)):
            self.remember()
        else:
            self.model[name] = before

    def check_waiting(self, name: str, model: Model, counters: list[list[int]]) -> None:
        """Compare the counts of waiting keys.

        counters  (key, occurrences, version of the last) that the shard has
        """
        waiting = model.waiting
        if name == "w":
            keys = np.array(sorted(waiting), np.uint64)
            counts = self.home.shard._tables.get(name).table.gate.waiting(keys)
            assert counts.tolist() == [waiting[key][0] for key in sorted(waiting)]
            assert counters == []
        else:
            assert counters == [[key, *waiting[key]] for key in sorted(waiting)]
