"""The figures of all shards: each shard is asked seldom, and only at configured addresses."""

from __future__ import annotations

import http.server
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import pytest
from servers import eventually, free_ports
from sites import HOST, Figures, document, site

from psproto import ps_pb2 as pb
from psserver import httppeers, overview
from psserver.addresses import addresses_of
from psserver.config import load
from psserver.unusable import ConfigError


@contextmanager
def cluster(shards: int) -> Iterator[tuple[int, list[Figures]]]:
    """Serve the pages of all shards. Yields (port of shard 0, figures of each shard)."""
    first = free_ports(shards)
    addresses = [f"{HOST}:{first + number}" for number in range(shards)]
    figures = [Figures(number, version=number + 1) for number in range(shards)]
    with ExitStack() as stack:
        for number, each in enumerate(figures):
            stack.enter_context(site(each, addresses, port=first + number))
        yield first, figures


class TestCluster:
    def test_every_shard_shows_all(self) -> None:
        with cluster(3) as (first, _):
            for number in range(3):
                found = document(first + number)
                assert found["shard"] == number
                shown = [(each["shard"], each["problem"]) for each in found["shards"]]
                assert shown == [(0, ""), (1, ""), (2, "")]
                versions = [each["status"]["version"] for each in found["shards"]]
                assert versions == [1, 2, 3]
                assert all(0 <= each["age_seconds"] < 60 for each in found["shards"])

    def test_many_viewers_cost_no_more_than_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(overview, "FRESH_SECONDS", 3600)
        monkeypatch.setattr(overview, "OWN_SECONDS", 3600)
        with cluster(3) as (first, figures):
            viewers = [threading.Thread(target=document, args=(first,)) for _ in range(20)]
            for each in viewers:
                each.start()
            for each in viewers:
                each.join()
            assert [each.reads for each in figures] == [1, 1, 1]

    def test_a_shard_alone_asks_no_other(self) -> None:
        with cluster(2) as (first, figures):
            for _ in range(3):
                (entry,) = document(first, "?shard=self")["shards"]
                assert entry["shard"] == 0
            assert figures[1].reads == 0

    def test_figures_become_newer(self) -> None:
        with cluster(2) as (first, figures):
            assert document(first)["shards"][1]["status"]["version"] == 2
            figures[1].status.version = 77
            eventually(lambda: document(first)["shards"][1]["status"]["version"] == 77)


