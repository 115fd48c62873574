"""A load test over TLS, with a token, a policy and a budget; its counts against the server's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from authority import Authority, Mount
from secured import section
from servers import Cluster
from typer.testing import CliRunner

from psclient import Client, Tls
from psclient.tools import ctl

CA = Authority()
SECONDS = 3.0
BUDGET = 40  # requests per second of the principal "limited"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cluster, Path]]:
    """A server with TLS and a policy, and the directory with the files of a client."""
    directory = tmp_path_factory.mktemp("secured")
    mount = Mount(directory / "tls")
    mount.put(CA.pem, CA.server())
    verbs = (["create", "pull", "push", "drop"], ["bench.*"])
    policy = section("free", verbs, (["status"], ["*"]))
    policy += section("limited", verbs, requests_per_second=BUDGET)
    policy += section("reader", (["pull"], ["bench.*"]))
    (directory / "policy.toml").write_text(policy)
    for token in ("free", "limited", "reader"):
        (directory / token).write_text(token)
    (directory / "ca.crt").write_bytes(CA.pem)
    flags = [*mount.flags, "--tls-client-auth", "none"]
    cluster = Cluster(1, *flags, "--policy-file", str(directory / "policy.toml"), metrics=True)
    cluster.start()
    try:
        yield cluster, directory
    finally:
        cluster.stop()


def bench(site: tuple[Cluster, Path], token: str, *words: str) -> Any:
    cluster, directory = site
    given = ["bench", "--keys", "500", "--dim", "4", "--batch", "20", "--mix", "C", "--warmup", "0"]
    given += ["--seconds", f"{SECONDS}", "--servers", f"localhost:{cluster.port}"]
    given += ["--tls-ca", str(directory / "ca.crt"), "--token-file", str(directory / token)]
    return CliRunner().invoke(ctl.app, [*given, "--output", "json", *words])


def counted(cluster: Cluster, name: str, **labels: str) -> float:
    """The sum of all samples of a metric that have these labels."""
    return sum(
        value
        for (sample, found), value in cluster.metrics(0).items()
        if sample == name and labels.items() <= dict(found).items()
    )


def refusals(cluster: Cluster) -> float:
    return counted(cluster, "ps_errors_total", reason="BUDGET_EXCEEDED")


@pytest.mark.slow
def test_the_counts_are_those_of_the_server(site: tuple[Cluster, Path]) -> None:
    """Over TLS with a token: every pull that the load test counts, the server counts too."""
    cluster, _ = site
    name = "ps_request_duration_seconds"
    before = [counted(cluster, f"{name}_{what}", method="Pull") for what in ("count", "sum")]
    done = bench(site, "free", "--rate", "100")
    assert done.exit_code == 0, done.output
    after = [counted(cluster, f"{name}_{what}", method="Pull") for what in ("count", "sum")]
    result = json.loads(done.stdout)["result"]
    served, seconds = (new - old for new, old in zip(after, before, strict=True))
    assert served == result["latency"]["count"] + 4  # each client pulls once when it connects
    assert 0 < seconds / served <= result["service"]["mean"]  # without the network
    assert result["service"]["mean"] <= result["latency"]["mean"] * 1.002
    assert len(json.loads(done.stdout)["shard_use"]) == 1


@pytest.mark.slow
def test_a_budget_refuses_the_rest_and_refusals_are_counted_apart(
    site: tuple[Cluster, Path],
) -> None:
    """On any machine: what the budget lets through in this time is less than what is due."""
    cluster, _ = site
    before = refusals(cluster)
    done = bench(site, "limited", "--rate", "300")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)["result"]
    assert result["errors"]["BUDGET_EXCEEDED"]["count"] == result["refused"] > 0
    # a token bucket: at most that of one second at once, then its rate
    assert result["latency"]["count"] <= BUDGET * (1 + SECONDS + 1)
    assert refusals(cluster) - before >= result["refused"]
    assert json.loads(done.stdout)["shard_use"] == []  # without the verb status


@pytest.mark.slow
def test_a_principal_without_the_rights_is_told_so(site: tuple[Cluster, Path]) -> None:
    cluster, directory = site
    done = bench(site, "reader")
    assert done.exit_code == 5, done.output
    assert "create" in done.output
    tls, token = Tls(ca=str(directory / "ca.crt")), str(directory / "free")
    with Client(f"localhost:{cluster.port}", tls=tls, token_file=token) as client:
        assert not client.list_tables()  # those of the other tests are gone as well
