"""A local cluster: what it refuses at once, and what it reports of a shard that fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from psserver import cluster
from psserver.config import ConfigError
from psserver.member import Member


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"host": "a b"}, "host: must be a name, an IPv4 or an IPv6 address, got 'a b'"),
        (
            {"port": 65535},
            "port: 2 shards use the ports 65535 to 65536, but the largest port is 65535",
        ),
        ({"metrics_port": 65535}, "metrics_port: 2 shards use the ports 65535 to 65536, but"),
        ({"data_dir": Path("/dev/null/x")}, "data_dir: cannot use /dev/null/x: it is not a dir"),
    ],
)
def test_what_no_shard_could_use_is_refused_at_once(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    settings: dict[str, Any] = {"host": "::1", "port": 7000, "metrics_port": 0}
    settings |= {"shards": 2, "data_dir": tmp_path / "data", "flags": []}
    with pytest.raises(ConfigError) as caught:
        cluster.up(**{**settings, **changes})
    assert str(caught.value).startswith(message)


def test_up_starts_without_the_imports_of_a_server() -> None:
    code = "import sys, psserver.cli; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "typer" in loaded
    assert not loaded & {"numba", "numpy", "grpc", "pydantic", "psproto", "storage"}


def test_a_log_file_that_cannot_be_written_is_refused_before_a_shard_starts(tmp_path: Path) -> None:
    (tmp_path / "shard-1.log").mkdir()
    with pytest.raises(ConfigError, match=r"^data_dir: cannot use .*shard-1.log: Is a directory"):
        cluster.up(2, "::1", 7000, 0, tmp_path, [])


@pytest.mark.parametrize(
    ("lines", "shown"),
    [
        (['{"event": "memory"}', "psserver: port: taken"], "psserver: port: taken"),
        (
            ['{"event": "memory"}', '{"event": "failed"}'],
            '{"event": "memory"}\n{"event": "failed"}',
        ),
    ],
)
def test_the_error_of_a_shard_is_its_own_and_of_this_start(
    tmp_path: Path, lines: list[str], shown: str
) -> None:
    log = tmp_path / "shard-0.log"
    log.write_text("psserver: of an earlier start\n")
    code = f"import sys; print({chr(10).join(lines)!r}, file=sys.stderr); sys.exit(2)"
    member = Member(0, [sys.executable, "-c", code], log)
    member.process.wait()
    assert member.failed
    assert member.error() == shown
    assert member.process.stdout is not None
    member.process.stdout.close()