class Wrong(http.server.BaseHTTPRequestHandler):
    """A peer that answers whatever ``answer`` has."""

    answer: ClassVar[bytes] = b""
    status: ClassVar[int] = 200

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(self.answer)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def wrong(answer: bytes, status: int = 200) -> Iterator[str]:
    """A peer with a wrong answer; yields its address."""
    handler = type("Handler", (Wrong,), {"answer": answer, "status": status})
    server = http.server.ThreadingHTTPServer((HOST, 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"{HOST}:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def told(answer: Any) -> bytes:
    return json.dumps({"shards": [{"status": answer}]}).encode()


class TestProblems:
    """A shard that does not answer as it should is shown with the reason; the others are shown."""

    def problem(self, address: str) -> str:
        """What is shown of shard 1 with this address, once it is known."""
        with site(Figures(0), ["", address]) as port:

            def entry() -> Any:
                own, other = document(port)["shards"]
                assert own["status"]["shard"] == 0
                assert "status" not in other
                return other["problem"] not in ("", "it has not answered yet") and other

            return str(eventually(entry)["problem"])

    def test_without_an_address(self) -> None:
        assert self.problem("") == "its address is not in the setting http_peers"

    def test_nobody_listens(self) -> None:
        assert self.problem(f"{HOST}:{free_ports(1)}") == "Connection refused"

    def test_an_unknown_host(self) -> None:
        assert self.problem("no-such-host.invalid:1") == (
            "the host name of no-such-host.invalid:1 is not known"
        )

    def test_no_answer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(httppeers, "FETCH_SECONDS", 0.3)
        monkeypatch.setattr(overview, "PATIENCE_SECONDS", 0.1)
        monkeypatch.setattr(overview, "FRESH_SECONDS", 0.0)
        with socket.create_server((HOST, 0)) as silent:
            address = f"{HOST}:{silent.getsockname()[1]}"
            assert self.problem(address) == "nothing came within 0.3 seconds"

    @pytest.mark.parametrize(
        ("answer", "status", "expected"),
        [
            (b"", 200, "its answer is not the JSON of /status.json"),
            (b"[]", 200, "its answer is not the JSON of /status.json"),
            (b"[" * 100_000, 200, "its answer is not the JSON of /status.json"),
            (told(None), 200, "its answer is not the JSON of /status.json"),
            (told({"shard": 1, "x": float("nan")}), 200, "its answer is not the JSON"),
            (told({"shard": 2}), 200, "is shard 2: correct the setting http_peers"),
            (b"no", 404, "instead of its figures: is it an older release?"),
            (b" " * (2 << 20), 200, "its answer has more than 1048576 bytes"),
        ],
        ids=["empty", "list", "deep", "null", "nan", "other shard", "404", "large"],
    )
    def test_a_wrong_answer(self, answer: bytes, status: int, expected: str) -> None:
        with wrong(answer, status) as address:
            assert expected in self.problem(address)

    def test_a_shard_that_dies_is_shown_with_its_last_figures(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(overview, "FRESH_SECONDS", 0.0)
        other = free_ports(1)
        with site(Figures(0), ["", f"{HOST}:{other}"]) as port:
            with site(Figures(1, version=9), ["", ""], port=other):
                eventually(lambda: "status" in document(port)["shards"][1])
            entry = eventually(
                lambda: document(port)["shards"][1]["problem"] and document(port)["shards"][1]
            )
            assert entry["status"]["version"] == 9
            assert entry["age_seconds"] > 0

    def test_a_shard_that_hangs_does_not_delay_the_others(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(httppeers, "FETCH_SECONDS", 3600)
        monkeypatch.setattr(overview, "FRESH_SECONDS", 0.0)
        with socket.create_server((HOST, 0)) as silent, cluster(1) as (good, _):
            addresses = ["", f"{HOST}:{silent.getsockname()[1]}", f"{HOST}:{good}"]
            with site(Figures(2), ["", *addresses[1:]]) as port:
                began = time.monotonic()
                assert len(document(port)["shards"]) == 3
                assert time.monotonic() - began < 60


class TestAddresses:
    def test_a_pattern_has_the_number_of_the_shard(self) -> None:
        assert addresses_of("ps-{shard}.ps:9400", 2) == ["ps-0.ps:9400", "ps-1.ps:9400"]

    def test_a_list_is_by_number(self) -> None:
        assert addresses_of("a:1, [::1]:2", 2) == ["a:1", "[::1]:2"]

    @pytest.mark.parametrize(
        "peers", ["a,b", "a:0,b:1", "::1:2,b:3", "x-{shard}", "http://a:1,b:2", "a:1,"]
    )
    def test_others_are_refused(self, peers: str) -> None:
        with pytest.raises(ValueError, match="must"):
            addresses_of(peers, 2)

    def test_there_is_one_per_shard(self) -> None:
        with pytest.raises(ConfigError, match="http_peers must have 2 addresses, one per shard"):
            load(["--shards", "2", "--http-peers", "a:1"], {})


def test_the_figures_of_a_shard_that_is_none_are_shown_too() -> None:
    with site(Figures(5), ["", ""]) as port:
        assert [each["shard"] for each in document(port)["shards"]] == [0, 1, 5]


def test_a_large_cluster_has_few_tables_per_shard() -> None:
    tables = [pb.TableStatus(name=f"t{number}") for number in range(256)]
    with site(Figures(0, tables=tables), [""] * 64) as port:
        assert len(document(port)["shards"][0]["status"]["tables"]) == 64
        assert len(document(port, "?shard=self")["shards"][0]["status"]["tables"]) == 256
