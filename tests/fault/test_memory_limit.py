"""A server whose memory is limited, filled beyond it: it refuses or uses the disk, and lives.

For more memory: python tests/fault/crowding.py --gib 8
"""

from __future__ import annotations

from pathlib import Path

import pytest
from cgroups import limited
from crowding import GIB, ROW, crowd
from servers import free_ports, serve_in

SECONDS = 100.0  # maximum time to fill the server


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("disk", [True, False], ids=["with a disk", "memory alone"])
def test_a_crowded_server_is_not_killed(tmp_path: Path, disk: bool) -> None:
    with limited(GIB) as group:
        found = crowd(group, GIB, tmp_path if disk else None, beyond=1.5, seconds=SECONDS)
    print(found)
    assert (found.kills, found.status, found.errors) == (0, None, [])
    assert 0 < found.anonymous < GIB
    assert found.tools > 0
    if disk:
        assert found.rows * ROW > 1.5 * found.table_bytes  # else it was not filled
        assert found.checkpoints >= 2
        assert found.changes > 0
        assert found.refused == 0
    else:
        assert found.rows * ROW > 0.8 * found.table_bytes
        assert found.refused > 0


@pytest.mark.slow
def test_a_limit_that_leaves_nothing_for_tables_is_refused() -> None:
    with limited(300 << 20) as group:
        process = serve_in(group.enter, "--port", str(free_ports(1)), "--metrics-port", "0")
        out, err = process.communicate(timeout=300)
        assert (process.returncode, out, group.kills) == (2, "", 0)
    assert "no memory is left for tables: the limit is 300 MiB (cgroup, " in err
