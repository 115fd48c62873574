"""Alerts and dashboard: their metrics exist, the alerts fire, the pages they name exist."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.request
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from rendering import DEPLOY, ROOT, kustomized, only, parse
from servers import Cluster
from tools import program, run

from psclient import Client

MONITORING = DEPLOY / "components" / "monitoring"
METRICS = ROOT / "docs" / "metrics.md"
RULES_TEST = ROOT / "tests" / "deploy" / "rules_test.yaml"
OTHERS = {  # metrics of the kubelet
    "kubelet_volume_stats_available_bytes",
    "kubelet_volume_stats_capacity_bytes",
}
ON_A_GPU = {f"ps_gpu_{each}" for each in ("bytes", "budget_bytes", "paused")} | {
    "ps_gpu_promotions_total",
    "ps_gpu_demotions_total",
}
# words of PromQL that are neither metrics nor labels
WORDS = {
    *("and", "or", "unless", "by", "on", "group_left", "sum", "group", "rate", "increase"),
    *("histogram_quantile", "quantile", "last_over_time", "max", "time", "count", "min"),
    *("clamp_min", "changes"),
}


def groups() -> list[dict[str, Any]]:
    """Return the groups of rules of the monitoring component."""
    (rules,) = parse((MONITORING / "rules.yaml").read_text())
    found: list[dict[str, Any]] = rules["spec"]["groups"]
    return found


def rules() -> list[dict[str, Any]]:
    """Return the alerts, and the rules that record values for them."""
    return [rule for group in groups() for rule in group["rules"]]


def alerts() -> list[dict[str, Any]]:
    """Return the alerts."""
    return [rule for rule in rules() if "alert" in rule]


def panels() -> list[dict[str, Any]]:
    """Return the panels of the dashboard, with the headings of its rows."""
    found: list[dict[str, Any]] = json.loads((MONITORING / "dashboard.json").read_text())["panels"]
    return found


RECORDED = {rule["record"] for rule in rules() if "record" in rule}
EXPRESSIONS = {each.get("alert") or each["record"]: each["expr"] for each in rules()} | {
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
        eviction = {"step_ttl": {"steps": 1}}
        table = client.create_table("monitored", dim=4, optimizer="sgd", lr=0.1, eviction=eviction)
        keys = np.arange(10)
        table.push(keys, np.ones((10, 4), np.float32), step=1)
        table.push(keys[:1], np.ones((1, 4), np.float32), step=100)
        table.pull(keys)
        client.evict("monitored")
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
    for metric in metrics - OTHERS - ON_A_GPU - RECORDED:
        base = re.sub(r"_(bucket|count|sum|total)$", "", metric)
        assert metric in exposed or base in exposed, f"{metric} is not in /metrics"
    of_target = {"shard", "namespace", "job"}  # labels that Prometheus adds
    of_others = {"persistentvolumeclaim"}
    of_errors = {"method", "code", "reason"}  # there are no errors in the exposed page
    known = of_target | of_others | of_errors | set().union(*exposed.values())
    labels = re.findall(r"(\w+)=~?\"", expression)
    for group in re.findall(r"\b(?:by|on) \(([^)]*)\)", expression):
        labels += re.split(r",\s*", group)
    assert set(labels) - {""} <= known


def test_the_metrics_of_a_gpu_exist() -> None:
    source = "".join(path.read_text() for path in (ROOT / "psserver" / "metrics").glob("*.py"))
    assert all(f'"{metric.removesuffix("_total")}"' in source for metric in ON_A_GPU)


def test_the_list_of_metrics_can_fail(exposed: dict[str, set[str]]) -> None:
    assert metrics_of('sum by (a) (rate(ps_x_total{b="c"}[5m])) / ps_y') == {"ps_x_total", "ps_y"}
    assert "ps_x" not in exposed
    assert exposed["ps_ready"] == set()
    assert "le" in exposed["ps_request_duration_seconds_bucket"]


@pytest.mark.parametrize(
    ("source", "file"), [("dashboard", "dashboard.json"), ("alerts", "rules.yaml")]
)
def test_the_file_is_the_one_of_its_source(source: str, file: str) -> None:
    command = [sys.executable, "-m", f"deploy.components.monitoring.{source}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert (MONITORING / file).read_text() == done.stdout


@pytest.mark.parametrize("wrong", [False, True])
def test_grafana_has_a_type_for_every_field_of_the_dashboard(wrong: bool) -> None:
    """The types of Grafana's SDK come from its schema. Reading drops fields that they lack."""
    with warnings.catch_warnings():  # the SDK prefers a newer form, which Grafana 10 cannot import
        warnings.simplefilter("ignore", DeprecationWarning)
        import_module("grafana_foundation_sdk.cog.plugins").register_default_plugins()
        model = import_module("grafana_foundation_sdk.models.dashboard")
    written = json.loads((MONITORING / "dashboard.json").read_text())
    if wrong:
        written["panels"][1]["fieldConfig"]["defaults"]["units"] = "s"
    read = model.Dashboard.from_json(written)
    assert (json.loads(json.dumps(read, cls=JSONEncoder)) != written) == wrong


