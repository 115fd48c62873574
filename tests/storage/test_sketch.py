"""Sketches: how many keys are early or late, ageing, cells.

Errors of a sketch are counted over fixed seeds. The bound is the one that the rule promises plus
five standard deviations, which chance exceeds once in some millions of seeds.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from gates import (
    MASK,
    NAMES,
    SEED,
    five_sigma,
    gate_of,
    ones,
    spread,
    u32,
    u64,
)

from storage.admission.rules import (
    PLANNED,
    Sketch,
    make_admission,
)
from storage.admission.sketch import HALVED, SketchGate
from storage.arena import Budget
from storage.errors import OutOfMemory


def sketch(threshold: int = 3, expected: int = 1000, rate: float = 0.01, **of: int) -> SketchGate:
    rule = Sketch(threshold=threshold, expected_keys=expected, error_rate=rate)
    return rule.gate(Budget(1 << 30), of.get("seed", SEED))  # type: ignore[return-value]


def early(gate: SketchGate, count: int, threshold: int) -> float:
    """The share of keys never seen before that would be admitted at once."""
    fresh = spread(1 << 40, (1 << 40) + count)
    return float(gate.weigh(fresh, ones(fresh), 1)[0].mean())


@pytest.mark.parametrize("rate", [0.5, 0.1, 0.01, 0.001])
@pytest.mark.parametrize("threshold", [2, 3, 40])
def test_at_the_expected_keys_few_others_are_admitted_early(rate: float, threshold: int) -> None:
    """The worst case: every key that waits is one occurrence short."""
    gate, keys = sketch(threshold, 50_000, rate), spread(0, 50_000)
    gate.admit(keys, (threshold - 1) * ones(keys), 1)
    trials = 200_000
    assert early(gate, trials, threshold) <= five_sigma(rate, trials)
    assert gate.entries == pytest.approx(50_000, rel=0.02)
    gate.close()


@pytest.mark.parametrize("seed", [0, 1, MASK])
def test_the_share_is_that_of_a_bloom_filter(seed: int) -> None:
    """Two hashes do for k: each cell of a key is a fair draw from all cells."""
    gate, keys = sketch(2, 100_000, 2**-5, seed=seed), spread(0, 100_000)
    gate.admit(keys, ones(keys), 1)
    used = np.count_nonzero(gate.cells()) / len(gate.cells())
    assert used == pytest.approx(PLANNED, rel=0.01)
    trials = 1_000_000
    wanted = used**5
    error = 5 * math.sqrt(wanted / trials)
    assert early(gate, trials, 2) == pytest.approx(wanted, abs=error + 0.02 * wanted)
    gate.close()


def test_the_size_is_known_at_creation() -> None:
    rule = Sketch(threshold=3, expected_keys=1_000_000, error_rate=0.01)
    assert (rule.hashes, rule.bytes) == (7, rule.cells)
    assert rule.cells == math.ceil(7_000_000 / -math.log(1 - PLANNED))
    gate = gate_of(rule)
    assert rule.bytes <= gate.bytes <= rule.bytes + (2 << 20)
    assert Sketch(threshold=33, expected_keys=1_000_000).bytes == 2 * rule.bytes
    gate.close()
    with pytest.raises(OutOfMemory):
        gate_of(rule, rule.bytes // 2)


def test_with_more_keys_than_expected_it_ages_and_keeps_its_rate() -> None:
    rate, size = 0.01, 10_000
    gate = sketch(3, 100_000, rate)
    for version in range(1, 101):  # a million keys, each seen once or twice
        keys = spread(version * size, (version + 1) * size)
        gate.admit(keys, ones(keys) + np.uint32(version % 2), version)
        assert np.count_nonzero(gate.cells()) <= len(gate.cells()) / 2
        assert early(gate, 20_000, 3) <= five_sigma(rate, 20_000)
    gate.close()


@pytest.mark.parametrize("expected", [500, 2000, 20_000])
@pytest.mark.parametrize("count", [1, 2])
def test_pushes_of_more_keys_than_expected_make_no_others_early(expected: int, count: int) -> None:
    rate, size = 0.01, 10_000
    gate = sketch(3, expected, rate)
    for version in range(1, 11):
        keys = spread(version * size, (version + 1) * size)
        assert gate.admit(keys, count * ones(keys), version)[0].mean() <= five_sigma(rate, size)
        assert np.count_nonzero(gate.cells()) <= len(gate.cells()) / 2
    gate.close()


def test_a_push_ages_a_sketch_no_further_than_its_keys_pay_for() -> None:
    """High counts in most cells, of which a halving frees none."""
    gate, keys = sketch(100, 100_000), spread(0, 10)
    cells = len(gate.cells())
    gate.load_cells(0, np.full(2 * cells, 255, np.uint8))
    for version, halved in ((1, HALVED), (2, 2 * HALVED)):
        gate.admit(keys, ones(keys), version)
        assert np.count_nonzero(gate.cells() < 65_000) == halved
    gate.close()


def test_in_a_stream_few_are_early_and_next_to_none_late() -> None:
    """Zipf's law, each admission taken out again; no more wait than expected, so nothing ages."""
    rate, threshold, count = 0.01, 3, 200_000
    gate = sketch(threshold, count, rate)
    rng = np.random.default_rng(1)
    law = np.cumsum(1 / np.arange(1, count + 1) ** 0.9)
    true, has_row = np.zeros(count, np.int64), np.zeros(count, np.bool_)
    early_ones = late_ones = 0
    for version in range(1, 101):
        drawn = np.searchsorted(law, rng.random(10_000) * law[-1])
        ids, counts = np.unique(drawn[~has_row[drawn]], return_counts=True)
        true[ids] += counts
        admitted, totals = gate.admit(spread(0, count)[ids], counts.astype(np.uint32), version)
        assert (totals[admitted] >= threshold).all()
        has_row[ids[admitted]] = True
        before = true[ids] - counts
        early_ones += (true[ids][admitted] < threshold).sum()
        late_ones += (before[admitted] >= threshold).sum()
        assert (before[admitted] < 2 * threshold).all()
    assert early_ones <= five_sigma(rate, count) * count
    assert late_ones <= 0.002 * has_row.sum()
    assert has_row.sum() > 30_000
    gate.close()


