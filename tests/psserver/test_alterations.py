"""Settings of a live table: what can be altered, and what stays."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from altering import (
    KINDS,
    NEW,
    alter,
    counters,
    everything,
    give,
    keys_of,
    with_values,
)
from stores import Home, contents, make_shard, schema

from psproto import ps_pb2 as pb
from psserver.alterations import ALTERABLE, FIXED, altered, require_alterable
from psserver.errors import BadRequest, NoLog, NotAlterable, Overloaded
from psserver.schemas import read_schema, write_schema
from psserver.shard import Shard
from psserver.status import code_of, reason_of, status_of
from storage.admission.rules import ADMISSIONS, Always, Counter, Sketch
from storage.errors import OutOfMemory, SchemaMismatch, UnknownTable
from storage.eviction.rules import CapacityLru, Norm, StepTtl, TimeTtl
from storage.schema import TableSchema

# ---- what can be altered


def test_every_field_of_a_schema_can_be_altered_or_says_why_not() -> None:
    fields = {field.name for field in dataclasses.fields(TableSchema)}
    assert set(ALTERABLE) | set(FIXED) == fields | {"lr"}
    assert set(ALTERABLE) & set(FIXED) == set()
    assert set(NEW) == set(ALTERABLE)
    assert {field.name for field in pb.TableSchema.DESCRIPTOR.fields} == fields


@pytest.mark.parametrize("field", FIXED)
def test_what_cannot_be_altered_is_refused_with_the_field_and_the_reason(field: str) -> None:
    request = pb.AlterTableRequest(schema=pb.TableSchema(name="t"), fields=["lr", field])
    with pytest.raises(NotAlterable) as caught:
        require_alterable(request)
    assert f"table 't': {field} cannot be altered: {FIXED[field]}" in str(caught.value)
    status = status_of(caught.value)
    assert (code_of(status).name, reason_of(status)) == ("FAILED_PRECONDITION", "NOT_ALTERABLE")
    assert pb.ErrorInfo.FromString(status.details[0].value).metadata == {"field": field}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([], "'t': 'fields' is empty; name at least one field"),
        (["lr", "rate"], "'t': no field 'rate'; alterable are: lr, serving_default,"),
    ],
)
def test_fields_that_make_no_sense_are_refused(fields: list[str], message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        require_alterable(pb.AlterTableRequest(schema=pb.TableSchema(name="t"), fields=fields))


BAD = [
    ({"optimizer": pb.Rule(parameters={"lr": -1.0})}, "lr", "'t': .*lr"),
    ({}, "lr", "'t': lr: schema.optimizer.parameters"),
    ({"serving_default": float("nan")}, "serving_default", "'t': serving_default must be finite"),
    (
        {"durability": 9},
        "durability",
        r"'t': durability must be 1 .applied., 2 .log. or 3 .fsync., got 9",
    ),
    ({"admission": pb.Rule(name="bloom")}, "admission", "'t': no admission 'bloom'"),
    (
        {"admission": pb.Rule(name="counter", parameters={"threshold": 0})},
        "admission",
        "'t': admission 'counter': threshold must be in",
    ),
    ({"evictions": [pb.Rule(name="ttl")]}, "evictions", "'t': no eviction 'ttl'"),
    (
        {"evictions": [pb.Rule(name="capacity_lru"), pb.Rule(name="capacity_lfu")]},
        "evictions",
        "'t': eviction rules .* both have the cause 'capacity'",
    ),
    ({"max_step_ahead": 1 << 47}, "max_step_ahead", "'t': max_step_ahead must be in"),
    ({}, "max_step_ahead", "'t': max_step_ahead: schema.max_step_ahead, the new value, is missing"),
]


@pytest.mark.parametrize(("fields", "name", "message"), BAD)
def test_a_value_that_breaks_a_rule_is_refused_and_nothing_changes(
    fields: Any, name: str, message: str
) -> None:
    shard = make_shard()
    shard.create_table(schema())
    give(shard, range(9))
    before = everything(shard)
    named = ["serving_default", name] if name != "serving_default" else [name]
    request = pb.AlterTableRequest(schema=pb.TableSchema(name="t", **fields), fields=named)
    with pytest.raises(BadRequest, match=message):
        shard.alter_table("t", lambda old: altered(old, request))
    assert everything(shard) == before


@pytest.mark.parametrize("field", NEW)
def test_a_field_is_altered_and_the_others_and_all_rows_stay(tmp_path: Path, field: str) -> None:
    with Home(tmp_path / "home") as home:
        shard = home.shard
        shard.create_table(schema())
        shard.create_table(schema("u"))
        give(shard, range(20))
        rows, version = contents(shard)["rows"], shard.version
        now, dropped = alter(shard, **{field: NEW[field]})
        assert now == shard.describe("t")[0] == with_values(schema(), **{field: NEW[field]})
        assert (shard.version, dropped) == (version + 1, 0)
        assert contents(shard)["rows"] == rows
        assert shard.describe("u")[0] == schema("u")
        assert alter(shard, **{field: NEW[field]}) == (now, 0)  # a repetition changes nothing
        assert shard.version == version + 1
        before = everything(shard)
        home.reopen()
        assert everything(home.shard) == before


def test_a_table_that_is_not_there_or_a_log_that_is_not() -> None:
    shard = make_shard()
    with pytest.raises(UnknownTable):
        alter(shard, lr=1.0)
    shard.create_table(schema())
    with pytest.raises(NoLog):
        alter(shard, durability="fsync")


def test_creating_an_altered_table_asks_for_what_it_is_now() -> None:
    shard = make_shard()
    shard.create_table(schema())
    for field, value in NEW.items():
        alter(shard, **{field: value})
    new = with_values(schema(), **NEW)
    version = shard.version
    assert shard.create_table(new) == new
    assert read_schema(write_schema(new)) == new
    with pytest.raises(SchemaMismatch, match="'t' exists with optimizer"):
        shard.create_table(schema())
    assert shard.version == version


# ---- what each does


def test_the_learning_rate_of_pushes_that_send_none() -> None:
    shard = make_shard()
    shard.create_table(schema())
    give(shard, [1])
    alter(shard, lr=0.25)
    give(shard, [1])
    give(shard, [1], lr=0.5)
    assert shard.dump()["t"].rows.tolist() == [[-1.75, -1.75]]


def test_what_a_serving_pull_returns() -> None:
    shard = make_shard()
    shard.create_table(schema())
    alter(shard, serving_default=2.5)
    out = np.empty((1, 2), np.float32)
    shard._tables.get("t").table.pull(np.zeros(1, np.uint64), "serve", out)
    assert out.tolist() == [[2.5, 2.5]]


def test_how_far_ahead_a_push_may_be() -> None:
    shard = make_shard()
    shard.create_table(schema())
    alter(shard, max_step_ahead=9)
    with pytest.raises(Exception, match="max_step_ahead is 9"):
        give(shard, [1], step=10)
    alter(shard, max_step_ahead=0)
    give(shard, [1], step=1 << 46)


def ticks(shard: Shard) -> None:
    for _ in range(50):
        if not shard.sweeps.tick():
            return
    raise AssertionError("sweeps go on for ever")


def test_eviction_begins_ends_and_changes() -> None:
    shard = make_shard()
    shard.create_table(schema())
    for step in range(100):
        give(shard, [step], step=step)
    ticks(shard)
    assert len(keys_of(shard)) == 100
    alter(shard, evictions=(StepTtl(steps=40),))
    ticks(shard)
    assert keys_of(shard) == list(range(59, 100))
    alter(shard, evictions=(StepTtl(steps=20), CapacityLru(max_rows=10)))
    ticks(shard)
    assert keys_of(shard) == list(range(90, 100))
    alter(shard, evictions=())
    give(shard, range(200, 300), step=1000)
    ticks(shard)
    assert len(keys_of(shard)) == 110
    assert shard.sweeps.tick() == 0.0


def test_a_time_ttl_counts_from_the_alteration_and_keeps_its_times_when_it_changes() -> None:
    seconds = [1000.0]
    shard = make_shard(now=lambda: seconds[0])
    shard.create_table(schema())
    give(shard, [1])
    seconds[0] = 1400.0
    alter(shard, evictions=(TimeTtl(seconds=100),))
    give(shard, [2])
    seconds[0] = 1450.0
    ticks(shard)
    give(shard, [3])
    assert keys_of(shard) == [1, 2, 3]  # the first counts as pushed at the alteration
    alter(shard, evictions=(TimeTtl(seconds=1000), Norm(threshold=1e-9)))
    seconds[0] = 1550.0
    give(shard, [4])
    ticks(shard)
    assert keys_of(shard) == [1, 2, 3, 4]
    alter(shard, evictions=(TimeTtl(seconds=120),))
    ticks(shard)
    assert keys_of(shard) == [3, 4]


def test_a_sweep_on_demand_ends_when_its_rules_are_altered() -> None:
    shard = make_shard()
    shard.create_table(schema(evictions=(StepTtl(steps=10),)))
    give(shard, range(100), step=0)
    give(shard, [100], step=50)
    number, sweep = shard.sweeps.begin("t", False)
    alter(shard, evictions=(StepTtl(steps=1000),))
    with pytest.raises(
        Overloaded, match="'t' were altered during the sweep: start the sweep again"
    ):
        shard.sweeps.take_slice(number, sweep)
    assert len(keys_of(shard)) == 101
    number, sweep = shard.sweeps.begin("t", False)
    alter(shard, lr=0.5)  # no rule
    shard.sweeps.take_slice(number, sweep)


# ---- admission


def test_counters_stay_when_the_threshold_or_their_number_changes() -> None:
    shard = make_shard()
    shard.create_table(schema(admission=Counter(threshold=5)))
    for _ in range(3):
        give(shard, range(10))
    assert alter(shard, admission=Counter(threshold=9))[1] == 0
    assert counters(shard) == dict.fromkeys(range(10), 3)
    assert alter(shard, admission=Counter(threshold=2, max_keys=4))[1] == 0
    give(shard, [0, 1, 20])  # more than enough now
    assert keys_of(shard) == [0, 1]
    assert len(counters(shard)) == 4  # the stalest made room


def test_a_sketch_stays_when_its_threshold_changes_and_its_size_does_not() -> None:
    shard = make_shard()
    shard.create_table(schema(admission=Sketch(threshold=5, expected_keys=1000)))
    for _ in range(3):
        give(shard, range(10))
    cells = shard.dump()["t"].cells.tolist()
    assert alter(shard, admission=Sketch(threshold=4, expected_keys=1000))[1] == 0
    assert shard.dump()["t"].cells.tolist() == cells
    give(shard, range(5))
    assert keys_of(shard) == list(range(5))
    for other in (
        Sketch(threshold=4, expected_keys=9000),
        Sketch(threshold=4, expected_keys=9000, error_rate=1e-4),
        Sketch(threshold=40, expected_keys=9000, error_rate=1e-4),
    ):
        alter(shard, admission=other)
        assert not shard.dump()["t"].cells.any()
        give(shard, range(50, 60))


def test_there_is_one_of_every_kind_here() -> None:
    assert {type(rule) for rule in KINDS} == set(ADMISSIONS.values())


@pytest.mark.parametrize("old", KINDS, ids=lambda rule: rule.name)
@pytest.mark.parametrize("new", KINDS, ids=lambda rule: rule.name)
def test_another_kind_drops_the_counters_says_how_many_and_keeps_the_rows(
    old: Any, new: Any
) -> None:
    shard = make_shard()
    held = shard.budget.held
    shard.create_table(schema(admission=old))
    give(shard, range(20))
    rows = keys_of(shard)
    waiting = shard.describe("t")[1].waiting
    _, dropped = alter(shard, admission=new)
    assert dropped == (0 if new is old else waiting)
    assert shard.describe("t")[1].waiting == (waiting if new is old else 0)
    assert keys_of(shard) == rows
    assert shard.tally("t")[1] == dropped
    lossless = new is old or old == Always()
    known = shard.view_keys("t", np.array([7, 999], np.uint64))
    assert ("an alteration" in known.loss_reason) == (not lossless)
    for _ in range(2):
        give(shard, range(100, 120))
    admitted = {"always": 20, "counter": 0, "sketch": 0, "probability": 0}[new.name]
    assert len(keys_of(shard)) == len(rows) + admitted
    give(shard, range(100, 120))
    assert len(keys_of(shard)) == len(rows) + (0 if new.name == "probability" else 20)
    shard.drop_table("t")
    assert shard.budget.held == held


def test_without_memory_for_the_new_counters_nothing_changes(tmp_path: Path) -> None:
    with Home(tmp_path / "home") as home:
        shard = home.shard
        shard.create_table(schema(admission=Counter(threshold=3)))
        give(shard, range(20))
        before, held = everything(shard), shard.budget.held
        with pytest.raises(OutOfMemory, match="sketch"):
            alter(shard, lr=0.5, admission=Sketch(expected_keys=100_000_000))
        assert (everything(shard), shard.budget.held) == (before, held)
        home.reopen()
        assert everything(home.shard) == before
