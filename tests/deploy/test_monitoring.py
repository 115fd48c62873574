"""Alerts and dashboard: their metrics exist, the alerts fire, the pages they name exist."""

from __future__ import annotations

import json
import re
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rendering import DEPLOY, ROOT, kustomized, only, parse
from servers import Cluster
from tools import program, run

from psclient import Client

MONITORING = DEPLOY / "components" / "monitoring"
OTHERS = {  # metrics of the kubelet
    "kubelet_volume_stats_available_bytes",
    "kubelet_volume_stats_capacity_bytes",
}
# words of PromQL that are neither metrics nor labels
WORDS = {
    *("and", "or", "unless", "by", "on", "group_left", "sum", "group", "rate", "increase"),
    *("histogram_quantile", "quantile", "last_over_time"),
}


def alerts() -> list[dict[str, Any]]:
    """Return the alerts of the monitoring component."""
    (rule,) = parse((MONITORING / "rules.yaml").read_text())
    return [alert for group in rule["spec"]["groups"] for alert in group["rules"]]


def panels() -> list[dict[str, Any]]:
    """Return the panels of the dashboard, with the headings of its rows."""
    found: list[dict[str, Any]] = json.loads((MONITORING / "dashboard.json").read_text())["panels"]
    return found


EXPRESSIONS = {each["alert"]: each["expr"] for each in alerts()} | {
    f"{panel['title']} {target['refId']}": target["expr"]
    for panel in panels()
    for target in panel.get("targets", [])
}


def metrics_of(expression: str) -> set[str]:
    """Return the metrics in a PromQL expression."""
    bare = re.sub(r'"[^"]*"|\{[^}]*\}|\[[^\]]*\]', "", expression)
    bare = re.sub(r"\b(by|on|group_left)\s*\([^)]*\)", "", bare)
    return set(re.findall(r"[a-zA-Z_:][a-zA-Z0-9_:]*", bare)) - WORDS


@pytest.fixture(scope="module")
def exposed(cluster1: Cluster) -> dict[str, set[str]]:
    """The metrics of a server that has a table and served requests, and the labels of each."""
    with Client(cluster1.addresses, timeout=60) as client:
        table = client.create_table("monitored", dim=4, optimizer="sgd", lr=0.1)
        keys = np.arange(10)
        table.push(keys, np.ones((10, 4), np.float32))
        table.pull(keys)
    url = f"http://127.0.0.1:{cluster1.metrics_port}/metrics"
    with urllib.request.urlopen(url, timeout=10) as page:
        text = page.read().decode()
    found: dict[str, set[str]] = {}
    for line in text.splitlines():
        if match := re.match(r"# TYPE (\w+) ", line):
            found.setdefault(match[1], set())
        elif match := re.match(r"(\w+)(?:\{(.*)\})? ", line):
            found.setdefault(match[1], set()).update(re.findall(r'(\w+)="', match[2] or ""))
    return found


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_every_metric_and_label_exists(name: str, exposed: dict[str, set[str]]) -> None:
    expression = EXPRESSIONS[name]
    metrics = metrics_of(expression)
    assert metrics, "no metric was found in the expression"
    for metric in metrics - OTHERS:
        base = re.sub(r"_(bucket|total)$", "", metric)
        assert metric in exposed or base in exposed, f"{metric} is not in /metrics"
    of_target = {"shard", "namespace", "job"}  # labels that Prometheus adds
    of_others = {"persistentvolumeclaim"}
    of_errors = {"method", "code", "reason"}  # there are no errors in the exposed page
    known = of_target | of_others | of_errors | set().union(*exposed.values())
    labels = re.findall(r"(\w+)=~?\"", expression)
    for group in re.findall(r"\b(?:by|on) \(([^)]*)\)", expression):
        labels += re.split(r",\s*", group)
    assert set(labels) - {""} <= known


def test_the_list_of_metrics_can_fail(exposed: dict[str, set[str]]) -> None:
    assert metrics_of('sum by (a) (rate(ps_x_total{b="c"}[5m])) / ps_y') == {"ps_x_total", "ps_y"}
    assert "ps_x" not in exposed
    assert exposed["ps_ready"] == set()
    assert "le" in exposed["ps_request_seconds_bucket"]


def test_the_dashboard_is_the_one_of_its_source() -> None:
    command = [sys.executable, str(MONITORING / "dashboard.py")]
    assert (MONITORING / "dashboard.json").read_text() == run(command)


def test_production_applies_the_alerts_and_the_dashboard() -> None:
    objects = parse(kustomized("production"))
    assert only(objects, "PrometheusRule")["spec"]["groups"][0]["rules"] == alerts()
    (config,) = (o for o in objects if "embedding-ps.json" in o.get("data", {}))
    assert json.loads(config["data"]["embedding-ps.json"])["panels"] == panels()


def test_panels_do_not_overlap_and_have_explanations() -> None:
    taken = set()
    for panel in panels():
        box = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(box["x"], box["x"] + box["w"])
            for y in range(box["y"], box["y"] + box["h"])
        }
        assert not cells & taken, panel["title"]
        assert box["x"] + box["w"] <= 24
        taken |= cells
        if panel["type"] != "row":
            assert panel["description"].endswith(".")
            assert panel["targets"]


@pytest.mark.slow
def test_promtool_accepts_the_alerts_and_they_fire(tmp_path: Path) -> None:
    promtool = program("promtool", in_ci=False)
    spec = only(parse(kustomized("production")), "PrometheusRule")["spec"]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(spec))
    tests = (ROOT / "tests" / "deploy" / "rules_test.yaml").read_text()
    (tmp_path / "rules_test.yaml").write_text(tests)
    run([promtool, "check", "rules", "--lint-fatal", tmp_path / "rules.yaml"])
    run([promtool, "test", "rules", tmp_path / "rules_test.yaml"])


def test_promtool_accepts_the_queries_of_the_dashboard(tmp_path: Path) -> None:
    promtool = program("promtool", in_ci=False)
    targets = [each for panel in panels() for each in panel.get("targets", [])]
    queries = [each["expr"].replace("$__rate_interval", "1m") for each in targets]
    rules = [{"record": f"query{at}", "expr": query} for at, query in enumerate(queries)]
    assert len(rules) > 10
    file = tmp_path / "queries.yaml"
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    run([promtool, "check", "rules", file])


def test_every_alert_names_a_section_that_says_what_to_do() -> None:
    for rule in alerts():
        page, _, section = rule["annotations"]["action"].partition(", ")
        headings = set(_headings(ROOT / page))
        assert not section or section in headings, f"{rule['alert']}: {page} has no {section!r}"


def _headings(page: Path) -> Iterator[str]:
    """Yield the headings of a page, in lower case."""
    for line in page.read_text().splitlines():
        if line.startswith("#"):
            yield line.lstrip("# ").lower()
