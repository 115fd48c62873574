"""The rules, and every gate against dicts: however occurrences are split over calls."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from gates import (
    COUNTING,
    EXTREMES,
    NAMES,
    SEED,
    SMALL,
    gate_of,
    held,
    ones,
    spread,
    u32,
    u64,
)

from storage.admission.rules import (
    Admission,
    Probability,
    compile_all,
    make_admission,
)
from storage.arena import Budget


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def small(name: str) -> Admission:
    return make_admission(name, SMALL.get(name, {}))


@pytest.fixture(params=COUNTING)
def counting(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A gate of threshold 3 that counts."""
    gate = gate_of(make_admission(request.param, SMALL[request.param]))
    yield gate
    gate.close()


def test_rules_are_values(name: str) -> None:
    one, other = make_admission(name, {}), make_admission(name, {})
    assert (one, hash(one)) == (other, hash(other))
    assert len({make_admission(each, {}) for each in NAMES}) == len(NAMES)


def test_a_rule_is_made_again_from_its_name_and_parameters_as_floats(small: Admission) -> None:
    params = {field.name: float(getattr(small, field.name)) for field in fields(small)}
    again = make_admission(small.name, params)
    assert (again, repr(again)) == (small, repr(small))


def test_an_unknown_name_is_answered_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="no admission 'bloom'; there are: always, counter"):
        make_admission("bloom", {})


def test_an_unknown_parameter_is_answered_with_those_there_are(name: str) -> None:
    with pytest.raises(ValueError, match=f"admission '{name}' has no parameter 'size'; it has: "):
        make_admission(name, {"size": 1.0})


@pytest.mark.parametrize(
    ("name", "param", "value", "rule"),
    [
        ("counter", "threshold", 0, "in 1..16777215"),
        ("counter", "threshold", 2**24, "in 1..16777215"),
        ("counter", "threshold", 2.5, "a whole number"),
        ("counter", "threshold", math.nan, "a whole number"),
        ("counter", "max_keys", 0, r"in 1..2\^36"),
        ("counter", "max_keys", math.inf, "a whole number"),
        ("sketch", "threshold", 8193, "in 1..8192"),
        ("sketch", "expected_keys", 0, r"in 1..2\^32"),
        ("sketch", "expected_keys", 2**31, r"small enough for 2\^32 cells"),
        ("sketch", "error_rate", 0.0, "in 1e-6..0.5"),
        ("sketch", "error_rate", 0.6, "in 1e-6..0.5"),
        ("sketch", "error_rate", math.nan, "in 1e-6..0.5"),
        ("probability", "p", 0.0, "above 0 and at most 1"),
        ("probability", "p", 1.01, "above 0 and at most 1"),
        ("probability", "p", math.nan, "above 0 and at most 1"),
    ],
)
def test_a_refused_parameter_is_named(name: str, param: str, value: float, rule: str) -> None:
    with pytest.raises(ValueError, match=f"admission '{name}': {param} must be {rule}.*got "):
        make_admission(name, {param: value})


# ---- every gate


def test_all_kernels_compile() -> None:
    compile_all()


def test_memory_is_taken_from_the_budget_and_returned(small: Admission) -> None:
    budget = Budget(1 << 30)
    gate = small.gate(budget, SEED)
    keys = spread(0, 900)
    gate.admit(keys, ones(keys), 1)
    assert gate.bytes == budget.held
    gate.close()
    assert budget.held == 0


def test_calls_without_keys_do_nothing(small: Admission) -> None:
    gate = gate_of(small)
    none, nothing = u64(), u32()
    admitted, totals = gate.admit(none, nothing, 1)
    assert (admitted.dtype, totals.dtype) == (np.bool_, np.uint32)
    assert (len(admitted), len(totals), len(gate.waiting(none))) == (0, 0, 0)
    gate.discard(none)
    gate.put(none, nothing, none)
    assert (gate.entries, held(gate)) == (0, {})
    gate.close()


def test_no_key_is_a_sentinel_and_read_only_arrays_will_do(small: Admission) -> None:
    gate = gate_of(small)
    keys, counts = u64(*EXTREMES), ones(u64(*EXTREMES))
    for array in (keys, counts):
        array.flags.writeable = False
    for version in range(1, 200):
        admitted, totals = gate.admit(keys, counts, version)
        keys, counts = keys[~admitted], counts[~admitted]
        assert totals.tolist() == [totals[0]] * len(totals)
        if not len(keys):
            break
    assert len(keys) == 0
    gate.close()


def test_weighing_changes_nothing(small: Admission) -> None:
    gate = gate_of(small)
    keys = spread(0, 100)
    gate.admit(keys, ones(keys), 1)
    before = held(gate), gate.cells().tolist(), gate.entries, gate.waiting(keys).tolist()
    first = gate.weigh(keys, ones(keys), 2)
    second = gate.weigh(keys, ones(keys), 2)
    assert [a.tolist() for a in first] == [a.tolist() for a in second]
    assert (held(gate), gate.cells().tolist(), gate.entries, gate.waiting(keys).tolist()) == before
    gate.close()


def test_what_is_replayed_may_be_replayed_again(small: Admission) -> None:
    gate, keys = gate_of(small), u64(*EXTREMES)
    for _ in range(2):
        gate.put(keys, ones(keys), ones(keys).astype(np.uint64))
        gate.put(keys, 2 * ones(keys), 2 * ones(keys).astype(np.uint64))
    once = gate_of(small)
    once.put(keys, 2 * ones(keys), 2 * ones(keys).astype(np.uint64))
    assert gate.waiting(keys).tolist() == once.waiting(keys).tolist()
    assert held(gate) == held(once)
    gate.close()
    once.close()


# ---- probability


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_each_occurrence_is_a_draw(p: float, count: int) -> None:
    gate, keys = gate_of(Probability(p=p)), spread(0, 200_000)
    admitted, totals = gate.admit(keys, count * ones(keys), 17)
    wanted = 1 - (1 - p) ** count
    sigma = math.sqrt(wanted * (1 - wanted) / len(keys))
    assert abs(admitted.mean() - wanted) < 5 * sigma
    assert totals.tolist() == [count] * len(keys)


def test_versions_are_independent_draws_for_a_key() -> None:
    gate = gate_of(Probability(p=0.5))
    story = np.array([gate.admit(u64(3), u32(1), v)[0][0] for v in range(1, 20_001)])
    assert abs(story.mean() - 0.5) < 5 * 0.5 / math.sqrt(20_000)
    pairs = (story[1:] & story[:-1]).mean()
    assert abs(pairs - 0.25) < 5 * 0.5 / math.sqrt(20_000)


def test_a_draw_depends_on_seed_key_and_version_alone() -> None:
    rule, keys = Probability(p=0.3), spread(0, 1000)
    whole = rule.gate(Budget(0), 5).admit(keys, ones(keys), 9)[0]
    gate = rule.gate(Budget(0), 5)
    gate.admit(keys, ones(keys), 8)
    parts = [gate.admit(keys[i : i + 7], ones(keys[i : i + 7]), 9)[0] for i in range(0, 1000, 7)]
    assert np.concatenate(parts).tolist() == whole.tolist()
    for other, version in ((rule.gate(Budget(0), 6), 9), (gate, 10)):
        assert 0.1 < (other.admit(keys, ones(keys), version)[0] != whole).mean() < 0.9


def test_certainty_admits_every_key_that_occurs() -> None:
    gate, keys = gate_of(Probability(p=1)), u64(*EXTREMES)
    assert gate.admit(keys, ones(keys), 1)[0].all()
    assert not gate.admit(keys, 0 * ones(keys), 1)[0].any()
