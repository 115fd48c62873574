"""Load tests of real servers: what is sent and counted, stalls, refusals, the command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from servers import Cluster, eventually
from typer.testing import CliRunner

from psclient import Client
from psclient.errors import InvalidArgument
from psclient.tools import ctl
from psclient.tools.bench import fleet as fleet_module
from psclient.tools.bench.draws import key_of
from psclient.tools.bench.fleet import Fleet, GeneratorFailed
from psclient.tools.bench.latencies import Latencies
from psclient.tools.bench.mixes import Mix, Request
from psclient.tools.bench.plan import MIXES, Plan
from psclient.tools.bench.result import Second
from psclient.tools.bench.worker import UNSENT

SMALL: dict[str, Any] = {"keys": 2000, "dim": 4, "batch": 50, "clients": 2, "in_flight": 16}
GRPC = {"lane": "never"}


def fleet(cluster: Cluster, name: str, **more: Any) -> Fleet:
    options = {each: more.pop(each) for each in ("reuse", "keep", "fill") if each in more}
    plan = Plan(**{"prefix": name, **SMALL, **more})
    return Fleet(cluster.addresses, plan, options=GRPC, **options)


def wanted(plan: Plan, count: int) -> list[Request]:
    """Return the requests that the process of a plan sends first."""
    mix = Mix(plan, 0, (plan.seed, 0, 3))
    return [mix.next() for _ in range(count)]


@pytest.mark.parametrize(
    "mix", [pytest.param(mix, marks=[] if mix == "D" else [pytest.mark.slow]) for mix in MIXES]
)
def test_the_tables_have_what_a_mix_must_push(
    cluster2: Cluster, connect: Callable[..., Client], name: str, mix: str
) -> None:
    """Frequencies of all keys on the servers, against those of a model of the requests sent."""
    with fleet(cluster2, name, mix=mix, tables=2, fill=False, keep=True) as running:
        results = [running.run(rate, 1.0, warmup=0) for rate in (150, 0)]
        sent = sum(len(each.latency) for each in results)
    assert all(set(each.errors) <= {UNSENT} for each in results)  # on a busy machine
    requests = wanted(running.plan, sent)
    assert {kind for each in results for kind in each.kinds} == {each.kind for each in requests}
    client = connect(cluster2)
    for number, table in enumerate(running.plan.names):
        pushed = [each.push[number] for each in requests if each.push]
        keys, counts = np.unique(
            np.concatenate([np.zeros(0, np.uint64), *pushed]), return_counts=True
        )
        assert client.describe_table(table).rows == len(keys)
        assert (client.table(table).pull_rows(keys).frequencies == counts).all()
        assert bool(len(keys)) == (mix != "C")
        client.drop_table(table)


def test_figures_agree_with_each_other(cluster1: Cluster, name: str) -> None:
    """On a busy machine, too: what is late is counted once, and where it belongs."""
    seen: list[Second] = []
    with fleet(cluster1, name, mix="B", processes=2) as running:
        assert running.row_bytes > 16
        result = running.run(200, 2.0, warmup=0.5, on_second=seen.append)
    assert 300 < result.offered * 2 < 500  # 400, sqrt(400) = 20
    assert result.offered * 2 == len(result.latency) + result.failed
    assert not result.errors.keys() - {UNSENT}
    longest = max(result.latency.longest, *(each.latency.longest for each in seen))
    assert abs(result.offered - result.achieved) * 2 < 40 + 400 * longest  # due before, ended after
    assert result.keys == pytest.approx(result.achieved * 50)
    assert len(result.cores) == 2
    assert result.seconds == 2.0
    assert [each.second for each in seen] == [0, 1, 2]
    assert seen == list(result.series)
    ended = result.achieved * 2
    assert sum(each.ok for each in seen[1:]) == pytest.approx(ended, abs=SMALL["in_flight"])
    assert set(result.kinds) == {"pull", "push"}
    assert len(result.latency) == sum(map(len, result.kinds.values()))
    assert len(result.latency) == len(result.service)
    assert len(result.latency) + result.failed == len(result.lag) + result.waited
    p50, p99 = result.latency.percentiles([50, 99])
    assert 0 < p50 <= p99 <= result.latency.longest
    assert json.loads(json.dumps(result.as_json()))["latency"]["count"] == len(result.latency)


@pytest.mark.slow
def test_a_stall_of_a_server_is_seen_whole(
    start_cluster: Callable[..., Cluster], name: str
) -> None:
    """A server that is stopped for 1 s delays all requests that are due meanwhile.

    Lower bounds alone, which a slow machine cannot break; test_bench_stalls.py has exact ones.
    """
    cluster = start_cluster(1)
    [pid] = cluster.pids(0)

    def stall() -> None:
        os.kill(pid, signal.SIGSTOP)
        time.sleep(1.0)
        os.kill(pid, signal.SIGCONT)

    def watch(second: Second) -> None:
        if second.second == 1:
            threading.Thread(target=stall).start()

    with fleet(cluster, name, mix="C", in_flight=2, timeout=60.0) as running:
        result = running.run(200, 4.0, warmup=0.5, on_second=watch)
    assert result.latency.percentile(99.9) > 0.9
    assert result.latency.percentile(90) > 0.4  # a quarter waited, on average half of the stall
    assert result.latency.longest >= result.service.longest
    assert result.waited > 100
    assert max(each.latency.longest for each in result.series[1:]) > 0.9


def test_requests_that_could_not_be_sent_are_counted(cluster1: Cluster, name: str) -> None:
    """One request in flight, far more are due than one client can send."""
    with fleet(cluster1, name, mix="F", in_flight=1, clients=1, batch=2000) as running:
        result = running.run(20_000, 1.0, warmup=0)
    assert result.offered > 15_000
    assert result.achieved < 5000
    unsent = len(result.errors[UNSENT])
    assert unsent + len(result.latency) == pytest.approx(result.offered, abs=5)
    assert result.failed == unsent
    assert result.latency.percentile(50) > result.service.percentile(50)


# ---- tables and processes


def test_tables_are_dropped_unless_they_were_there(
    cluster1: Cluster, connect: Callable[..., Client], name: str
) -> None:
    client = connect(cluster1)
    mine = client.create_table(f"{name}.0", 4)
    mine.push([1], np.ones((1, 4), np.float32))

    def there() -> set[str]:
        return {each.name for each in client.list_tables() if each.name.startswith(name)}

    with (
        pytest.raises(InvalidArgument, match=f"table '{name}.0' exists"),
        fleet(cluster1, name, tables=2),
    ):
        pass
    assert there() == {f"{name}.0"}
    assert mine.describe().rows == 1
    with fleet(cluster1, name, tables=2, reuse=True):
        assert there() == {f"{name}.0", f"{name}.1"}
        assert mine.describe().rows == len({1, *key_of(np.arange(2000)).tolist()})
    assert there() == {f"{name}.0"}
    with fleet(cluster1, f"{name}.kept", keep=True, fill=False):
        pass
    assert there() == {f"{name}.0", f"{name}.kept.0"}
    for table in there():
        client.drop_table(table)


def test_a_process_that_ends_early_is_reported(
    cluster1: Cluster, connect: Callable[..., Client], name: str
) -> None:
    with fleet(cluster1, name, fill=False) as running:
        stdin = running._workers[0].process.stdin
        assert stdin is not None
        stdin.write("nonsense\n")
        why = "process 0 of the load generator ended with status 1: .*JSONDecodeError"
        with pytest.raises(GeneratorFailed, match=why):
            running.run(10, 1.0)
    assert not [each for each in connect(cluster1).list_tables() if each.name == f"{name}.0"]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"mix": "A"}, "mix must be one of C, F, X, B, D, got 'A'"),
        ({"clients": 1, "processes": 2}, r"clients must be in 2\.\.65536, got 1"),
        ({"skew": -1.0}, r"skew must be in 0\.\.10, got -1.0"),
        ({"durability": "no"}, "durability must be one of applied, log, fsync, got 'no'"),
        ({"prefix": ""}, "prefix must be not empty"),
    ],
)
def test_plans_are_checked(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(InvalidArgument, match=match):
        Plan(**settings)


# ---- histograms


def test_histograms_of_processes_are_merged_without_loss() -> None:
    rng = np.random.default_rng(0)
    drawn = rng.lognormal(-6, 1.5, 30_000)
    parts = []
    for some in np.split(drawn, 3):
        part = Latencies()
        part.record(some)
        parts.append(part.encoded())
    whole = Latencies.merged(parts)
    assert len(whole) == len(drawn)
    for percent in (1, 50, 99, 99.9, 99.99):
        expected = np.sort(drawn)[round(percent * len(drawn) / 100) - 1]
        assert whole.percentile(percent) == pytest.approx(expected, rel=2e-3, abs=2e-6)
    assert whole.longest == pytest.approx(drawn.max(), rel=2e-3)
    assert whole.mean == pytest.approx(drawn.mean(), rel=2e-3)
    empty = Latencies()
    assert (len(empty), empty.longest, empty.mean, empty.percentile(99)) == (0, 0.0, 0.0, 0.0)


# ---- what goes wrong meanwhile


@pytest.mark.slow
def test_a_shard_that_dies_in_mid_run_does_not_end_the_test(
    start_cluster: Callable[..., Cluster], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`psserver up` starts it again. Later it is gone for good, and the tables are named."""
    monkeypatch.setattr(fleet_module, "DROP_SECONDS", 0.5)
    cluster = start_cluster(1)

    def watch(second: Second) -> None:
        if second.second == 1:
            os.kill(cluster.pids(0)[-1], signal.SIGKILL)

    with fleet(cluster, name, mix="C", tables=2, timeout=0.3) as running:
        down = running.run(50, 4.0, warmup=0, on_second=watch)
        eventually(lambda: len(running.run(50, 0.5, warmup=0).latency))
        cluster.stop()
    assert down.failed > 0
    assert down.refused == 0
    assert len(down.latency) > 0
    assert list(running.left) == [f"{name}.0", f"{name}.1"]
    assert all(cluster.addresses[0] in why for why in running.left.values())


