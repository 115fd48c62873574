"""A data directory that release 0.2.0 wrote starts, and loses and revives nothing.

golden/shard-0.2.0.tar.xz = shard/ with the data directory as after a kill, and contents.json, the
result of ``stores.contents`` in that release.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from stores import Home, change, contents, copy_of, push

from storage.block import FORMATS, ROWS

GOLDEN = Path(__file__).parent / "golden" / "shard-0.2.0.tar.xz"


def plain(value: Any) -> Any:
    """Return a value as JSON has it."""
    return json.loads(json.dumps(value))


@pytest.fixture
def old(tmp_path: Path) -> tuple[Path, Any]:
    with tarfile.open(GOLDEN) as archive:
        archive.extractall(tmp_path, filter="data")
    wanted = tmp_path / "shard" / "contents.json"
    value = json.loads(wanted.read_text())
    wanted.unlink()
    return tmp_path / "shard", value


@pytest.mark.parametrize("memory", [256 << 20, 1 << 20])
def test_an_older_data_directory_starts(old: tuple[Path, Any], memory: int) -> None:
    directory, before = old
    with Home(directory, memory_bytes=memory) as home:
        assert plain(contents(home.shard)) == before
        assert sum(len(table.table) for table in home.shard._tables) > 100
        assert home.shard._tables.get("wide").table.store.blocks.rows > 0, "read in place"
        assert home.shard._tables.get("sketch").table.store.dirty > 40, "small blocks cannot stay"
        for _ in range(2):
            home.reopen()  # before the first flush of this release
            assert plain(contents(home.shard)) == before
        home.flush()
        assert home.base.state is not None
        assert home.base.state.distinct
        assert plain(contents(home.shard)) == before
        home.reopen()
        assert plain(contents(home.shard)) == before


def test_rows_of_an_older_release_are_moved_and_deleted_like_others(
    old: tuple[Path, Any], tmp_path: Path
) -> None:
    directory, _ = old
    with Home(directory) as home:
        for at in range(6):
            keys = home.shard.dump()["sketch"].keys.tolist()
            home.shard.exchange([push(keys[at::3], 2.0, table="sketch")], [])
            home.shard.delete(change(keys[at : at + 5], table="sketch"))
            home.shard.delete(change(keys[at : at + 9], table="wide"))
            home.shard._tables.get("sketch").table.store.demote(1)
            home.flush()
            home.written()
            before = contents(home.shard)
            with Home(copy_of(directory, tmp_path / f"copy{at}")) as other:
                assert contents(other.shard) == before
        formats = {block.format for _, block in home.base.blocks() if block.kind == ROWS}
        assert formats >= {FORMATS[ROWS]}
