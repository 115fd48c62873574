"""Every expression of the dashboard and of the alerts has a result on a cluster that works, and an
alert arrives where it should: with a real Prometheus, Alertmanager and three shards.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import contactsheet
import pytest
from authority import HOUR, Authority, Mount, dates
from load import Load
from servers import Cluster, eventually
from tools import program
from watching import Alertmanager, Prometheus, Webhook

from deploy.components.monitoring import alerts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
DASHBOARD = Path(alerts.__file__).parent / "dashboard.json"
MIB = 1 << 20
SECONDS = 40.0  # how long the load works before the expressions are evaluated
FLAGS = (
    *("--host-bytes", str(12 * MIB), "--max-message-bytes", str(4 * MIB)),
    *("--max-inflight-bytes", str(4 * MIB), "--flush-seconds", "2", "--scrub-seconds", "5"),
    *("--disk-bytes", str(40 * MIB)),
)
POLICY = """
[principals.trainer]
certificates = ["cn:trainer"]
grants = [{verbs = ["*"], tables = ["*"]}]
"""
ELSEWHERE = {  # alert or panel -> why a local cluster has no data for it
    "PsCheckpointDiskLow": "the metrics come from the kubelet of Kubernetes",
    "PsGpuPaused": "needs a GPU",
    "GPU memory of tables A": "needs a GPU",
    "Moves between GPU memory and host memory A": "needs a GPU",
    "Moves between GPU memory and host memory B": "needs a GPU",
    "GPU is not used for more rows A": "needs a GPU",
}
PANELS: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]


def measured(expression: str) -> str:
    """Return an expression that has a result if and only if all quantities in it have one.

    The result of ``a > b`` is empty if no ``a`` is greater. That of ``a > bool b`` is 0 or 1.
    In the same way, ``a unless b`` becomes ``a and b``.
    """
    return re.sub(r"(\s)(<|>|==) ", r"\1\2 bool ", expression.replace("unless", "and"))


EXPRESSIONS = {
    f"{panel['title']} {target['refId']}": contactsheet.filled(target["expr"])
    for panel in PANELS
    for target in panel.get("targets", [])
} | {alert.name: measured(alert.expression) for alert in alerts.ALERTS}


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Mount]:
    """Certificates of one authority, for the servers and for their clients."""
    authority = Authority()
    leaves = {
        "server": authority.server(**dates(-HOUR, 20 * 24 * HOUR)),
        "client": authority.client(),
    }
    mounts = {who: Mount(tmp_path_factory.mktemp("tls") / who) for who in leaves}
    for who, leaf in leaves.items():
        mounts[who].put(authority.pem, leaf)
    return mounts


@pytest.fixture(scope="module")
def token(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the token of the servers' HTTP ports."""
    file = tmp_path_factory.mktemp("http") / "token"
    file.write_text("secret\n")
    return file


@pytest.fixture(scope="module")
def cluster(
    certificates: dict[str, Mount], token: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """Three shards, most of whose rows do not fit into memory."""
    program("prometheus", in_ci=False)
    url = f"file://{tmp_path_factory.mktemp('checkpoints')}"
    policy = tmp_path_factory.mktemp("policy")
    (policy / "policy.toml").write_text(POLICY)
    flags = [*FLAGS, *certificates["server"].flags, "--checkpoint-url", url]
    flags += ["--policy-file", str(policy / "policy.toml")]
    flags += ["--audit-file", str(policy / "audit.jsonl"), "--http-token-file", str(token)]
    servers = Cluster(3, *flags, metrics=True).start()
    try:
        yield servers
    finally:
        assert servers.stop() == 0


@dataclass(frozen=True, slots=True)
class Watched:
    """What watches the cluster.

    end  Unix time at which the cluster's load ended
    """

    prometheus: Prometheus
    webhook: Webhook
    end: float


@pytest.fixture(scope="module")
def watched(
    cluster: Cluster,
    certificates: dict[str, Mount],
    token: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Watched]:
    """The cluster after a load during which Prometheus, with the project's rules, scraped it."""
    directory = tmp_path_factory.mktemp("watching")
    targets = {str(at): f"127.0.0.1:{cluster.metrics_port + at}" for at in range(cluster.shards)}
    with ExitStack() as stack:
        webhook = Webhook()
        stack.callback(webhook.stop)
        alertmanager = Alertmanager(directory, webhook.port)
        stack.callback(alertmanager.stop)
        prometheus = Prometheus(directory, targets, _impatient(), alertmanager.port, token)
        stack.callback(prometheus.stop)
        load = Load(cluster.addresses, certificates["client"].tls(), SECONDS / 4).start()
        time.sleep(SECONDS)
        end = time.time()
        load.stop()
        assert load.steps > 10
        assert load.changes > 10
        assert load.overloaded > 0
        yield Watched(prometheus, webhook, end)


def _impatient() -> list[dict[str, Any]]:
    """Return the rules, but alerts fire after 2 s. rules_test.yaml tests the real times."""
    groups = alerts.groups()
    for rule in chain.from_iterable(group["rules"] for group in groups):
        if "for" in rule:
            rule["for"] = "2s"
    return groups


def test_conditions_become_quantities() -> None:
    assert measured("a > 1 and b == 0") == "a > bool 1 and b == bool 0"
    assert measured("a\n> b\n> 0") == "a\n> bool b\n> bool 0"
    assert measured('a{x!="1",y=~".+"} / b\nunless c') == 'a{x!="1",y=~".+"} / b\nand c'


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_the_expression_has_a_result(name: str, watched: Watched) -> None:
    found = watched.prometheus.query(EXPRESSIONS[name], watched.end)
    numbers = [series for series in found if series["value"][1] != "NaN"]
    assert bool(numbers) == (name not in ELSEWHERE), f"{EXPRESSIONS[name]}: {found}"


def test_refusals_and_waits_of_an_overload_are_seen(watched: Watched) -> None:
    for expression in (
        'sum(increase(ps_errors_total{reason="OVERLOADED"}[2m]))',
        "sum(increase(ps_request_queue_seconds_count[2m]))",
    ):
        (found,) = watched.prometheus.query(expression, watched.end)
        assert float(found["value"][1]) > 0, expression


def test_an_alert_arrives_and_resolves(cluster: Cluster, watched: Watched) -> None:
    states = lambda: watched.webhook.states("PsShardDown", "1")  # noqa: E731
    assert states() == []
    os.kill(cluster.process.pid, signal.SIGSTOP)  # so that it does not start the shard again
    try:
        os.kill(cluster.pids(1)[-1], signal.SIGKILL)
        eventually(lambda: states() == ["firing"])
    finally:
        os.kill(cluster.process.pid, signal.SIGCONT)
    eventually(lambda: states()[-1] == "resolved")


def test_the_contact_sheet_has_every_panel(watched: Watched, tmp_path: Path) -> None:
    ask = contactsheet.asker(f"http://127.0.0.1:{watched.prometheus.port}", watched.end)
    html, png = tmp_path / "sheet.html", tmp_path / "sheet.png"
    html.write_text(contactsheet.page(PANELS, ask))
    program("chromium", in_ci=False)
    contactsheet.picture(html, png)
    assert png.stat().st_size > 100_000
    if keep := os.environ.get("KEEP_PICTURES"):
        shutil.copy(png, keep)
