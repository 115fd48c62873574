"""The pages of the HTTP port: what each answers, to whom, and with which header fields."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.registry import Collector
from sites import Figures, document, get, loop, request, site

from psclient.tools import ctl
from psproto import ps_pb2 as pb
from psserver import site as module
from psserver.hostnames import may_name
from psserver.page import document as document_module

OWN = ("page", "figures", "plots")  # files of the page that are not a library's
PATHS = ("/", "/status.json", "/metrics", "/livez", "/readyz")


@pytest.fixture(scope="module")
def figures() -> Figures:
    tables = [pb.TableStatus(name=f"t{number}") for number in range(3)]
    return Figures(version=2**53 + 1, tables=tables)


@pytest.fixture(scope="module")
def registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    Gauge("ps_test", "Of the test.", registry=registry).set(7)
    return registry


@pytest.fixture(scope="module")
def port(figures: Figures, registry: CollectorRegistry) -> Iterator[int]:
    with site(figures, names=["ps.example.com"], registry=registry) as port:
        yield port


def test_a_scrape_gets_the_metrics(port: int) -> None:
    status, fields, body = get(port, "/metrics?name[]=ps_test", Accept="*/*")
    assert (status, fields["content-type"].split(";")[0]) == (200, "text/plain")
    assert b"ps_test 7.0\n" in body


def test_metrics_that_fail_are_an_error_of_one_request(
    port: int, registry: CollectorRegistry
) -> None:
    class Failing(Collector):
        def collect(self) -> Any:
            raise RuntimeError("no")

    failing = Failing()
    registry.register(failing)
    assert get(port, "/metrics")[0] == 500
    registry.unregister(failing)
    assert get(port, "/metrics")[0] == 200


def test_the_page_is_one_file_whose_policy_allows_its_own_script_alone(port: int) -> None:
    status, fields, body = get(port, "/")
    assert (status, fields["content-type"]) == (200, "text/html; charset=utf-8")
    policy = dict(
        each.strip().split(" ", 1) for each in fields["content-security-policy"].split(";")
    )
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for name, source in policy.items():
        assert "unsafe" not in source, name
        assert "*" not in source, name
    assert re.fullmatch(r"'sha256-[\w+/=]+'", policy["script-src"])
    assert re.fullmatch(r"'sha256-[\w+/=]+'", policy["style-src"])
    assert len(re.findall(rb"<script>", body)) == len(re.findall(rb"<style>", body)) == 1
    assert not re.search(rb"""(src|href)=["'](?!data:|#|status\.json"|metrics")""", body)


def test_the_page_names_only_commands_and_options_of_psctl() -> None:
    group: Any = typer.main.get_command(ctl.app)
    own = [file for file in Path(document_module.__file__).parent.glob("*.*") if file.stem in OWN]
    text = "\n".join(file.read_text() for file in own)
    named = re.findall(r"psctl ([a-z]+)((?: --[a-z-]+)*)", text)
    assert len(named) >= 2
    for name, options in named:
        known = {option for each in group.commands[name].params for option in each.opts}
        assert set(options.split()) <= known, f"psctl {name}{options}"