# ---- the command


@pytest.mark.slow
def test_a_sweep_from_the_command_line(cluster2: Cluster, name: str, tmp_path: Path) -> None:
    words = ["bench", "--sweep", "--mix", "C", "--prefix", name, "--keys", "2000", "--dim", "4"]
    words += ["--batch", "64", "--seconds", "1", "--warmup", "0.2", "--step-seconds", "0.5"]
    words += ["--p99-ms", "2000", "--rate", "2000", "--in-flight", "8", "--wanted", "100"]
    words += ["--html", str(tmp_path / "report.html"), "--output", "json"]
    done = CliRunner().invoke(ctl.app, words, env={"PSCTL_SERVERS": ",".join(cluster2.addresses)})
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["shards"] == 2
    assert len(found["shard_use"]) == 2
    assert found["plan"]["mix"] == "C"
    assert found["knee"]["points"]
    rates = [each["rate"] for each in found["knee"]["points"]]
    assert rates == sorted(rates)
    assert found["knee"]["recommended"] == pytest.approx(0.7 * found["knee"]["at"]["rate"])
    assert found["result"]["rate"] == found["knee"]["recommended"]
    whole = Latencies.merged([found["result"]["latency"]["hdrhistogram"]])
    assert len(whole) == found["result"]["latency"]["count"]
    assert (tmp_path / "report.html").read_text().startswith("<!DOCTYPE html>")
    with Client(cluster2.addresses) as client:
        assert not [each for each in client.list_tables() if each.name.startswith(name)]


