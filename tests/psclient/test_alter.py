"""Settings of a live table, altered by a client on all shards, and by psctl."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from servers import Cluster, eventually
from typer.testing import CliRunner

from psclient import Alteration, Client, Follower, Table
from psclient.aio import AsyncClient
from psclient.errors import InvalidArgument, PsError, SchemaMismatch, TableNotFound
from psclient.schema import TableInfo
from psclient.tools.ctl import app

DIM = 2
KEYS = np.arange(100)
NEW: dict[str, Any] = {
    "lr": 0.25,
    "serving_default": 2.5,
    "durability": "applied",
    "admission": "counter",
    "admission_args": {"threshold": 3},
    "eviction": {"step_ttl": {"steps": 100}},
    "max_step_ahead": 9,
}
Connect = Callable[..., Client]


def made(client: Client, name: str, **settings: Any) -> Table:
    """A table whose rows start at 0 and lose their gradients."""
    whole = {"optimizer": "sgd", "lr": 1.0, "initializer": "zeros", **settings}
    return client.create_table(name, DIM, **whole)


def push(table: Table, keys: Any = KEYS, step: int = 0) -> None:
    table.push(keys, np.ones((len(keys), DIM), np.float32), step=step)


def resting(info: TableInfo) -> TableInfo:
    """What stays as it is while rows move between memory and disk."""
    moving = {"bytes": 0, "shard_bytes": (), "tiers": {}, "cache": None}
    return dataclasses.replace(info, **moving)  # type: ignore[arg-type]


def test_all_settings_are_altered_on_all_shards_and_rows_stay(
    cluster2: Cluster, connect: Connect, name: str
) -> None:
    client = connect(cluster2)
    table = made(client, name)
    push(table)
    done = table.alter(**NEW)
    assert done == Alteration(done.table, 0)
    assert resting(done.table) == resting(client.describe_table(name))
    info = done.table
    assert (info.optimizer_args, info.serving_default, info.durability) == (
        {"lr": 0.25},
        2.5,
        "applied",
    )
    assert (info.admission, info.admission_args["threshold"]) == ("counter", 3)
    assert (info.eviction, info.max_step_ahead) == ({"step_ttl": {"steps": 100}}, 9)
    assert info.rows == 100
    assert client.alter_table(name, **NEW).table.versions == info.versions  # nothing changed
    push(table)
    assert table.pull(KEYS)[:, 0].tolist() == [-1.25] * 100
    assert table.pull([-5], mode="serve").tolist() == [[2.5, 2.5]]
    with pytest.raises(InvalidArgument, match="max_step_ahead is 9") as caught:
        push(table, step=10)
    assert caught.value.reason == "STEP_TOO_FAR"
    waiting = np.arange(1000, 1050)
    push(table, waiting)
    assert client.describe_table(name).waiting == 50
    assert table.alter(admission="always", eviction={}).dropped_counters == 50
    assert client.describe_table(name).eviction == {}


def test_a_step_far_ahead_is_refused_on_a_table_with_defaults(
    cluster2: Cluster, connect: Connect, name: str
) -> None:
    client = connect(cluster2)
    table = made(client, name, eviction={"step_ttl": {"steps": 100}})
    push(table, step=7)
    with pytest.raises(InvalidArgument, match="is at step 7: a push of step 1764000000000 "):
        push(table, step=1_764_000_000_000)
    assert client.evict(name, dry_run=True)["step_ttl"] == 0
    assert client.describe_table(name).max_step_ahead == 100_000_000
    free = made(client, f"{name}.free", max_step_ahead=0)
    push(free, step=1_764_000_000_000)


def test_creating_an_altered_table(cluster2: Cluster, connect: Connect, name: str) -> None:
    client = connect(cluster2)
    made(client, name)
    client.alter_table(name, lr=0.25, serving_default=2.5)
    made(client, name, lr=0.25, serving_default=2.5)  # as it is now
    with pytest.raises(SchemaMismatch, match="exists with optimizer"):
        made(client, name)


def test_what_makes_no_sense_is_refused(cluster2: Cluster, connect: Connect, name: str) -> None:
    client = connect(cluster2)
    made(client, name)
    before = client.describe_table(name)
    bad: list[tuple[dict[str, Any], str]] = [
        ({}, "expected at least one setting to alter, got none"),
        ({"lr": "a"}, "lr must be a number"),
        ({"lr": -1.0}, "lr"),
        ({"durability": "always"}, "durability must be one of"),
        ({"admission_args": {"threshold": 3}}, "admission_args requires admission"),
        ({"admission": "bloom"}, "no admission 'bloom'"),
        ({"eviction": {"step_ttl": {"steps": 0}}}, "steps must be 1 or more"),
        ({"max_step_ahead": -1}, "max_step_ahead must be"),
        ({"serving_default": 1.0, "eviction": {"ttl": {}}}, "no eviction 'ttl'"),
    ]
    for settings, message in bad:
        with pytest.raises(InvalidArgument, match=message):
            client.alter_table(name, **settings)
    assert client.describe_table(name) == before
    with pytest.raises(TableNotFound):
        client.alter_table(f"{name}.none", lr=0.5)


def test_of_an_async_client(cluster2: Cluster, connect: Connect, name: str) -> None:
    made(connect(cluster2), name)

    async def act() -> Any:
        async with AsyncClient(cluster2.addresses) as client:
            await client.alter_table(name, lr=0.5)
            return await (await client.table(name)).alter(serving_default=1.5)

    done = asyncio.run(act())
    assert (done.table.optimizer_args["lr"], done.table.serving_default) == (0.5, 1.5)


def test_a_follower_serves_the_altered_default(
    cluster2: Cluster, connect: Connect, name: str
) -> None:
    client = connect(cluster2)
    push(made(client, name))
    with Follower(client, tables=[name]) as follower:
        follower.wait_for(client.describe_table(name).versions)
        assert follower.pull(name, [-5]).tolist() == [[0.0, 0.0]]
        client.alter_table(name, serving_default=2.5)
        follower.wait_for(client.describe_table(name).versions)
        assert follower.pull(name, [-5]).tolist() == [[2.5, 2.5]]
        assert follower.pull(name, KEYS)[:, 0].tolist() == [-1.0] * 100


@pytest.mark.slow
def test_a_shard_that_fails_midway_is_named_and_a_repetition_completes_it(
    start_cluster: Callable[..., Cluster], connect: Connect
) -> None:
    cluster = start_cluster(2)
    client = connect(cluster, timeout=3.0)
    table = made(client, "t")
    push(table)
    [pid] = cluster.pids(1)
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(PsError, match=r"shard 1 .*repeat the same alteration to complete it"):
            table.alter(lr=0.25)
    finally:
        os.kill(pid, signal.SIGCONT)
    eventually(lambda: table.alter(lr=0.25))
    assert client.describe_table("t").optimizer_args == {"lr": 0.25}
    assert client.describe_table("t").rows == 100


# ---- psctl


def psctl(cluster: Cluster, *words: str, exit: int = 0) -> str:
    environment = {"PSCTL_SERVERS": ",".join(cluster.addresses), "COLUMNS": "80"}
    done = CliRunner().invoke(app, words, env=environment)
    assert done.exit_code == exit, (done.exception, done.output)
    return " ".join(done.output.split())


def test_psctl_alter(cluster2: Cluster, connect: Connect, name: str) -> None:
    client = connect(cluster2)
    made(client, name, admission="counter", admission_args={"threshold": 3})
    push(client.table(name))
    shown = psctl(
        cluster2,
        *("alter", name, "lr=0.25", "serving_default=1.5", "durability=applied"),
        *("admission=sketch:threshold=2,expected_keys=1000", "max_step_ahead=0"),
        *("eviction=norm:threshold=0.5", "eviction=step_ttl:steps=10"),
    )
    assert "altered lr, serving_default, durability, admission, max_step_ahead, eviction" in shown
    assert "100 admission counters were discarded; their keys are counted from zero again" in shown
    info = client.describe_table(name)
    assert (info.optimizer_args["lr"], info.serving_default) == (0.25, 1.5)
    assert (info.admission, set(info.eviction)) == ("sketch", {"norm", "step_ttl"})
    assert (info.durability, info.max_step_ahead) == ("applied", 0)
    assert "it already has these settings" in psctl(cluster2, "alter", name, "lr=0.25")
    assert "altered eviction" in psctl(cluster2, "alter", name, "eviction=none")
    assert "max step ahead no limit" in psctl(cluster2, "table", name)


def test_psctl_alter_says_why_not(cluster2: Cluster, connect: Connect, name: str) -> None:
    client = connect(cluster2)
    made(client, name, eviction={"step_ttl": {"steps": 9}})
    before = client.describe_table(name)
    for words, message in (
        (["dim=3"], "dim cannot be altered: every row has this many numbers"),
        (["lr=0.5", "seed=3"], "seed cannot be altered"),
        (["optimizer=adam"], "optimizer cannot be altered"),
        (["rate=3"], "no field 'rate'; fields that can be altered: lr,"),
        (["evictions=none"], "no field 'evictions'; fields that can be altered: lr,"),
        (["lr=a"], "lr must be a number, got 'a'"),
        (["admission=counter:x"], "admission must be RULE"),
    ):
        assert message in psctl(cluster2, "alter", name, *words, exit=1)
    assert "FIELD=VALUE" in psctl(cluster2, "alter", name, "lr", exit=2)
    assert client.describe_table(name) == before


def test_psctl_create_says_how_much_memory_a_sketch_takes(
    cluster2: Cluster, connect: Connect, name: str
) -> None:
    rule = "--admission=sketch:expected_keys=1000000"
    assert "its sketch takes 1" in psctl(cluster2, "create", name, "--dim=2", rule)
    assert connect(cluster2).describe_table(name).counter_bytes > 11_000_000
