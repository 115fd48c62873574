"""Checkpoints of a real cluster deleted and pruned, with psctl."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from servers import Cluster
from typer.testing import CliRunner

from psclient import Client, admin
from psclient.errors import CheckpointNeeded, CheckpointNotFound, InvalidArgument
from psclient.tools import ctl

pytestmark = pytest.mark.slow
Start = Callable[..., Cluster]
Connect = Callable[..., Client]


def psctl(cluster: Cluster, *words: str, fails: bool = False) -> str:
    environment = {"PSCTL_SERVERS": ",".join(cluster.addresses), "COLUMNS": "80"}
    done = CliRunner().invoke(ctl.app, words, env=environment)
    assert done.exit_code == (1 if fails else 0), (done.exception, done.stderr)
    return done.stderr if fails else done.stdout


def names(client: Client) -> list[str]:
    return [each.name for each in admin.checkpoints(client)]


def test_checkpoints_are_deleted_and_pruned(
    start_cluster: Start, connect: Connect, tmp_path: Path
) -> None:
    cluster = start_cluster(3, "--checkpoint-url", f"file://{tmp_path}/checkpoints")
    client = connect(cluster)
    table = client.create_table("t", 4)
    keys = np.arange(300)
    for name, parent in (("a", None), ("b", "a"), ("c", None), ("d", "c")):
        table.push(keys, np.ones((300, 4)))
        admin.checkpoint(client, name, parent=parent)
    with pytest.raises(CheckpointNeeded, match="needed by 'b'"):
        admin.delete(client, "a", "c", "d")
    with pytest.raises(CheckpointNotFound):
        admin.delete(client, "e")
    with pytest.raises(InvalidArgument):
        admin.delete(client)
    assert "'a' is needed by 'b'" in psctl(cluster, "delete", "a", fails=True)
    assert psctl(cluster, "delete", "a", "b", "--dry-run").splitlines() == [
        "b: would be deleted",
        "a: would be deleted",
    ]
    assert psctl(cluster, "prune", "--keep", "1", "--dry-run").splitlines() == [
        "b: would be deleted",
        "a: would be deleted",
    ]
    assert names(client) == list("abcd")
    assert psctl(cluster, "delete", "b") == "b: deleted\n"
    assert names(client) == list("acd")
    assert psctl(cluster, "prune", "--keep", "1") == "a: deleted\n"
    assert psctl(cluster, "prune", "--keep", "1") == "nothing to delete\n"
    assert psctl(cluster, "checkpoint", "e", "--keep", "1").splitlines()[1:] == [
        "d: deleted",
        "c: deleted",
    ]
    assert names(client) == ["e"]
    admin.verify(client, "e")
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["e"]
