"""Flushes that fail in part: nothing that is on disk already is lost."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from stores import Home, contents, push, schema

from psserver.basewriter import BaseWriter
from storage.block import pack_counters
from storage.errors import OutOfMemory
from storage.tiers.lmdb import Blocks

KINDS = (np.uint64, np.uint64, np.uint32)  # of the arrays of a block of counters


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    with Home(tmp_path / "shard") as home:
        home.shard.create_table(schema())
        yield home


def test_a_failed_flush_is_discarded_only_while_no_other_flush_runs(home: Home) -> None:
    discarding = threading.Thread(target=home.flusher._discard)
    with home.flusher.paused():
        number = home.base.add(pack_counters(1, *(np.array([5], kind) for kind in KINDS)))
        discarding.start()
        discarding.join(0.3)
        assert discarding.is_alive()
        assert home.base._added == [number]  # its transaction is still open
        home.base.discard()
    discarding.join(10)
    assert not discarding.is_alive()


def test_rows_of_a_block_without_memory_stay_on_disk(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, tries = Blocks.add, iter([True])

    def add(self: Blocks, *args: object, **options: object) -> int:
        if next(tries, False):
            raise OutOfMemory(1, 1, 1)
        return real(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Blocks, "add", add)
    monkeypatch.setattr(BaseWriter, "crowded", lambda *_: True)
    home.shard.exchange([push([1, 2, 3], 2.0)], [])
    home.flush()
    state = home.base.state
    assert state is not None
    assert state.version == home.shard.version
    before = contents(home.shard)
    home.reopen()
    assert contents(home.shard) == before
    assert home.recovered.rows == 3