def test_production_applies_the_alerts_and_the_dashboard() -> None:
    objects = parse(kustomized("production"))
    assert only(objects, "PrometheusRule")["spec"]["groups"] == groups()
    (config,) = (o for o in objects if "embedding-ps.json" in o.get("data", {}))
    assert json.loads(config["data"]["embedding-ps.json"])["panels"] == panels()


def test_panels_have_ids_and_titles_of_their_own_and_explanations() -> None:
    assert [panel["id"] for panel in panels()] == list(range(1, len(panels()) + 1))
    titles = [panel["title"] for panel in panels()]
    assert len(set(titles)) == len(titles)
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


def test_every_alert_has_a_test_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    tested: dict[str, set[bool]] = {}
    for group in yaml.safe_load(RULES_TEST.read_text())["tests"]:
        for test in group["alert_rule_test"]:
            tested.setdefault(test["alertname"], set()).add(bool(test["exp_alerts"]))
    assert tested == {rule["alert"]: {True, False} for rule in alerts()}


@pytest.mark.slow
def test_promtool_accepts_the_alerts_and_they_fire(tmp_path: Path) -> None:
    promtool = program("promtool", in_ci=False)
    spec = only(parse(kustomized("production")), "PrometheusRule")["spec"]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(spec))
    (tmp_path / "rules_test.yaml").write_text(RULES_TEST.read_text())
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


@pytest.mark.parametrize("token", [False, True])
def test_promtool_accepts_the_configuration_of_the_page(tmp_path: Path, token: bool) -> None:
    promtool = program("promtool", in_ci=False)
    page = (ROOT / "docs" / "monitoring.md").read_text()
    (text,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (credentials,) = re.findall(r"`authorization: \{credentials_file: (PATH)\}`", page)
    (configuration,) = parse(text)
    (job,) = configuration["scrape_configs"]
    assert {each["labels"]["shard"] for each in job["static_configs"]} == {"0", "1"}
    if token:
        (tmp_path / credentials).write_text("token")
        job["authorization"] = {"credentials_file": credentials}
    rules = [sys.executable, "-m", "deploy.components.monitoring.alerts", "--plain"]
    written = subprocess.run(rules, cwd=ROOT, check=True, capture_output=True).stdout
    (tmp_path / "rules.yaml").write_bytes(written)
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(configuration))
    run([promtool, "check", "config", tmp_path / "prometheus.yaml"])


def test_every_alert_names_a_section_of_the_runbook() -> None:
    headings = set(_headings(ROOT / "docs" / "runbook.md"))
    for rule in alerts():
        page, _, section = rule["annotations"]["action"].partition(", ")
        assert page == "docs/runbook.md"
        assert section.lower() in headings, f"{rule['alert']}: the runbook has no {section!r}"


def test_the_page_lists_every_alert_as_it_is() -> None:
    """docs/monitoring.md has a row for each alert, with its severity, time and section."""
    row = re.compile(
        r"^\| `(\w+)` \| (\w+) \| ([\w ]+) \| .* \| \[[^]]*\]\(runbook.md#(.*)\) \|$", re.M
    )
    listed = row.findall((ROOT / "docs" / "monitoring.md").read_text())
    assert listed == [
        (
            rule["alert"],
            rule["labels"]["severity"],
            f"{rule['for'][:-1]} min" if "for" in rule else "at once",
            rule["annotations"]["action"].partition(", ")[2].lower().replace(" ", "-"),
        )
        for rule in alerts()
    ]


def _users() -> dict[str, set[str]]:
    """Return metric of a shard -> the alerts whose expressions use it, also through a rule that
    records a value.
    """
    recorded = {rule["record"]: metrics_of(rule["expr"]) for rule in rules() if "record" in rule}
    found: dict[str, set[str]] = {}
    for rule in alerts():
        for metric in metrics_of(rule["expr"]) - OTHERS:
            for each in recorded.get(metric, {metric}):
                name = re.sub(r"_(bucket|count|sum)$", "", each)
                found.setdefault(name, set()).add(rule["alert"])
    return found


def test_the_rows_of_metrics_name_the_alerts_that_use_them_and_ask_for_no_others() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", METRICS.read_text(), re.M)
    named = {metric: set(re.findall(r"`(Ps[A-Z]\w+)`", advice)) for metric, advice in rows}
    assert {metric: names for metric, names in named.items() if names} == _users()
    asking = [metric for metric, advice in rows if re.search(r"\balert\b", advice, re.I)]
    assert asking == [], "an alert that is asked for must exist, and be named"


def _headings(page: Path) -> Iterator[str]:
    """Yield the headings of a page, in lower case."""
    for line in page.read_text().splitlines():
        if line.startswith("#"):
            yield line.lstrip("# ").lower()
