"""Alterations of a live table outlive crashes, and are in checkpoints."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from altering import (
    KINDS,
    SMALL_SKETCH,
    alter,
    counters,
    everything,
    give,
    keys_of,
    with_values,
)
from homes import Homes
from stores import Home, change, copy_of, schema

from psserver.alterations import ALTERABLE
from storage.admission.rules import Always, Counter, Sketch
from storage.eviction.rules import CapacityLfu, Norm, StepTtl, TimeTtl

# ---- crashes

SEEDS = [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 8))]


def script(rng: random.Random) -> list[tuple[str, Any]]:
    """Operations: pushes, deletes, alterations of every field, flushes."""
    rules = [(), (StepTtl(steps=30),), (TimeTtl(seconds=50), CapacityLfu(max_rows=40)), (Norm(),)]
    values: dict[str, list[Any]] = {
        "lr": [0.25, 0.5, 1.0],
        "serving_default": [0.0, 1.5],
        "durability": ["applied", "log", "fsync"],
        "admission": [*KINDS, Counter(threshold=2), Sketch(threshold=2, expected_keys=1000)],
        "evictions": rules,
        "max_step_ahead": [0, 500, 1000],
    }
    assert set(values) == set(ALTERABLE)
    done: list[tuple[str, Any]] = []
    for step in range(40):
        some = rng.sample(range(60), 15)
        done.append(("push", (some, 10 * step)))
        fields = rng.sample(sorted(values), rng.randrange(1, 3))
        done.append(
            rng.choice(
                (
                    ("alter", {field: rng.choice(values[field]) for field in fields}),
                    ("alter", {field: rng.choice(values[field]) for field in fields}),
                    ("delete", some[:4]),
                    ("flush", None),
                    ("evict", None),
                )
            )
        )
    return done


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_recovered_after_a_kill_is_what_there_was(tmp_path: Path, seed: int) -> None:
    rng, seconds = random.Random(seed), [1000.0]
    with Home(tmp_path / "home", now=lambda: seconds[0]) as home:
        home.shard.create_table(schema())
        for number, (what, value) in enumerate(script(rng)):
            seconds[0] += 7.0
            match what:
                case "push":
                    give(home.shard, value[0], step=value[1])
                case "alter":
                    alter(home.shard, **value)
                case "delete":
                    home.shard.delete(change(value))
                case "flush":
                    home.flush()
                case "evict":
                    table, sweep = home.shard.sweeps.begin("t", False)
                    while not sweep.done:
                        home.shard.sweeps.take_slice(table, sweep)
            if what in ("alter", "flush") or number % 9 == 0:
                home.written()
                dead = copy_of(tmp_path / "home", tmp_path / f"dead-{number}")
                with Home(dead, now=lambda: seconds[0]) as again:
                    assert everything(again.shard) == everything(home.shard), (number, what, value)


def test_counters_in_old_blocks_do_not_come_back(tmp_path: Path) -> None:
    with Home(tmp_path / "home") as home:
        home.shard.create_table(schema(admission=Counter(threshold=5)))
        give(home.shard, range(1000))
        home.flush()
        for rule in (Always(), Counter(threshold=5)):
            alter(home.shard, admission=rule)
        give(home.shard, [5])
        home.flush()  # keeps the block with the old counters
        assert counters(home.shard) == {5: 1}
        home.reopen()
        assert counters(home.shard) == {5: 1}


# ---- checkpoints


@pytest.mark.parametrize("base", ["", "a"])
def test_a_checkpoint_has_the_schema_as_altered(tmp_path: Path, base: str) -> None:
    url = f"file://{tmp_path}/checkpoints"
    with Homes(tmp_path / "one", 2, url) as one, Homes(tmp_path / "three", 3, url) as three:
        one.create(schema(admission=Counter(threshold=4)))
        one.push(range(500))
        one.checkpoint("a")
        for node in one.nodes:
            alter(node.shard, admission=Counter(threshold=2), evictions=(Norm(),), lr=0.5)
        one.push(range(100))
        one.checkpoint("b", base=base)
        three.restore("b", replace=True)
        expected = with_values(
            schema(), admission=Counter(threshold=2), evictions=(Norm(),), lr=0.5
        )
        assert [node.shard.describe("t")[0] for node in three.nodes] == [expected] * 3
        kept = {key: total for node in three.nodes for key, total in counters(node.shard).items()}
        assert kept == dict.fromkeys(range(100, 500), 1)
        assert sorted(key for node in three.nodes for key in keys_of(node.shard)) == list(
            range(100)
        )
        three.restore("a", replace=True)
        assert three.nodes[0].shard.describe("t")[0] == schema(admission=Counter(threshold=4))


@pytest.mark.parametrize("rule", [Always(), SMALL_SKETCH, Counter(threshold=9)])
def test_counters_that_are_dropped_while_a_checkpoint_is_taken_are_not_in_it(
    tmp_path: Path, rule: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from psserver import checkpoints

    def counters_then_alter(captured: Any, *rest: Any) -> Any:
        yield from original(captured, *rest)
        alter(node.shard, admission=rule)

    original = checkpoints.counters_of
    with Homes(tmp_path / "one", 1, f"file://{tmp_path}/checkpoints") as one:
        [node] = one.nodes
        one.create(schema(admission=Counter(threshold=4)))
        one.push(range(500))
        monkeypatch.setattr(checkpoints, "counters_of", counters_then_alter)
        one.checkpoint("a")
        before = counters(node.shard)
        one.restore("a", replace=True)
        [node] = one.nodes
        assert counters(node.shard) == before
        assert len(before) == (500 if rule == Counter(threshold=9) else 0)
        assert node.shard.describe("t")[0].admission == rule
