"""Run tests while nearly all rows are on disk: `pytest --cold`.

Without this, the tables of most tests fit into memory, and no row ever leaves it. With it, the
classes of the server are changed so that after most changes of a shard its dirty rows are flushed,
and all rows in memory are given up. Shards without a data directory get blocks in a temporary one.
Real servers do the same every few milliseconds, on their flusher's thread.

What happens after which change is drawn at random, with the name of the test as the seed.
"""

from __future__ import annotations

import functools
import gc
import os
import random
import shutil
import tempfile
import weakref
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from psserver.basewriter import BaseWriter, Stored
from psserver.engine import Inline
from psserver.flusher import Flusher
from psserver.shard import Shard
from psserver.sweeps import Sweeps
from storage.base import Base
from storage.blockfile import BlockFile
from storage.emptybase import DATA
from storage.errors import DiskFull, LogFailed
from storage.history import History, draw_epoch

CHANGES = ("create_table", "alter_table", "exchange", "delete", "write_rows", "barrier")
OFTEN = 150  # after so many flushes of a shard, only some of its changes are followed by one
RARELY = 0.1  # share of these changes
SERVERS = Path(__file__).parent / "coldservers"
HERE = ("psserver", "cluster", "psclient", "contract")  # directories of tests
SHARDS = {"make_shard", "Home", "Homes", "Node", "Cluster", "Make", "shard_of_all_kinds", "serve"}
CLUSTERS = {"cluster1", "cluster2", "cluster3", "start_cluster"}

