"""A cluster with a policy, and its clients: over gRPC and the same-host lane."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from secured import section
from servers import Cluster, eventually

from psclient import Client
from psclient.errors import PermissionDenied, Unauthenticated

pytestmark = pytest.mark.slow

KEYS = np.arange(1000)
OPS = section("ops", (["*"], ["*"]))
TRAINER = section("trainer", (["pull", "push"], ["t"]))


@pytest.mark.parametrize("lane", ["never", "require"])
def test_clients_of_a_cluster_with_a_policy(
    start_cluster: Callable[..., Cluster],
    connect: Callable[..., Client],
    tmp_path: Path,
    lane: str,
) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text(OPS + TRAINER)
    tokens = {who: tmp_path / who for who in ("ops", "trainer", "stranger")}
    for who, path in tokens.items():
        path.write_text(f"{who}\n")
    cluster = start_cluster(2, "--policy-file", str(policy))

    def client(who: str) -> Client:
        return connect(cluster, token_file=str(tokens[who]), token_in_plaintext=True, lane=lane)

    ops = client("ops")
    for name in ("t", "u"):
        ops.create_table(name, 4, optimizer="sgd", lr=1.0)
    table = client("trainer").table("t")
    table.push(KEYS, np.ones((len(KEYS), 4), np.float32), step=1)
    assert table.pull(KEYS).shape == (len(KEYS), 4)
    with pytest.raises(PermissionDenied, match="no right on table 'u'"):
        client("trainer").table("u")
    with pytest.raises(Unauthenticated):
        client("stranger").table("t")
    policy.with_suffix(".new").write_text(OPS)
    policy.with_suffix(".new").rename(policy)

    def refused() -> bool:
        try:
            table.pull(KEYS)
        except (PermissionDenied, Unauthenticated):
            return True
        return False

    eventually(refused)
    with pytest.raises((PermissionDenied, Unauthenticated)):
        table.push(KEYS, np.ones((len(KEYS), 4), np.float32), step=2)
    assert ops.table("t").pull(KEYS).shape == (len(KEYS), 4)