def test_no_script_makes_markup_or_code_of_data() -> None:
    for script in (Path(document_module.__file__).parent).glob("*.js"):
        if not script.name.startswith("uPlot"):
            text = script.read_text()
            for word in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval("):
                assert word not in text, script.name


@pytest.mark.parametrize("path", [*PATHS, "/other"])
def test_every_answer_has_the_fields_of_security(port: int, path: str) -> None:
    fields = get(port, path)[1]
    assert fields["x-content-type-options"] == "nosniff"
    assert fields["referrer-policy"] == "no-referrer"
    assert fields["cross-origin-resource-policy"] == "same-origin"
    assert "default-src 'none'" in fields["content-security-policy"]
    assert "frame-ancestors 'none'" in fields["content-security-policy"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_no_method_changes_anything(port: int, path: str, method: str) -> None:
    status, fields, _ = request(port, method, path)
    assert (status, fields["allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize("path", PATHS)
def test_head_gets_the_status_alone(port: int, path: str) -> None:
    status, fields, body = request(port, "HEAD", path)
    assert (status, body) == (200, b"")
    assert int(fields["content-length"]) > 0


def test_an_unknown_page_names_those_that_exist(port: int) -> None:
    status, _, body = get(port, "/other")
    assert (status, body) == (404, b"the pages are / /status.json /metrics /livez /readyz\n")


class TestReady:
    @pytest.mark.parametrize("number", sorted(set(pb.Phase.values()) - {pb.PHASE_UNSPECIFIED}))
    def test_ready_means_that_requests_are_accepted(
        self, figures: Figures, port: int, number: int
    ) -> None:
        figures.phases.enter(number)  # type: ignore[arg-type]
        status, _, body = get(port, "/readyz")
        name = pb.Phase.Name(number).removeprefix("PHASE_").lower()  # type: ignore[arg-type]
        serving = number in (pb.PHASE_READY, pb.PHASE_RESTORING)
        assert (status, body.decode()) == (200 if serving else 503, f"{name}\n")
        figures.phases.enter(pb.PHASE_READY)

    def test_a_server_is_alive_while_it_recovers(self, figures: Figures, port: int) -> None:
        figures.phases.enter(pb.PHASE_RECOVERY)
        assert get(port, "/livez")[::2] == (200, b"alive\n")
        figures.phases.enter(pb.PHASE_READY)

    def test_a_server_whose_loop_hangs_is_not_alive(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "LIVE_SECONDS", 0.1)
        hung = asyncio.new_event_loop()  # nothing runs it
        with site(Figures(), grpc=hung) as port:
            assert get(port, "/livez")[::2] == (
                503,
                b"the event loop of gRPC does not run\n",
            )
            hung.close()
            assert get(port, "/livez")[0] == 503
        with loop() as running, site(Figures(), grpc=running) as port:
            assert get(port, "/livez")[0] == 200


class TestNames:
    @pytest.mark.parametrize(
        "name",
        [
            *("127.0.0.1", "127.0.0.1:9400", "[::1]:9400", "[::1]", "10.1.2.3:80", "localhost"),
            *("localhost:9400", "ps:9400", "ps-0.ps.default.svc:9400", "PS.Example.com", "x.local"),
            *("ps-0.ps.default.svc.cluster.local.", "node.us-east1.internal:9400", None),
        ],
    )
    def test_a_name_that_nobody_can_register_is_accepted(self, name: str | None) -> None:
        assert may_name(name, {"ps.example.com"})

    @pytest.mark.parametrize(
        "name",
        [
            *("evil.com", "evil.com:9400", "127.0.0.1.evil.com", "ps.example.com.evil.com"),
            *("localhost.evil.com", "1.2.3.4.5", "example.com", "svc.evil.com.", "a.svc.evil"),
        ],
    )
    def test_a_name_that_anybody_can_register_is_refused(self, name: str) -> None:
        assert not may_name(name, {"ps.example.com"})

    @pytest.mark.parametrize("path", ["/", "/status.json", "/metrics", "/other"])
    def test_a_foreign_site_that_leads_here_reads_nothing(self, port: int, path: str) -> None:
        status, _, body = get(port, path, Host="evil.com")
        assert status == 421
        assert b"http_names" in body
        assert get(port, "/metrics", Host="ps.example.com:9400")[0] == 200

    @pytest.mark.parametrize("path", ["/livez", "/readyz"])
    def test_probes_come_under_any_name(self, port: int, path: str) -> None:
        assert get(port, path, Host="evil.com")[0] == 200


class TestStatus:
    def test_it_has_the_figures_with_exact_numbers(self, port: int) -> None:
        status, fields, _ = get(port, "/status.json")
        assert (status, fields["content-type"]) == (200, "application/json")
        assert fields["cache-control"] == "no-store"
        found = document(port)
        assert found["shard"] == 0
        (entry,) = found["shards"]
        assert entry["problem"] == ""
        assert entry["status"]["version"] == 2**53 + 1
        assert entry["status"]["phase"] == "PHASE_READY"

    def test_a_viewer_may_ask_for_fewer_tables(self, port: int) -> None:
        (entry,) = document(port, "?shard=self&tables=2")["shards"]
        assert [each["name"] for each in entry["status"]["tables"]] == ["t0", "t1"]

    @pytest.mark.parametrize(
        "query",
        ["?shard=1", "?shard=http://evil.com", "?tables=x", "?tables=-1", "?tables=1000000"],
    )
    def test_a_viewer_cannot_choose_what_is_asked(self, port: int, query: str) -> None:
        assert get(port, f"/status.json{query}")[0] == 400