# Tests that cannot run while their rows leave memory, or that have nothing to do with rows:
# file -> beginning of the name -> why.
WARM = {
    "cluster/test_checkpointer_faults.py": {
        "test_a_cut_that_does_not": "it is about the files of a trainer",
        "test_a_damaged_cut": "it is about the files of a trainer",
        "test_an_error": "it is about the files of a trainer",
        "test_old_cuts": "it is about the files of a trainer",
        "test_what_an_interrupted": "it is about the files of a trainer",
        "test_wrong_calls": "it is about the files of a trainer",
    },
    "cluster/test_comeback_example.py": {"test_": "test_checkpointer.py does the same"},
    "cluster/test_restore.py": {
        "test_a_server_without_a_place": "no row is read",
        "test_of_two_restores": "it is about which of two requests wins",
    },
    "cluster/test_servers.py": {
        "test_a_server_ends": "no row is read",
        "test_rows_of_a_cold_server": "its server is cold anyway",
    },
    "cluster/test_up.py": {
        "test_ready_means": "no row is read",
        "test_a_signal_stops": "no row is read",
        "test_shards_end_with_a_parent": "no row is read",
        "test_a_port_in_use": "no row is read",
        "test_an_unknown_flag": "no row is read",
        "test_a_data_directory": "no row is read",
        "test_flags_stand": "no row is read",
        "test_a_metrics_port": "no row is read",
        "test_a_setting_that_is": "no row is read",
    },
    "cluster/test_warm_start.py": {
        "test_an_empty_parent": "no row is read",
    },
    "contract/test_stubs_refusals.py": {"test_": "what is refused touches no row"},
    "psclient/test_fork.py": {"test_": "it is about the processes of clients"},
    "psclient/test_one_name.py": {"test_": "it is about addresses"},
    "psclient/test_public.py": {"test_": "it is about the objects of a client"},
    "psclient/test_refusals.py": {"test_": "what is refused touches no row"},
    "psclient/test_status.py": {"test_": "no row is read"},
    "psclient/test_timeouts.py": {"test_": "its servers have no rows"},
    "psclient/tools/test_bench_runs.py": {"test_": "it is about the load generator"},
    "psclient/tools/test_ctl_doctor.py": {"test_": "no row is read"},
    "psclient/tools/test_ctl_output.py": {"test_": "it is about what is printed"},
    "psclient/tools/test_ctl_tables.py": {
        "test_status_of": "no row is read",
        "test_status_notices": "no row is read",
        "test_status_shows": "no row is read",
        "test_a_command_ends": "no row is read",
        "test_bad_": "what is refused touches no row",
        "test_rules_are_shown": "no row is read",
        "test_every_help_text": "no row is read",
        "test_the_help": "no row is read",
        "test_wrong_usage": "no row is read",
        "test_malformed": "no row is read",
    },
    "psserver/test_cold_flushes.py": {
        "test_a_slot_that_gets_an_older_row": "it chooses when a flush happens",
        "test_a_log_with_more_rows": "it counts the bytes that a replay leaves in the log",
        "test_a_kill_during_the_replay": "it counts the flushes of a replay",
        "test_a_restart_reads_keys": "it counts the blocks that a restart reads",
    },
    "psserver/test_coldruns.py": {
        "test_pushes_wait_for_room": "it counts dirty rows",
        "test_requests_of_a_stream": "it chooses which rows are on disk",
        "test_hot_pulls_are_quick": "it needs rows in memory",
        "test_a_damaged_row_fails": "it chooses which block is damaged",
        "test_what_happens_between": "it counts moves between the tiers",
    },
    "psserver/test_flusher.py": {
        "test_a_shard_without_a_flush": "there is always a flush",
        "test_what_came_after_a_flush": "there is always a flush after it",
        "test_a_block_with_few_current_rows": "it lists the blocks of each flush",
    },
    "psserver/test_flusher_log.py": {
        "test_flushes_that_write": "it counts flushes",
        "test_a_sketch_is_written_again": "it counts the blocks of each flush",
        "test_a_flush_that_finds_the_disk_full": "it chooses when a flush happens",
        "test_damage_that_a_flush_meets": "it chooses when a flush happens",
        "test_a_sync_of_the_base_that_fails": "it chooses when a flush happens",
        "test_the_log_is_kept_for_a_time": "it chooses when a flush happens",
        "test_a_lost_base_is_damage": "it chooses when a flush happens",
    },
    "psserver/test_flusher_pins.py": {
        "test_a_flush_is_asked_for": "memory is never full of changed rows",
        "test_a_server_that_stops": "nothing is left to flush",
    },
    "psserver/test_disk_space.py": {
        "test_a_disk_too_full_to_move_rows": "it chooses when a flush happens",
    },
    "psserver/test_scrubber.py": {
        "test_rows_that_are_in_memory_too": "no row is in memory too",
    },
    "psserver/test_room.py": {
        "test_training_over_ten_times": "it counts rows and bytes in memory",
        "test_a_push_larger_than_memory": "it measures memory",
        "test_two_tables_share": "it measures memory",
        "test_without_a_data_directory": "every shard gets blocks",
        "test_a_flush_makes_rows_clean": "it counts clean rows in memory",
        "test_a_scan_goes_on": "it measures memory",
        "test_the_curve_of_an_analysis": "it chooses which rows are in memory",
        "test_a_key_of_a_pull_or_push": "it chooses which rows are in memory",
    },
    "psserver/test_preloader.py": {
        "test_all_rows_return": "rows that return to memory leave it again",
        "test_rows_that_change_meanwhile": "rows that return to memory leave it again",
    },
    "psserver/test_slices.py": {
        "test_no_slice_does_more": "it counts the slots that each call reads",
    },
    "psserver/test_tombstones.py": {
        "test_many_small_deletes": "it counts the blocks of one flush",
    },
    "psserver/test_feed.py": {
        "test_only_what_is_on_disk": "it delays the sync that a flush needs",
    },
    "psserver/test_feed_costs.py": {
        "test_calls_that_wait_for_the_disk": "it delays the sync that a flush needs",
    },
    "psserver/test_shard.py": {
        "test_memory_may_run_out": "it fills the memory with rows",
    },
    "psserver/test_checkpoints.py": {
        "test_no_piece_of_work": "it measures memory",
    },
    "psserver/test_sweeper.py": {
        "test_rows_that_stay_for_want_of_room": "rows on disk are read before they leave",
        "test_saving_and_exporting": "it counts messages",
        "test_a_sweep_on_demand_leaves_pushes": "it counts slices",
    },
    "psserver/test_rowscan.py": {
        "test_who_was_cut_off": "it counts messages",
        "test_the_engine_copies": "rows on disk are not copied on the engine",
    },
}

_state = {"active": False, "seed": 0}


class _NoLog:
    """What a flush needs of a log, for a shard that has none."""

    lineage, history = bytes(16), History((draw_epoch(),))

    def sync(self, version: int) -> None:
        """Everything is durable."""


class _Squeezer:
    """Flushes one shard, and gives up its rows in memory.

    turn  None: only this object flushes the shard
    """

    def __init__(self, shard: Shard, writer: BaseWriter) -> None:
        self._shard, self._writer = weakref.proxy(shard), writer
        self.turn: Any = None
        self._rng = random.Random(_state["seed"])
        self._busy, self._count = False, 0

    def squeeze(self) -> None:
        """Do one of the things that may happen between two changes."""
        if self._busy or (self._count > OFTEN and self._rng.random() > RARELY):
            return
        self._busy = True
        try:
            chance = self._rng.random()
            if chance > 0.2:
                self._count += 1
                self._flush()
            if not 0.15 < chance < 0.3:
                self._demote()
        finally:
            self._busy = False

    def _flush(self) -> None:
        if self.turn is not None and not self.turn.acquire(blocking=False):
            return  # the test is flushing
        try:
            self._writer.write(self._shard.capture(), Inline())
        except (DiskFull, LogFailed):
            if self._writer.base.failure is None:
                self._writer.base.discard()
        finally:
            if self.turn is not None:
                self.turn.release()

    def _demote(self) -> None:
        for entry in self._shard._tables:
            store = entry.table.store
            if store.blocks is not None:
                store.demote(store.host.slots.rows)