def pushed(client: Client, table: str) -> int:
    """How many keys were pushed to a table; 0: it is not there yet."""
    if table not in {each.name for each in client.list_tables()}:
        return 0
    return int(client.table(table).pull_rows(key_of(np.arange(2000))).frequencies.sum())


@pytest.mark.slow
@pytest.mark.parametrize("sweep", [False, True])
def test_ctrl_c_ends_a_test_with_what_it_measured(
    cluster1: Cluster, name: str, tmp_path: Path, sweep: bool
) -> None:
    page = tmp_path / "report.html"
    words = ["bench", "--prefix", name, "--keys", "2000", "--dim", "4", "--batch", "50"]
    words += ["--rate", "50", "--seconds", "600", "--warmup", "0", "--output", "json"]
    words += ["--sweep", "--step-seconds", "0.5", "--p99-ms", "9000"] if sweep else []
    words += ["--html", str(page), "--servers", cluster1.addresses[0]]
    running = subprocess.Popen(
        [sys.executable, "-c", "from psclient.tools.ctl import main; main()", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with Client(cluster1.addresses) as client:
        if sweep:  # until a step has ended
            assert running.stderr is not None
            assert "sweep 50/s" in running.stderr.readline()
        else:  # until some requests after those that filled the table were answered
            eventually(lambda: pushed(client, f"{name}.0") > 2000 + 5 * 50)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=60)
        assert running.returncode == 130, err
        found = json.loads(out)
        assert found["interrupted"]
        assert 0 < found["result"]["seconds"] < 600
        assert found["result"]["latency"]["count"] > 0
        assert bool(found["knee"]) == sweep
        assert "The test was interrupted" in page.read_text()
        assert not [each for each in client.list_tables() if each.name.startswith(name)]
