"""After a restart the rows of a table return to host memory, if all of them fit."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from stores import Direct, Home, push, schema

from psserver.preloader import Preloader
from storage.slots import VERSION

ROWS = 6000


def store_of(home: Home) -> Any:
    return home.shard._tables.get("t").table.store


def fill(home: Home) -> None:
    home.shard.create_table(schema())
    for version in range(6):
        keys = range(version * 1000, version * 1000 + 1000)
        home.shard.exchange([push(keys, float(version + 1))], [])
    home.flusher.flush()


def preload(home: Home) -> None:
    """Run the thread to its end."""
    preloader = Preloader(home.shard.preloads, Direct())
    preloader.open()
    preloader._thread.join(30)
    assert not preloader._thread.is_alive()
    preloader.close()


def test_all_rows_return_and_stay_clean(tmp_path: Path) -> None:
    with Home(tmp_path) as home:
        fill(home)
        before = home.shard.dump()["t"]
    with Home(tmp_path) as home:
        store = store_of(home)
        assert (store.host.rows, store.blocks.rows) == (0, ROWS)
        preload(home)
        assert (store.host.rows, store.blocks.rows, store.dirty) == (ROWS, 0, 0)
        after = home.shard.dump()["t"]
        assert after.rows.tobytes() == before.rows.tobytes()
        assert after.meta.tobytes() == before.meta.tobytes()
        home.shard.exchange([push(range(10), 1.0)], [])
        assert store.dirty == 10
        assert store.demote(ROWS) == ROWS - 10


def test_rows_that_do_not_fit_stay_on_disk(tmp_path: Path) -> None:
    with Home(tmp_path) as home:
        fill(home)
    with Home(tmp_path, memory_bytes=700 << 10) as home:
        preload(home)
        assert store_of(home).host.rows == 0
        assert home.shard.dump()["t"].meta[:, VERSION].min() > 0


def test_rows_that_change_meanwhile_keep_their_new_contents(tmp_path: Path) -> None:
    with Home(tmp_path) as home:
        fill(home)
    with Home(tmp_path) as home:
        begun = home.shard.preloads.begin(1)
        assert begun is not None
        scan, _ = begun
        places, _ = scan.find(0, 0, 1 << 47, ROWS)
        pages = home.shard.preloads.pages(1, places)
        assert pages is not None
        pages.warm()
        home.shard.exchange([push(range(100), 9.0)], [])
        before = home.shard.dump()["t"]
        assert home.shard.preloads.load(1, pages, places) == ROWS - 100
        after = home.shard.dump()["t"]
        assert after.rows.tobytes() == before.rows.tobytes()
        assert np.array_equal(after.meta, before.meta)


def test_a_dropped_table_ends_its_loading(tmp_path: Path) -> None:
    with Home(tmp_path) as home:
        fill(home)
    with Home(tmp_path) as home:
        begun = home.shard.preloads.begin(1)
        assert begun is not None
        places, _ = begun[0].find(0, 0, 1 << 47, ROWS)
        pages = home.shard.preloads.pages(1, places)
        assert pages is not None
        home.shard.drop_table("t")
        assert home.shard.preloads.pages(1, places) is None
        assert home.shard.preloads.load(1, pages, places) == 0
        assert home.shard.preloads.begin(1) is None


def test_a_stop_does_not_wait_for_the_whole_table(tmp_path: Path) -> None:
    with Home(tmp_path) as home:
        fill(home)
    with Home(tmp_path) as home:
        preloader = Preloader(home.shard.preloads, Direct())
        preloader._stop.set()
        preloader.open()
        began = time.monotonic()
        preloader.close()
        assert time.monotonic() - began < 10
        assert store_of(home).host.rows < ROWS
