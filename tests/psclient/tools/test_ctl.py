"""psctl as it is typed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
from filled import KEYS, fill, whole
from safetensors.numpy import load_file
from servers import Cluster
from typer.testing import CliRunner, Result

from psclient import Client
from psclient.tools import ctl

pytestmark = pytest.mark.slow
Start = Callable[..., Cluster]
Connect = Callable[..., Client]


@pytest.fixture
def flags(tmp_path: Path) -> tuple[str, ...]:
    return ("--checkpoint-url", f"file://{tmp_path}/checkpoints")


def run(*words: str, servers: list[str], typed: str | None = None) -> Result:
    environment = {"PSCTL_SERVERS": ",".join(servers), "COLUMNS": "80"}
    return CliRunner().invoke(ctl.app, words, env=environment, input=typed)


def psctl(cluster: Cluster, *words: str, fails: bool = False) -> str:
    done = run(*words, servers=cluster.addresses)
    assert done.exit_code == (1 if fails else 0), (done.exception, done.stderr)
    if fails:
        assert done.stderr.startswith("psctl: ")
        assert done.stderr.count("\n") == 1
    return done.stderr if fails else done.stdout


def test_psctl_does_it_all(
    start_cluster: Start, connect: Connect, flags: tuple[str, ...], tmp_path: Path
) -> None:
    source, target = start_cluster(3, *flags), start_cluster(2, *flags)
    with connect(source) as client:
        table = fill(client)
        rows = client.describe_table("t").rows
        psctl(source, "checkpoint", "a")
        table.push(KEYS[:9], np.ones((9, 6)))
        assert f"{rows + 9:,} rows" in psctl(source, "checkpoint", "b", "--incremental-from", "a")
        wanted = whole(client, "t")
    assert "exists" in psctl(source, "checkpoint", "b", fails=True)
    listing = psctl(source, "checkpoints")
    assert all(word in listing for word in ("parent", " a ", "\nb ", f"{rows + 9:,}"))
    assert "undamaged" in psctl(source, "verify", "b")
    psctl(target, "restore", "b")
    with connect(target) as client:
        assert whole(client, "t") == wanted
    assert "would delete" in psctl(target, "restore", "b", fails=True)
    psctl(target, "restore", "b", "--replace")
    psctl(target, "restore", "--abort")
    psctl(target, "restore", "b", "--table", "t", "--into", "t2")
    psctl(target, "export", "t2", "--out", str(tmp_path / "live.parquet"))
    psctl(target, "export", "b", "--out", str(tmp_path / "all"), "--format", "safetensors")
    psctl(target, "export", "b", "--table", "t", "--out", str(tmp_path / "one.parquet"))
    assert parquet.read_table(tmp_path / "live.parquet").num_rows == rows + 9
    assert parquet.read_table(tmp_path / "one.parquet").num_rows == rows + 9
    assert len(load_file(tmp_path / "all" / "t.safetensors")["keys"]) == rows + 9
    psctl(target, "import", "t2", "--parquet", str(tmp_path / "one.parquet"))
    assert "no checkpoint" in psctl(target, "verify", "c", fails=True)
    assert "checkpoint name must be" in psctl(target, "checkpoint", "../c", fails=True)
