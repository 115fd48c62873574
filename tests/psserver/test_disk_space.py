"""Bytes on disk while rows change: at most 1.5 times the bytes of the live rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from stores import Home, push, schema

from storage.base import Base
from storage.basestate import BaseState
from storage.block import disk_bytes
from storage.errors import DiskFull, NoRoom

DIM = 254
ROWS = 40_000
BATCH = 1000
LIVE = ROWS * disk_bytes(DIM)


def update(home: Home, keys: np.ndarray) -> None:
    """Push to rows; flush if there is no room for them in memory."""
    item = push(keys.tolist(), gradients=np.ones((len(keys), DIM), np.float32))
    try:
        home.shard.exchange([item], [])
    except NoRoom:
        home.flush()
        home.shard.exchange([item], [])


def filled(directory: Path) -> Home:
    """A shard with 40,000 rows, of which an eighth fits into memory."""
    home = Home(directory, memory_bytes=ROWS // 8 * 1048 + (4 << 20), segment_bytes=1 << 22)
    home.open().shard.create_table(schema(dim=DIM))
    for at in range(0, ROWS, BATCH):
        update(home, np.arange(at, at + BATCH))
    home.flush()
    return home


@pytest.mark.slow
@pytest.mark.parametrize("snapshot", [False, True])
def test_rows_that_change_take_half_as_much_again_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, snapshot: bool
) -> None:
    home, rng, sizes = filled(tmp_path / "shard"), np.random.default_rng(1), []
    commit = Base.commit

    def measured(base: Base, state: BaseState) -> None:
        """Commit, and note the bytes before and after: they are largest before."""
        base._finish()
        sizes.append(base.bytes)
        commit(base, state)
        sizes.append(base.bytes)

    monkeypatch.setattr(Base, "commit", measured)
    blocks = home.shard._tables.get("t").table.store.blocks
    assert blocks is not None
    scan = blocks.scan()  # what a snapshot that is held open reads
    if snapshot:
        assert len(scan.find(0, 0, 1 << 40, 10)[0]) == 10
    for i in range(60):
        popular = rng.zipf(1.3, BATCH) % ROWS if i % 2 else rng.choice(ROWS, BATCH)
        update(home, np.unique(popular))
        if i % 7 == 6:
            home.flush()
    assert len(sizes) > 60
    assert max(sizes) <= 1.5 * LIVE
    before = home.shard.dump()["t"]
    del scan
    home.reopen()
    after = home.shard.dump()["t"]
    assert np.array_equal(before.keys, after.keys)
    assert np.array_equal(before.rows, after.rows)
    home.close()


def test_a_disk_too_full_to_move_rows_does_not_fail_the_flush(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = filled(tmp_path / "shard")
    for at in range(0, ROWS // 2, 2 * BATCH):
        update(home, np.arange(at, at + BATCH))
    commits, commit = 0, Base.commit

    def refuse(base: Base, state: BaseState) -> None:
        nonlocal commits
        commits += 1
        if commits > 1:
            raise DiskFull("x", 1)
        commit(base, state)

    with monkeypatch.context() as patch:
        patch.setattr(Base, "commit", refuse)
        home.flush()
    assert commits == 2
    assert home.flusher.failure == ""
    before = home.shard.dump()["t"].rows
    home.reopen()
    assert np.array_equal(home.shard.dump()["t"].rows, before)
    home.close()
