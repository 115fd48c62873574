"""The trainer of docs/trainers.md that comes back: killed, and resumed under each policy."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import Cluster

from psclient import Client

pytest.importorskip("torch")
pytestmark = pytest.mark.slow
PAGE = (Path(__file__).parents[2] / "docs" / "trainers.md").read_text()
SECTION = PAGE[PAGE.index("## A trainer that comes back") :]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    url = f"file://{tmp_path_factory.mktemp('stored')}"
    servers = Cluster(2, "--checkpoint-url", url).start()
    try:
        yield servers
    finally:
        assert servers.stop() == 0


def run(cluster: Cluster, home: Path, policy: str, kill: int = 0) -> tuple[int, str, str]:
    """Run the example; return (exit status, output, errors).

    home  directory in which it runs
    kill  step after which it kills itself
    """
    code = re.findall(r"^```python\n(.*?)^```", SECTION, re.M | re.S)[0]
    code = code.replace('["127.0.0.1:7000", "127.0.0.1:7001"]', repr(list(cluster.addresses)))
    at = "        ck.at(step, save=save)\n"
    assert code.count(at) == 1
    code = code.replace(
        at, f"{at}        if step == {kill}:\n            os.kill(os.getpid(), 9)\n"
    )
    home.mkdir(exist_ok=True)
    words = [sys.executable, "-c", "import os\n" + code, *([policy] if policy else [])]
    done = subprocess.run(words, cwd=home, capture_output=True, text=True, check=False, timeout=300)
    return done.returncode, done.stdout, done.stderr


def test_it_comes_back_under_each_policy(cluster: Cluster, tmp_path: Path) -> None:
    twin = run(cluster, tmp_path / "one", "")
    assert (twin[0], twin[2]) == (0, "")
    assert re.fullmatch(r"step 500, loss 0\.\d{6}, -?\d+\.\d{9}\n", twin[1])
    for policy in ("rewind", "once", "ahead"):
        with Client(cluster.addresses) as client:
            client.drop_table("user")
        home = tmp_path / policy
        assert run(cluster, home, "", kill=250)[0] == -9
        status, _, errors = run(cluster, home, "")
        assert status == 1
        assert "TrainerBehind: dense is at step " in errors
        assert "servers saw 250; shard 0 was at version" in errors
        status, shown, errors = run(cluster, home, policy)
        assert (status, errors) == (0, ""), policy
        assert shown.startswith("step 500, loss 0.")
        assert policy != "rewind" or shown == twin[1]