def _squeezer_of(shard: Shard) -> _Squeezer | None:
    return vars(shard).get("_squeezer")


def _before_first_table(shard: Shard) -> None:
    """Give a shard without a data directory blocks in a temporary directory."""
    if shard._tables.file is not None or _squeezer_of(shard) is not None:
        return
    directory = Path(tempfile.mkdtemp(prefix="ps-cold-", dir=_fast()))
    base = Base(directory).open()
    file = BlockFile(directory / DATA).open()
    shard.keep_in(file)
    weakref.finalize(shard, _remove, base, file, directory)
    BaseWriter(shard, base, _NoLog(), Stored())  # type: ignore[arg-type]


def _remove(base: Base, file: BlockFile, directory: Path) -> None:
    base.close()
    file.close()
    shutil.rmtree(directory, ignore_errors=True)


def _fast() -> str | None:
    return "/dev/shm" if os.path.isdir("/dev/shm") else None  # noqa: S108


def _squeezing(method: Callable[..., Any], shard_of: Callable[[Any], Shard | None]) -> Any:
    """Return a method that also squeezes the shard, unless nothing was changed."""

    @functools.wraps(method)
    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        if method.__name__ == "create_table":
            _before_first_table(self)
        shard = shard_of(self)
        version = -1 if shard is None or shard is not self else shard.version
        result = method(self, *args, **kwargs)
        squeezer = None if shard is None else _squeezer_of(shard)
        if shard is not None and squeezer is not None and shard.version != version:
            squeezer.squeeze()
        return result

    return changed


def _patch() -> None:
    """Change the classes of the server."""
    for name in CHANGES:
        setattr(Shard, name, _squeezing(getattr(Shard, name), lambda shard: shard))
    owners: weakref.WeakKeyDictionary[Sweeps, weakref.ref[Shard]] = weakref.WeakKeyDictionary()
    make_shard, make_writer, make_flusher = Shard.__init__, BaseWriter.__init__, Flusher.__init__

    def new_shard(self: Shard, *args: Any, **kwargs: Any) -> None:
        make_shard(self, *args, **kwargs)
        owners[self.sweeps] = weakref.ref(self)

    def new_writer(self: BaseWriter, shard: Shard, *args: Any, **kwargs: Any) -> None:
        make_writer(self, shard, *args, **kwargs)
        vars(shard)["_squeezer"] = _Squeezer(shard, self)

    def new_flusher(self: Flusher, shard: Shard, *args: Any, **kwargs: Any) -> None:
        make_flusher(self, shard, *args, **kwargs)
        if (squeezer := _squeezer_of(shard)) is not None:
            squeezer.turn = self._turn

    Shard.__init__ = new_shard  # type: ignore[method-assign]
    BaseWriter.__init__ = new_writer  # type: ignore[method-assign]
    Flusher.__init__ = new_flusher  # type: ignore[method-assign]

    def shard_of(sweeps: Sweeps) -> Shard | None:
        return owners[sweeps]() if sweeps in owners else None

    for name in ("begin", "take_slice"):
        setattr(Sweeps, name, _squeezing(getattr(Sweeps, name), shard_of))


# ---- pytest


def activate() -> None:
    """Squeeze all shards of this process, and of the servers that it starts."""
    _state["active"] = True
    _patch()


def environment() -> dict[str, str]:
    """Return the environment of a server's process."""
    if not _state["active"]:
        return dict(os.environ)
    paths = [str(SERVERS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def begin(test: str) -> None:
    """Draw what happens in a test from its name. Frees the shards of earlier tests."""
    _state["seed"] = zlib.crc32(test.encode())
    if _state["active"]:
        gc.collect()  # each has a large part of the address space


def choose(items: list[pytest.Item]) -> tuple[list[Any], list[Any]]:
    """Return (the tests that use shards, all others). Those in WARM are others."""
    chosen: list[pytest.Item] = []
    others: list[pytest.Item] = []
    tests = Path(__file__).parent
    for item in items:
        path = item.path.relative_to(tests).as_posix()
        module = set(vars(item.getparent(pytest.Module).obj))  # type: ignore[union-attr]
        uses = SHARDS & module or CLUSTERS & set(getattr(item, "fixturenames", ()))
        excluded = any(item.name.startswith(each) for each in WARM.get(path, ()))
        here = path.split("/")[0] in HERE
        (chosen if uses and here and not excluded else others).append(item)
    return chosen, others
