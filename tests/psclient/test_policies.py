"""Admission and eviction as a trainer meets them: over shards, clients and restarts."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from servers import Cluster, Labels, alive, eventually
from typer.testing import CliRunner

from psclient import Client, Table, admin
from psclient.errors import InvalidArgument, SchemaMismatch
from psclient.subscriber import Subscriber
from psclient.tools.ctl import app

DIM = 2
KEYS = np.array([5, -1, 2**63 - 1, -(2**63), 0, 77])


def table_of(client: Client, name: str, **rules: Any) -> Table:
    """Rows start at 1 and lose their gradients."""
    return client.create_table(
        name,
        DIM,
        optimizer="sgd",
        lr=1.0,
        initializer="constant",
        initializer_args={"value": 1.0},
        serving_default=-4.0,
        **rules,
    )


def push(table: Table, keys: Any, step: int = 0, value: float = 1.0) -> None:
    table.push(keys, np.full((len(keys), DIM), value, np.float32), step=step)


def column(table: Table, keys: Any, mode: Any = "train") -> list[float]:
    rows: list[float] = table.pull(keys, mode=mode)[:, 0].tolist()
    return rows


def test_the_rules_of_a_table_are_described(
    cluster2: Cluster, connect: Callable[..., Client], name: str
) -> None:
    client = connect(cluster2)
    eviction = {"step_ttl": {"steps": 100}, "capacity_lfu": {"max_rows": 5000}}
    rules = {"admission": "sketch", "admission_args": {"threshold": 4}, "eviction": eviction}
    table_of(client, name, **rules)
    table_of(client, name, **rules)
    info = client.describe_table(name)
    sketch = {"threshold": 4.0, "expected_keys": 1e6, "error_rate": 0.01}
    assert (info.admission, info.admission_args) == ("sketch", sketch)
    assert info.eviction == {
        "step_ttl": {"steps": 100.0},
        "capacity_lfu": {"max_rows": 5000.0, "half_life": 100_000.0},
    }
    assert (info.rows, info.waiting) == (0, 0)
    assert info.bytes > info.counter_bytes > 1e6 * 7
    with pytest.raises(SchemaMismatch, match="admission"):
        table_of(client, name, **{**rules, "admission_args": {"threshold": 5}})
    with pytest.raises(SchemaMismatch, match="evictions"):
        table_of(client, name, **{**rules, "eviction": {}})


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ({"admission": "bloom"}, "no admission 'bloom'; there are: always, counter,"),
        ({"admission": "counter", "admission_args": {"limit": 3}}, "no parameter 'limit'"),
        (
            {"admission": "counter", "admission_args": {"threshold": 0}},
            r"threshold must be in 1\.\.16777215, got 0",
        ),
        ({"admission": "probability", "admission_args": {"p": 1.5}}, "p must be above 0 and at"),
        ({"eviction": {"lru": {}}}, "no eviction 'lru'; there are: step_ttl,"),
        ({"eviction": {"step_ttl": {"steps": 1.5}}}, "steps must be a whole number"),
        ({"eviction": {"norm": {"threshold": -1}}}, "threshold must be above 0, got -1"),
        ({"eviction": {"capacity_lru": {}, "capacity_lfu": {}}}, "both have the cause 'capacity'"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused_by_name(
    cluster2: Cluster, connect: Callable[..., Client], name: str, rules: Any, says: str
) -> None:
    client = connect(cluster2)
    with pytest.raises(InvalidArgument, match=f"table {name!r}.*{says}"):
        table_of(client, name, **rules)
    assert name not in [info.name for info in client.list_tables()]


@pytest.mark.parametrize("transport", ["stream", "unary"])
@pytest.mark.parametrize("rule", ["counter", "sketch"])
def test_occurrences_of_all_clients_and_duplicates_count(
    cluster3: Cluster, connect: Callable[..., Client], name: str, rule: str, transport: Any
) -> None:
    clients = [connect(cluster3, transport=transport) for _ in range(2)]
    rules = {"admission": rule, "admission_args": {"threshold": 4}}
    one, two = (table_of(client, name, **rules) for client in clients)
    push(one, KEYS)
    push(two, np.repeat(KEYS, 2))
    assert column(one, KEYS) == [1.0] * 6
    assert column(one, KEYS, "serve") == [-4.0] * 6
    info = clients[0].describe_table(name)
    assert (info.rows, info.waiting) == (0, 6)
    assert not two.pull_rows(KEYS).found.any()
    push(one, KEYS[:4], step=9)
    assert column(two, KEYS) == [0.0] * 4 + [1.0] * 2
    assert column(two, KEYS, "serve") == [0.0] * 4 + [-4.0] * 2
    seen = two.pull_rows(KEYS)
    assert seen.frequencies.tolist() == [4] * 4 + [0] * 2
    assert seen.steps.tolist() == [9] * 4 + [0] * 2
    info = clients[1].describe_table(name)
    assert (info.rows, info.waiting) == (4, 2)


def test_rows_are_as_fresh_as_the_table_whoever_brings_them(
    cluster2: Cluster, connect: Callable[..., Client], name: str
) -> None:
    one, two = connect(cluster2), connect(cluster2)
    ahead = table_of(one, name, eviction={"step_ttl": {"steps": 64}})
    push(ahead, np.arange(100), step=700)
    push(two.table(name), np.arange(10))
    admin.write_rows(two, name, np.arange(100, 110), np.ones((10, DIM), np.float32))
    assert ahead.pull_rows(np.arange(110)).steps.tolist() == [700] * 110


def overdue(client: Client, name: str) -> Table:
    """180 rows, 120 of them idle, which the background does not look for before step 6,490.

    A sweep looks for idle rows first, and then for rows beyond the limit, those that were pushed
    once. So once the surplus is gone, the sweep of step 6,390 no longer looks for idle rows.
    """
    rules = {"step_ttl": {"steps": 6400}, "capacity_lfu": {"max_rows": 900}}
    table = table_of(client, name, eviction=rules)
    push(table, np.arange(1000, 1060), step=-100)
    push(table, np.repeat(np.arange(120), 2), step=0)
    push(table, np.repeat(np.arange(2000, 2060), 2), step=6390)
    eventually(lambda: client.describe_table(name).rows == 180)  # the sweep has begun
    push(table, surplus := np.arange(10_000, 12_000), step=6390)
    eventually(lambda: max(client.describe_table(name).shard_rows) <= 301)  # a third, rounded up
    table.delete(surplus)
    push(table, np.arange(2000, 2060), step=6401)
    return table


def test_eviction_on_demand_counts_first_and_then_evicts_on_all_shards(
    cluster3: Cluster, connect: Callable[..., Client], name: str
) -> None:
    client = connect(cluster3)
    table = overdue(client, name)
    assert client.evict(name, dry_run=True) == {"step_ttl": 120, "capacity": 0}
    assert client.describe_table(name).rows == 180
    assert client.evict(name) == {"step_ttl": 120, "capacity": 0}
    none = {"step_ttl": 0, "capacity": 0}
    assert client.evict(name) == client.evict(name, dry_run=True) == none
    keys = np.concatenate([np.arange(120), np.arange(2000, 2060)])
    assert table.pull_rows(keys).found.tolist() == [False] * 120 + [True] * 60
    label = Labels(table=name, cause="step_ttl")
    pages = [cluster3.metrics(shard, name) for shard in range(3)]
    assert sum(page["ps_evicted_rows_total", label] for page in pages) == 180


def test_psctl_evicts_and_says_what(
    cluster3: Cluster, connect: Callable[..., Client], name: str
) -> None:
    client = connect(cluster3)
    overdue(client, name)
    table_of(client, f"{name}.kept")

    def psctl(*words: str) -> list[list[str]]:
        where = {"PSCTL_SERVERS": ",".join(cluster3.addresses), "COLUMNS": "100"}
        done = CliRunner().invoke(app, ["evict", *words], env=where)
        assert done.exit_code == 0, done.output
        return [re.findall(r"[\w.%]+", line) for line in done.output.splitlines()]

    counted = [
        ["capacity", "0", "0%"],
        ["step_ttl", "120", "66.7%"],
        ["total", "120", "66.7%"],
        ["rows", "before", "180"],
    ]
    would, did = psctl(name, "--dry-run"), psctl(name)
    assert would[0] == ["cause", "rows", "that", "would", "be", "evicted", "share"]
    assert did[0] == ["cause", "rows", "evicted", "share"]
    assert would[2:] == did[2:] == counted
    assert client.describe_table(name).rows == 60
    none = [["no", "eviction", "rule", "all", "0", "rows", "stay"]]
    assert [line[-7:] for line in psctl(f"{name}.kept")] == none


@pytest.mark.slow
def test_rows_leave_in_the_background_and_subscribers_are_told_why(
    cluster2: Cluster, connect: Callable[..., Client], name: str
) -> None:
    client = connect(cluster2)
    table = table_of(client, name, eviction={"step_ttl": {"steps": 64}})
    with Subscriber(cluster2.addresses, tables=[name], start="latest") as changes:
        push(table, np.arange(500))
        push(table, np.arange(100), step=65)
        push(table, [1000 + i for i in range(40)], step=65)  # so that every shard is at step 65
        assert eventually(lambda: client.describe_table(name).rows == 140)
        gone: list[int] = []
        for change in changes:
            if change.kind == "deletes":
                assert change.cause == "step_ttl"
                gone += change.keys.tolist()
            if len(gone) == 400:
                break
    assert sorted(gone) == list(range(100, 500))
    label = Labels(table=name, cause="step_ttl")
    pages = [cluster2.metrics(shard, name) for shard in range(2)]
    assert sum(page["ps_evicted_rows_total", label] for page in pages) == 400


def test_capacity_holds_over_all_shards(
    cluster2: Cluster, connect: Callable[..., Client], name: str
) -> None:
    client = connect(cluster2)
    table = table_of(client, name, eviction={"capacity_lru": {"max_rows": 1000}})
    for start in range(0, 5000, 500):
        push(table, np.arange(start, start + 500))
    eventually(lambda: client.describe_table(name).rows <= 1000)
    assert client.describe_table(name).shard_rows == (500, 500)


def test_rules_show_in_the_metrics(
    cluster2: Cluster, connect: Callable[..., Client], name: str
) -> None:
    client = connect(cluster2)
    table = table_of(client, name, admission="counter", admission_args={"threshold": 3})
    push(table, np.repeat(np.arange(100), 2))
    push(table, np.arange(60))
    pages = [cluster2.metrics(shard, name) for shard in range(2)]
    of = Labels(table=name)

    def total(metric: str) -> float:
        return sum(page[metric, of] for page in pages)

    assert total("ps_admitted_keys_total") == 60
    assert total("ps_waiting_keys") == 40
    assert total("ps_refused_keys_total") == 100
    assert total("ps_dropped_gradients_total") == 200
    assert total("ps_admission_bytes") > 0


def test_counters_that_expire_show_in_the_metrics(
    cluster2: Cluster, connect: Callable[..., Client], name: str
) -> None:
    client = connect(cluster2)
    rules = {"admission": "counter", "admission_args": {"threshold": 9}}
    table = table_of(client, name, **rules, eviction={"step_ttl": {"steps": 64}})
    push(table, np.arange(100))
    push(table, np.arange(100, 140), step=100)

    def expired() -> float:
        pages = [cluster2.metrics(shard, name) for shard in range(2)]
        return sum(page["ps_expired_counters_total", Labels(table=name)] for page in pages)

    assert eventually(lambda: expired() == 100)
    assert client.describe_table(name).waiting == 40


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["counter", "sketch"])
def test_counters_outlive_a_kill_with_and_without_a_checkpoint(
    start_cluster: Callable[..., Cluster], name: str, rule: str
) -> None:
    cluster = start_cluster(1, "--flush-seconds", "0.5")
    keys, args = np.arange(2000), {"threshold": 4, "expected_keys": 100_000}
    if rule == "counter":
        del args["expected_keys"]
    with Client(cluster.addresses, timeout=60.0) as client:
        table = table_of(client, name, admission=rule, admission_args=args)
        for done in range(3):
            push(table, keys)
            if done == 1:  # the first two are in the base then, the third in the log
                base = cluster.directory / "data" / "shard-0" / "base" / "data.mdb"
                before = base.stat().st_mtime_ns
                eventually(lambda base=base, before=before: base.stat().st_mtime_ns > before)
            old = cluster.pids(0)[-1]
            os.kill(old, signal.SIGKILL)
            eventually(lambda old=old: not alive(old))
            assert_array_equal(table.pull(keys), np.ones((2000, DIM)))
            info = client.describe_table(name)
            assert info.rows == 0
            assert abs(info.waiting - 2000) <= (100 if rule == "sketch" else 0)
        push(table, keys)
        assert_array_equal(table.pull(keys), np.zeros((2000, DIM)))
        assert client.describe_table(name).rows == 2000
