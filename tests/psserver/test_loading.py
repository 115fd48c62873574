"""Tables filled from a checkpoint: whole or not at all, and nothing is deleted by a refusal."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from homes import Continue, Homes, Load
from stores import DIM, change, push, schema

from psproto import ps_pb2 as pb
from psserver import loading
from psserver.errors import (
    BadRequest,
    CheckpointBusy,
    Draining,
    NotEmpty,
    TableLoading,
    TooLarge,
    UnknownCall,
)
from storage.admission.rules import Counter
from storage.errors import (
    Corrupt,
    DiskFull,
    OutOfMemory,
    SchemaMismatch,
    UnknownCheckpoint,
    UnknownTable,
)
from storage.optimizers import OPTIMIZERS, make_optimizer

ADAM = make_optimizer("adam", None, {})
Make = Callable[..., Homes]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """make(shards): a cluster, closed after the test."""
    made: list[Homes] = []

    def new(shards: int, **settings: Any) -> Homes:
        directory = tmp_path / f"cluster-{len(made)}"
        url = f"file://{tmp_path}/checkpoints"
        made.append(Homes(directory, shards, url, **settings).__enter__())
        return made[-1]

    yield new
    for each in made:
        each.__exit__(None, None, None)


@pytest.fixture
def source(make: Make) -> Homes:
    """Three shards with a checkpoint "full", which has the tables "t" and "adam"."""
    cluster = make(3)
    cluster.create(schema())
    cluster.create(schema("adam", optimizer=ADAM, dim=5))
    cluster.push(range(400), 1.0, step=1)
    cluster.push(range(100, 300), 2.0, step=-7)
    cluster.push(range(50, 900), 0.5, table="adam", step=9)
    cluster.checkpoint("full")
    return cluster


def state(cluster: Homes) -> Any:
    """Rows and names of all tables."""
    return cluster.rows(), [node.shard.tables() for node in cluster.nodes]


# ---- filled


@pytest.mark.quick(4)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_table_is_filled_from_another_whatever_its_optimizer(
    make: Make, source: Homes, optimizer: str
) -> None:
    target = make(2)
    into = schema("into", optimizer=make_optimizer(optimizer, None, {}), dim=5)
    target.create(into)
    assert target.load("full", "adam", "into") == 850
    found, rows = target.rows()["into"], source.rows()["adam"]
    assert found.keys() == rows.keys()
    initial = into.optimizer.initial_state(5).tolist()
    for key, (row, meta) in rows.items():
        whole = row if optimizer == "adam" else [*row[:5], *initial]
        assert found[key][0] == whole
        assert found[key][1][2:] == meta[2:]
    for node in target.nodes:
        node.reopen()
    assert target.rows()["into"] == found


def test_a_table_that_does_not_exist_is_created_like_the_stored_one(
    make: Make, source: Homes
) -> None:
    target = make(2)
    assert target.load("full", "adam", "new/name") == 850
    stored = source.nodes[0].shard.describe("adam")[0]
    created = target.nodes[0].shard.describe("new/name")[0]
    assert (created.dim, created.optimizer) == (stored.dim, stored.optimizer)


def test_rows_are_replaced_only_if_that_is_said(make: Make, source: Homes) -> None:
    target = make(2)
    target.create(schema("mine"))
    target.push(range(1000, 1050), table="mine")
    before = state(target)
    with pytest.raises(NotEmpty, match=r"'mine' has \d+ rows and 0 admission counters"):
        target.load("full", "t", "mine")
    assert state(target) == before
    assert target.load("full", "t", "mine", replace=True) == 400
    assert set(target.rows()["mine"]) == set(range(400))
    for node in target.nodes:
        node.reopen()
    assert set(target.rows()["mine"]) == set(range(400))


def test_counters_of_keys_without_a_row_are_not_deleted_silently(make: Make, source: Homes) -> None:
    target = make(1)
    target.create(schema("mine", admission=Counter(threshold=5)))
    target.push(range(9), table="mine")
    with pytest.raises(NotEmpty, match="0 rows and 9 admission counters"):
        target.load("full", "t", "mine")


def test_rows_are_durable_before_the_load_is_done(make: Make, source: Homes) -> None:
    target = make(1, sync_seconds=60.0)
    log = target.nodes[0].home.log
    seen: list[tuple[int, int]] = []
    target.load(
        "full", "adam", "mine", done=lambda: seen.append((log.durable, target.versions()[0]))
    )
    assert seen[0][0] == seen[0][1] > 1


# ---- refused


def refuse(cluster: Homes, error: type[Exception], match: str, **request: Any) -> None:
    """The load is refused before any shard has changed anything."""
    before, versions = state(cluster), cluster.versions()
    with pytest.raises(error, match=match), Load(cluster, **request) as load:
        load.reach("ready")
    assert (state(cluster), cluster.versions()) == (before, versions)
    assert not list(cluster.nodes[0].directory.glob(loading.FILE))


def test_refusals_come_before_anything_is_deleted(make: Make, source: Homes) -> None:
    target = make(2, max_tables=2)
    for name, dim in (("mine", DIM), ("wide", 9)):
        target.create(schema(name, dim=dim))
        target.push(range(500), table=name)
    asked: dict[str, Any] = {"name": "full", "table": "t", "into": "mine", "replace": True}
    refuse(target, SchemaMismatch, "dim", **asked | {"into": "wide"})
    refuse(target, TooLarge, "already has 2 tables", **asked | {"into": "third"})
    refuse(target, BadRequest, "table name", **asked | {"into": "../x"})
    refuse(target, UnknownTable, "no table 'no'", **asked | {"table": "no"})
    refuse(target, UnknownCheckpoint, "'none'", **asked | {"name": "none"})
    with target.nodes[1].checkpoints.work.alone("it takes checkpoint 'nightly'"):
        refuse(target, CheckpointBusy, "it takes checkpoint 'nightly'", **asked)


def test_a_load_that_cannot_fit_is_refused(make: Make) -> None:
    """The rows need no memory, but their index does."""
    source = make(1)
    source.create(schema("large"))
    source.push(range(100_000), table="large")
    source.checkpoint("large")
    target = make(1, memory_bytes=1 << 20)
    target.create(schema("mine"))
    target.push(range(9), table="mine")
    refuse(target, OutOfMemory, "budget", name="large", table="large", into="mine", replace=True)


def test_rows_that_do_not_fit_into_memory_are_loaded_to_disk(make: Make) -> None:
    source = make(1)
    source.create(schema("large", dim=64))
    source.push(range(20_000), table="large")
    source.checkpoint("large")
    target = make(1, memory_bytes=3 << 20)
    assert target.load("large", "large", "mine") == 20_000
    loaded, pushed = target.rows()["mine"], source.rows()["large"]
    assert {key: row for key, (row, _) in loaded.items()} == {
        key: row for key, (row, _) in pushed.items()
    }
    target.nodes[0].reopen()
    assert target.rows()["mine"] == loaded


def test_a_push_between_the_look_and_the_load_keeps_its_rows(make: Make, source: Homes) -> None:
    """The target was empty when the shard accepted the load; a push has come since."""
    target = make(1)
    target.create(schema("mine"))
    with Load(target, "full", "t", "mine") as load:
        load.reach("ready")
        target.push(range(5), table="mine")
        load.proceed(Continue.STEP_START)
        with pytest.raises(NotEmpty):
            load.reach("done")
    assert set(target.rows()["mine"]) == set(range(5))
    target.nodes[0].reopen()
    assert set(target.rows()["mine"]) == set(range(5))


def test_two_loads_into_one_name_are_one_after_the_other(make: Make, source: Homes) -> None:
    target = make(2)
    with Load(target, "full", "t", "mine") as first:
        first.reach("ready")
        with pytest.raises(CheckpointBusy, match="it fills table 'mine'"):
            target.load("full", "t", "mine", replace=True)
        first.proceed(Continue.STEP_START)
        first.reach("done")
        with pytest.raises(CheckpointBusy):
            target.load("full", "t", "mine", replace=True)
        first.proceed(Continue.STEP_FINISH)
        assert first.rows() == 400
    assert set(target.rows()["mine"]) == set(range(400))


# ---- while it is filled


def test_a_table_is_hidden_until_it_is_complete(make: Make, source: Homes) -> None:
    target = make(1)
    target.create(schema("mine"))
    shard = target.nodes[0].shard
    with Load(target, "full", "t", "mine") as load:
        load.reach("ready")
        load.proceed(Continue.STEP_START)
        load.reach("done")
        assert shard.tables() == []
        for use in (
            lambda: shard.exchange([push([7], table="mine")], []),
            lambda: shard.delete(change([7], table="mine")),
            lambda: shard.create_table(schema("mine")),
            lambda: shard.drop_table("mine"),
            lambda: shard.describe("mine"),
        ):
            with pytest.raises(TableLoading, match="'mine' is being filled"):
                use()
        target.nodes[0].home.flush()  # what is hidden is stored like all else
        load.proceed(Continue.STEP_FINISH)
        load.rows()
    assert shard.tables() == ["mine"]
    target.nodes[0].reopen()
    assert set(target.rows()["mine"]) == set(range(400))


# ---- interrupted


@pytest.mark.parametrize("stage", ["ready", "done"])
@pytest.mark.parametrize("existed", [True, False])
def test_a_client_that_goes_away_leaves_no_rows(
    make: Make, source: Homes, stage: str, existed: bool
) -> None:
    target = make(2)
    if existed:
        target.create(schema("mine", admission=Counter(threshold=1)))
        target.push(range(50), table="mine")
    before = state(target)
    with Load(target, "full", "t", "mine", replace=True) as load:
        load.reach("ready")
        if stage == "done":
            load.proceed(Continue.STEP_START)
            load.reach("done")
    for each in load.running:
        with pytest.raises(Draining):
            each.result()
    for _ in range(2):
        if stage == "ready":
            assert state(target) == before
        elif existed:
            assert state(target) == ({"mine": {}}, [["mine"]] * 2)
            kept = target.nodes[0].shard.describe("mine")[0]
            assert kept.admission == Counter(threshold=1)
        else:
            assert state(target) == ({}, [[], []])
        for node in target.nodes:
            node.reopen()
    assert target.load("full", "t", "mine", replace=True) == 400


@pytest.mark.parametrize("flush", [True, False])
@pytest.mark.parametrize("existed", [True, False])
def test_a_crash_while_a_table_is_filled_leaves_no_rows(
    make: Make, source: Homes, existed: bool, flush: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = make(1)
    node = target.nodes[0]
    target.create(schema("other"))
    target.push(range(3), table="other")
    if existed:
        target.create(schema("mine"))
        target.push(range(50), table="mine")
    monkeypatch.setattr(loading.TableLoader, "_cancel", lambda *_: None)  # as if it died
    with Load(target, "full", "t", "mine", replace=True) as load:
        load.reach("ready")
        load.proceed(Continue.STEP_START)
        load.reach("done")
        if flush:
            node.home.flush()
    assert (node.directory / loading.FILE).exists()
    for _ in range(2):
        node.reopen()
        assert set(target.rows()["other"]) == {0, 1, 2}
        assert target.rows().get("mine") == ({} if existed else None)
        assert not (node.directory / loading.FILE).exists()
    assert target.load("full", "t", "mine") == 400


def test_a_damaged_note_of_a_load_stops_the_start(make: Make) -> None:
    node = make(1).nodes[0]
    (node.directory / loading.FILE).write_bytes(b"{}")
    node.close()
    with pytest.raises(Corrupt, match=loading.FILE):
        node.open()
    node.home.close()
    (node.directory / loading.FILE).unlink()
    node.open()


def test_a_failure_in_the_middle_is_taken_back_and_reported(
    make: Make, source: Homes, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = make(1)
    shard, calls = target.nodes[0].shard, 0
    real = shard.write_rows

    def failing(*args: Any) -> int:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise DiskFull("log", 5)
        return real(*args)

    monkeypatch.setattr(shard, "write_rows", failing)
    with pytest.raises(DiskFull):
        target.load("full", "t", "mine")
    assert state(target) == ({}, [[]])
    target.load("full", "t", "mine")


# ---- Continue


def test_continue_is_idempotent_and_names_an_unknown_call(make: Make, source: Homes) -> None:
    target = make(1)
    calls = target.nodes[0].checkpoints.calls
    with Load(target, "full", "t", "mine") as load:
        load.reach("ready")
        for step in (Continue.STEP_START, Continue.STEP_FINISH):
            load.proceed(step)
            load.proceed(step)
        load.rows()
    load.proceed(Continue.STEP_FINISH)  # it has ended well
    with pytest.raises(UnknownCall, match="never began"):
        calls.proceed(pb.ContinueRequest(id="f" * 16, step=Continue.STEP_START))
    with pytest.raises(BadRequest, match="was used before"):
        target.nodes[0].checkpoints.loader.load(load.request, load.progress[0])


def test_many_loads_at_once_fill_the_table_once(make: Make, source: Homes) -> None:
    target = make(2)
    results: list[Any] = []

    def work() -> None:
        try:
            results.append(target.load("full", "t", "mine"))
        except (CheckpointBusy, NotEmpty, Draining, TableLoading) as error:
            results.append(type(error).__name__)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = target.rows().get("mine", {})
    assert len(rows) == (400 if 400 in results else 0), results
    assert results.count(400) <= 1
    assert np.isin(list(rows), np.arange(400)).all()