def test_ageing_halves_every_count() -> None:
    gate, keys = sketch(100, 1000), spread(0, 9)
    gate.admit(keys, np.arange(1, 10, dtype=np.uint32), 5)
    gate.expire(5)  # its last halving was at version 0
    assert gate.waiting(keys).tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 4]
    gate.expire(5)  # that was at version 5
    assert gate.waiting(keys).tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 4]
    gate.admit(u64(77), u32(1), 9)
    gate.expire(6)
    assert gate.waiting(keys).tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert gate.entries == 6
    gate.close()


def test_ageing_goes_a_slice_at_a_time() -> None:
    gate, keys = sketch(100, 200_000), spread(0, 10)
    cells = len(gate.cells())
    assert cells > 4 * HALVED
    gate.admit(keys, 64 * ones(keys), 5)
    gate.expire(1, limit=cells // 2)
    assert set(gate.waiting(keys).tolist()) <= {32, 64}
    assert 32 in gate.waiting(keys).tolist()
    assert np.unique(gate.cells()[: cells // 2]).max() <= 32
    assert np.unique(gate.cells()[cells // 2 :]).max() == 64
    for version in range(6, 10):  # pushes go on with it
        gate.admit(u64(), u32(), version)
    assert gate.waiting(keys).tolist() == [32] * 10
    gate.close()


def test_a_cell_that_is_full_is_not_taken_from() -> None:
    gate, keys = sketch(32, 1), spread(0, 100)  # too few cells in use to age
    gate.put(keys, 300 * ones(keys), ones(keys).astype(np.uint64))  # as ten keys of a cell would
    full = gate.cells() == 255
    assert full.any()
    gate.discard(keys[:50])
    assert (gate.cells()[full] == 255).all()
    gate.close()


def test_cells_are_a_checkpoint_with_what_was_pushed_meanwhile() -> None:
    gate, keys = sketch(9, 1000), spread(0, 500)
    gate.admit(keys, 2 * ones(keys), 1)
    half = len(gate.cells()) // 2
    first = gate.cells()[:half].copy()
    _, totals = gate.admit(keys[100:], 3 * ones(keys[100:]), 2)
    second = gate.cells()[half:].copy()
    copy = sketch(9, 1000)
    copy.load_cells(0, first)
    copy.load_cells(half, second)
    for _ in range(2):
        copy.put(keys[100:], totals, np.full(400, 2, np.uint64))
    assert (copy.waiting(keys) == gate.waiting(keys)).mean() > 0.98
    assert (copy.waiting(keys) >= [2] * 100 + [5] * 400).all()
    assert not gate.cells().flags.writeable
    gate.close()
    copy.close()


def test_loaded_cells_are_the_same_sketch() -> None:
    gate, keys = sketch(), spread(0, 500)
    gate.admit(keys, 2 * ones(keys), 1)
    copy = sketch()
    copy.load_cells(0, gate.cells())
    assert (copy.entries, copy.waiting(keys).tolist()) == (gate.entries, [2] * 500)
    gate.discard(keys)
    copy.discard(keys)
    assert (gate.entries, copy.entries, copy.cells().max()) == (0, 0, 0)
    size = len(gate.cells())
    for start, count in ((0, size + 1), (size - 5, 6), (size + 1, 0), (-1, 1)):
        with pytest.raises(ValueError, match=rf"bytes {start}\.\..* into a sketch of {size} bytes"):
            copy.load_cells(start, np.zeros(count, np.uint8))
    gate.close()
    copy.close()


@pytest.mark.parametrize("name", [name for name in NAMES if name != "sketch"])
def test_other_gates_have_no_cells(name: str) -> None:
    gate = gate_of(make_admission(name, {}))
    gate.load_cells(0, gate.cells())
    with pytest.raises(ValueError, match=r"bytes 0\.\.0 into a sketch of 0 bytes"):
        gate.load_cells(0, np.zeros(1, np.uint8))
    gate.close()
